"""Failing servers and full disks end in one sentence, and no incomplete file is kept."""

import base64
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cifarlab.data import fetch
from cifarlab.data.dataset import Dataset
from tests.conftest import REPO
from tests.support.archives import (
    ArchiveServer,
    ReplyHandler,
    assert_is_cifar10,
    checksum,
    cifar10,
    pets,
)

Get = Callable[..., Dataset]
Refused = Callable[..., str]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return cifar10(tmp_path / "cifar.tar.gz")


def test_http_status_of_a_failed_download_is_named(
    archive: Path, refused: Refused, archive_server: ArchiveServer
) -> None:
    archive_server.replies = [(404, b"", 0)]
    sentence = refused("cifar10", archive_server.url, sha256=checksum(archive))
    assert f"{archive_server.url}: the download failed, HTTPError 404" in sentence
    assert len(archive_server.asked) == fetch.ATTEMPTS


def test_incomplete_download_starts_again_from_the_beginning(
    archive: Path, get: Get, archive_server: ArchiveServer
) -> None:
    whole = archive.read_bytes()
    archive_server.replies = [
        (200, whole[: len(whole) // 2], len(whole)),
        (200, b"", len(whole)),
        (200, whole, len(whole)),
    ]
    assert_is_cifar10(get("cifar10", archive_server.url, sha256=checksum(archive)))
    assert len(archive_server.asked) == 3


class Redirecting(ReplyHandler):
    """Redirects every request."""

    location = "/again"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(302)
        self.send_header("Location", self.location)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.mark.parametrize(
    "location", ["/again", "http://[::1", "ftp://127.0.0.1/x", "http://user:hunter2@127.0.0.1:1/x"]
)
def test_endless_or_broken_redirection_is_refused(
    archive: Path,
    refused: Refused,
    archive_server: ArchiveServer,
    monkeypatch: pytest.MonkeyPatch,
    location: str,
) -> None:
    monkeypatch.setattr(Redirecting, "location", location)
    archive_server.RequestHandlerClass = Redirecting
    sentence = refused("cifar10", archive_server.url, sha256=checksum(archive))
    assert "127.0.0.1" in sentence
    assert "hunter2" not in sentence
    # The library requests follows 30 redirections.
    assert len(archive_server.asked) <= 31 * fetch.ATTEMPTS


class Stalling(ReplyHandler):
    """Sends the first `sent` bytes of the first reply, then nothing until `released` is set."""

    sent = 0
    released = threading.Event()

    def do_GET(self) -> None:
        _, body, announced = self.server.replies[0]
        if self.sent:
            self.send_response(200)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(body[: self.sent])
            self.wfile.flush()
        self.server.asked.append(self.path)
        self.released.wait(60)


@pytest.fixture(params=[0, 1, 200], ids=["nothing", "a byte", "a part"])
def stalling(
    request: pytest.FixtureRequest,
    archive: Path,
    archive_server: ArchiveServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[ArchiveServer]:
    monkeypatch.setattr(fetch, "TIMEOUT", 0.2)
    monkeypatch.setattr(Stalling, "sent", request.param)
    monkeypatch.setattr(Stalling, "released", threading.Event())
    archive_server.give(archive.read_bytes())
    archive_server.RequestHandlerClass = Stalling
    yield archive_server
    Stalling.released.set()


@pytest.mark.timeout(60)
def test_stalled_download_ends_in_one_sentence(
    tmp_path: Path, archive: Path, refused: Refused, stalling: ArchiveServer
) -> None:
    sentence = refused("cifar10", stalling.url, sha256=checksum(archive))
    assert f"{stalling.url}: the download failed" in sentence
    assert len(stalling.asked) == fetch.ATTEMPTS
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_next_source_is_used_after_a_stall(
    archive: Path, get: Get, stalling: ArchiveServer
) -> None:
    assert_is_cifar10(get("cifar10", stalling.url, archive, sha256=checksum(archive)))


def test_a_download_may_stall_for_half_a_minute() -> None:
    assert fetch.TIMEOUT == 30


@pytest.mark.parametrize("machine", ["127.0.0.1", "elsewhere"])
def test_login_in_netrc_is_sent_to_its_server_only(
    tmp_path: Path,
    archive: Path,
    get: Get,
    archive_server: ArchiveServer,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
) -> None:
    logins: list[str | None] = []

    class Asking(ReplyHandler):
        def do_GET(self) -> None:
            logins.append(self.headers["Authorization"])
            super().do_GET()

    archive_server.RequestHandlerClass = Asking
    archive_server.give(archive.read_bytes())
    (tmp_path / ".netrc").write_text(f"machine {machine} login me password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert_is_cifar10(get("cifar10", archive_server.url, sha256=checksum(archive)))
    assert logins == [
        f"Basic {base64.b64encode(b'me:hunter2').decode()}" if machine == "127.0.0.1" else None
    ]


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["cifar10", "folder"])
@pytest.mark.parametrize("sha256", [None, "0" * 64])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(os.mkfifo, id="pipe"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="device"),
        pytest.param(bind_socket, id="socket"),
    ],
)
def test_source_that_is_no_file_is_refused_at_once(
    tmp_path: Path,
    archive: Path,
    get: Get,
    refused: Refused,
    name: str,
    sha256: str | None,
    make: Callable[[Path], None],
) -> None:
    make(tmp_path / "a.fifo")
    assert "a.fifo: is neither a file nor a folder" in refused(name, "a.fifo", sha256=sha256)
    if name == "cifar10":
        assert_is_cifar10(get("cifar10", "a.fifo", archive, sha256=checksum(archive)))


@pytest.mark.timeout(60)
def test_link_to_itself_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop: does not exist" in refused("folder", "loop")


def checkout(folder: Path, **data: object) -> None:
    """Write what the stage download needs, with these parameters of the data."""
    for name in ("src", "stages"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    content = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
    content["data"] |= data
    (folder / "params.yaml").write_text(yaml.safe_dump(content), "utf-8")


def download_with_files_up_to(blocks: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the stage where no file can be larger than this many blocks of 512 bytes.

    The limit causes the same error as a full disk, with another number.
    """
    limit = f'ulimit -f {blocks}; exec "$@"'
    return subprocess.run(
        ["sh", "-c", limit, "sh", sys.executable, "-m", "stages.download"],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "DVC_ROOT"}
        | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_full_disk_during_a_download_leaves_no_incomplete_file(
    tmp_path: Path, archive_server: ArchiveServer
) -> None:
    (tmp_path / "archive").write_bytes(random.Random(0).randbytes(2**20))
    archive_server.give((tmp_path / "archive").read_bytes())
    checkout(tmp_path, sources=[archive_server.url], sha256=checksum(tmp_path / "archive"))
    done = download_with_files_up_to(100, tmp_path)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert str(tmp_path / ".cache") in done.stderr.splitlines()[-1]
    assert list((tmp_path / ".cache").iterdir()) == []


@pytest.mark.parametrize("name", ["folder", pytest.param("digits", marks=pytest.mark.slow)])
def test_full_disk_for_the_images_leaves_the_old_ones(tmp_path: Path, name: str) -> None:
    checkout(tmp_path, name=name, sources=["pets"], sha256=None)
    images = pets(tmp_path / "pets")
    for i in range(40):  # the first images fit, and the two for testing
        (tmp_path / f"pets/train/dog/d{i}.png").write_bytes(images["train/dog/0.png"])
    (tmp_path / "data").mkdir()
    old = {tmp_path / "data" / file: file for file in ("train_images.npy", "dataset.json")}
    for path, content in old.items():
        path.write_text(content)
    done = download_with_files_up_to(100, tmp_path)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert re.search("^error: File too large: data/train_images.npy;", done.stderr, re.M)
    assert {path: path.read_text() for path in (tmp_path / "data").iterdir()} == old
    assert download_with_files_up_to(100_000, tmp_path).returncode == 0
    assert len(Dataset.load(tmp_path / "data").classes) == (10 if name == "digits" else 2)

"""A server that fails, stalls, or turns in circles, and a full disk, end in a sentence; nothing half sent is kept."""

import base64
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cifarlab import sources
from cifarlab.datasets import Dataset
from tests.conftest import REPO
from tests.test_sources import Handler, Server, assert_is_cifar10, checksum, cifar10

Get = Callable[..., Dataset]
Refused = Callable[..., str]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return cifar10(tmp_path / "cifar.tar.gz")


def test_status_of_a_refusal_is_told(archive: Path, refused: Refused, server: Server) -> None:
    server.replies = [(404, b"", 0)]
    assert "127.0.0.1 does not answer as it should: HTTPError 404" in refused("cifar10", server.url, sha256=checksum(archive))
    assert len(server.asked) == sources.ATTEMPTS


def test_cut_transfer_starts_again_from_the_beginning(archive: Path, get: Get, server: Server) -> None:
    whole = archive.read_bytes()
    server.replies = [(200, whole[: len(whole) // 2], len(whole)), (200, b"", len(whole)), (200, whole, len(whole))]
    assert_is_cifar10(get("cifar10", server.url, sha256=checksum(archive)))
    assert len(server.asked) == 3


class Elsewhere(Handler):
    """Sends everybody on."""

    location = "/again"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(302)
        self.send_header("Location", self.location)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.mark.parametrize("location", ["/again", "http://[::1", "ftp://127.0.0.1/x", "http://user:hunter2@127.0.0.1:1/x"])
def test_redirection_to_nowhere_ends(
    archive: Path, refused: Refused, server: Server, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    monkeypatch.setattr(Elsewhere, "location", location)
    server.RequestHandlerClass = Elsewhere
    sentence = refused("cifar10", server.url, sha256=checksum(archive))
    assert "127.0.0.1" in sentence
    assert "hunter2" not in sentence
    assert len(server.asked) <= 31 * sources.ATTEMPTS  # 30 redirections are what requests follows


class Stalling(Handler):
    """Sends so many bytes of the first reply and then nothing, until it is let go."""

    sent = 0
    let_go = threading.Event()

    def do_GET(self) -> None:
        _, body, promised = self.server.replies[0]
        if self.sent:
            self.send_response(200)
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(body[: self.sent])
            self.wfile.flush()
        self.server.asked.append(self.path)
        self.let_go.wait(60)


@pytest.fixture(params=[0, 1, 200], ids=["nothing", "a byte", "a part"])
def stalling(request: pytest.FixtureRequest, archive: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(sources, "PATIENCE", 0.2)
    monkeypatch.setattr(Stalling, "sent", request.param)
    monkeypatch.setattr(Stalling, "let_go", threading.Event())
    server.give(archive.read_bytes())
    server.RequestHandlerClass = Stalling
    yield server
    Stalling.let_go.set()


def test_stall_ends_in_a_bounded_time(tmp_path: Path, archive: Path, refused: Refused, stalling: Server) -> None:
    started = time.perf_counter()
    assert "127.0.0.1 does not answer as it should" in refused("cifar10", stalling.url, sha256=checksum(archive))
    assert time.perf_counter() - started < 10
    assert len(stalling.asked) == sources.ATTEMPTS
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_next_source_is_asked_after_a_stall(archive: Path, get: Get, stalling: Server) -> None:
    assert_is_cifar10(get("cifar10", stalling.url, archive, sha256=checksum(archive)))


def test_people_wait_half_a_minute_for_a_byte() -> None:
    assert sources.PATIENCE == 30


@pytest.mark.parametrize("machine", ["127.0.0.1", "elsewhere"])
def test_login_of_netrc_goes_to_its_machine_only(
    tmp_path: Path, archive: Path, get: Get, server: Server, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    logins: list[str | None] = []

    class Asking(Handler):
        def do_GET(self) -> None:
            logins.append(self.headers["Authorization"])
            super().do_GET()

    server.RequestHandlerClass = Asking
    server.give(archive.read_bytes())
    (tmp_path / ".netrc").write_text(f"machine {machine} login me password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert_is_cifar10(get("cifar10", server.url, sha256=checksum(archive)))
    assert logins == [f"Basic {base64.b64encode(b'me:hunter2').decode()}" if machine == "127.0.0.1" else None]


@pytest.mark.parametrize("full", ["while it downloads", "while it writes the images"])
def test_full_disk_is_named_and_nothing_half_written_stays(tmp_path: Path, server: Server, full: str) -> None:
    """No file may grow beyond a few blocks: what a write to a full disk says, but for the number of the error."""
    for name in ("src", "stages"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "archive").write_bytes(random.Random(0).randbytes(2**20))
    server.give((tmp_path / "archive").read_bytes())
    content = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
    changes = {"sources": [server.url], "sha256": checksum(tmp_path / "archive")} if "downloads" in full else {"name": "digits"}
    content["data"] |= changes
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content), "utf-8")
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 100; exec "$@"', "sh", sys.executable, "-m", "stages.download"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "DVC_ROOT"} | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    folder = tmp_path / (".cache" if "downloads" in full else "data")
    assert str(folder if "downloads" in full else "data/") in done.stderr.splitlines()[-1]
    assert list(folder.iterdir()) == []

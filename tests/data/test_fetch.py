"""Paths, URLs and downloads give the archive with the right checksum, or a clear error."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cifarlab.data.dataset import Dataset
from tests.support.archives import ArchiveServer, assert_is_cifar10, checksum, cifar10, pets


@pytest.mark.parametrize("by", [str, Path.as_uri, "http"])
def test_cifar10_from_a_path_a_file_url_and_a_server(
    tmp_path: Path, get: Callable[..., Dataset], archive_server: ArchiveServer, by: Any
) -> None:
    path = cifar10(tmp_path / "a copy, größer.tar.gz")  # a file URL must escape this name
    archive_server.give(path.read_bytes())
    assert_is_cifar10(
        get("cifar10", archive_server.url if by == "http" else by(path), sha256=checksum(path))
    )


@pytest.mark.parametrize("remote", [False, True])
def test_wrong_checksum_is_refused_before_the_archive_is_opened(
    tmp_path: Path,
    refused: Callable[..., str],
    archive_server: ArchiveServer,
    monkeypatch: pytest.MonkeyPatch,
    remote: bool,
) -> None:
    path = cifar10(tmp_path / "cifar.tar.gz")
    archive_server.give(path.read_bytes())
    opened: list[Any] = []
    monkeypatch.setattr(tarfile.TarFile, "open", lambda *args: opened.append(args))
    assert "SHA-256" in refused("cifar10", archive_server.url if remote else path, sha256="0" * 64)
    assert opened == []


@pytest.mark.parametrize("first", ["missing", "other content", "http 404"])
def test_second_source_is_used_when_the_first_fails(
    tmp_path: Path, get: Callable[..., Dataset], archive_server: ArchiveServer, first: str
) -> None:
    path = cifar10(tmp_path / "cifar.tar.gz")
    archive_server.replies = [(404, b"", 0)]
    (tmp_path / "other content").write_text("other")
    assert_is_cifar10(
        get(
            "cifar10",
            archive_server.url if first == "http 404" else first,
            path,
            sha256=checksum(path),
        )
    )


def test_server_error_is_tried_again(
    tmp_path: Path, get: Callable[..., Dataset], archive_server: ArchiveServer
) -> None:
    path = cifar10(tmp_path / "cifar.tar.gz")
    archive_server.replies = [(500, b"", 0), (200, path.read_bytes(), path.stat().st_size)]
    assert_is_cifar10(get("cifar10", archive_server.url, sha256=checksum(path)))
    assert len(archive_server.asked) == 2


@pytest.mark.parametrize("promised", ["whole", "half", None])
def test_incomplete_download_is_never_used(
    tmp_path: Path,
    get: Callable[..., Dataset],
    refused: Callable[..., str],
    archive_server: ArchiveServer,
    promised: str | None,
) -> None:
    path = cifar10(tmp_path / "cifar.tar.gz")
    whole = path.read_bytes()
    half = whole[: len(whole) // 2]
    archive_server.replies = [
        (200, half, {"whole": len(whole), "half": len(half), None: None}[promised])
    ]
    refused("cifar10", archive_server.url, sha256=checksum(path))
    assert list((tmp_path / "cache").iterdir()) == []
    archive_server.give(whole)
    assert_is_cifar10(get("cifar10", archive_server.url, sha256=checksum(path)))


def test_verified_download_is_not_fetched_again(
    tmp_path: Path, get: Callable[..., Dataset], archive_server: ArchiveServer
) -> None:
    path = cifar10(tmp_path / "cifar.tar.gz")
    archive_server.give(path.read_bytes())
    for _ in range(2):
        assert_is_cifar10(get("cifar10", archive_server.url, sha256=checksum(path)))
    assert len(archive_server.asked) == 1
    (cached,) = (path for path in (tmp_path / "cache").iterdir() if path.is_file())
    cached.write_bytes(b"damaged since")
    assert_is_cifar10(get("cifar10", archive_server.url, sha256=checksum(path)))
    assert len(archive_server.asked) == 2


def test_without_network_one_sentence_says_what_to_do(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # No server listens on port 1.
    sentence = refused("cifar10", "http://127.0.0.1:1/x", sha256="0" * 64)
    assert "make demo" in sentence
    assert "data.sources" in sentence
    assert sentence.count("127.0.0.1") == 1  # once, though it was tried several times


@pytest.mark.parametrize("source", ["http://[::1/x", "~nobody-has-this-name/x"])
def test_source_that_cannot_be_parsed_is_named(refused: Callable[..., str], source: str) -> None:
    assert source in refused("cifar10", source, sha256="0" * 64)


def test_relative_path_starts_at_the_main_checkout(
    tmp_path: Path, get: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar10(tmp_path / "cifar.tar.gz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_is_cifar10(get("cifar10", "cifar.tar.gz"))


def test_checksum_of_a_directory_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    pets(tmp_path / "pets")
    assert "data.sha256: null" in refused("folder", tmp_path / "pets", sha256="0" * 64)

"""Small archives of images, and a server that sends them."""

import hashlib
import io
import pickle
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cifarlab.data.dataset import Dataset

# An archive of CIFAR-10 with six batches of two images each.
CLASSES = ["airplane", "automobile", "bird"]
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
LABELS = np.arange(12) % 3
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its strings."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012 - the name that pickle uses

    def save_string(self, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2(content: Any) -> bytes:
    """Pickle like the official archive: by Python 2, with the module names of numpy 1."""
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(content)
    return buffer.getvalue().replace(b"numpy._core", b"numpy.core")


def batch(i: int) -> dict[bytes, Any]:
    """Return the content of batch `i`: for each image all red values, then green, then blue."""
    images = PIXELS[2 * i : 2 * i + 2]
    planes = [images[..., channel].reshape(2, 1024) for channel in range(3)]
    return {b"data": np.hstack(planes), b"labels": LABELS[2 * i : 2 * i + 2].tolist()}


def cifar10(path: Path, dump: Callable[[Any], bytes] = python2, **changes: bytes) -> Path:
    """Write an archive in the official layout. `changes` replaces whole members."""
    members = {name: dump(batch(i)) for i, name in enumerate(BATCHES)}
    members["batches_meta"] = dump({b"label_names": [name.encode() for name in CLASSES]})
    members |= changes
    names = {name: f"cifar-10-batches-py/{name.replace('_meta', '.meta')}" for name in members}
    return tar(path, {names[name]: data for name, data in members.items()})


def assert_is_cifar10(data: Dataset) -> None:
    """Check that these are the images, labels and classes of the archive."""
    assert np.array_equal(data.images["train"], PIXELS[:10])
    assert np.array_equal(data.images["test"], PIXELS[10:])
    assert np.array_equal(data.labels["train"], LABELS[:10])
    assert np.array_equal(data.labels["test"], LABELS[10:])
    assert data.classes == CLASSES
    assert all(images.dtype == np.uint8 for images in data.images.values())


def tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else b""
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.linkname, entry.type = target, kind
    return entry


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, "png")
    return buffer.getvalue()


def raw_png(width: int, height: int, bits: int = 8, colour: int = 2, rows: int = -1) -> bytes:
    """Return a black PNG of any type of colour, made row by row. It holds `rows` of its rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]  # grey, RGB, palette, grey + alpha, RGBA
    row = bytes((width * samples * bits + 7) // 8 + 1)
    packer = zlib.compressobj(1)
    left, step = height if rows < 0 else rows, 1 + 2**20 // len(row)
    packed = [packer.compress(row * min(step, left - done)) for done in range(0, left, step)]
    size = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256)) if colour == 3 else b""
    pixels = chunk(b"IDAT", b"".join(packed) + packer.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + palette + pixels + chunk(b"IEND", b"")


def pax_record(key: str, value: str) -> bytes:
    """Return a line of a PAX header: its own length, a key and a value."""
    line = f" {key}={value}\n"
    length = len(line) + len(str(len(line)))
    length = len(line) + len(str(length))
    return f"{length}{line}".encode()


def with_headers(
    path: Path,
    images: dict[str, bytes],
    headers: Iterable[tuple[bytes, bytes]],
    chain: bool = False,
) -> Path:
    """Write a tar.gz whose images come after members that have PAX headers (kind, content).

    With `chain` all headers belong to the first image.
    """
    packer = zlib.compressobj(1, wbits=31)

    def block(entry: tarfile.TarInfo, content: bytes) -> bytes:
        entry.size = len(content)
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        return packer.compress(entry.tobuf(tarfile.GNU_FORMAT) + content + padding)

    with path.open("wb") as file:
        for kind, content in headers:
            header = tarfile.TarInfo("header")
            header.type = kind
            file.write(block(header, content))
            if not chain:
                file.write(block(tarfile.TarInfo("readme"), b""))
        for name, content in images.items():
            file.write(block(tarfile.TarInfo(name), content))
        file.write(packer.compress(bytes(2 * tarfile.BLOCKSIZE)) + packer.flush())
    return path


def pets(folder: Path, classes: tuple[str, ...] = ("cat", "dog")) -> dict[str, bytes]:
    """Write three training images and one test image per class, 6×6 pixels; return them by name."""
    rng = np.random.default_rng(1)
    files = ["train/{}/0.png", "train/{}/1.png", "train/{}/2.png", "test/{}/0.png"]
    names = [file.format(label) for label in classes for file in files]
    images = {name: png(rng.integers(0, 256, (6, 6, 3), np.uint8)) for name in names}
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return images


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class ArchiveServer(ThreadingHTTPServer):
    """Sends its replies (status, body, announced length) in turn, and repeats the last one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ReplyHandler)
        self.replies: list[tuple[int, bytes, int | None]] = []
        self.asked: list[str] = []
        """Paths of the requests so far."""
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-10-python.tar.gz"

    def give(self, body: bytes) -> None:
        """Answer every request with this body."""
        self.replies = [(200, body, len(body))]

    @contextmanager
    def running(self) -> Iterator["ArchiveServer"]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with self:
            yield self
            self.shutdown()
        thread.join()


class ReplyHandler(BaseHTTPRequestHandler):
    server: ArchiveServer

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        replies = self.server.replies
        status, body, announced = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(status)
        if announced is not None:
            self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass

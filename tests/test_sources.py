"""Every source gives the same images; nothing hostile, damaged or half sent gets in."""

import hashlib
import io
import os
import pickle
import random
import shutil
import struct
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cifarlab import UserError
from cifarlab.datasets import SPLITS, Dataset
from cifarlab.params import DataParams
from cifarlab.sources import prepare

CLASSES = ["airplane", "automobile", "bird"]
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)  # two images a batch, six batches
LABELS = np.arange(12) % 3
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its strings."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012 - pickle's own name

    def save_string(self, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2(content: Any) -> bytes:
    """Pickle as the official archive is pickled: by Python 2, with the module names of numpy 1."""
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(content)
    return buffer.getvalue().replace(b"numpy._core", b"numpy.core")


def batch(i: int) -> dict[bytes, Any]:
    images = PIXELS[2 * i : 2 * i + 2]
    planes = [images[..., channel].reshape(2, 1024) for channel in range(3)]  # all of red, then green, then blue
    return {b"data": np.hstack(planes), b"labels": LABELS[2 * i : 2 * i + 2].tolist()}


def cifar10(path: Path, dump: Callable[[Any], bytes] = python2, **changes: bytes) -> Path:
    """Write an archive in the official layout; `changes` replaces whole members."""
    members = {name: dump(batch(i)) for i, name in enumerate(BATCHES)}
    members["batches_meta"] = dump({b"label_names": [name.encode() for name in CLASSES]})
    members |= changes
    return tar(path, {f"cifar-10-batches-py/{name.replace('_meta', '.meta')}": data for name, data in members.items()})


def tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else b""
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, "png")
    return buffer.getvalue()


def pets(folder: Path, classes: tuple[str, ...] = ("cat", "dog")) -> dict[str, bytes]:
    """Write three training images and one test image of every class, 6×6 pixels; return them by name."""
    rng = np.random.default_rng(1)
    names = [f"{split}/{label}/{i}.png" for label in classes for split, i in (*(("train", i) for i in range(3)), ("test", 0))]
    images = {name: png(rng.integers(0, 256, (6, 6, 3), np.uint8)) for name in names}
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return images


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def get(tmp_path: Path) -> Callable[..., Dataset]:
    """Return a function: get("cifar10", source, …, sha256=…) prepares the images, downloads are cached in `cache`."""

    def get(name: str, *sources: Any, sha256: str | None = None, image_size: int = 32) -> Dataset:
        params = DataParams(name=name, sources=[str(s) for s in sources], sha256=sha256, image_size=image_size, validation=0.1)
        return prepare(params, tmp_path, tmp_path / "cache")

    return get


@pytest.fixture
def refused(get: Callable[..., Dataset]) -> Callable[..., str]:
    """Return a function like `get` that returns the one sentence of the refusal."""

    def refused(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(UserError) as caught:
            get(*args, **kwargs)
        sentence = str(caught.value)
        assert "\n" not in sentence
        return sentence

    return refused


class Server(ThreadingHTTPServer):
    """Gives its replies (status, body, promised length) in turn, the last one for ever."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, bytes, int | None]] = []
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-10-python.tar.gz"

    def give(self, body: bytes) -> None:
        self.replies = [(200, body, len(body))]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        replies = self.server.replies
        status, body, promised = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(status)
        if promised is not None:
            self.send_header("Content-Length", str(promised))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
    thread.join()


def assert_is_cifar10(data: Dataset) -> None:
    assert np.array_equal(data.images["train"], PIXELS[:10])
    assert np.array_equal(data.images["test"], PIXELS[10:])
    assert np.array_equal(data.labels["train"], LABELS[:10])
    assert np.array_equal(data.labels["test"], LABELS[10:])
    assert data.classes == CLASSES
    assert all(images.dtype == np.uint8 for images in data.images.values())


# The archive of CIFAR-10


@pytest.mark.parametrize(
    "dump",
    [
        pytest.param(python2, id="python 2"),
        pytest.param(lambda content: pickle.dumps(content, 2), id="python 3 for python 2"),
        pytest.param(pickle.dumps, id="python 3"),
    ],
)
def test_cifar10_has_the_right_pixels_labels_and_names(tmp_path: Path, get: Callable[..., Dataset], dump: Callable[[Any], bytes]) -> None:
    assert_is_cifar10(get("cifar10", cifar10(tmp_path / "cifar.tar.gz", dump)))


@pytest.mark.parametrize("by", [str, Path.as_uri, "http"])
def test_cifar10_from_a_path_a_file_url_and_a_server(tmp_path: Path, get: Callable[..., Dataset], server: Server, by: Any) -> None:
    path = cifar10(tmp_path / "a copy, größer.tar.gz")  # which a file URL has to escape
    server.give(path.read_bytes())
    assert_is_cifar10(get("cifar10", server.url if by == "http" else by(path), sha256=checksum(path)))


@pytest.mark.parametrize("remote", [False, True])
def test_wrong_checksum_is_refused_before_the_archive_is_opened(
    tmp_path: Path, refused: Callable[..., str], server: Server, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    path = cifar10(tmp_path / "cifar.tar.gz")
    server.give(path.read_bytes())
    opened: list[Any] = []
    monkeypatch.setattr(tarfile, "open", lambda *args: opened.append(args))
    assert "SHA-256" in refused("cifar10", server.url if remote else path, sha256="0" * 64)
    assert opened == []


class Call:
    """Pickles as a call, which a plain unpickler makes."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "argument"), [(os.system, "touch {}"), (eval, "__import__('pathlib').Path('{}').touch()")], ids=["os.system", "eval"]
)
@pytest.mark.parametrize("member", ["data_batch_3", "batches_meta"])
@pytest.mark.parametrize("wrap", [lambda call: call, lambda call: {**batch(2), b"data": call}], ids=["whole", "nested"])
def test_hostile_pickle_is_refused_and_runs_nothing(
    tmp_path: Path, refused: Callable[..., str], function: Callable[..., Any], argument: str, member: str, wrap: Callable[[Any], Any]
) -> None:
    trace = tmp_path / "trace"
    hostile = pickle.dumps(wrap(Call(function, argument.format(trace))))
    pickle.loads(hostile)
    assert trace.exists()  # the payload works where nothing holds it back
    trace.unlink()

    assert "it asks for" in refused("cifar10", cifar10(tmp_path / "cifar.tar.gz", **{member: hostile}))
    assert not trace.exists()


@pytest.mark.parametrize(
    "member",
    [
        b"",
        b"garbage",
        python2(batch(0))[:-100],
        b"\x80\x03\x8d" + b"\xff" * 8,  # promises more text than there is memory
        pickle.dumps([1, 2]),
        pickle.dumps({**batch(0), b"data": np.zeros((2, 3071), np.uint8)}),
        pickle.dumps({**batch(0), b"labels": [0]}),
        pickle.dumps({**batch(0), b"labels": [0, 3]}),
        pickle.dumps({**batch(0), b"labels": [0, -1]}),
        pickle.dumps({**batch(0), b"labels": [b"bird", b"bird"]}),
    ],
    ids=["empty", "garbage", "cut", "huge", "list", "small images", "a label short", "unknown label", "negative label", "text labels"],
)
def test_damaged_batch_is_refused(tmp_path: Path, refused: Callable[..., str], member: bytes) -> None:
    assert "cifar.tar.gz is not the archive" in refused("cifar10", cifar10(tmp_path / "cifar.tar.gz", data_batch_2=member))


@pytest.mark.parametrize("name", ["cifar10", "folder"])
@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda _: b"garbage", lambda _: b""], ids=["cut", "garbage", "empty"]
)
def test_damaged_archive_is_refused(tmp_path: Path, refused: Callable[..., str], name: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "some.tar.gz"
    if name == "cifar10":
        cifar10(path)
    else:
        tar(path, pets(tmp_path / "pets"))
    path.write_bytes(damage(path.read_bytes()))
    assert "some.tar.gz" in refused(name, path)


def test_archive_of_something_else_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    sentence = refused("cifar10", tar(tmp_path / "pets.tar.gz", pets(tmp_path / "pets")))
    assert "pets.tar.gz" in sentence
    assert "data.name: folder" in sentence


# Downloads


@pytest.mark.parametrize("first", ["missing", "other content", "http 404"])
def test_second_source_serves_when_the_first_fails(tmp_path: Path, get: Callable[..., Dataset], server: Server, first: str) -> None:
    path = cifar10(tmp_path / "cifar.tar.gz")
    server.replies = [(404, b"", 0)]
    (tmp_path / "other content").write_text("other")
    assert_is_cifar10(get("cifar10", server.url if first == "http 404" else first, path, sha256=checksum(path)))


def test_server_error_is_tried_again(tmp_path: Path, get: Callable[..., Dataset], server: Server) -> None:
    path = cifar10(tmp_path / "cifar.tar.gz")
    server.replies = [(500, b"", 0), (200, path.read_bytes(), path.stat().st_size)]
    assert_is_cifar10(get("cifar10", server.url, sha256=checksum(path)))
    assert len(server.asked) == 2


@pytest.mark.parametrize("promised", ["whole", "half", None])
def test_cut_transfer_is_never_taken_for_the_archive(
    tmp_path: Path, get: Callable[..., Dataset], refused: Callable[..., str], server: Server, promised: str | None
) -> None:
    path = cifar10(tmp_path / "cifar.tar.gz")
    whole = path.read_bytes()
    half = whole[: len(whole) // 2]
    server.replies = [(200, half, {"whole": len(whole), "half": len(half), None: None}[promised])]
    refused("cifar10", server.url, sha256=checksum(path))
    assert list((tmp_path / "cache").iterdir()) == []
    server.give(whole)
    assert_is_cifar10(get("cifar10", server.url, sha256=checksum(path)))


def test_verified_download_is_not_fetched_again(tmp_path: Path, get: Callable[..., Dataset], server: Server) -> None:
    path = cifar10(tmp_path / "cifar.tar.gz")
    server.give(path.read_bytes())
    for _ in range(2):
        assert_is_cifar10(get("cifar10", server.url, sha256=checksum(path)))
    assert len(server.asked) == 1
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(b"damaged since")
    assert_is_cifar10(get("cifar10", server.url, sha256=checksum(path)))
    assert len(server.asked) == 2


def test_without_network_one_sentence_shows_the_way(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sentence = refused("cifar10", "http://127.0.0.1:1/x", sha256="0" * 64)  # nobody listens on port 1
    assert "make demo" in sentence
    assert "data.sources" in sentence
    assert sentence.count("127.0.0.1") == 1  # said once, however often it was tried


@pytest.mark.parametrize("source", ["http://[::1/x", "~nobody-has-this-name/x"])
def test_source_that_cannot_be_parsed_is_named(refused: Callable[..., str], source: str) -> None:
    assert source in refused("cifar10", source, sha256="0" * 64)


def test_relative_path_starts_at_root(tmp_path: Path, get: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10(tmp_path / "cifar.tar.gz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_is_cifar10(get("cifar10", "cifar.tar.gz"))


# Folders


@pytest.mark.parametrize("kind", ["directory", "gztar", "xztar", "zip"])
def test_directory_and_archives_hold_the_same_dataset(tmp_path: Path, get: Callable[..., Dataset], kind: str) -> None:
    images = pets(tmp_path / "pets", ("cat", "Käfer", "猫"))
    source = tmp_path / "pets" if kind == "directory" else shutil.make_archive(str(tmp_path / "pets"), kind, tmp_path / "pets")
    data = get("folder", source, image_size=6)
    assert data.classes == ["Käfer", "cat", "猫"]
    assert data.name == "pets"
    for split in SPLITS:
        names = sorted(name for name in images if name.startswith(split))
        assert np.array_equal(data.images[split], [np.asarray(Image.open(io.BytesIO(images[name]))) for name in names])
        assert [data.classes[label] for label in data.labels[split]] == [name.split("/")[1] for name in names]


def test_order_of_members_does_not_change_the_digest_but_content_does(tmp_path: Path, get: Callable[..., Dataset]) -> None:
    images = pets(tmp_path / "pets")
    shuffled = random.Random(0).sample(list(images), len(images))
    moved = images | {"train/cat/0.png": images["train/dog/0.png"], "train/dog/0.png": images["train/cat/0.png"]}
    orders = {"sorted": images, "shuffled": {name: images[name] for name in shuffled}, "moved": moved}
    digests = {name: get("folder", tar(tmp_path / f"{name}.tar.gz", members), image_size=6).digest() for name, members in orders.items()}
    assert digests["sorted"] == digests["shuffled"] != digests["moved"]


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.random.default_rng(2).integers(0, 256, (8, 8, 3), np.uint8)
PALETTE = Image.fromarray(np.array([[0, 1]], np.uint8).repeat(8, 0).repeat(4, 1), "P")
PALETTE.putpalette([200, 100, 50, 0, 20, 250])
FLAG = np.zeros((8, 24, 3), np.uint8)  # red, green and blue upright stripes of 8×8
FLAG[:, :8, 0] = FLAG[:, 8:16, 1] = FLAG[:, 16:, 2] = 255


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(GREY, GREY[..., None].repeat(3, 2), id="grey"),
        pytest.param(GREY.astype(np.uint16) * 257, GREY[..., None].repeat(3, 2), id="grey of 16 bits"),
        pytest.param(PALETTE, np.array([[[200, 100, 50]] * 4 + [[0, 20, 250]] * 4] * 8), id="palette"),
        pytest.param(np.dstack([COLOUR, np.full((8, 8), 255, np.uint8)]), COLOUR, id="transparency"),
        pytest.param(np.full((1, 1, 3), (1, 2, 3), np.uint8), np.full((8, 8, 3), (1, 2, 3)), id="1×1"),
        pytest.param(FLAG, np.full((8, 8, 3), (0, 255, 0)), id="wide: the middle"),
        pytest.param(FLAG.transpose(1, 0, 2), np.full((8, 8, 3), (0, 255, 0)), id="high: the middle"),
        pytest.param(np.full((1500, 2000, 3), (9, 8, 7), np.uint8), np.full((8, 8, 3), (9, 8, 7)), id="big"),
    ],
)
def test_image_of_any_kind_becomes_a_square_of_rgb(tmp_path: Path, get: Callable[..., Dataset], image: Any, expected: Any) -> None:
    images = pets(tmp_path / "pets") | {"train/cat/0.png": png(image)}
    data = get("folder", tar(tmp_path / "pets.tar.gz", images), image_size=8)
    assert data.images["train"].dtype == np.uint8
    assert np.array_equal(data.images["train"][0], expected)


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.linkname, entry.type = target, kind
    return entry


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
@pytest.mark.parametrize("target", ["/etc/hostname", "../../../secret.png"])
def test_link_out_of_the_archive_is_refused(tmp_path: Path, refused: Callable[..., str], kind: bytes, target: str) -> None:
    images = pets(tmp_path / "pets")
    name = "train/cat/linked.png"
    sentence = refused("folder", tar(tmp_path / "pets.tar.gz", {**images, name: link(name, target, kind)}))
    assert "outside the archive" in sentence


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
@pytest.mark.parametrize("name", ["../train/cat/9.png", "/train/cat/9.png", "train/cat/../../../9.png", "..\\9.png"])
def test_member_out_of_the_archive_is_refused(tmp_path: Path, refused: Callable[..., str], kind: str, name: str) -> None:
    images = pets(tmp_path / "pets")
    images[name] = images["train/cat/0.png"]
    path = tmp_path / f"pets.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in images.items():
                archive.writestr(member, data)
    else:
        tar(path, images)
    sentence = refused("folder", path)
    assert "outside the archive" in sentence
    assert name in sentence


@pytest.mark.parametrize(
    ("members", "named"),
    [
        pytest.param(["train/cat/1.png", "train/dog/1.png", "test/cat/1.png"], "dog", id="a class without test images"),
        pytest.param(["train/cat/1.png", "test/dog/1.png", "test/cat/1.png"], "dog", id="a class without training images"),
        pytest.param(["train/cat/1.png", "test/cat/1.png"], "one class only, cat", id="one class"),
        pytest.param(["train/cat/readme.txt", "cat/1.png"], "train/<class>/", id="no images"),
        pytest.param(["train/cat/1.png", "train/dog/broken.png"], "train/dog/broken.png", id="broken image"),
    ],
)
def test_folder_that_cannot_be_learned_from_is_refused(tmp_path: Path, refused: Callable[..., str], members: list[str], named: str) -> None:
    whole = png(COLOUR)
    for name in members:
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole[:-40] if "broken" in name else whole)
    sentence = refused("folder", tmp_path / "pets")
    assert str(tmp_path / "pets") in sentence
    assert named in sentence


def test_directory_has_no_checksum(tmp_path: Path, refused: Callable[..., str]) -> None:
    pets(tmp_path / "pets")
    assert "data.sha256: null" in refused("folder", tmp_path / "pets", sha256="0" * 64)


# Digits


def test_digits_are_those_of_scikit_learn_each_in_one_split_only(get: Callable[..., Dataset]) -> None:
    data, again, bundle = get("digits"), get("digits"), load_digits()
    assert data.classes == list("0123456789")
    assert sum(map(len, data.labels.values())) == 1797
    rows: Counter[bytes] = Counter()
    for split in SPLITS:
        images, labels = data.images[split], data.labels[split]
        assert images.shape == (len(labels), 32, 32, 3)
        assert set(labels) == set(range(10))
        assert (images == images[:, ::4, ::4, :1].repeat(4, 1).repeat(4, 2)).all()  # 4×4 blocks of grey
        rows.update(image.tobytes() + bytes([label]) for image, label in zip(images[:, ::4, ::4, 0], labels, strict=True))
    # As a multiset: nothing is lost, nothing is in both splits.
    expected = np.rint(bundle.images * 255 / 16).astype(np.uint8)
    assert rows == Counter(image.tobytes() + bytes([label]) for image, label in zip(expected, bundle.target, strict=True))
    assert data.digest() == again.digest()

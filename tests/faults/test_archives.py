"""Damaged and hostile archives are refused with little memory; good ones pass all stages."""

import io
import json
import lzma
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cifarlab.data import readers
from cifarlab.data.dataset import Dataset
from cifarlab.data.layout import Problem
from cifarlab.errors import UserError
from cifarlab.params.sections import DataParams
from cifarlab.tracking.upload import accuracy_of
from tests.conftest import REPO
from tests.support.archives import (
    cifar10,
    link,
    pax_record,
    pets,
    png,
    raw_png,
    tar,
    with_headers,
    zipped,
)
from tests.support.draws import DRAWS, examples

MIB = 2**20
REST = {"folder": "images", "labels": None, "test": 0, "sha256": None}
REST |= {"validation": 0, "validation_seed": 0}


def read(path: Path) -> str:
    """Read an archive and return the digest of its pixels, labels and classes."""
    name = "cifar10" if path.name.startswith("cifar") else "folder"
    params = DataParams(name=name, sources=[str(path)], image_size=32, **REST)
    return readers.prepare(params, path.parent, path.parent, path.parent / "written", []).digest()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("archives")
    images = {
        name: data
        for name, data in pets(folder / "pets", ("cat", "Käfer")).items()
        if not name.endswith(("1.png", "2.png"))
    }
    names = sorted(images)
    with tarfile.open(folder / "pets.tar", "w") as archive:
        for name in names:
            archive.add(folder / "pets" / name, name)
    shutil.make_archive(str(folder / "pets"), "xztar", folder, "pets")
    return {
        "tar.gz": tar(folder / "pets.tar.gz", images),
        "tar.xz": folder / "pets.tar.xz",
        "tar": folder / "pets.tar",
        "zip": zipped(folder / "pets.zip", images),
        "stored zip": zipped(folder / "stored.zip", images, zipfile.ZIP_STORED),
        "cifar": cifar10(folder / "cifar.tar.gz"),
    }


def assert_same_or_refused(path: Path, damaged: bytes, digest: str) -> None:
    """Check that a damaged copy of an archive is refused or gives the same data."""
    (path.parent / "damaged").mkdir(exist_ok=True)
    copy = path.parent / "damaged" / path.name
    copy.write_bytes(damaged)
    try:
        found = read(copy)
    except UserError as error:
        assert path.name in str(error)  # noqa: PT017 - most draws are refused, some are not
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert found == digest


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "zip", "stored zip", "cifar"])
@examples(40, 300)
def test_changed_byte_is_refused_or_changes_nothing(
    archives: dict[str, Path], kind: str, examples: int
) -> None:
    whole, digest = archives[kind].read_bytes(), read(archives[kind])

    @given(st.integers(0, len(whole) - 1), st.integers(1, 255))
    @settings(DRAWS, max_examples=examples)
    def check(place: int, flip: int) -> None:
        damaged = bytearray(whole)
        damaged[place] ^= flip
        assert_same_or_refused(archives[kind], bytes(damaged), digest)

    check()


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar", "zip", "cifar"])
@examples(20, 100)
def test_incomplete_archive_is_refused_or_changes_nothing(
    archives: dict[str, Path], kind: str, examples: int
) -> None:
    whole, digest = archives[kind].read_bytes(), read(archives[kind])

    @given(
        st.integers(0, len(whole) - 1)
        | st.integers(0, len(whole) // 512 - 1).map(lambda block: block * 512)
    )
    @settings(DRAWS, max_examples=examples)
    def check(length: int) -> None:
        assert_same_or_refused(archives[kind], whole[:length], digest)

    check()


@pytest.mark.parametrize("protocol", [3, 4])
@examples(1000, 5000)
def test_changed_byte_in_a_pickle_damages_no_memory(protocol: int, examples: int) -> None:
    """Change bytes that no checksum protects, while Python's allocator checks the memory.

    With numpy's own __setstate__ the process would crash.
    """
    script = f"""
import io, pickle, random
import numpy as np
from cifarlab.data.archives import ArrayUnpickler
pixels = np.arange(6144, dtype=np.uint8).reshape(2, 3072)
whole = pickle.dumps({{b"data": pixels, b"labels": [0, 1]}}, {protocol})
draw = random.Random(0)
ends = [*range(260), *range(len(whole) - 80, len(whole))]
same = 0
for _ in range({examples}):
    damaged = bytearray(whole)
    damaged[draw.choice(ends)] ^= draw.randrange(1, 256)
    try:
        array = ArrayUnpickler(io.BytesIO(bytes(damaged)), encoding="bytes").load()[b"data"].array
    except Exception:
        continue
    same += array.dtype == np.uint8 and array.nbytes <= 6144
    assert np.zeros(3, np.uint8).sum() == 0
print(same)
"""
    env = os.environ | {"PYTHONMALLOC": "malloc_debug", "PYTHONPATH": str(REPO / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > examples / 10  # a changed pixel is not noticed here


def test_link_inside_the_archive_does_not_count_as_an_image(
    tmp_path: Path, get: Callable[..., Dataset]
) -> None:
    images = pets(tmp_path / "pets")
    links = {
        "train/cat/9.png": link("train/cat/9.png", "0.png", tarfile.SYMTYPE),
        "x": link("x", "x", tarfile.SYMTYPE),
    }
    images |= {f"train/cat/{i}.png": images["train/cat/0.png"] for i in range(20, 30)}
    plain, linked = (
        get("folder", tar(tmp_path / f"{n}.tar.gz", members))
        for n, members in enumerate([images, {**images, **links}])
    )
    assert linked.digest() == plain.digest()


@pytest.mark.parametrize(
    "name", ["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"]
)
def test_link_for_a_batch_is_refused(
    tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    assert "is not the archive" in refused(
        "cifar10", tar(tmp_path / "cifar.tar.gz", {name: link(name, name, tarfile.SYMTYPE)})
    )


def test_empty_folder_is_not_a_class_and_a_class_needs_training_images(
    tmp_path: Path, get: Callable[..., Dataset], refused: Callable[..., str]
) -> None:
    images = pets(tmp_path / "pets")
    (tmp_path / "pets/train/bird").mkdir()
    assert get("folder", tmp_path / "pets").classes == ["cat", "dog"]
    (tmp_path / "pets/test/bird").mkdir()
    (tmp_path / "pets/test/bird/0.png").write_bytes(images["test/cat/0.png"])
    assert "bird" in refused("folder", tmp_path / "pets")


@pytest.mark.parametrize(
    "content",
    [b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", png(np.zeros((9, 9, 3), np.uint8))[:45]],
)
def test_file_that_is_not_an_image_is_named(
    tmp_path: Path, refused: Callable[..., str], content: bytes
) -> None:
    images = pets(tmp_path / "pets") | {"train/cat/0.png": content}
    assert "train/cat/0.png is not a readable image" in refused(
        "folder", zipped(tmp_path / "pets.zip", images)
    )


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_compression_without_a_memory_limit_is_refused(
    tmp_path: Path, refused: Callable[..., str], method: int
) -> None:
    assert "deflate" in refused(
        "folder", zipped(tmp_path / "pets.zip", pets(tmp_path / "pets"), method)
    )


def test_more_images_than_allowed_are_refused(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pets(tmp_path / "pets")
    monkeypatch.setattr(readers, "MAX_NAMES", 7 * 600)  # there are eight
    assert "of names; use fewer images" in refused("folder", tmp_path / "pets")


# What is no plain file, and names


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link to itself", "link to a pipe"])
def test_what_is_no_file_in_a_folder_is_named(
    tmp_path: Path, refused: Callable[..., str], kind: str
) -> None:
    pets(tmp_path / "pets")
    path = tmp_path / "pets/train/cat/9.png"
    with socket.socket(socket.AF_UNIX) as listening:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "link to a pipe":
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to(tmp_path / "pipe")
        elif kind == "socket":
            listening.bind(os.path.relpath(path))
        else:
            path.symlink_to("/dev/zero" if kind == "device" else path)
        sentence = refused("folder", tmp_path / "pets")
    why = "link that leads out of the folder" if kind in ("device", "link to a pipe") else "no file"
    assert f"train/cat/9.png is not a readable image ({why})" in sentence


@pytest.mark.timeout(60)
def test_links_to_files_inside_the_folder_are_followed(
    tmp_path: Path, read: Callable[..., tuple[Dataset, list[Problem]]]
) -> None:
    folder = tmp_path / "pets"
    pets(folder)
    before, _ = read("folder", folder)
    (folder / "images").mkdir()
    (folder / "train/cat/0.png").rename(folder / "images/0.png")
    (folder / "train/cat/0.png").symlink_to("../../images/0.png")
    (folder / "train/dog/again").symlink_to(folder)  # it would never end
    (tmp_path / "else/bird").mkdir(parents=True)
    (folder / "train/bird").symlink_to(tmp_path / "else/bird")
    (folder / "train/fish").symlink_to(tmp_path / "nothing")
    data, problems = read("folder", folder)
    assert data.digest() == before.digest()
    found = {problem.file: problem.kind for problem in problems}
    assert found["train/bird"] == found["train/fish"] == "link that leads out of the folder"
    assert found["train/dog/again"] == "link to a folder"
    assert {kind for file, kind in found.items() if file.startswith("images")} == {
        "outside of test/, train/"
    }


def test_links_to_images_elsewhere_are_not_read(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    pets(tmp_path / "pets")
    (tmp_path / "pets/train/cat/0.png").rename(tmp_path / "cat.png")
    (tmp_path / "pets/train/cat/0.png").symlink_to(tmp_path / "cat.png")
    assert "1 of 8 images cannot be read; train/cat/0.png is" in refused(
        "folder", tmp_path / "pets"
    )


def in_class(images: dict[str, bytes], label: str) -> dict[str, bytes]:
    """Return the images with another name for the class dog."""
    return {name.replace("/dog/", f"/{label}/"): data for name, data in images.items()}


@pytest.mark.parametrize("kind", ["folder", "tar.gz"])
@pytest.mark.parametrize(
    ("label", "shown"),
    [
        pytest.param(os.fsdecode(b"caf\xe9"), "caf\\xe9", id="latin 1"),
        pytest.param("می\u200cخواهم 🐈\u200d⬛", "می\u200cخواهم 🐈\u200d⬛", id="joiners"),
        pytest.param("x" * 255, "x" * 255, id="long"),
    ],
)
def test_any_name_of_a_class_becomes_readable(
    tmp_path: Path, get: Callable[..., Dataset], kind: str, label: str, shown: str
) -> None:
    images = in_class(pets(tmp_path / "pets"), label)
    if kind == "folder":
        for split in ("train", "test"):
            (tmp_path / f"pets/{split}/dog").rename(tmp_path / "pets" / split / label)
        data = get("folder", tmp_path / "pets")
    else:
        data = get("folder", tar(tmp_path / "pets.tar.gz", images))
    assert set(data.classes) == {"cat", shown}
    assert data.images["train"].shape[0] == 6


def test_classes_that_look_equal_are_refused_and_others_are_not(
    tmp_path: Path, get: Callable[..., Dataset], refused: Callable[..., str]
) -> None:
    images = pets(tmp_path / "pets")
    both = in_class(images, "Cat") | in_class(images, "ﬁsh") | in_class(images, "fish")
    assert get("folder", tar(tmp_path / "a.tar.gz", both)).classes == ["Cat", "cat", "fish", "ﬁsh"]
    for label in (os.fsdecode(b"caf\xe9"), "caf\\xe9"):
        shutil.copytree(tmp_path / "pets/train/dog", tmp_path / "pets/train" / label)
    sentence = refused("folder", tmp_path / "pets")
    assert "look equal; rename one" in sentence
    assert sentence.isprintable()
    for number, twin in enumerate(("cat ", "cat\u200b")):
        images = in_class(pets(tmp_path / "more"), twin) | in_class(pets(tmp_path / "more"), "cat")
        assert "look equal" in refused("folder", tar(tmp_path / f"twins{number}.tar.gz", images))


@pytest.mark.parametrize("label", ["two\nlines", "\x1b[1m", "a\u2028b", "a\x85", "\u202etac"])
def test_characters_that_cannot_be_seen_are_refused_in_a_class(
    tmp_path: Path, refused: Callable[..., str], label: str
) -> None:
    images = in_class(pets(tmp_path / "pets"), label)
    sentence = refused("folder", tar(tmp_path / "pets.tar.gz", images))
    assert "which cannot be seen; rename it" in sentence
    assert sentence.isprintable()


def test_names_of_classes_are_compared_in_nfc(tmp_path: Path, get: Callable[..., Dataset]) -> None:
    """A zip file made on macOS may have other bytes for the same name."""
    images = pets(tmp_path / "pets")
    train = {name: data for name, data in images.items() if name.startswith("train")}
    both = in_class(images, "Ka\u0308fer") | in_class(train, "K\xe4fer")
    mixed = {name: data for name, data in both.items() if "train/Ka\u0308fer" not in name}
    data = get("folder", tar(tmp_path / "mixed.tar.gz", mixed))
    assert data.classes == ["K\xe4fer", "cat"]
    assert (
        data.digest()
        == get("folder", tar(tmp_path / "a.tar.gz", in_class(images, "K\xe4fer"))).digest()
    )


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_long_name_of_a_class_is_cut(
    tmp_path: Path, get: Callable[..., Dataset], kind: str
) -> None:
    images = in_class(pets(tmp_path / "pets"), "x" * 5000)
    path = tmp_path / f"pets.{kind}"
    data = get("folder", (zipped if kind == "zip" else tar)(path, images))
    assert data.classes == ["cat", "x" * 255]


def test_name_of_a_damaged_image_is_readable(tmp_path: Path, refused: Callable[..., str]) -> None:
    images = pets(tmp_path / "pets") | {os.fsdecode(b"train/cat/\xff\n.png"): b"no image"}
    sentence = refused("folder", tar(tmp_path / "pets.tar.gz", images))
    why = "it is no image that Pillow can open"
    assert f"train/cat/\\xff\\u000a.png is not a readable image ({why}); repair" in sentence


def test_zip_with_backslashes_or_names_that_are_not_utf8(
    tmp_path: Path, get: Callable[..., Dataset], refused: Callable[..., str]
) -> None:
    images = in_class(pets(tmp_path / "pets"), "Käfer")
    plain = get("folder", zipped(tmp_path / "plain.zip", images))
    from_windows = {name.replace("/", "\\"): data for name, data in images.items()}
    data = get("folder", zipped(tmp_path / "windows.zip", from_windows))
    assert data.digest() == plain.digest()
    content = (tmp_path / "plain.zip").read_bytes()
    # Linux and macOS write UTF-8 without the flag that says so.
    for head in (b"PK\3\4\x14\0", b"PK\1\2\x14\3\x14\0"):
        assert head + b"\0\x08" in content
    unsaid = content.replace(b"\x14\0\0\x08", b"\x14\0\0\0")
    (tmp_path / "linux.zip").write_bytes(unsaid)
    assert get("folder", tmp_path / "linux.zip").digest() == plain.digest()
    (tmp_path / "dos.zip").write_bytes(unsaid.replace("Käfer".encode(), b"K\xff\xfffer"))
    assert "K\xa0\xa0fer" in get("folder", tmp_path / "dos.zip").classes  # code page 437
    (tmp_path / "other.zip").write_bytes(content.replace("ä".encode(), b"\xff\xff"))
    assert "other.zip cannot be read: 'utf-8' codec" in refused("folder", tmp_path / "other.zip")


def test_encrypted_zip_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = zipped(tmp_path / "pets.zip", pets(tmp_path / "pets"))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\1\2") + 8
    content[place] |= 1  # a flag in the central directory
    path.write_bytes(content)
    assert "train/cat/0.png is encrypted; pack it without a password" in refused("folder", path)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda p: (p / "train/cat/0.png").unlink(), id="an image vanishes"),
        pytest.param(
            lambda p: shutil.copy(p / "train/cat/0.png", p / "train/cat/9.png"), id="a new image"
        ),
        pytest.param(lambda p: shutil.rmtree(p / "test"), id="a folder vanishes"),
        pytest.param(
            lambda p: (p / "train/cat/0.png").write_bytes(b""), id="an image becomes empty"
        ),
    ],
)
def test_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path,
    get: Callable[..., Dataset],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], Any],
) -> None:
    pets(tmp_path / "pets")
    get("folder", tmp_path / "pets")
    written = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    find = readers._list

    def then_change(*args: Any) -> Any:
        found = find(*args)
        change(tmp_path / "pets")
        return found

    monkeypatch.setattr(readers, "_list", then_change)
    sentence = refused("folder", tmp_path / "pets")
    assert "pets has changed while" in sentence or "train/cat/0.png is not a" in sentence
    after = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert after == written  # the images that were there before are whole


# Archives that unpack to gigabytes

MEASURE = """
import json, sys
from pathlib import Path
import numpy, PIL.Image, PIL.PngImagePlugin, tqdm
from cifarlab.data import readers
from cifarlab.errors import UserError
from cifarlab.params.sections import DataParams

def peak():  # getrusage would begin with the memory of the parent process
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) >> 10

before, path = peak(), Path(sys.argv[2])
params = DataParams(name=sys.argv[1], sources=[str(path)], sha256=None, image_size=int(sys.argv[3]),
    folder="images", labels=None, test=0, validation=0, validation_seed=0)
try:
    readers.prepare(params, path.parent, path.parent, path.parent / "written", [])
    print(json.loads((path.parent / "written/dataset.json").read_text())["digest"])
except UserError as error:
    print(error)
print(peak() - before)
"""


def memory_of(name: str, path: Path, image_size: int = 32) -> tuple[str, int]:
    """Read an archive in a new process; return its message and the growth of memory in MiB."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURE, name, str(path), str(image_size)],
        env=os.environ | {"PYTHONPATH": str(REPO / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    *notes, message, grown = done.stdout.splitlines()
    from_sources = "images/ holds no images, so data.sources is read"
    assert notes == ([from_sources] if name == "folder" else [])
    return message, int(grown)


def gzip_of_zeros(mib: int) -> bytes:
    """Return compressed zeros. Concatenated gzip files are a gzip file."""
    packer = zlib.compressobj(9, wbits=31)
    return (packer.compress(bytes(16 * MIB)) + packer.flush()) * (mib // 16)


def tar_bomb(path: Path, entry: tarfile.TarInfo, mib: int = 4096) -> Path:
    entry.size = mib * MIB
    packer = zlib.compressobj(wbits=31)
    path.write_bytes(
        packer.compress(entry.tobuf(tarfile.GNU_FORMAT)) + packer.flush() + gzip_of_zeros(mib)
    )
    return path


def header(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    return entry


def zip_bomb(path: Path, announced: int | None) -> Path:
    """Pack an image that unpacks to 512 MiB, with the size `announced` in its header, if given."""
    zipped(path, pets(path.parent / "pets"))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("train/cat/9.png", "w", force_zip64=False) as file:
            file.write(png(np.zeros((6, 6, 3), np.uint8)))
            for _ in range(32):
                file.write(bytes(16 * MIB))
        member = archive.infolist()[-1]
        member.file_size = announced or member.file_size
    return path


class Array:
    """Pickles as an array that takes half a gigabyte when it is filled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.ndarray, ((200_000, 3072), "u1")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        pytest.param(
            "folder",
            lambda p: tar(p / "a.tar.gz", pets(p / "pets") | {"train/cat/0.png": bytes(80 * MIB)}),
            "more than 64 MiB",
            id="image in tar",
        ),
        pytest.param(
            "folder",
            lambda p: tar_bomb(p / "a.tar.gz", header("x", tarfile.XHDTYPE)),
            "header",
            id="pax header",
        ),
        pytest.param(
            "folder",
            lambda p: tar_bomb(p / "a.tar.gz", header("x", tarfile.GNUTYPE_LONGNAME)),
            "header",
            id="long name",
        ),
        pytest.param(
            "folder", lambda p: zip_bomb(p / "a.zip", None), "more than 64 MiB", id="image in zip"
        ),
        pytest.param(
            "folder",
            lambda p: zip_bomb(p / "a.zip", 1000),
            "train/cat/9.png",
            id="image in zip with a wrong size",
        ),
        pytest.param(
            "cifar10",
            lambda p: tar_bomb(p / "cifar.tar.gz", header("cifar-10-batches-py/data_batch_1"), 512),
            "it unpacks to 536,870,912 bytes, more than 64 MiB",
            id="batch",
        ),
        pytest.param(
            "cifar10",
            lambda p: cifar10(
                p / "cifar.tar.gz",
                data_batch_1=pickle.dumps({b"data": Array(), b"labels": [0] * 1000}),
            ),
            "cifar.tar.gz is not the archive of CIFAR-10",
            id="array",
        ),
    ],
)
def test_bomb_is_refused_and_takes_little_memory(
    tmp_path: Path, name: str, make: Callable[[Path], Path], message: str
) -> None:
    sentence, grown = memory_of(name, make(tmp_path))
    assert message in sentence
    assert grown < 100


def records(count: int, key: str) -> Iterator[bytes]:
    """Yield the contents of PAX headers of 16 kB; {} in the key is their number."""
    return (pax_record(key.format(i), "x" * 16_000) for i in range(count))


# In older versions of Python, each of these records has all that follow in its key.
NESTED = b"2 " * 8000 + b"key=\n"
SPARSE = pax_record("GNU.sparse.major", "1") + pax_record("GNU.sparse.minor", "0")
X, GLOBAL = tarfile.XHDTYPE, tarfile.XGLTYPE


def sparse_map(path: Path) -> Path:
    """Write a member with a list of its parts that is 256 MiB long."""
    packer = zlib.compressobj(1, wbits=31)
    header = tarfile.TarInfo("header")
    header.type, header.size = X, len(SPARSE)
    start = header.tobuf(tarfile.GNU_FORMAT) + SPARSE.ljust(tarfile.BLOCKSIZE, b"\0")
    member = tarfile.TarInfo("x")
    member.size = 2**32
    start += member.tobuf(tarfile.GNU_FORMAT) + b"1000000000\n"
    packed = [packer.compress(start), *(packer.compress(b"1\n" * 2**19) for _ in range(256))]
    path.write_bytes(b"".join(packed) + packer.flush())
    return path


def large_dictionary(path: Path) -> Path:
    """Write a .tar.xz that can be unpacked only with 512 MiB of memory."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 * MIB}]
    with lzma.open(path, "wb", filters=filters) as file:
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    return path


def central_directory(path: Path, members: int) -> Path:
    """Write a zip archive that only lists members, with names of one letter."""
    entry = struct.pack("<4s4B4H3L5H2L", b"PK\1\2", 20, 3, 20, *[0] * 8, 1, *[0] * 6) + b"x"
    size = len(entry) * members
    count = members & 0xFFFF
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, 0, 0)
    path.write_bytes(entry * members + end)
    return path


@pytest.mark.parametrize(
    ("make", "message", "most"),
    [
        pytest.param(
            lambda p, i: with_headers(p, i, ((X, r) for r in records(1500, "comment"))),
            None,
            12,
            id="many pax headers",
        ),
        pytest.param(
            lambda p, i: with_headers(p, i, ((GLOBAL, r) for r in records(3000, "k{}"))),
            "too many global headers",
            20,
            id="global headers that add up",
        ),
        pytest.param(
            lambda p, i: with_headers(p, i, ((X, r) for r in records(3000, "k{}")), chain=True),
            "too many headers",
            20,
            id="headers of one member",
        ),
        pytest.param(
            lambda p, i: with_headers(p, i, [(GLOBAL, NESTED)] * 6, chain=True),
            "too many global headers",
            600,
            id="records that overlap",
        ),
        pytest.param(lambda p, _: sparse_map(p), "sparse", 20, id="a long sparse map"),
        pytest.param(
            lambda p, i: tar_bomb(p, header("x", X), 2), "header", 20, id="a header of 2 MiB"
        ),
        pytest.param(
            lambda p, _: large_dictionary(p), "no zip or tar", 50, id="xz with a large dictionary"
        ),
        pytest.param(
            lambda p, _: central_directory(p, 2_000_000),
            "larger than 32 MiB",
            20,
            id="a huge directory of a zip",
        ),
        pytest.param(
            lambda p, _: central_directory(p, 700_000),
            "cannot be read",
            500,
            id="the largest directory of a zip",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_headers_of_an_archive_are_limited_in_sum(
    tmp_path: Path, make: Callable[[Path, dict[str, bytes]], Path], message: str | None, most: int
) -> None:
    sentence, grown = memory_of("folder", make(tmp_path / "a", pets(tmp_path / "pets")))
    assert message in sentence if message else len(sentence) == 64
    assert grown < most


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        pytest.param(b"\x80\2" + b"]" * 20 * MIB + b".", "too many objects", id="many lists"),
        pytest.param(b"\x80\2c" + b"m" * 20 * MIB + b"\nx\n.", "it asks for mm", id="a long name"),
    ],
)
def test_pickle_takes_memory_within_limits(tmp_path: Path, batch: bytes, message: str) -> None:
    sentence, grown = memory_of("cifar10", cifar10(tmp_path / "c.tar.gz", data_batch_1=batch))
    assert message in sentence
    assert len(sentence) < 1000
    assert grown < 200


def test_headers_of_the_cifar_archive_are_not_kept(tmp_path: Path) -> None:
    path = with_headers(tmp_path / "c.tar.gz", {}, ((X, r) for r in records(1500, "comment")))
    sentence, grown = memory_of("cifar10", path)
    assert "it has no 'data_batch_1'" in sentence
    assert grown < 12


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["in the header", "in an extra header"])
def test_negative_size_of_a_member_is_no_endless_loop(
    tmp_path: Path, refused: Callable[..., str], where: str
) -> None:
    images = pets(tmp_path / "pets")
    path = tmp_path / "pets.tar"
    if where == "in an extra header":
        with_headers(path, images, [(X, pax_record("size", "-10000"))])
    else:
        entry = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
        entry[124:136] = struct.pack(">iq", -1, -1024)  # GNU's form for large and negative numbers
        entry[148:156] = b" " * 8
        entry[148:155] = b"%06o\0" % sum(entry)
        path.write_bytes(entry + bytes(10_240))
    assert "pets.tar cannot be read" in refused("folder", path)


def jpeg(mode: str, size: tuple[int, int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "jpeg", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param(
            lambda: raw_png(50_000, 50_000, rows=1),
            "train/cat/0.png is not a readable image (Image size",
            id="50,000×50,000",
        ),
        pytest.param(
            lambda: raw_png(13_000, 13_000, rows=1),
            "(Image size (169000000 pixels) exceeds limit of 50000000 pixels",
            id="13,000×13,000",
        ),
        pytest.param(
            lambda: raw_png(1, 89_000_000, rows=1),
            "(Image size (89000000 pixels) exceeds limit of 50000000 pixels",
            id="1×89,000,000",
        ),
        pytest.param(lambda: raw_png(4000, 4000), None, id="4,000×4,000"),
        pytest.param(lambda: jpeg("RGB", (7000, 7000)), None, id="jpeg"),
        *(
            pytest.param(image, None, id=name, marks=pytest.mark.slow)
            for name, image in {
                "high": lambda: raw_png(1, 49_999_999),
                "wide": lambda: raw_png(49_999_999, 1),
                "rgba": lambda: raw_png(7000, 7000, colour=6),
                "grey and alpha": lambda: raw_png(7000, 7000, colour=4),
                "palette": lambda: raw_png(7000, 7000, colour=3),
                "grey of 16 bits": lambda: raw_png(7000, 7000, 16, 0),
                "progressive": lambda: jpeg("CMYK", (7000, 7000), progressive=True, subsampling=0),
            }.items()
        ),
    ],
)
def test_too_large_image_is_refused_and_a_large_one_is_read(
    tmp_path: Path, image: Callable[[], bytes], message: str | None
) -> None:
    """Nothing is printed, also no warning of Pillow."""
    images = pets(tmp_path / "pets") | {"train/cat/0.png": image()}
    sentence, grown = memory_of("folder", zipped(tmp_path / "pets.zip", images))
    assert message in sentence if message else len(sentence) == 64
    assert grown < (100 if message else 800)


def test_many_large_images_take_no_more_memory_than_one(tmp_path: Path) -> None:
    large = raw_png(3000, 2000, colour=6)
    images = pets(tmp_path / "pets") | {f"train/cat/l{i}.png": large for i in range(24)}
    sentence, grown = memory_of("folder", zipped(tmp_path / "pets.zip", images))
    assert len(sentence) == 64
    assert grown < 600  # together they would be 1,100 MiB


def with_texts(count: int, after: bool) -> bytes:
    """Return a PNG with so many packed texts of 1 MB, before or after its pixels."""
    texts = PngInfo()
    for i in range(count):
        texts.add_text(str(i), "x" * 10**6, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6)).save(buffer, "png", pnginfo=texts)
    whole = buffer.getvalue()
    start, end = whole.index(b"IDAT") - 4, whole.index(b"IEND") - 4
    texts_and_header, pixels = whole[:start], whole[start:end]
    return texts_and_header[:33] + pixels + texts_and_header[33:] + whole[end:] if after else whole


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after the pixels"])
def test_texts_in_images_take_little_memory(tmp_path: Path, after: bool) -> None:
    images = pets(tmp_path / "pets")
    few = with_texts(4, after)
    many = images | {f"train/cat/t{i}.png": few for i in range(120)}
    sentence, grown = memory_of("folder", zipped(tmp_path / "few.zip", many))
    assert len(sentence) == 64
    assert grown < 200
    one = images | {"train/cat/0.png": with_texts(5, after)}
    sentence, grown = memory_of("folder", zipped(tmp_path / "many.zip", one))
    assert "train/cat/0.png is not a readable image (Too much memory" in sentence


@pytest.mark.parametrize(
    "kind", ["tar.gz", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("folder", "zip"))]
)
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, kind: str) -> None:
    """The array of 320 MiB is written to disk and never in memory as a whole."""
    images = pets(tmp_path / "pets")
    images |= {f"train/dog/d{i}.png": images["train/dog/0.png"] for i in range(427)}
    path = tmp_path / f"many.{kind}"
    if kind == "folder":
        for name, data in images.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    else:
        (zipped if kind == "zip" else tar)(path, images)
    sentence, grown = memory_of("folder", path, image_size=512)
    assert len(sentence) == 64
    assert grown < 220
    assert (tmp_path / "written/train_images.npy").stat().st_size > 320 * MIB


# Good images, through all stages

NAMES = ["Cat", "Käfer", "NA", os.fsdecode(b"caf\xe9"), "cat", "cat, dog; 50 %", "猫"]
CLASSES = ["Cat", "Käfer", "NA", "caf\\xe9", "cat", "cat, dog; 50 %", "猫"]


@pytest.mark.slow
def test_every_kind_of_image_and_class_name_goes_through_all_stages(tmp_path: Path) -> None:
    for name in ("src", "stages"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "dvc.yaml", tmp_path)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    rng = np.random.default_rng(0)
    members = {}
    for label in NAMES:
        for split, count in (("train", 6), ("test", 2)):
            for i in range(count):
                image = Image.fromarray(
                    rng.integers(0, 256, ((1, 1, 3), (40, 20, 3))[i % 2], np.uint8)
                )
                members[f"bilder/{split}/{label}/{i}.png"] = png(
                    image.convert(("RGB", "L", "RGBA", "P", "1", "LA")[i])
                )
    tar(tmp_path / "Bilder.tar.gz", members)
    content = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
    content["data"] |= {
        "name": "folder",
        "sources": ["Bilder.tar.gz"],
        "sha256": None,
        "image_size": 8,
        "validation": 0.2,
    }
    content["model"] |= {"layers": 2, "widths": [8, 8]}
    content["train"] |= {
        "epochs": 2,
        "batch_size": 4,
        "translate": 1,
        "threads": 1,
        "device": "cpu",
    }
    content["plot"] |= {"samples": 8, "mistakes": 4, "dpi": 40}
    content["tracking"] |= {"log_model": False, "system_metrics": False}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content), "utf-8")

    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("DVC", "MLFLOW", "PYTHONPATH"))
    } | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    # One process for all stages, because the imports of each would take seconds.
    script = "import runpy\nfor stage in ('download', 'train', 'evaluate', 'plot'):\n"
    script += "    runpy.run_module(f'stages.{stage}', run_name='__main__')\n"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "warning: MLflow" not in done.stderr

    data = Dataset.load(tmp_path / "data")
    assert data.classes == CLASSES
    assert data.images["train"].shape == (42, 8, 8, 3)
    of_classes = json.loads((tmp_path / "metrics/per_class.json").read_text("utf-8"))
    assert list(of_classes) == CLASSES
    for figure in (
        "confusion",
        "confusion_recall",
        "curves",
        "per_class",
        "training_images",
        "mistakes",
    ):
        with Image.open(tmp_path / f"plots/{figure}.png") as image:
            assert min(image.size) > 50
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cifarlab")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    found = {name for name in run.data.metrics if name.startswith("per_class/")}
    assert found == {accuracy_of(label) for label in CLASSES}
    assert len(found) == len(CLASSES)

"""Damaged and hostile archives are refused with little memory; good ones pass all stages."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cifarlab.data import readers
from cifarlab.data.dataset import Dataset
from cifarlab.errors import UserError
from cifarlab.params.sections import DataParams
from tests.conftest import REPO
from tests.support.archives import cifar10, link, pets, png, tar, zipped
from tests.support.draws import DRAWS, examples

MIB = 2**20


def read(path: Path) -> str:
    """Read an archive and return the digest of its pixels, labels and classes."""
    name = "cifar10" if path.name.startswith("cifar") else "folder"
    params = DataParams(name=name, sources=[str(path)], sha256=None, image_size=32, validation=0)
    return readers.prepare(params, path.parent, path.parent).digest()


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


@pytest.mark.parametrize("protocol", [2, 4])
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
    monkeypatch.setattr(readers, "MAX_PIXELS", 7 * 3 * 32**2)  # there are eight
    assert "data.image_size" in refused("folder", tmp_path / "pets")


# Archives that unpack to gigabytes

MEASURE = """
import sys
from pathlib import Path
import numpy, PIL.Image, PIL.PngImagePlugin, tqdm
from cifarlab.data import readers
from cifarlab.errors import UserError
from cifarlab.params.sections import DataParams

def peak():  # getrusage would begin with the memory of the parent process
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) >> 10

before, path = peak(), Path(sys.argv[2])
params = DataParams(name=sys.argv[1], sources=[str(path)], sha256=None, image_size=32, validation=0)
try:
    print(readers.prepare(params, path.parent, path.parent).digest())
except UserError as error:
    print(error)
print(peak() - before)
"""


def memory_of(name: str, path: Path) -> tuple[str, int]:
    """Read an archive in a new process; return its message and the growth of memory in MiB."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURE, name, str(path)],
        env=os.environ | {"PYTHONPATH": str(REPO / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    message, grown = done.stdout.splitlines()
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
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("train/cat/0.png", "w", force_zip64=False) as file:
            file.write(png(np.zeros((6, 6, 3), np.uint8)))
            for _ in range(32):
                file.write(bytes(16 * MIB))
        (member,) = archive.infolist()
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
            lambda p: tar_bomb(p / "a.tar.gz", header("train/cat/0.png")),
            "more than 256 MiB",
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
            "folder", lambda p: zip_bomb(p / "a.zip", None), "more than 256 MiB", id="image in zip"
        ),
        pytest.param(
            "folder",
            lambda p: zip_bomb(p / "a.zip", 1000),
            "train/cat/0.png",
            id="image in zip with a wrong size",
        ),
        pytest.param(
            "cifar10",
            lambda p: tar_bomb(p / "cifar.tar.gz", header("cifar-10-batches-py/data_batch_1"), 512),
            "data_batch_1: it unpacks to 536,870,912 bytes, more than 256 MiB",
            id="batch",
        ),
        pytest.param(
            "cifar10",
            lambda p: cifar10(
                p / "cifar.tar.gz",
                data_batch_1=pickle.dumps({b"data": Array(), b"labels": [0] * 200_000}),
            ),
            "data_batch_1 must have one label for each image",
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


def png_of(width: int, height: int) -> bytes:
    """Return a PNG that announces this size and holds less data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + start
        + chunk(b"IDAT", zlib.compress(bytes(MIB)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("image", "message", "most"),
    [
        pytest.param(
            lambda: png_of(50_000, 50_000),
            "train/cat/0.png is not a readable image",
            100,
            id="50,000×50,000",
        ),
        pytest.param(
            lambda: png(np.full((4000, 4000, 3), 7, np.uint8)), None, 300, id="4,000×4,000"
        ),
    ],
)
def test_huge_image_is_refused_and_a_large_one_is_read(
    tmp_path: Path, image: Callable[[], bytes], message: str | None, most: int
) -> None:
    images = pets(tmp_path / "pets") | {"train/cat/0.png": image()}
    sentence, grown = memory_of("folder", zipped(tmp_path / "pets.zip", images))
    assert message in sentence if message else len(sentence) == 64
    assert grown < most


# Good images, through all stages

CLASSES = ["Käfer", "cat, dog; 50 %", "猫"]


@pytest.mark.slow
def test_every_kind_of_image_and_class_name_goes_through_all_stages(tmp_path: Path) -> None:
    for name in ("src", "stages"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "dvc.yaml", tmp_path)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    rng = np.random.default_rng(0)
    members = {}
    for label in CLASSES:
        for split, count in (("train", 6), ("test", 2)):
            for i in range(count):
                image = Image.fromarray(
                    rng.integers(0, 256, ((1, 1, 3), (40, 20, 3))[i % 2], np.uint8)
                )
                members[f"bilder/{split}/{label}/{i}.png"] = png(
                    image.convert(("RGB", "L", "RGBA", "P", "1", "LA")[i])
                )
    zipped(tmp_path / "Bilder.zip", members)
    content = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
    content["data"] |= {
        "name": "folder",
        "sources": ["Bilder.zip"],
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
    assert data.images["train"].shape == (18, 8, 8, 3)
    metrics = json.loads((tmp_path / "metrics/evaluate.json").read_text("utf-8"))
    assert list(metrics["accuracy_per_class"]) == CLASSES
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
    assert {name for name in run.data.metrics if name.startswith("accuracy/")} == {
        "accuracy/Käfer",
        "accuracy/cat_ dog_ 50 _",
        "accuracy/猫",
    }

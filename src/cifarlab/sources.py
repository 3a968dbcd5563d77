"""Where images come from: a verified download, an archive, a folder, or a bundle."""

import hashlib
import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, Self
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from cifarlab import UserError, first_line
from cifarlab.datasets import SPLITS, Dataset, stratified_split
from cifarlab.params import DataParams, is_remote

ATTEMPTS = 3
PATIENCE = 30  # seconds without a byte
# The most that may be unfolded, in bytes: the header of a member, a member, and the pixels of all images together.
HEADER, MEMBER, PIXELS = 2**20, 2**28, 2**32


def prepare(params: DataParams, root: Path, cache: Path) -> Dataset:
    """Get the images that `params` name.

    Parameters
    ----------
    root : where relative paths in `data.sources` start
    cache : folder that keeps verified downloads

    Raises
    ------
    UserError
        Nothing could be fetched, a checksum differs, or the content is not images in the expected layout.
    """
    if params.name == "digits":
        return digits()
    source = fetch(params, root, cache)
    if params.name == "cifar10":
        return read_cifar10(source)
    return read_folder(source, params.image_size)


def fetch(params: DataParams, root: Path, cache: Path) -> Path:
    """Return the first of `data.sources` that can be had, its checksum verified."""
    failures: list[str] = []
    for _ in range(ATTEMPTS):
        for source in params.sources:
            try:
                return _fetch_one(source, params.sha256, root, cache)
            except UserError as error:
                failures.append(str(error))
            except (ValueError, RuntimeError, OSError) as error:  # a URL, a path or a home folder that cannot be
                failures.append(f"{source}: {first_line(error)}")
        if not any(map(is_remote, params.sources)):
            break  # a file that is not there now will not be there in a second
    reasons = "; ".join(dict.fromkeys(failures))
    raise UserError(
        f"no source of {params.name} could be used ({reasons}). `make demo` needs no download; "
        "or name a mirror or a local copy: dvc exp run -S 'data.sources=[/path/to/archive]'"
    )


def _fetch_one(source: str, sha256: str | None, root: Path, cache: Path) -> Path:
    url = urlsplit(source)
    if is_remote(source):
        assert sha256  # params.py refuses a download without
        return _download(source, sha256, cache)
    path = Path(unquote(url.path)) if url.scheme == "file" else root / Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source} does not exist (relative paths start at {root})")
    if sha256 is not None:
        if path.is_dir():
            raise UserError(f"{source} is a directory, which has no checksum: set data.sha256: null")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise UserError(f"{source} has SHA-256 {found}, data.sha256 says {sha256}")
    return path


def _download(url: str, sha256: str, cache: Path) -> Path:
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")
    # The checksum is in the name: another archive under the same URL never meets this one.
    name = f"{sha256[:16]}-{PurePosixPath(urlsplit(url).path).name[-100:]}"
    bar = not (cache / name).exists()
    host = urlsplit(url).hostname
    try:
        downloader = pooch.HTTPDownloader(progressbar=bar, timeout=PATIENCE)
        return Path(pooch.retrieve(url, f"sha256:{sha256}", name, cache, downloader=downloader))
    except requests.RequestException as error:
        status = "" if error.response is None else f" {error.response.status_code}"
        raise UserError(f"{host} does not answer as it should: {type(error).__name__}{status}") from error
    except ValueError as error:
        raise UserError(f"{host} sent something else than the archive, its SHA-256 is not {sha256}") from error
    except OSError as error:
        raise UserError(f"{cache} cannot be written: {error.strerror or first_line(error)}") from error


class Bytes:
    """Stands in for the arrays in a pickle, all of which must be uint8.

    numpy's own `__setstate__` trusts what it is given: a damaged or hostile state makes it write anywhere in memory.
    """

    def __init__(self, *_: Any) -> None:
        self.array: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, Kind) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array that is not of uint8")
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class Kind:
    """Stands in for the dtype uint8, the only one there is."""

    def __init__(self, name: Any, *_: Any) -> None:
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {name!r} instead of uint8")

    def __setstate__(self, _: Any) -> None:
        pass


class ArrayUnpickler(pickle._Unpickler):  # the one in Python: that in C takes as much memory as a pickle says it will need
    """Reads arrays of uint8 and plain containers; anything else in the pickle is refused, nothing is run."""

    ADMITTED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): Bytes,
        ("numpy._core.multiarray", "_reconstruct"): Bytes,
        ("numpy", "ndarray"): Bytes,
        ("numpy", "dtype"): Kind,
        # How Python 3 writes bytes for Python 2; codecs of the user's choice stay out.
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands in for one of the few constructors of an array."""
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_cifar10(archive: Path) -> Dataset:
    """Read the official `cifar-10-python.tar.gz` (Krizhevsky 2009): 50,000 and 10,000 images of 32×32."""
    images: dict[str, Any] = {"train": [], "test": []}
    labels: dict[str, Any] = {"train": [], "test": []}
    try:
        with _tar(archive) as tar:

            def batch(name: str) -> dict[bytes, Any]:
                try:
                    entry = tar.getmember(f"cifar-10-batches-py/{name}")
                    content: dict[bytes, Any] = ArrayUnpickler(_whole(tar.extractfile(entry), entry.size), encoding="bytes").load()
                except Exception as error:
                    raise ValueError(f"{name}: {first_line(error)}") from error
                return content

            for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
                for content in map(batch, names):
                    pixels, numbers = content[b"data"].array, content[b"labels"]
                    if pixels.shape != (len(numbers), 3072):
                        raise ValueError("a batch has not as many images of 3×32×32 bytes as labels")
                    images[split].append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                    labels[split].append(np.fromiter(numbers, np.int64))
            classes = [name.decode() for name in batch("batches.meta")[b"label_names"]]
        joined = {split: np.concatenate(labels[split]) for split in SPLITS}
        if not all(joined[split].min() >= 0 and joined[split].max() < len(classes) for split in SPLITS):
            raise ValueError("a label has no class")
    except Exception as error:  # damaged bytes can raise anything, MemoryError and SystemError included
        raise UserError(
            f"{archive} is not the archive of CIFAR-10 for Python: {first_line(error)}; "
            "set data.name: folder for images in train/<class>/ and test/<class>/"
        ) from error
    return Dataset({split: np.concatenate(images[split]) for split in SPLITS}, joined, classes, "cifar10")


def read_folder(source: Path, image_size: int) -> Dataset:
    """Read `train/<class>/*` and `test/<class>/*` from a directory, a tar or a zip archive; PNG or JPEG of any size."""
    from PIL import Image, ImageOps
    from tqdm import tqdm

    found: dict[tuple[str, str, str], npt.NDArray[np.uint8]] = {}
    try:
        for name, open_file in tqdm(_image_files(source), desc=f"reading {source.name}", unit=" images", disable=None):
            split, label, file = PurePosixPath(name).parts[-3:]
            if (split, label, file) in found:
                raise UserError(f"{source} holds two images called {split}/{label}/{file}; which one is meant?")
            if (len(found) + 1) * 3 * image_size**2 > PIXELS:
                raise UserError(f"{source} holds more than {PIXELS >> 30} GiB of images; lower data.image_size, or leave some out")
            try:
                with open_file() as stream, Image.open(stream, formats=("PNG", "JPEG")) as image:
                    upright = ImageOps.exif_transpose(image)
                    if upright.mode.startswith("I;16"):  # convert() would turn all but the darkest grey into white
                        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
                    # Centre crop to a square, so that nothing is stretched.
                    found[split, label, file] = np.asarray(ImageOps.fit(upright.convert("RGB"), (image_size, image_size)))
            except Exception as error:
                raise UserError(f"{source}: {name} is not a readable image ({first_line(error)}); mend or remove it") from error
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise UserError(f"{source} cannot be read as an archive: {first_line(error)}") from error

    names = {split: sorted({label for s, label, _ in found if s == split}) for split in SPLITS}
    if not names["train"] or names["train"] != names["test"]:
        raise UserError(
            f"{source} must hold PNG or JPEG images of the same classes in train/<class>/ and test/<class>/; "
            f"train has {names['train'] or 'none'}, test has {names['test'] or 'none'}"
        )
    if len(names["train"]) < 2:
        raise UserError(f"{source} holds one class only, {names['train'][0]}; there is nothing to tell apart")
    keys = {split: sorted(key for key in found if key[0] == split) for split in SPLITS}  # the archive's order is nobody's business
    images = {split: np.stack([found[key] for key in keys[split]]) for split in SPLITS}
    labels = {split: np.asarray([names["train"].index(key[1]) for key in keys[split]], np.int64) for split in SPLITS}
    return Dataset(images, labels, names["train"], source.name.split(".")[0])


def _image_files(source: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, function that opens it) of every image below train/ and test/."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if _is_image(path.relative_to(source).as_posix()):
                yield path.relative_to(source).as_posix(), lambda path=path: path.open("rb")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                _refuse_escape(source, member.filename)
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unfold without bound
                    raise ValueError(f"{member.filename} is packed in a way that is not read; pack it with deflate")
                with archive.open(member) as file:  # which compares its two headers
                    if _is_image(member.filename):
                        yield member.filename, lambda file=file, size=member.file_size: _whole(file, size)
    else:
        with _tar(source) as tar:
            for entry in tar:
                _refuse_escape(source, entry.name, *([entry.linkname] if entry.islnk() or entry.issym() else []))
                if entry.isfile() and _is_image(entry.name):
                    yield entry.name, lambda entry=entry: _whole(tar.extractfile(entry), entry.size)


class Member(tarfile.TarInfo):
    """A member whose header is not unfolded when it is a bomb: long names and the like are read whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a block of a header."""
        entry = super().frombuf(buf, encoding, errors)
        if entry.type == tarfile.GNUTYPE_SPARSE or (not entry.isreg() and entry.size > HEADER):
            raise ValueError(f"{entry.name} is a sparse file, or its header is larger than {HEADER >> 20} MiB")
        return entry


@contextmanager
def _tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar archive, and when all is read go on to its end, where gzip's checksum stands."""
    with tarfile.open(path, tarinfo=Member) as tar:
        yield tar
        assert tar.fileobj
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("it is cut short or damaged")
        while tar.fileobj.read(2**20):
            pass


def _whole(file: IO[bytes] | None, size: int) -> io.BytesIO:
    """Read a member to its end, where zip's checksum stands."""
    assert file
    if size > MEMBER:
        raise ValueError(f"it unfolds to {size:,} bytes, more than {MEMBER >> 20} MiB")
    return io.BytesIO(file.read(size + 1))


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        len(path.parts) >= 3
        and path.parts[-3] in SPLITS
        and path.suffix.lower() in (".png", ".jpg", ".jpeg")
        and not path.name.startswith(".")
    )


def _refuse_escape(source: Path, *names: str) -> None:
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{source} is refused: its member {name} points outside the archive")


def digits() -> Dataset:
    """scikit-learn's handwritten digits (UCI, 1,797 images of 8×8) as 32×32 RGB, a fifth of them for testing."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = (bundle.images * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    train, test = stratified_split(bundle.target, 0.2)
    indices = {"train": train, "test": test}
    return Dataset(
        {s: images[i] for s, i in indices.items()},
        {s: bundle.target[i].astype(np.int64) for s, i in indices.items()},
        [str(d) for d in range(10)],
        "digits",
    )

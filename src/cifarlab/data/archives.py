"""Read tar and zip archives, and pickled arrays, that may be damaged or hostile.

No more memory is used than the limits below allow, no code from a pickle runs, and nothing is
written to disk.
"""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from cifarlab.data.dataset import SPLITS
from cifarlab.errors import UserError

MAX_HEADER = 2**20
"""Bytes of the header of one member of a tar archive."""
MAX_MEMBER = 2**28
"""Bytes of one unpacked member."""


Images = Iterator[tuple[str, Callable[[], IO[bytes]]]]
"""Pairs of the name of an image and a function that opens it."""


class ArrayStandIn:
    """Takes the place of numpy arrays in a pickle. Only arrays of uint8 are accepted.

    numpy's own `__setstate__` does not check its input: a damaged or hostile pickle can make it
    write anywhere in memory.
    """

    def __init__(self, *_: Any) -> None:
        self.array: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, Uint8StandIn) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array that is not of uint8")
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class Uint8StandIn:
    """Takes the place of numpy dtypes in a pickle. Every dtype but uint8 is refused."""

    def __init__(self, name: Any, *_: Any) -> None:
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {name!r} instead of uint8")

    def __setstate__(self, _: Any) -> None:
        pass


# The unpickler written in Python: the one in C allocates as much memory as a pickle announces.
class ArrayUnpickler(pickle._Unpickler):
    """Reads plain containers and arrays of uint8 (as `ArrayStandIn`). Refuses everything else."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): ArrayStandIn,
        ("numpy._core.multiarray", "_reconstruct"): ArrayStandIn,
        ("numpy", "ndarray"): ArrayStandIn,
        ("numpy", "dtype"): Uint8StandIn,
        # Python 3 writes bytes for Python 2 like this. The pickle cannot choose another codec.
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a class or function that the pickle names."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


def image_files(source: Path) -> Images:
    """Yield the images in train/<class>/ and test/<class>/ of a folder, zip or tar archive.

    Open each image before you ask for the next one.

    Raises
    ------
    UserError
        A member points outside the archive.
    ValueError, OSError, zipfile.BadZipFile, tarfile.TarError, …
        The archive is damaged, or larger than the limits.
    """
    if source.is_dir():
        return _images_in_folder(source)
    return _images_in_zip(source) if zipfile.is_zipfile(source) else _images_in_tar(source)


def _images_in_folder(folder: Path) -> Images:
    for path in sorted(folder.rglob("*")):
        if _is_image(name := path.relative_to(folder).as_posix()):
            yield name, partial(path.open, "rb")  # type: ignore[misc]


def _images_in_zip(source: Path) -> Images:
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            _refuse_outside(source, member.filename)
            # The other compression methods of zip have no bound on the memory that they take.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename} is not packed with deflate; pack it so")
            with archive.open(member) as file:  # compares the two headers, also of other files
                if _is_image(member.filename):
                    yield member.filename, partial(read_bounded, file, member.file_size)


def _images_in_tar(source: Path) -> Images:
    with open_tar(source) as tar:
        for entry in tar:
            for name in (entry.name, entry.linkname):  # the latter is empty unless it is a link
                _refuse_outside(source, name)
            if entry.isfile() and _is_image(entry.name):
                yield entry.name, partial(read_bounded, tar.extractfile(entry), entry.size)


class BoundedTarInfo(tarfile.TarInfo):
    """A member of a tar archive whose header must be small.

    tarfile reads headers (long names and the like) whole, however large they are unpacked.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the member that a block of 512 bytes describes. ValueError: it is refused."""
        entry = super().frombuf(buf, encoding, errors)
        if entry.type == tarfile.GNUTYPE_SPARSE or (not entry.isreg() and entry.size > MAX_HEADER):
            raise ValueError(f"{entry.name} is a sparse file, or its header is too large")
        return entry


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar archive of any compression. When all is read, check its end.

    After the last member a tar archive has a block of zeros, and gzip has a checksum. ValueError
    or an error of the compression: the archive is cut short or damaged.
    """
    with tarfile.open(path, tarinfo=BoundedTarInfo) as tar:
        yield tar
        assert tar.fileobj
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("it is cut short or damaged")
        while tar.fileobj.read(2**20):
            pass


def read_bounded(file: IO[bytes] | None, size: int) -> io.BytesIO:
    """Return the content of an open member. ValueError: it is not a file, or too large."""
    if file is None or size > MAX_MEMBER:
        raise ValueError(f"it unpacks to {size:,} bytes, more than {MAX_MEMBER >> 20} MiB")
    return io.BytesIO(file.read(size + 1))  # one byte more: zip compares its checksum at the end


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    in_class = any(path.match(f"{split}/*/[!.]*") for split in SPLITS)
    return in_class and path.suffix.lower() in (".png", ".jpg", ".jpeg")


def _refuse_outside(source: Path, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{source} is refused: its member {name} points outside the archive")

"""Read folders, tar and zip archives, and pickled arrays, that may be damaged or hostile.

No more memory is used than the limits below allow, no code from a pickle runs, and nothing is
written to disk.
"""

import io
import itertools
import lzma
import os
import pickle
import pickletools
import re
import stat
import tarfile
import zipfile
from _compression import DecompressReader
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, Self

import numpy as np
import numpy.typing as npt

from cifarlab.errors import UserError, first_line, in_a_sentence

MAX_HEADER = 2**14
"""Bytes of one header of a tar archive, unpacked. tarfile needs up to its square / 4 of memory."""
MAX_HEADERS = 8
"""Headers of one member of a tar archive."""
MAX_DIRECTORY = 2**25
"""Bytes of the central directory of a zip archive. zipfile needs 15 times as much memory."""
MAX_DICTIONARY = 2**28
"""Bytes of memory for unpacking .tar.xz; `xz -9` needs a quarter of it."""
MAX_MEMBER = 2**26
"""Bytes of one file, unpacked."""
NO_FILE = "no file"
MAX_NAME = 255
"""Characters of a name that are shown; file systems have the same limit."""
MAX_OPCODES = 2**18
"""Instructions of a pickle. Each can make an object; a file of CIFAR-10 has up to 90,000."""


class Member(NamedTuple):
    """A file of a folder or an archive."""

    name: str
    """Its path from the top of the source, with / between the parts."""
    read: Callable[[], io.BytesIO]
    """Reads it. Damaged bytes can raise any exception. What has a problem may be empty."""
    problem: str = ""
    """Why it cannot be read, if that is known."""


class StandIn:
    """Takes the place of a numpy array or dtype in a pickle, and keeps what the pickle says of it.

    numpy's own `__setstate__` does not check its input: a damaged or hostile pickle can make it
    write anywhere in memory.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The array. Damaged ones, and those of another type than uint8, raise any exception."""
        _, shape, dtype, fortran, content = self.state
        if dtype.arguments[0] not in ("u1", b"u1") or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array that is not of uint8")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


# The unpickler written in Python: the one in C allocates as much memory as a pickle announces.
class ArrayUnpickler(pickle._Unpickler):
    """Reads plain containers, and arrays as `StandIn`. Refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a class or function that the pickle names."""
        # Versions of numpy differ in the names of its modules.
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return StandIn
        raise pickle.UnpicklingError(readable(f"it asks for {module}.{name}"))


def unpickle(file: io.BytesIO) -> Any:
    """Return what `ArrayUnpickler` reads from a file that Python 2 or 3 has written.

    Damaged and hostile files raise any exception.
    """
    if next(itertools.islice(pickletools.genops(file), MAX_OPCODES, None), None):
        raise pickle.UnpicklingError("it holds too many objects")
    file.seek(0)
    return ArrayUnpickler(file, encoding="bytes").load()


def members(source: Path) -> Iterator[Member]:
    """Yield the files of a folder, zip or tar archive.

    The order of a source that has not changed is the same each time. Read each file before you
    ask for the next one.

    Raises
    ------
    UserError
        The source is damaged or larger than the limits.
    """
    # Damaged bytes can raise any exception.
    with in_a_sentence(f"{source} cannot be read: %s; replace it", words=reason):
        if source.is_dir():
            yield from _files_in_folder(source)
        else:
            yield from (_files_in_zip if _is_zip(source) else files_in_tar)(source)


def _files_in_folder(folder: Path) -> Iterator[Member]:
    top = folder.resolve()
    for parent, folders, files in os.walk(folder, onerror=_unlisted):
        folders.sort()
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for path in [Path(parent, name) for name in [*links, *sorted(files)]]:
            problem = "" if path.is_file() else "link to a folder" if path.is_dir() else NO_FILE
            # resolve() refuses a link to itself.
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(top):
                problem = "link that leads out of the folder"
            yield Member(path.relative_to(folder).as_posix(), partial(read_file, path), problem)


def read_file(path: Path) -> io.BytesIO:
    """Return the content of a file. ValueError: it is no regular file, or too large."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device may have no end
        raise ValueError(NO_FILE)
    with path.open("rb") as file:
        return read_bounded(file, found.st_size)


def _is_zip(source: Path) -> bool:
    """Tell whether an archive is a zip. A tar whose last file is a zip ends like one."""
    with source.open("rb") as file:
        return file.read(262)[257:] != b"ustar" and zipfile.is_zipfile(file)


def _files_in_zip(source: Path) -> Iterator[Member]:
    with source.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[zipfile._ECD_SIZE] > MAX_DIRECTORY:  # type: ignore[attr-defined]
        raise ValueError(f"the list of its members is larger than {MAX_DIRECTORY >> 20} MiB")
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            name = _name_in_zip(member)
            # The other compression methods of zip have no bound on the memory that they take.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is not packed with deflate; pack it so")
            if member.flag_bits & 1:
                raise ValueError(f"{name} is encrypted; pack it without a password")
            with archive.open(member) as file:  # compares the two headers, also of other files
                if not name.endswith("/"):
                    yield Member(name, partial(read_bounded, file, member.file_size))


def _name_in_zip(member: zipfile.ZipInfo) -> str:
    """Return the name of a member. Linux and macOS write UTF-8, and often do not say so."""
    name = member.filename.replace("\\", "/")  # some programs for Windows write backslashes
    with suppress(UnicodeError):
        if not member.flag_bits & 0x800:
            return name.encode("cp437").decode("utf-8")
    return name


class BoundedTarInfo(tarfile.TarInfo):
    """A member of a tar archive whose headers must be few and small.

    tarfile reads headers (long names and the like) whole, however large they are unpacked.
    """

    def _proc_member(self, tar: "BoundedTarFile") -> tarfile.TarInfo:
        """Read what belongs to a header. tarfile calls this for each header of a member."""
        tar.headers += 1
        if tar.headers > MAX_HEADERS:
            raise ValueError("a member has too many headers")
        most = self.size if self.isreg() else MAX_HEADER
        if self.type == tarfile.GNUTYPE_SPARSE or not 0 <= self.size <= most:
            raise ValueError(f"{self.name} is a sparse file, or its header is too large")
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]

    def _refuse_sparse(self, *_: Any) -> NoReturn:
        raise ValueError(f"{self.name} is a sparse file")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class BoundedTarFile(tarfile.TarFile):
    """A tar archive whose members have few and small headers, of which it keeps none."""

    tarinfo = BoundedTarInfo
    headers = 0

    @classmethod
    def xzopen(cls, name: Any, mode: Any, fileobj: Any, **_: Any) -> Self:  # type: ignore[override]
        """Open an .xz file. The memory that it needs is its own choice; lzma.open has no limit."""
        decoder = partial(lzma.LZMADecompressor, memlimit=MAX_DICTIONARY)
        unpacked = DecompressReader(fileobj, decoder, trailing_error=lzma.LZMAError)
        try:
            return cls.taropen(name, mode, io.BufferedReader(unpacked))
        except (lzma.LZMAError, EOFError) as error:
            raise tarfile.ReadError("not an xz file") from error

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member, or None at the end. ValueError: it is refused."""
        self.headers = 0
        entry = super().next()
        self.members.clear()  # type: ignore[attr-defined]
        # The size in a header of its own is not known to `_proc_member`.
        if len(self.pax_headers) > 100 or (entry and entry.size < 0):
            raise ValueError("it has too many global headers, or a member of less than 0 bytes")
        return entry


def files_in_tar(source: Path) -> Iterator[Member]:
    """Yield the files of a tar archive of any compression.

    After the last member a tar archive has a block of zeros, and gzip has a checksum. ValueError
    or an error of the compression: the archive is cut short or damaged.
    """
    with source.open("rb") as file, BoundedTarFile.open(fileobj=file) as tar:
        while entry := tar.next():
            if entry.isfile():
                content = tar.fileobject(tar, entry)
                yield Member(entry.name, partial(read_bounded, content, entry.size))
            elif not entry.isdir():
                problem = "link in an archive" if entry.linkname else NO_FILE
                yield Member(entry.name, io.BytesIO, problem)
        assert tar.fileobj
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("it is cut short or damaged")
        while tar.fileobj.read(2**20):
            pass


def read_bounded(file: IO[bytes], size: int) -> io.BytesIO:
    """Return the content of an open file that should have this size. ValueError: it is too large.

    One byte more is read because zip compares its checksum at the end.
    """
    if size > MAX_MEMBER:
        raise ValueError(f"it unpacks to {size:,} bytes, more than {MAX_MEMBER >> 20} MiB")
    return io.BytesIO(file.read(size + 1))


def readable(name: str) -> str:
    r"""Return a name on one line: other bytes than UTF-8 as \xe9, control characters as \u000a.

    Two names can become the same. At most `MAX_NAME` characters are kept.
    """
    hidden = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    # Python reads the byte 0xe9 as the surrogate 0xdce9.
    return re.sub(hidden, lambda c: f"\\u{ord(c[0]):04x}".replace("\\udc", "\\x"), name[:MAX_NAME])


def reason(error: Exception) -> str:
    """Return why a file cannot be read, in words for its user."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":  # its text shows an object of Python
        return "it is no image that Pillow can open"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, tarfile.ReadError):
        return "it is no zip or tar archive, or it is damaged"
    return readable(first_line(error))


def _unlisted(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from error

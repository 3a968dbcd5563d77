"""Labelled images as arrays on disk, and the split into training and validation images."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cifarlab.errors import in_a_sentence
from cifarlab.files import atomic, read_json, write_json

SPLITS = ("train", "test")
Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """Labelled images of both splits.

    Attributes
    ----------
    images : dict of uint8 arrays (N, height, width, 3), RGB; the keys are "train" and "test"; N is
        0 as long as they are not read
    labels : dict of int64 arrays (N,), indices into `classes`
    classes : class names
    name : for titles; for a folder or an archive this is its file name
    validation : how many training images, the last ones, came with the data for validation
    """

    images: dict[str, Pixels]
    labels: dict[str, Labels]
    classes: list[str]
    name: str
    validation: int = 0

    def split(self, share: float, seed: int) -> tuple[Labels, Labels]:
        """Return the indices of the images to train on and of those held out for validation.

        A share of each class is drawn by `seed`, unless the data came with images for validation.
        """
        if self.validation:
            indices = np.arange(len(self.labels["train"]))
            return indices[: -self.validation], indices[-self.validation :]
        return stratified_split(self.labels["train"], share, seed)

    def digest(
        self, files: "Mapping[str, ImageFile] | None" = None, splits: Sequence[str] = SPLITS
    ) -> str:
        """Return the SHA-256 of pixels, labels and class names, in hexadecimal digits.

        The pixels are those of `files`, if given.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        if self.validation and "train" in splits:
            digest.update(str(self.validation).encode())
        for split in splits:
            array = np.ascontiguousarray(self.images[split])
            for block in files[split] if files else [array.data]:
                digest.update(block)
            digest.update(np.ascontiguousarray(self.labels[split]).data)
        return digest.hexdigest()

    def save(self, folder: Path, blocks: Iterable[tuple[str, int, Pixels]] | None = None) -> None:
        """Write {train,test}_{images,labels}.npy and dataset.json into `folder`.

        If anything fails, the files that were there before stay.

        Parameters
        ----------
        blocks : images that are not in memory together, instead of those of the dataset: their
            split, the number of the first one there, uint8 (height, width, 3) or (n, height,
            width, 3), in any order; the labels of images that are not among them are left out
        """
        if blocks is None:
            blocks = ((split, 0, images) for split, images in self.images.items())
        with ExitStack() as stack:
            files: dict[str, ImageFile] = {}
            for split in SPLITS:
                path = stack.enter_context(atomic(folder / f"{split}_images.npy"))
                shape = (len(self.labels[split]), *self.images[split].shape[1:])
                # Without a buffer, because closing a full one raises an error without a name.
                files[split] = ImageFile(stack.enter_context(path.open("w+b", buffering=0)), shape)
            for split, row, pixels in blocks:
                files[split].write(row, pixels)
            labels = {split: self.labels[split][files[split].written] for split in SPLITS}
            before = len(self.labels["train"]) - self.validation
            validation = int(files["train"].written[before:].sum())
            kept = replace(self, labels=labels, validation=validation)
            for split in SPLITS:
                files[split].close_gaps()
                np.save(stack.enter_context(atomic(folder / f"{split}_labels.npy")), labels[split])
            counts = {split: len(labels[split]) for split in SPLITS}
            counts |= {"validation": validation} if validation else {}
            digests = {"digest": kept.digest(files), "test_digest": kept.digest(files, ["test"])}
            meta = {"name": self.name, **digests, **counts, "classes": self.classes}
            write_json(stack.enter_context(atomic(folder / "dataset.json")), meta)

    @classmethod
    def load(cls, folder: Path) -> "Dataset":
        """Open a folder that `save` wrote.

        The images are memory-mapped: they are read from disk when they are used. UserError: a
        file is missing or damaged.
        """
        problem = f"{folder}/ is missing or damaged (%s); `dvc repro -f download` repairs it"
        with in_a_sentence(problem, OSError, EOFError, ValueError, KeyError, TypeError):
            meta = read_json(folder / "dataset.json")
            images = {split: np.load(folder / f"{split}_images.npy", "r") for split in SPLITS}
            labels = {split: np.load(folder / f"{split}_labels.npy") for split in SPLITS}
            return cls(images, labels, meta["classes"], meta["name"], meta.get("validation", 0))


class ImageFile:
    """An .npy file of uint8 images, written in any order. It iterates over the bytes of its pixels.

    It is not a memory map: the pages of a map count as memory of the process, and if the disk is
    full, writing to a map kills the process.
    """

    def __init__(self, file: FileIO, shape: tuple[int, ...]) -> None:
        self.file, self.shape, self.size = file, shape, math.prod(shape[1:])
        self.written = np.zeros(shape[0], bool)
        self._write_header()
        self.start = file.tell()

    def _write_header(self) -> None:
        self.file.seek(0)  # it has the same length for any number of images
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def write(self, row: int, pixels: Pixels) -> None:
        """Write images, the first of which has the number `row`. OSError: it names the file."""
        try:
            self.file.seek(self.start + row * self.size)
            left = np.ascontiguousarray(pixels).reshape(-1).data
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:  # it names no file
            raise OSError(error.errno, error.strerror, str(self.file.name)) from error
        self.written[row : row + pixels.size // self.size] = True

    def close_gaps(self) -> None:
        """Remove the rows of images that were not written."""
        kept = np.flatnonzero(self.written).tolist()
        for new, old in enumerate(kept):
            if new != old:
                self.file.seek(self.start + old * self.size)
                self.write(new, np.frombuffer(self.file.read(self.size), np.uint8))
        self.shape = (len(kept), *self.shape[1:])
        self.file.truncate(self.start + len(kept) * self.size)
        self._write_header()

    def __iter__(self) -> Iterator[bytes]:
        self.file.seek(self.start)
        return iter(lambda: self.file.read(2**20), b"")


def stratified_split(labels: Labels, share: float, seed: int = 0) -> tuple[Labels, Labels]:
    """Split the indices of `labels` into (kept, held out), both ascending.

    The same `share` of every class is held out; a class keeps at least one image. The split depends
    on `seed` only.
    """
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    counts = [min(round(share * len(members)), len(members) - 1) for members in classes]
    held_out = [rng.permutation(c)[:count] for c, count in zip(classes, counts, strict=True)]
    held = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held), held

"""Labelled images as arrays on disk, and the split into training and validation images."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cifarlab.errors import UserError
from cifarlab.files import atomic, read_json, write_json

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Dataset:
    """Labelled images of both splits.

    Attributes
    ----------
    images : dict of uint8 arrays (N, height, width, 3), RGB; the keys are "train" and "test"
    labels : dict of int64 arrays (N,), indices into `classes`
    classes : class names
    name : for titles; for a folder or an archive this is its file name
    """

    images: dict[str, npt.NDArray[np.uint8]]
    labels: dict[str, npt.NDArray[np.int64]]
    classes: list[str]
    name: str

    def digest(self) -> str:
        """Return the SHA-256 of pixels, labels and class names, in hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in SPLITS:
            digest.update(np.ascontiguousarray(self.images[split]).data)
            digest.update(np.ascontiguousarray(self.labels[split]).data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write {train,test}_{images,labels}.npy and dataset.json into `folder`."""
        for kind, arrays in (("images", self.images), ("labels", self.labels)):
            for split, array in arrays.items():
                with atomic(folder / f"{split}_{kind}.npy") as path:
                    np.save(path, array)
        counts = {split: len(self.labels[split]) for split in SPLITS}
        meta = {"name": self.name, "digest": self.digest(), **counts, "classes": self.classes}
        write_json(folder / "dataset.json", meta)

    @classmethod
    def load(cls, folder: Path) -> "Dataset":
        """Open a folder that `save` wrote.

        The images are memory-mapped: they are read from disk when they are used. UserError: a
        file is missing or damaged.
        """
        try:
            meta = read_json(folder / "dataset.json")
            images = {split: np.load(folder / f"{split}_images.npy", "r") for split in SPLITS}
            labels = {split: np.load(folder / f"{split}_labels.npy") for split in SPLITS}
            return cls(images, labels, meta["classes"], meta["name"])
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            repair = "`dvc repro -f download` repairs it"
            raise UserError(f"{folder}/ is missing or damaged ({error}); {repair}") from error


def stratified_split(
    labels: npt.NDArray[np.int64], share: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split the indices of `labels` into (kept, held out), both ascending.

    The same `share` of every class is held out. The split is always the same, so that runs with
    different seeds are compared on the same images.
    """
    rng = np.random.default_rng(0)
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    held_out = [rng.permutation(members)[: round(share * len(members))] for members in classes]
    held = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held), held

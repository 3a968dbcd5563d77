"""Labelled images on disk: uint8 arrays that memory-map, and the split of the training images."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cifarlab import UserError
from cifarlab.files import atomic, write_json

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Dataset:
    """Labelled images of both splits.

    Attributes
    ----------
    images : dict of uint8 arrays (N, height, width, 3), RGB, keys "train" and "test"
    labels : dict of int64 arrays (N,), indices into `classes`
    classes : class names
    name : for titles; of a folder or an archive its file name
    """

    images: dict[str, npt.NDArray[np.uint8]]
    labels: dict[str, npt.NDArray[np.int64]]
    classes: list[str]
    name: str

    def digest(self) -> str:
        """SHA-256 of pixels, labels and class names."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in SPLITS:
            digest.update(np.ascontiguousarray(self.images[split]).data)
            digest.update(np.ascontiguousarray(self.labels[split]).data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write {train,test}_{images,labels}.npy and dataset.json."""
        for split in SPLITS:
            for kind, arrays in (("images", self.images), ("labels", self.labels)):
                with atomic(folder / f"{split}_{kind}.npy") as path:
                    np.save(path, arrays[split])
        counts = {split: len(self.labels[split]) for split in SPLITS}
        write_json(folder / "dataset.json", {"name": self.name, "digest": self.digest(), **counts, "classes": self.classes})

    @classmethod
    def load(cls, folder: Path) -> "Dataset":
        """Open what `save` wrote; the images stay on disk until they are read."""
        try:
            meta = json.loads((folder / "dataset.json").read_text("utf-8"))
            images = {split: np.load(folder / f"{split}_images.npy", mmap_mode="r") for split in SPLITS}
            labels = {split: np.load(folder / f"{split}_labels.npy") for split in SPLITS}
            classes, name = meta["classes"], meta["name"]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}/ is missing or damaged ({error}); `dvc repro -f download` makes it anew") from error
        return cls(images, labels, classes, name)


def stratified_split(labels: npt.NDArray[np.int64], share: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split indices into (kept, held out), the same `share` of every class held out, ascending.

    Fixed once and for all: runs of different seeds are compared on the same held-out images.
    """
    rng = np.random.default_rng(0)
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    held_out = [rng.permutation(members)[: round(share * len(members))] for members in classes]
    held = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held), held

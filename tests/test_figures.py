"""The pictures of a run: all six, the same bytes every time, legible whatever the classes are called and how many there are."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from sklearn import metrics as sk

from cifarlab.datasets import Dataset
from cifarlab.evaluation import evaluate
from cifarlab.figures import draw_all
from cifarlab.files import write_json
from cifarlab.params import Params
from cifarlab.training import Epoch

NAMES = {"confusion", "confusion_recall", "curves", "per_class", "training_images", "mistakes"}
PETS = ["bird", "cat", "dog", "猫"[:0] + "fish"]


class Run:
    """A run on synthetic images: what the stages write, and the figures as they were when they were saved."""

    def __init__(self, folder: Path, classes: list[str], errors: int, epochs: int, validation: bool) -> None:
        self.folder, self.classes = folder, classes
        rng = np.random.default_rng(0)
        n = len(classes)
        labels = {"train": np.arange(3 * n) % n, "test": np.arange(4 * n) % n}
        images = {split: rng.integers(0, 256, (len(of), 16, 16, 3), np.uint8) for split, of in labels.items()}
        Dataset(images, labels, classes, "synthetic").save(folder / "data")

        self.actual = labels["test"]
        self.predicted = self.actual.copy()
        wrong = rng.permutation(len(self.actual))[:errors]
        self.predicted[wrong] = (self.predicted[wrong] + rng.integers(1, n, errors)) % n
        sure = rng.uniform(0.6, 1, (len(self.actual), 1))
        probabilities = (1 - sure) / (n - 1) * np.ones(n)
        np.put_along_axis(probabilities, self.predicted[:, None], sure, 1)
        self.metrics, tables = evaluate(probabilities, self.actual, classes, 15)

        write_json(folder / "metrics" / "evaluate.json", self.metrics)
        (folder / "plots").mkdir()
        for name, table in tables.items():
            table.to_csv(folder / "plots" / f"{name}.csv", index=False, float_format="%.6f")
        history = [Epoch(e, 2 / e, 1 - 1 / e, 2.1 / e if validation else None, 0.9 - 1 / e if validation else None, 0.1) for e in range(1, epochs + 1)]
        pd.DataFrame(history).to_csv(folder / "plots" / "history.csv", index=False)

    def draw(self, params: Params) -> dict[str, Figure]:
        figures: list[Figure] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plt, "close", figures.append)  # called with every figure once it is saved
            paths = list(draw_all(params, self.folder / "data", self.folder / "plots"))
        return {path.stem: figure for path, figure in zip(paths, figures, strict=True)}

    def bytes(self) -> dict[str, bytes]:
        return {path.stem: path.read_bytes() for path in (self.folder / "plots").glob("*.png")}

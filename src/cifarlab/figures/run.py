"""The pictures of a run: what the network was fed, how it learned and what it confuses."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from cifarlab.data.dataset import Dataset, Pixels
from cifarlab.data.draws import draw
from cifarlab.figures import style
from cifarlab.files import read_json
from cifarlab.params.sections import Params

# With more classes, numbers in the cells would be too small to read; the colours remain.
CLASSES_WITH_NUMBERS = 30
CAPTION, LABEL = 12, 40  # longest class name in a gallery and at an axis, in characters


def draw_all(params: Params, data: Path, tables: Path) -> Iterator[Path]:
    """Draw every picture of a run.

    Parameters
    ----------
    data : folder with the images
    tables : folder with the tables of the run; the pictures are written beside them

    Yields
    ------
    The path of each picture, as soon as it is written.
    """
    style.apply()
    images = Dataset.load(data)
    confusion = _read(tables / "confusion.csv", "actual/predicted").set_index("actual/predicted")
    per_class = _read(tables / "per_class.csv", "class")
    predictions = _read(tables / "predictions.csv", "actual", "predicted")
    accuracy = read_json(tables.parent / "metrics" / "evaluate.json")["accuracy"]
    history = pd.read_csv(tables / "history.csv")
    trained = "training, images mixed by CutMix" if params.train.cutmix else "training"
    title = f"{images.name} · {params.model.describe()} · test accuracy {accuracy:.1%}"
    figures = {
        "confusion": confusion_heatmap(confusion, normalized=False),
        "confusion_recall": confusion_heatmap(confusion, normalized=True),
        "curves": curves(history, trained, params.train.label_smoothing),
        "per_class": per_class_bars(per_class, accuracy),
        "training_images": training_images(images, params),
        "mistakes": mistakes(images, predictions, params.plot.mistakes),
    }
    for name, figure in figures.items():
        # A character is about 7.5 points wide.
        wrapped = textwrap.fill(title, int(figure.get_figwidth() * 72 / 7.5))
        figure.suptitle(f"{figure.get_suptitle()}\n{wrapped}", fontsize=11.5)
        path = tables / f"{name}.png"
        style.save(figure, path, params.plot.dpi)
        yield path


def confusion_heatmap(counts: pd.DataFrame, *, normalized: bool) -> Figure:
    """Draw a confusion matrix: actual classes as rows, predicted classes as columns.

    Parameters
    ----------
    normalized : show shares, so that each row sums to one, instead of numbers of images
    """
    n = len(counts)
    many = n > CLASSES_WITH_NUMBERS
    side, label_size = (min(0.18 * n + 3, 40.0), 7) if many else (max(6.0, 0.62 * n + 2), 11)
    figure, axes = plt.subplots(figsize=(side + 0.8, side))
    values = counts.div(counts.sum(axis=1).clip(lower=1), axis=0) if normalized else counts
    # The square root makes the few mistakes visible beside the large numbers of the diagonal.
    norm = PowerNorm(0.5, vmin=0, vmax=1 if normalized else max(1, int(counts.to_numpy().max())))
    names = [_shorten(name, LABEL) for name in counts.index]
    texts = values.map(("{:.2f}" if normalized else "{:d}").format).replace(["0", "0.00"], "")
    cells = {"annot": False if many else texts, "fmt": "", "annot_kws": {"size": 10}}
    quantity = "share of the actual class" if normalized else "test images"
    bar = {"shrink": 0.8, "label": f"{quantity}\n(the colour follows the square root)"}
    look = {"norm": norm, "cmap": "Blues", "square": True, "linewidths": 0 if many else 0.5}
    labels = {"xticklabels": names, "yticklabels": names}
    sns.heatmap(values, ax=axes, cbar_kws=bar, **look, **cells, **labels)
    axes.set(xlabel="predicted", ylabel="actual")
    axes.tick_params(axis="y", rotation=0, labelsize=label_size)
    axes.tick_params(axis="x", rotation=90 if many else 45, labelsize=label_size)
    if not many:
        plt.setp(axes.get_xticklabels(), ha="right", rotation_mode="anchor")
    figure.suptitle("Recall: where each class goes" if normalized else "Confusion matrix")
    return figure


def curves(history: pd.DataFrame, trained: str, smoothing: float) -> Figure:
    """Draw loss and accuracy over the epochs.

    Parameters
    ----------
    trained : label of the training curve; a validation curve is drawn where there is a split
    smoothing : of the labels, in the training loss only
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    for axes, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for label, split in ((trained, "train"), ("validation", "val")):
            column = f"{split}_{quantity}"
            if history[column].notna().any():
                sns.lineplot(history, x="epoch", y=column, label=label, marker="o", ax=axes)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.locator_params("x", integer=True, min_n_ticks=1)
    if smoothing:
        panels[0].set_ylabel(f"loss (in training with label smoothing {smoothing:g})")
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.suptitle("Learning curves")
    return figure


def per_class_bars(table: pd.DataFrame, accuracy: float) -> Figure:
    """Draw the accuracy of each class, in the order of the table, and a line for all classes.

    The order is the same for all runs, so that they can be compared.
    """
    n = len(table)
    height, text_size = (0.2, 7) if n > CLASSES_WITH_NUMBERS else (0.38, 10)
    figure, axes = plt.subplots(figsize=(8, max(3.2, height * n + 1.4)))
    sns.barplot(table, x="accuracy", y="class", color=sns.color_palette()[0], orient="h", ax=axes)
    for row, value in enumerate(table["accuracy"]):
        # At the left end of the bar the line of all classes does not cross the number. A bar
        # that is too short has its number beside it.
        x, color = (0.01, "white") if value > 0.12 else (value + 0.01, "0.2")
        axes.text(x, row, f"{value:.1%}", va="center", fontsize=text_size, color=color)
    axes.axvline(accuracy, color="0.3", ls="--", lw=1, label=f"all classes {accuracy:.1%}")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=10)
    axes.set(xlim=(0, 1), xticks=np.arange(0, 1.01, 0.2), xlabel="test accuracy", ylabel="")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_yticks(range(n), [_shorten(c, LABEL) for c in table["class"]], fontsize=text_size)
    figure.suptitle("Accuracy of each class")
    return figure


def training_images(data: Dataset, params: Params) -> Figure:
    """Draw a random sample of training images as the network gets them: augmented."""
    train, rng = params.train, np.random.default_rng(params.train.seed)
    kept, _ = data.split(params.data.validation, params.data.validation_seed)
    chosen = rng.permutation(kept)[: params.plot.samples]
    images = data.images["train"][chosen]
    if draws := draw(len(chosen), train, 1):
        images = np.stack([moved_image(*seen) for seen in zip(images, *draws, strict=True)])
    captions = [_shorten(data.classes[label], CAPTION) for label in data.labels["train"][chosen]]
    mixed = ", before CutMix" if train.cutmix else ""
    return _gallery(images, captions, f"Training images as fed to the network{mixed}")


def moved_image(image: Pixels, mirrored: bool, shift: npt.NDArray[np.int64]) -> Pixels:
    """Mirror and shift one image (height, width, 3) like `augment`, which would import PyTorch."""
    height, width, _ = image.shape
    reach = abs(shift).max()
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    top, left = reach + shift
    seen = padded[top : top + height, left : left + width]
    return seen[:, ::-1] if mirrored else seen


def mistakes(data: Dataset, predictions: pd.DataFrame, count: int) -> Figure:
    """Draw the `count` wrong predictions of which the network was most confident."""
    wrong = predictions[predictions["actual"] != predictions["predicted"]]
    wrong = wrong.sort_values("confidence", ascending=False, kind="stable").head(count)
    if wrong.empty:
        figure = plt.figure(figsize=(8, 2))
        figure.text(0.5, 0.4, "no mistakes on the test set", ha="center")
        figure.suptitle("Most confident mistakes")
        return figure
    images = data.images["test"][wrong.index.to_numpy()]
    names = wrong[["actual", "predicted"]].map(lambda name: _shorten(name, CAPTION))
    captions = names.actual + "\n→ " + names.predicted + wrong["confidence"].map(" {:.0%}".format)
    return _gallery(images, list(captions), "Most confident mistakes (actual → predicted)")


def _read(path: Path, *names: str) -> pd.DataFrame:
    """Read a table; `names` are its columns with class names. A class may be called 7 or NaN."""
    return pd.read_csv(path, dtype=dict.fromkeys(names, str), keep_default_na=False)


def _gallery(images: Pixels, captions: Sequence[str], headline: str) -> Figure:
    """Draw images, uint8 (N, height, width, 3), eight in a row, with a caption below each."""
    side, margin, columns = 96, 40, 8  # pixels of an enlarged image and around it; images per row
    rows, tile = -(-len(images) // columns), side + margin
    grid = Image.new("RGB", (columns * tile, rows * tile), "white")
    for i, image in enumerate(images):
        large = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        grid.paste(large, (i % columns * tile + margin // 2, i // columns * tile))
    figure, axes = plt.subplots(figsize=(columns * tile / 95, rows * tile / 95 + 1.2))
    axes.imshow(grid)
    axes.axis("off")
    for i, caption in enumerate(captions):
        x, y = (i % columns + 0.5) * tile, i // columns * tile + side + 3
        axes.text(x, y, caption, ha="center", va="top", fontsize=9, linespacing=1.1)
    figure.suptitle(headline)
    return figure


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"

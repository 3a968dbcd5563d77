"""seaborn pictures of a run: what was fed, how it learned, what it confuses."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, no display needed
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from cifarlab.augment import augment, draw
from cifarlab.datasets import Dataset, stratified_split
from cifarlab.files import atomic
from cifarlab.params import Params

# A class may be called $x$: no mathematics in names.
sns.set_theme(style="whitegrid", rc={"figure.constrained_layout.use": True, "text.parse_math": False})
CELL_NUMBERS_UP_TO = 30  # classes; beyond, numbers would be too small to read and the colours tell
CAPTION, LABEL = 12, 40  # characters


def draw_all(params: Params, data: Path, tables: Path) -> Iterator[Path]:
    """Draw every figure into `tables`, from the tables there and the images in `data`; yield their paths."""
    images = Dataset.load(data)
    # A class may be called 7, or actual.
    texts = {"confusion": ["actual/predicted"], "per_class": ["class"], "predictions": ["actual", "predicted"]}
    confusion, per_class, predictions = (
        pd.read_csv(tables / f"{name}.csv", dtype=dict.fromkeys(columns, str), keep_default_na=False) for name, columns in texts.items()
    )
    confusion = confusion.set_index("actual/predicted")
    accuracy = json.loads((tables.parent / "metrics" / "evaluate.json").read_text("utf-8"))["accuracy"]
    trained = "training, images mixed by CutMix" if params.train.cutmix else "training"
    title = f"{images.name} · {params.model.describe()} · test accuracy {accuracy:.1%}"
    figures = {
        "confusion": confusion_heatmap(confusion, title, normalized=False),
        "confusion_recall": confusion_heatmap(confusion, title, normalized=True),
        "curves": curves(pd.read_csv(tables / "history.csv"), title, trained),
        "per_class": per_class_bars(per_class, accuracy, title),
        "training_images": training_images(images, params, title),
        "mistakes": mistakes(images, predictions, params.plot.mistakes, title),
    }
    for name, figure in figures.items():
        save(figure, tables / f"{name}.png", params.plot.dpi)
        yield tables / f"{name}.png"


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a picture and close it; without the version of matplotlib in it, the same figure gives the same bytes."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
    plt.close(figure)


def confusion_heatmap(counts: pd.DataFrame, title: str, *, normalized: bool) -> Figure:
    """Heatmap of a confusion matrix, rows actual and columns predicted; normalised, every row sums to one."""
    n = len(counts)
    many = n > CELL_NUMBERS_UP_TO
    side, small = (min(0.18 * n + 3, 40.0), 7) if many else (max(6.0, 0.62 * n + 2), 11)
    figure, axes = plt.subplots(figsize=(side + 0.8, side))
    values = counts.div(counts.sum(axis=1).clip(lower=1), axis=0) if normalized else counts
    # The root makes the mistakes visible beside the much larger diagonal.
    norm = PowerNorm(0.5, vmin=0, vmax=1 if normalized else max(1, int(counts.to_numpy().max())))
    names = [_short(name, LABEL) for name in counts.index]
    bar = {"shrink": 0.8, "label": "share of the actual class" if normalized else "test images"}
    sns.heatmap(
        values, norm=norm, cmap="Blues", annot=not many, fmt=".2f" if normalized else "d", annot_kws={"size": 10}, square=True,
        linewidths=0 if many else 0.5, cbar_kws=bar, ax=axes, xticklabels=names, yticklabels=names,
    )  # fmt: skip
    axes.set(xlabel="predicted", ylabel="actual")
    axes.tick_params(axis="y", rotation=0, labelsize=small)
    axes.tick_params(axis="x", rotation=90 if many else 45, labelsize=small)
    if not many:
        plt.setp(axes.get_xticklabels(), ha="right", rotation_mode="anchor")
    _headline(figure, "Recall: where each class goes" if normalized else "Confusion matrix", title)
    return figure


def curves(history: pd.DataFrame, title: str, trained: str) -> Figure:
    """Loss and accuracy over the epochs, of the training, labelled `trained`, and, where there is one, of the validation split."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    for axes, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for label, split in ((trained, "train"), ("validation", "val")):
            if history[f"{split}_{quantity}"].notna().any():
                sns.lineplot(history, x="epoch", y=f"{split}_{quantity}", label=label, marker="o", ax=axes)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _headline(figure, "Learning curves", title)
    return figure


def per_class_bars(table: pd.DataFrame, accuracy: float, title: str) -> Figure:
    """Accuracy of each class, the best on top, beside the accuracy of all."""
    table = table.sort_values("accuracy", ascending=False, kind="stable")
    n = len(table)
    height, small = (0.2, 7) if n > CELL_NUMBERS_UP_TO else (0.38, 10)
    figure, axes = plt.subplots(figsize=(8, max(3.2, height * n + 1.4)))
    sns.barplot(table, x="accuracy", y="class", color=sns.color_palette("deep")[0], orient="h", ax=axes)
    for place, value in enumerate(table["accuracy"]):
        # At the foot of the bar, where the line of all classes does not cross it; a bar too short has it beside.
        x, color = (0.01, "white") if value > 0.12 else (value + 0.01, "0.2")
        axes.text(x, place, f"{value:.1%}", va="center", fontsize=small, color=color)
    axes.axvline(accuracy, color="0.3", linestyle="--", linewidth=1, label=f"all classes {accuracy:.1%}")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=10)
    axes.set(xlim=(0, 1), xticks=np.arange(0, 1.01, 0.2), xlabel="test accuracy", ylabel="")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_yticks(range(n), [_short(name, LABEL) for name in table["class"]], fontsize=small)
    _headline(figure, "Accuracy of each class", title)
    return figure


def training_images(data: Dataset, params: Params, title: str) -> Figure:
    """Training images as the network gets them: drawn at random, augmented."""
    generator = torch.Generator().manual_seed(params.train.seed)
    kept, _ = stratified_split(data.labels["train"], params.data.validation)
    chosen = kept[torch.randperm(len(kept), generator=generator)[: params.plot.samples].numpy()]
    draws = draw(len(chosen), params.train.seed, 1, flip=params.train.flip, translate=params.train.translate)
    images = augment(torch.from_numpy(data.images["train"][chosen]), draws)
    captions = [_short(data.classes[label], CAPTION) for label in data.labels["train"][chosen]]
    mixed = ", before CutMix" if params.train.cutmix else ""
    return _gallery(images, captions, f"Training images as fed to the network{mixed}", title)


def mistakes(data: Dataset, predictions: pd.DataFrame, count: int, title: str) -> Figure:
    """Show the wrong predictions that the network was surest of."""
    wrong = predictions[predictions["actual"] != predictions["predicted"]]
    wrong = wrong.sort_values("confidence", ascending=False, kind="stable").head(count)
    if wrong.empty:
        figure = plt.figure(figsize=(8, 2))
        figure.text(0.5, 0.4, "no mistakes on the test set", ha="center")
        _headline(figure, "Most confident mistakes", title)
        return figure
    images = torch.from_numpy(data.images["test"][wrong.index.to_numpy()]).permute(0, 3, 1, 2)
    rows = zip(wrong["actual"], wrong["predicted"], wrong["confidence"], strict=True)
    captions = [f"{_short(actual, CAPTION)}\n→ {_short(predicted, CAPTION)} {confidence:.0%}" for actual, predicted, confidence in rows]
    return _gallery(images, captions, "Most confident mistakes (actual → predicted)", title)


def _gallery(images: Tensor, captions: Sequence[str], headline: str, title: str, side: int = 96) -> Figure:
    """Images uint8 (N, 3, height, width), eight a row, a caption under each."""
    rows, columns, tile = -(-len(images) // 8), 8, side + 40
    large = F.interpolate(images.float(), size=(side, side), mode="bicubic", antialias=True).clamp(0, 255).round().byte()
    tiles = torch.full((rows * columns, 3, tile, tile), 255, dtype=torch.uint8)
    tiles[: len(large), :, :side, 20:-20] = large
    grid = tiles.view(rows, columns, 3, tile, tile).permute(0, 3, 1, 4, 2).reshape(rows * tile, columns * tile, 3).numpy()
    figure, axes = plt.subplots(figsize=(columns * tile / 95, rows * tile / 95 + 1.2))
    axes.imshow(grid)
    axes.axis("off")
    for i, caption in enumerate(captions):
        x, y = (i % columns + 0.5) * tile, i // columns * tile + side + 3
        axes.text(x, y, caption, ha="center", va="top", fontsize=9, linespacing=1.1)
    _headline(figure, headline, title)
    return figure


def _headline(figure: Figure, headline: str, title: str) -> None:
    lines = textwrap.wrap(title, int(figure.get_figwidth() * 72 / 7.5))  # a character is about 7.5 points wide
    figure.suptitle("\n".join([headline, *lines]), fontsize=11.5)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"

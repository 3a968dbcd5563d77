"""`make confusion`: which classes the network of the workspace confuses, which way, with examples: docs/studies/confusion.md."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from scipy import stats
from statsmodels.stats.multitest import multipletests

from cifarlab.datasets import Dataset
from cifarlab.files import atomic
from cifarlab.params import load_params

TARGET = Path("docs/studies")
SHOWN, EXAMPLES = 5, 5  # pairs with examples, and images each way


class Pair(NamedTuple):
    """Two classes and the mistakes between them."""

    one: str
    other: str
    there: int
    """Images of `one` taken for `other`: the more frequent way."""
    back: int
    share: float
    """Of all mistakes."""
    p: float
    """The chance of a split at least as uneven if both ways were equally likely (binomial test), corrected for all pairs (Holm 1979)."""


def pairs(predictions: pd.DataFrame, classes: list[str]) -> list[Pair]:
    """Return every two classes, those with the most mistakes first, from a table with the columns actual and predicted."""
    wrong = predictions[predictions.actual != predictions.predicted]
    counts = Counter(zip(wrong.actual, wrong.predicted, strict=True))
    ways = [sorted([(counts[a, b], a, b), (counts[b, a], b, a)], key=lambda way: -way[0]) for a, b in combinations(classes, 2)]
    p = [stats.binomtest(back, there + back).pvalue if there else 1.0 for (there, *_), (back, *_) in ways]
    corrected = multipletests(p, method="holm")[1]
    found = [
        Pair(one, other, there, back, (there + back) / max(1, len(wrong)), float(chance))
        for ((there, one, other), (back, *_)), chance in zip(ways, corrected, strict=True)
    ]
    return sorted(found, key=lambda pair: -pair.share)


def draw(path: Path, table: list[Pair], predictions: pd.DataFrame, data: Dataset) -> None:
    """Draw the pairs as bars, one colour a way, and beside them the surest mistakes of the first ones."""
    sns.set_theme(style="whitegrid", rc={"figure.constrained_layout.use": True, "text.parse_math": False})
    figure = plt.figure(figsize=(15, 6))
    bars, gallery = cast(Any, figure.subfigures(1, 2, width_ratios=(1, 2.2)))
    top = table[:12]
    axes = bars.subplots()
    places = np.arange(len(top))
    axes.barh(places - 0.2, [pair.there for pair in top], 0.4, label="the more frequent way")
    axes.barh(places + 0.2, [pair.back for pair in top], 0.4, label="the other way")
    labels = [f"{row.one} → {row.other}{' *' if row.p < 0.05 else ''}" for row in top]
    axes.set(yticks=places, yticklabels=labels, xlabel="test images", title="Most confused pairs (*: uneven beyond chance)")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.1), ncols=2, frameon=False)
    grid = gallery.subplots(SHOWN, 2 * EXAMPLES, squeeze=False)
    for row, pair in zip(grid, table, strict=False):
        for way, (actual, predicted) in enumerate(((pair.one, pair.other), (pair.other, pair.one))):
            found = predictions[(predictions.actual == actual) & (predictions.predicted == predicted)]
            surest = found.sort_values("confidence", ascending=False, kind="stable").head(EXAMPLES)
            row[way * EXAMPLES].set_title(f"{actual} → {predicted}", loc="left", fontsize=10)
            for panel, index in zip(row[way * EXAMPLES :], surest.index, strict=False):
                panel.imshow(data.images["test"][index], interpolation="bicubic")
                panel.set_xlabel(f"{predictions.confidence[index]:.0%}", fontsize=8)
    for panel in grid.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    gallery.suptitle("The surest mistakes, with the network's confidence", fontsize=11)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=90, metadata={"Software": None})
    plt.close(figure)


def page(table: list[Pair], title: str) -> str:
    """Return the page in words and numbers."""
    first, uneven = table[0], [pair for pair in table if pair.p < 0.05]
    half = next(n for n in range(1, len(table) + 1) if sum(pair.share for pair in table[:n]) >= 0.5)
    lines = [
        "# Which classes are confused, and which way?\n",
        "![pairs and examples](confusion.png)\n",
        f"{title}. Of {len(table)} pairs of classes {half} make half of all mistakes; *{first.one}* and *{first.other}* alone make",
        f"{first.share:.0%}. Uneven beyond chance (binomial test, Holm): "
        + ("; ".join(f"{r.one} → {r.other} ({r.there} against {r.back})" for r in uneven) or "none")
        + ".\n",
        "| pair | there | back | share of all mistakes | p |",
        "|---|---|---|---|---|",
        *(f"| {r.one} → {r.other} | {r.there} | {r.back} | {r.share:.1%} | {r.p:.2g} |" for r in table[:12]),
        "\n    dvc repro && make confusion\n\nwrites this page of the network in the workspace.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page and its picture."""
    params, data = load_params(), Dataset.load(Path("data"))
    predictions = pd.read_csv("plots/predictions.csv", dtype={"actual": str, "predicted": str}, keep_default_na=False)
    accuracy = json.loads(Path("metrics/evaluate.json").read_text("utf-8"))["accuracy"]
    table = pairs(predictions, data.classes)
    title = f"{data.name}, {params.model.describe()}, {params.train.epochs} epochs, seed {params.train.seed}: test accuracy {accuracy:.2%}"
    draw(TARGET / "confusion.png", table, predictions, data)
    with atomic(TARGET / "confusion.md") as path:
        path.write_text(page(table, title), "utf-8")


if __name__ == "__main__":
    main()

"""`make confusion`: show which classes the network in the workspace confuses.

Reads the results of the evaluate stage and writes docs/studies/confusion.md and .png. If that page
is about other data, it stays: the new one is in a folder with the name of the data.
"""

import sys
from collections import Counter
from itertools import combinations
from typing import Any, NamedTuple, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from cifarlab import files, pipeline
from cifarlab.data.dataset import Dataset
from cifarlab.errors import UserError
from cifarlab.figures import style
from cifarlab.params.load import load_params
from cifarlab.report.statistics import holm
from cifarlab.runtime import timings
from cifarlab.studies.page import page_of

LISTED = 12  # pairs in the table and in the bar chart
SHOWN, EXAMPLES = 5, 5  # pairs with example images, and images per direction
SIGNIFICANT = 0.05


class Pair(NamedTuple):
    """Two classes and the mistakes between them.

    Attributes
    ----------
    one, other : the classes, in the more frequent direction
    there : number of images of `one` that were classified as `other`
    back : number of images of `other` that were classified as `one`
    share : share of all mistakes
    p : probability of a split at least as uneven if both directions were equally likely (binomial
        test), corrected for the number of pairs (Holm 1979)
    """

    one: str
    other: str
    there: int
    back: int
    share: float
    p: float


def pairs(predictions: pd.DataFrame, classes: list[str]) -> list[Pair]:
    """Return all pairs of classes, those with the most mistakes first.

    Parameters
    ----------
    predictions : table with the columns actual and predicted, one row per image
    """
    wrong = predictions[predictions.actual != predictions.predicted]
    counts = Counter(zip(wrong.actual, wrong.predicted, strict=True))
    found = []
    for a, b in combinations(classes, 2):
        one, other = (a, b) if counts[a, b] >= counts[b, a] else (b, a)
        there, back = counts[one, other], counts[other, one]
        p = float(stats.binomtest(back, there + back).pvalue) if there else 1.0
        found.append(Pair(one, other, there, back, (there + back) / max(1, len(wrong)), p))
    corrected = holm([pair.p for pair in found])
    found = [pair._replace(p=float(p)) for pair, p in zip(found, corrected, strict=True)]
    return sorted(found, key=lambda pair: -pair.share)


def draw(table: list[Pair], predictions: pd.DataFrame, data: Dataset) -> Figure:
    """Draw the pairs as bars, and next to them the most confident mistakes of the first pairs."""
    style.apply()
    figure = plt.figure(figsize=(15, 6))
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=(1, 2.2)))
    draw_bars(left.subplots(), table[:LISTED])
    grid = right.subplots(SHOWN, 2 * EXAMPLES, squeeze=False)
    for row, pair in zip(grid, table, strict=False):
        draw_examples(row[:EXAMPLES], pair.one, pair.other, predictions, data)
        draw_examples(row[EXAMPLES:], pair.other, pair.one, predictions, data)
    for panel in grid.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    right.suptitle("The surest mistakes, with the network's confidence", fontsize=11)
    return figure


def draw_bars(axes: Axes, table: list[Pair]) -> None:
    """Draw two bars for each pair, one per direction."""
    places = np.arange(len(table))
    axes.barh(places - 0.2, [pair.there for pair in table], 0.4, label="the more frequent way")
    axes.barh(places + 0.2, [pair.back for pair in table], 0.4, label="the other way")
    labels = [f"{r.one} → {r.other}{' *' if r.p < SIGNIFICANT else ''}" for r in table]
    axes.set(yticks=places, yticklabels=labels, xlabel="test images")
    axes.set_title("Most confused pairs (*: uneven beyond chance)")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.1), ncols=2, frameon=False)


def draw_examples(
    panels: Any, actual: str, predicted: str, predictions: pd.DataFrame, data: Dataset
) -> None:
    """Draw the most confident mistakes of one direction, one per panel."""
    panels[0].set_title(f"{actual} → {predicted}", loc="left", fontsize=10)
    found = predictions[(predictions.actual == actual) & (predictions.predicted == predicted)]
    surest = found.sort_values("confidence", ascending=False, kind="stable")
    for panel, index in zip(panels, surest.index, strict=False):
        panel.imshow(data.images["test"][index], interpolation="bicubic")
        panel.set_xlabel(f"{predictions.confidence[index]:.0%}", fontsize=8)


def page(table: list[Pair], title: str, origin: str) -> str:
    """Return the page as Markdown.

    Parameters
    ----------
    title : which network this is, and its accuracy
    origin : the commit and the machine
    """
    first = table[0]
    shares = np.cumsum([pair.share for pair in table])
    half = int(np.argmax(shares >= 0.5)) + 1
    uneven = [
        f"{r.one} → {r.other} ({r.there} against {r.back})" for r in table if r.p < SIGNIFICANT
    ]
    rows = "\n".join(
        f"| {r.one} → {r.other} | {r.there} | {r.back} | {r.share:.1%} | {r.p:.2g} |"
        for r in table[:LISTED]
    )
    return f"""\
# Which classes are confused, and in which direction?

![pairs and examples](confusion.png)

{title}.

- Half of all mistakes are in {half} of the {len(table)} pairs of classes.
- *{first.one}* and *{first.other}* alone account for {first.share:.0%}.
- More frequent in one direction than chance explains: {"; ".join(uneven) or "none"}.

| pair | mistakes in this direction | in the other direction | share of all mistakes | p |
|---|---|---|---|---|
{rows}

p comes from a binomial test of the two directions, corrected for the {len(table)} pairs (Holm).
One run, {origin}.

`dvc repro && make confusion` writes this page for the network in the workspace.
"""


def main() -> None:
    """Write the page and its picture."""
    params, data = load_params(), Dataset.load(files.DATA)
    if not pipeline.workspace_is_current():
        raise UserError("the outputs are not those of params.yaml; run `dvc repro` first")
    predictions = pd.read_csv(
        files.PREDICTIONS, dtype={"actual": str, "predicted": str}, keep_default_na=False
    )
    accuracy = files.read_json(files.EVALUATION)["accuracy"]
    if (predictions.actual == predictions.predicted).all():
        raise UserError("the network in the workspace makes no mistakes, so nothing can be shown")
    table = pairs(predictions, data.classes)
    title = (
        f"{data.name}, {params.model.describe()}, {params.train.epochs} epochs, "
        f"seed {params.train.seed}: test accuracy {accuracy:.2%}"
    )
    known = timings.read(pipeline.training_key(params)).conditions
    where = timings.MACHINE.format(**known) if known else "unknown"
    inputs = [str(files.PARAMS), str(files.DVC_YAML), *pipeline.dependencies()]
    changed = ", ".join(pipeline.git("diff", "--name-only", "HEAD", "--", *inputs).split())
    commit = pipeline.git_commit()[:7] + (f" with changes of {changed}" if changed else "")
    origin = f"commit {commit}, machine: {where}"
    target = page_of("confusion", data.name)
    style.save(draw(table, predictions, data), target.with_name("confusion.png"), dpi=90)
    files.write(target, page(table, title, origin))
    print(target)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename} is missing; run `dvc repro` first")

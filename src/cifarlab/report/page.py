"""Writing the page, and giving it to MLflow."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from cifarlab import files, pipeline
from cifarlab.digest import json_digest
from cifarlab.errors import UserError, first_line
from cifarlab.pipeline import WORKSPACE, Revision
from cifarlab.report import statistics
from cifarlab.report.run import Pictures, Run, Values, load, parameters
from cifarlab.tracking import client as tracking

MOST = 5  # runs on a page; with more it could be larger than 5 MB
EXAMPLES = 12  # images that only one of two networks gets right


def write(names: Sequence[str], output: Path) -> Iterator[str]:
    """Write the page of some experiments or commits, or of the workspace if there are no names.

    The page is also logged to the MLflow run of the first one. Yields the path, and a line about
    MLflow.

    Raises
    ------
    UserError
        A revision does not exist or has no results, or there are too many of them.
    """
    if len(names) > MOST:
        raise UserError(f"{len(names)} revisions are too many for one page; at most {MOST}")
    revisions = [pipeline.find(name) for name in dict.fromkeys(names)] or [WORKSPACE]
    known, result = [], "not logged to MLflow: it has no run of this; `cifarlab sync` makes one"
    try:
        known = tracking.all_runs()
    except UserError as error:
        result = f"not logged to MLflow: {error}"
    runs = [load(revision, known) for revision in revisions]
    # A name that is not valid Unicode must not end the program.
    page = render(runs).encode("utf-8", "backslashreplace")
    files.write(output, page)
    yield str(output)
    yield _log(runs, page.decode()) if runs[0].tracked else result


def render(runs: Sequence[Run]) -> str:
    """Return the page as HTML: what the runs have in common, comparisons, then each run."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["statistics"] = statistics
    environment.filters["quote"] = shlex.quote
    head = pipeline.git_commit()
    tables = [parameters(Revision("", head, head)), *(run.params for run in runs)]
    values = {key: [t.get(key, "–") for t in tables] for t in reversed(tables) for key in t}
    return environment.get_template("page.html").render(
        runs=runs,
        head=head[:10],
        metrics=dict.fromkeys(name for run in runs for name in run.metrics),
        charts=[chart for quantity in ("loss", "accuracy") if (chart := _chart(quantity, runs))],
        changes={key: row for key, row in values.items() if any(v != row[0] for v in row)},
        comparisons=[compare(runs[0], other) for other in runs[1:]],
    )


def compare(first: Run, second: Run) -> Values:
    """Compare two runs image by image, or say why that means nothing."""
    found: Values = {"first": first, "second": second}
    one, other = first.predictions, second.predictions
    if one is None or other is None:
        return found | {"refusal": "The predictions of one of the two are missing."}
    same_images = first.test_digest == second.test_digest != ""
    if not same_images or not one.actual.equals(other.actual):
        reason = "The two were not tested on the same images, or it is not known whether they were."
        return found | {"refusal": f"{reason} So they cannot be compared image by image."}
    found["every"], found["each"] = statistics.compare(one, other, first.classes)
    found["only"] = first.try_to("examples", lambda: _examples(first, one, other))
    return found


def _examples(run: Run, one: pd.DataFrame, other: pd.DataFrame) -> list[Pictures]:
    """Return images that only one of two gets right; those first at which the other is surest."""

    def caption(row: Any) -> list[str]:
        said = [f"{t.predicted[row.Index]} ({t.confidence[row.Index]:.0%})" for t in (one, other)]
        return [row.actual, f"1 says {said[0]}", f"2 says {said[1]}"]

    a, b = statistics.right(one), statistics.right(other)
    return [run.pictures(rows, EXAMPLES, caption) for rows in (other[a & ~b], one[b & ~a])]


def _chart(quantity: str, runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return loss or accuracy of all runs over the epochs, with round ticks; None if there is none.

    Each line has a label, the number of its colour, whether it is dashed, and its finite values.
    """
    lines = []
    for color, run in enumerate(runs):
        mixed = ", images mixed by CutMix" if run.params.get("train.cutmix") else ""
        given = run.params if quantity == "loss" else {}
        kind = ", quadratic" if given.get("train.loss") == "quadratic" else ""
        smoothing = given.get("train.label_smoothing")
        smoothed = f", label smoothing {smoothing}" if smoothing else ""
        trained = f"training{mixed}{kind}{smoothed}"
        for split, label in (("val", f"validation{kind}"), ("train", trained)):
            if run.history is not None and f"{split}_{quantity}" in run.history:
                values = run.history[f"{split}_{quantity}"]
                name = f"{run.revision.label}: {label}" if len(runs) > 1 else label
                lines.append((name, color, split == "train", values[np.isfinite(values)]))
    lines = [line for line in lines if len(line[-1])]
    if not lines:
        return None
    every = pd.concat([values for *_, values in lines])
    x = MaxNLocator(6, integer=True).tick_values(0, every.index.max())
    y = MaxNLocator(5).tick_values(every.min(), max(every.max(), every.min() + 0.01))
    return {"title": quantity, "lines": lines, "x": [*x], "y": [*y]}


def _log(runs: Sequence[Run], page: str) -> str:
    """Log the page as an artifact of the first run; return a line about it."""
    digest = json_digest([run.revision.commit for run in runs])[:8]
    name = f"report/comparison-{digest}.html" if len(runs) > 1 else "report/report.html"
    run_id = runs[0].tracked.info.run_id
    try:
        tracking.within(60, lambda: tracking.connect().log_text(run_id, page, name))
    except Exception as error:  # MLflow, SQLAlchemy, requests and the disk raise their own
        return f"not logged to MLflow: {first_line(error)}"
    return f"logged to MLflow as {name} of run {run_id}"

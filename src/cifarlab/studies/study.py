"""`make study`: run what a study lacks and write its page. The state of all studies."""

from pathlib import Path

import pandas as pd

from cifarlab.files import QUESTIONS
from cifarlab.params.load import read_yaml
from cifarlab.studies import executors
from cifarlab.studies.page import made_by, update_notice, write_page
from cifarlab.studies.points import chosen, load, paths, record
from cifarlab.studies.question import names
from cifarlab.tracking.studies import publish


def run(name: str, execute: executors.Executor) -> Path:
    """Run the missing points of studies/NAME.yaml, write docs/studies/NAME.md and return its path.

    Every point is a DVC experiment. It becomes a row of docs/studies/NAME.csv as soon as it has
    finished, so a study that was stopped continues where it was, also on another machine.
    """
    study, points = load(name)
    done = set(record(name, study, points).results.experiment)  # also what a killed study has run
    missing = [point for point in points if point.experiment not in done]
    counts = f"{len(points)} points, {len(done)} done, {len(missing)} to run"
    print(f"{study.question}\n{counts}", flush=True)
    changes = {point.experiment: point.changes for point in missing}
    if changes:
        executors.run(changes, execute, lambda _: record(name, study, points))
    tables = record(name, study, points)
    page = write_page(name, study, points, tables)
    pictures = [page.with_name(f"{name}{suffix}") for suffix in (".png", "-layers.png")]
    files = [path for path in (page, *pictures, *paths(name)) if path.exists()]
    publish(name, study.question, files, list(tables.results.run))
    return page


def rewrite_page(name: str) -> Path:
    """Write docs/studies/NAME.md and its pictures from the tables, without running anything.

    Rows that do not count for the present code are used as well, and the page says so.
    """
    study, points = load(name)
    return write_page(name, study, points, chosen(name, points, any_origin=True))


def report() -> None:
    """Print the state of every study, and update the notice at the top of its page."""
    rows: list[tuple[object, ...]] = []
    for name in names():
        if "space" in read_yaml(QUESTIONS / f"{name}.yaml", ""):
            rows.append((name, "a search: `make search` judges its trials", "", "", "", ""))
            continue
        _, points = load(name)
        results = chosen(name, points, any_origin=True).results
        others = results[~results.counts]
        counts = (len(points), results.counts.sum(), len(others))
        data = " ".join(sorted(results.data.dropna().unique()))
        rows.append((name, *counts, made_by(others), data))
        update_notice(name, results)
    columns = ["study", "points", "valid rows", "rows of other code", "made by commit", "data"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False))

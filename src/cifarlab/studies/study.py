"""`make study`: run what a study lacks and write its page. The state of all studies."""

from pathlib import Path

import pandas as pd

from cifarlab.errors import UserError, first_line
from cifarlab.params.load import load_params
from cifarlab.studies import executors
from cifarlab.studies.page import joined, update_notice, write_page
from cifarlab.studies.points import Point, by_data, load, needed, paths, record
from cifarlab.studies.question import names
from cifarlab.tracking.studies import publish


def run(name: str, jobs: int, workers: str) -> Path:
    """Run the missing points of studies/NAME.yaml, write docs/studies/NAME.md and return its path.

    Every point is a DVC experiment. It becomes a row of docs/studies/NAME.csv as soon as it has
    finished, so a study that was stopped continues where it was, also on another machine.
    """
    study, points = load(name)
    print(study.question)
    before: list[Point] = []
    while True:
        tables = record(name, study, points)  # also what a killed study has run
        done, asked = set(tables.results.experiment), needed(study, points, tables.results)
        missing = [point for point in asked if point.experiment not in done]
        print(f"{len(asked)} trainings, {len(done)} done, {len(missing)} to run", flush=True)
        if missing == before or not missing:  # the same again: the code is not in Git
            break
        changes = {point.experiment: point.changes for point in missing}
        executors.run(changes, jobs, workers, lambda _: record(name, study, points))
        before = missing
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
    found = by_data(name, points)
    tables = next((tables for tables in found.values() if len(tables.results)), found[""])
    return write_page(name, study, points, tables)


def report() -> None:
    """Print the state of every study for each data set, and update the notices of its pages."""
    load_params()  # a damaged file is no fault of the studies
    rows: list[tuple[object, ...]] = []
    for name in names():
        try:
            study, points = load(name)
        except UserError as error:
            rows.append((name, first_line(error), *[""] * 5))
            continue
        every = [tables.results for tables in by_data(name, points).values()]
        for results in [table for table in every if len(table)] or every[:1]:
            asked, valid = needed(study, points, results), results.counts.sum()
            seeds = results.variant.value_counts().min() if len(results) else 0
            counts = (len(asked), f"{valid} of {len(results)}", seeds)
            data, machine = joined(results.data, "; "), joined(results.machine, "; ")
            rows.append((name, *counts, joined(results.commit.str[:7]), data, machine))
            update_notice(name, results)
    columns = ["study", "trainings", "valid rows", "seeds", "commit", "data", "machine"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False))

"""`make study`: run what a study lacks and write its page. The state of all studies."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.files import QUESTIONS
from cifarlab.params.load import read_yaml
from cifarlab.studies.page import made_by, update_notice, write_page
from cifarlab.studies.points import Point, chosen, load, needed, paths, record
from cifarlab.studies.question import names
from cifarlab.tracking.studies import publish

Tasks = dict[str, dict[str, Any]]
STATUSES, ENDED = ("Success", "Running", "Queued", "Failed"), ("Success", "Failed")
WAY_OUT = "`dvc queue stop --kill`, then `make queue`: trainings continue from their checkpoints"


def run(name: str, jobs: int) -> Path:
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
        print(f"{len(asked)} points, {len(done)} done, {len(missing)} to run", flush=True)
        if missing == before or not missing:  # the same again: the code is not in Git
            break
        run_points(missing, jobs, lambda: record(name, study, points))
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


def run_points(points: list[Point], jobs: int, on_change: Callable[[], object]) -> None:
    """Run points as DVC experiments: one after the other, or several at a time in DVC's queue.

    Parameters
    ----------
    jobs : how many at a time; points that are in the queue already are not queued again
    on_change : called whenever a point has ended
    """
    if jobs == 1:
        for left, point in zip(reversed(range(len(points))), points, strict=True):
            pipeline.run_experiment(point.experiment, point.changes)
            on_change()
            print(f"{point.experiment} done, {left} left", flush=True)
        return
    tasks = pipeline.queue_tasks().values()
    queued = {task["name"] for task in tasks if task["status"] not in ENDED}
    for point in points:
        if point.experiment not in queued:
            pipeline.run_experiment(point.experiment, point.changes, queue=True)
            print(f"{point.experiment} queued", flush=True)
    watch(jobs, on_change=on_change)


def watch(jobs: int, patience: float = 60, on_change: Callable[[], object] = lambda: None) -> None:
    """Run DVC's queue to its end and report tasks that hang.

    DVC's queue can hang with several workers (dvc#10562, dvc#10673).

    Parameters
    ----------
    patience : seconds without any processor time after which a task counts as hanging
    on_change : called whenever a task has started or ended

    Raises
    ------
    UserError
        Tasks failed, or all that are left hang.
    """
    ended = {rev for rev, task in pipeline.queue_tasks().items() if task["status"] in ENDED}
    pipeline.start_queue(jobs)
    started, before, hanging = time.monotonic(), "", set[str]()
    active: dict[str, tuple[object, float]] = {}
    while True:
        tasks = {rev: task for rev, task in pipeline.queue_tasks().items() if rev not in ended}
        counts = Counter(task["status"] for task in tasks.values())
        summary = ", ".join(f"{counts[status]} {status.lower()}" for status in STATUSES)
        if summary != before:
            print(f"queue: {summary}", flush=True)
            on_change()
            before = summary
        left = {rev: task for rev, task in tasks.items() if task["status"] not in ENDED}
        if not left:
            break
        if counts["Running"] < min(jobs, len(left)) and time.monotonic() - started > patience / 2:
            pipeline.start_queue(jobs, "--quiet")  # a worker has died
            started = time.monotonic()
        warned, hanging = hanging, _hanging(left, active, patience)
        for name in (left[r]["name"] for r in hanging - warned if left[r]["status"] == "Running"):
            advice = f"`dvc queue kill {name}`, then queue it again"
            print(f"warning: {name} hangs; {advice}", flush=True)
        if hanging == set(left):
            names = ", ".join(task["name"] for task in left.values())
            raise UserError(f"the queue hangs: {names}; {WAY_OUT}")
        time.sleep(min(5.0, patience / 4))
    if failed := [task["name"] for task in tasks.values() if task["status"] == "Failed"]:
        raise UserError(f"failed: {', '.join(failed)}; `dvc queue logs NAME` says why")


def _hanging(left: Tasks, active: dict[str, tuple[object, float]], patience: float) -> set[str]:
    """Return the tasks that have not been active for `patience` seconds.

    `active` keeps the last state of each task, and since when it is in that state. A queued task
    counts as active when the number of running ones changes.
    """
    running, now = sum(task["status"] == "Running" for task in left.values()), time.monotonic()
    for rev, task in left.items():
        state = (task["status"], _processor_time(rev), running)
        if state != active.get(rev, (None, now))[0]:
            active[rev] = (state, now)
    return {rev for rev in left if now - active[rev][1] > patience}


def _processor_time(rev: str) -> float:
    """Return the seconds of processor time that a task and its child processes have used."""
    total = 0.0
    for process in psutil.process_iter(["cmdline"]):
        if any(rev in part for part in process.info["cmdline"] or []):
            with contextlib.suppress(psutil.Error):
                family = [process, *process.children(recursive=True)]
                total += sum(sum(p.cpu_times()[:2]) for p in family)  # user and system
    return total

"""`dvc queue` with an eye on its workers."""

import contextlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil

from cifarlab import UserError


def tasks() -> dict[str, dict[str, Any]]:
    """Return the tasks of the queue by revision, each with name and status (Queued, Running, Success, Failed)."""
    from dvc.repo import Repo

    with Repo() as repo:
        return {task["rev"]: task for task in repo.experiments.celery_queue.status()}


def waiting() -> set[str]:
    """Return the names of the experiments that are queued or running."""
    return {task["name"] for task in tasks().values() if task["status"] in ("Queued", "Running")}


def watch(jobs: int, patience: float = 60, on_change: Callable[[], None] = lambda: None) -> None:
    """Start `jobs` workers, follow the queue to its end and name a task that stands still (dvc#10562, dvc#10673).

    Parameters
    ----------
    patience : seconds without any processor time after which a task stands still
    on_change : called whenever tasks have ended or started

    UserError says that tasks failed that had not before, or that all that are left stand still.
    """
    before = {rev for rev, task in tasks().items() if task["status"] in ("Failed", "Success")}  # these were told already
    start, started = ["dvc", "queue", "start", "--jobs", str(jobs)], time.monotonic()
    begun = started
    subprocess.run(start, check=True)
    moved: dict[str, tuple[Any, float]] = {}  # of a task: what was seen of it, and since when nothing else
    told: set[str] = set()
    counts = ""
    while True:
        listed = {rev: task for rev, task in tasks().items() if rev not in before}
        names = {rev: task["name"] or rev[:7] for rev, task in listed.items()}
        by_status = {s: [rev for rev, task in listed.items() if task["status"] == s] for s in ("Success", "Running", "Queued", "Failed")}
        now = ", ".join(f"{len(revs)} {status.lower()}" for status, revs in by_status.items())
        left = by_status["Running"] + by_status["Queued"]
        if now != counts:
            ended = len(listed) - len(left)
            about = f", about {(time.monotonic() - begun) / ended * len(left) / 60:.0f} min left" if ended and left else ""
            print(f"queue: {now}{about}", flush=True)
            on_change()
        counts = now
        if not left:
            break
        if len(by_status["Running"]) < min(jobs, len(left)) and time.monotonic() - started > patience / 2:  # a worker ended early
            subprocess.run([*start, "--quiet"], check=True)
            started = time.monotonic()
        for rev in left:
            sign = (listed[rev]["status"], _processor_time(rev), len(by_status["Running"]))
            if moved.get(rev, ("", 0))[0] != sign:
                moved[rev] = (sign, time.monotonic())
        still = {rev for rev in left if time.monotonic() - moved[rev][1] > patience}
        for rev in sorted((still - told) & set(by_status["Running"])):
            print(f"warning: {names[rev]} stands still; `dvc queue kill {names[rev]}` ends it, then queue it again", flush=True)
        told |= still
        if still == set(left):
            raise UserError(
                f"the queue stands still: {', '.join(names[rev] for rev in left)}; `dvc queue stop --kill`, then `make queue` again: "
                "trainings continue where they were"
            )
        time.sleep(min(5.0, patience / 4))  # between two looks
    if failed := by_status["Failed"]:
        raise UserError(f"failed: {', '.join(names[rev] for rev in failed)}; `dvc queue logs NAME` says why")


def _processor_time(rev: str) -> float:
    """Return the seconds of processor time of a task and all it started; 0 where no process has it."""
    total = 0.0
    for process in psutil.process_iter(["cmdline"]):
        if any(rev in part for part in process.info["cmdline"] or []):
            with contextlib.suppress(psutil.Error):
                total += sum(sum(p.cpu_times()[:2]) for p in [process, *process.children(recursive=True)])  # user and system
    return total

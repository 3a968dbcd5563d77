"""What an experiment costs when there are thousands: in Git, DVC and MLflow.

    python -m bench.growth              measure with 1,000 and 3,000 synthetic runs and experiments
    python -m bench.growth client 0 50  log 50 runs as one of many clients (MLFLOW_TRACKING_URI)

It works in a temporary folder, which is deleted.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = (1000, 3000)
EPOCHS, METRICS, PARAMS = 10, 6, 60  # of a run of this project, without system metrics


def timed(action: Callable[[], Any]) -> float:
    """Return how many seconds an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def size(folder: Path) -> int:
    """Return the bytes on disk below a folder, in whole blocks."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def log_run(client: Any, experiment: str, name: str, *, again: bool = False) -> None:
    """Log a run like those of this project. With `again`, continue it if it is there."""
    from mlflow.entities import Metric, Param

    query = f"tags.`cifarlab.key` = '{name}'"
    found = client.search_runs([experiment], query, max_results=1) if again else []
    tags = {"cifarlab.key": name}
    run = next(iter(found), None) or client.create_run(experiment, run_name=name, tags=tags)
    values = [
        Metric(f"m{metric}", step / EPOCHS, 0, step)
        for step in range(EPOCHS)
        for metric in range(METRICS)
    ]
    params = [Param(f"section.p{number}", str(number)) for number in range(PARAMS)]
    client.log_batch(run.info.run_id, values, params)
    client.update_run(run.info.run_id, "FINISHED")


def be_a_client(number: int, runs: int) -> None:
    """Log runs one after the other; what fails is looked for and logged again. Print seconds."""
    import mlflow

    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    client, deadline = mlflow.MlflowClient(), time.monotonic() + 1200
    experiment = client.get_experiment_by_name("shared").experiment_id
    for run in range(runs):
        again = False
        while True:
            started = time.perf_counter()
            try:
                log_run(client, experiment, f"{number}-{run}", again=again)
                print(f"{time.perf_counter() - started:.3f}", flush=True)
                break
            except mlflow.MlflowException:
                if time.monotonic() > deadline:
                    raise
                again = True
                time.sleep(1)  # the server is away


def measure_mlflow(folder: Path) -> None:
    """Fill an SQLite store as this project does, and read it as `cifarlab sync` does."""
    os.chdir(folder)
    os.environ["DVC_ROOT"] = str(folder)
    from cifarlab.tracking import client as tracking

    (folder / ".dvc/tmp").mkdir(parents=True)
    client, done = tracking.connect(), 0
    experiment = tracking.experiment_id(client, "growth")
    for count in SIZES:
        started = time.perf_counter()
        for number in range(done, count):
            log_run(client, experiment, f"r{number}")
        per_run = (time.perf_counter() - started) / (count - done)
        reading = timed(tracking.all_runs)
        stored = (folder / "mlflow.db").stat().st_size / count
        done = count
        print(
            f"MLflow, {count:,} runs: {1000 * per_run:.0f} ms to log one without artifacts, "
            f"{stored / 1024:.0f} KiB each, {reading:.1f} s to read all",
            flush=True,
        )


def measure_experiments(folder: Path) -> None:
    """Make references of experiments, each a commit of its own, and list, send and clone them."""
    os.chdir(folder)

    def git(*arguments: str, given: str = "") -> str:
        done = subprocess.run(
            ["git", *arguments], input=given, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    subprocess.run(["dvc", "init", "--quiet"], check=True)
    lock = "".join(f"line {number} of a lock file: 0123456789abcdef\n" for number in range(150))
    Path("dvc.lock").write_text(lock)
    git("add", "--all")
    git("commit", "--quiet", "--message=base")
    head, done = git("rev-parse", "HEAD"), 0
    for count in SIZES:
        stream = []
        for number in range(done, count):
            data = f"{number} {lock}"
            stream.append(
                f"commit refs/exps/{head[:2]}/{head[2:]}/e{number}\n"
                f"committer a <a@b> {1_700_000_000 + number} +0000\ndata 1\ne\nfrom {head}\n"
                f"M 100644 inline dvc.lock\ndata {len(data)}\n{data}\n"
            )
        git("fast-import", "--quiet", given="".join(stream))
        done = count
        from cifarlab import pipeline

        listing = timed(pipeline.experiments)
        show = timed(
            lambda: subprocess.run(["dvc", "exp", "list"], capture_output=True, check=True)
        )
        remote = timed(lambda: git("ls-remote", ".", "refs/exps/*"))
        stored = size(Path(".git")) / count
        print(
            f"DVC, {count:,} experiments: {listing:.1f} s to list them, {show:.1f} s with `dvc exp "
            f"list`, {remote:.2f} s for git ls-remote, {stored / 1024:.1f} KiB each in .git",
            flush=True,
        )


def main() -> None:
    """Measure, or be a client."""
    if sys.argv[1:2] == ["client"]:
        be_a_client(int(sys.argv[2]), int(sys.argv[3]))
        return
    for measure in (measure_mlflow, measure_experiments):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder))
            os.chdir("/")


if __name__ == "__main__":
    main()

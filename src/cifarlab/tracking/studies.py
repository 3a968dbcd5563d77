"""What a study reads from MLflow and writes to it."""

from pathlib import Path
from typing import Any

from cifarlab.params.load import load_params
from cifarlab.pipeline import Revision
from cifarlab.runtime.timings import MACHINE
from cifarlab.tracking import client as tracking
from cifarlab.tracking.sync import run_of

TIMING = ("run", "seconds", "wall", "machine")


def timing_of(revision: Revision) -> dict[str, Any]:
    """Return how long an experiment took, and where.

    Returns
    -------
    run : id of the MLflow run
    seconds, wall : of the training alone, and of the whole run
    machine : device and versions in words

    All values are None, with a warning, if MLflow cannot say.
    """

    def read() -> tuple[Any, ...]:
        client, run_id = tracking.connect(), run_of(revision)
        run, epochs = client.get_run(run_id), client.get_metric_history(run_id, "epoch_seconds")
        # An epoch that was trained again, under other conditions, has two; the newer one counts.
        newest = {e.step: e.value for e in sorted(epochs, key=lambda e: e.timestamp)}
        seconds = sum(newest.values()) or None
        wall = (run.info.end_time - run.info.start_time) / 1000
        return run_id, seconds, wall, MACHINE.format(**run.data.tags)

    values = tracking.try_to(read, f"{revision.name} has no training time")
    return dict(zip(TIMING, values or [None] * len(TIMING), strict=True))


def publish(name: str, question: str, files: list[Path], runs: list[str]) -> None:
    """Make the runs of a study the children of one run, which gets the files of the answer.

    A failure is a warning: the files are the answer, MLflow only shows them.
    """

    def send() -> None:
        client = tracking.connect()
        experiment = tracking.experiment_id(client, load_params().tracking.experiment)
        found = client.search_runs([experiment], f"tags.`study.parent` = '{name}'", max_results=1)
        if not found:
            tags = {"study.parent": name, "mlflow.note.content": question}
            found = [client.create_run(experiment, run_name=f"study {name}", tags=tags)]
        parent = found[0].info.run_id
        # Points that another machine ran have no run here.
        for run in {run.info.run_id for run in tracking.all_runs()}.intersection(runs):
            client.set_tag(run, "mlflow.parentRunId", parent)
            client.set_tag(run, "study", name)
        for file in files:
            client.log_artifact(parent, str(file))
        client.set_terminated(parent)

    tracking.try_to(send, f"MLflow does not show the study {name}")

"""The MLflow run of a pipeline execution, while one of its stages writes to it."""

import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cifarlab import files, pipeline
from cifarlab.errors import first_line, in_a_sentence
from cifarlab.params.sections import Params
from cifarlab.runtime import timings
from cifarlab.tracking import client as tracking
from cifarlab.tracking.client import KEY
from cifarlab.tracking.upload import Execution, Upload

VERSIONS = ("torch", "numpy", "dvc", "mlflow")  # the packages whose versions are logged
SOURCE = {"mlflow.source.name": "dvc.yaml", "mlflow.source.type": "PROJECT"}  # for MLflow's pages
FOLDER = "cifarlab.folder"  # the tag that says on which host and in which folder a stage ran last


def track(stage: str, params: Params, conditions: dict[str, str] | None = None) -> "StageRun":
    """Return a context manager that logs to MLflow what its block writes as one stage.

    A failure of MLflow costs one warning. When the block ends, everything is tried once more. The
    run is KILLED by a KeyboardInterrupt, and FAILED after any other exception. Stages call this in
    a process of its own (`logger`), so that they do not wait.

    Parameters
    ----------
    conditions : on what a training runs: device, threads, precision, PyTorch

    Raises
    ------
    UserError
        The data or the code is missing or damaged.
    """
    execution = Execution(params, pipeline.training_key(params), *pipeline.current_experiment())
    return StageRun(stage, execution, conditions or {})


@dataclass
class StageRun:
    """The run of an execution, found by its identity, or created.

    So stages pass nothing to each other, and a stage that runs again finds its run. The run also
    gets the files of earlier stages that it lacks: the store may be new, a server may have been
    away, or DVC may have restored a stage from its cache.
    """

    stage: str
    execution: Execution
    conditions: dict[str, str] = field(default_factory=dict)
    run: Any = None
    """The run to continue, if it is known."""
    upload: Upload | None = None
    """None while MLflow cannot be used."""
    lock: FileLock | None = None
    """Held while this process writes to the run, so that others know that it is alive."""
    warned: bool = False
    monitor: Any = None
    graph: Path = field(default_factory=Path)
    """The exported network, if this file exists: the stage writes it for MLflow."""
    started: float = field(default_factory=time.time)
    idle_since: int = 0
    """When the previous stage of this run ended, in milliseconds since 1970."""

    def __enter__(self) -> "StageRun":
        """Open the run and start to measure the load of the machine; warn if MLflow fails."""
        with self._warn_once():
            self.upload = self.open()
            if self.stage == "train" and self.execution.params.tracking.system_metrics:
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                self.monitor = SystemMetricsMonitor(self.upload.run_id, 5, resume_logging=True)
                self.monitor.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """End the run; warn if MLflow fails."""
        killed = error is KeyboardInterrupt
        status = "KILLED" if killed else "FAILED" if error else "FINISHED"
        if self.upload or not killed:
            with self._warn_once():
                self.close(status)

    def log_epochs(self) -> None:
        """Log the epochs of history.csv that the run lacks; warn if MLflow fails."""
        if upload := self.upload:
            with self._warn_once():
                upload.send_epochs()

    def open(self) -> Upload:
        """Find or create the run, and log what it lacks of the stages before this one."""
        client, execution = tracking.connect(), self.execution
        experiment = tracking.experiment_id(client, execution.params.tracking.experiment)
        with tracking.store_lock():
            if run := self.run or self._find(client, experiment):
                self.idle_since = run.info.end_time or int(1000 * self.started)
                client.update_run(run.info.run_id, "RUNNING", execution.experiment or None)
            else:
                run = self._create(client, experiment)
            self.lock = claim(run.info.run_id)
        query = f"attributes.status = 'RUNNING' AND tags.`{KEY}` LIKE '%'"
        end_killed(client, client.search_runs([experiment], query))
        upload = Upload(client, run, execution)
        known = execution.identity.items() <= run.data.tags.items()
        upload.send_params({FOLDER: _here()} if known else self._origin(), self.conditions)
        for stage in pipeline.STAGES[: pipeline.STAGES.index(self.stage)]:
            upload.send_stage(stage)
        return upload

    def close(self, status: str) -> str:
        """Log what this stage wrote, if it finished. End the run and return its id."""
        if self.monitor:
            self.monitor.finish()
        upload = self.upload or self.open()  # MLflow may have come back
        tracking.wait_for_database()
        if status == "FINISHED":
            upload.send_stage(self.stage)
        # The time between two stages does not count: a figure drawn a day later adds seconds.
        end = self.idle_since + int(1000 * (time.time() - self.started))
        upload.client.set_terminated(upload.run_id, status, end)
        if self.lock:
            Path(self.lock.lock_file).unlink(missing_ok=True)
            self.lock.release()
        wanted = self.execution.params.tracking.log_model and self.stage != "train"
        if status == "FINISHED" and wanted:
            # At the end: a proxy may refuse a file of this size, and a run is worth having without.
            problem = "the model was not logged: %s; tracking.log_model: false leaves it out"
            with in_a_sentence(problem):
                upload.send_model(self.graph)
        return upload.run_id

    def _origin(self) -> dict[str, str]:
        """Return the tags that name the experiment, the commit and the folder of this execution."""
        commit = self.execution.baseline or pipeline.git_commit()
        tags = self.execution.identity | {FOLDER: _here()}
        return tags | ({"git.commit": commit, "mlflow.source.git.commit": commit} if commit else {})

    def _find(self, client: Any, experiment: str) -> Any:
        """Return the run of this execution, or one that another execution can no longer finish.

        `dvc exp run` draws a new name for every try.
        """
        execution = self.execution
        runs = client.search_runs([experiment], f"tags.`{KEY}` = '{execution.key}'")
        same = [run for run in runs if execution.deciding.items() <= run.data.tags.items()]
        mine = [run for run in same if execution.identity.items() <= run.data.tags.items()]
        if tracking.database() != files.mlflow_database().resolve():  # others may use the store
            mine = [run for run in mine if "logged.plot" not in run.data.tags or _is_here(run)]
        return next(iter(mine), None) or next(filter(_is_left, same), None)

    def _create(self, client: Any, experiment: str) -> Any:
        execution = self.execution
        variant, epochs = execution.params.model.describe(), timings.read(execution.key).epochs
        tags = SOURCE | {"variant": variant} | self._origin()
        if execution.folder == Path():  # a commit may have run with others
            tags |= {f"version.{package}": version(package) for package in VERSIONS}
            tags |= {"version.python": platform.python_version()}
        start = self.idle_since = int(1000 * self.started)
        if epochs and self.stage != "train":  # the training ran before
            ended, seconds = next(iter(epochs.values()))
            start, self.idle_since = int(ended - 1000 * seconds), max(epochs.values())[0]
        return client.create_run(experiment, start, tags, run_name=execution.experiment or variant)

    @contextmanager
    def _warn_once(self) -> Iterator[None]:
        """Turn a failure into a warning, one for each stage, and stop using MLflow."""
        try:
            yield
        except Exception as error:  # MLflow, requests, SQLAlchemy and the disk raise their own
            self.upload = None
            if not self.warned:
                tracking.warn(self.stage, f"{type(error).__name__}: {first_line(error)}")
            self.warned = True


def end_killed(client: Any, runs: Iterable[Any]) -> None:
    """Mark those of some RUNNING runs as KILLED whose process has ended."""
    for run in runs:
        if not is_alive(run.info.run_id):
            client.set_terminated(run.info.run_id, "KILLED")
            _lock_file(run.info.run_id).unlink(missing_ok=True)


def claim(run_id: str) -> FileLock | None:
    """Lock a run for this process; None if another process writes to it.

    The kernel releases the lock when the process ends in any way.
    """
    lock = FileLock(_lock_file(run_id), thread_local=False)
    with suppress(Timeout):
        lock.acquire(blocking=False)
    return lock if lock.is_locked else None


def is_alive(run_id: str) -> bool:
    """Tell whether a process may still write to a run.

    A run without a lock file was not started in this checkout, and may run elsewhere, unless the
    store belongs to this checkout alone.
    """
    if not _lock_file(run_id).exists():
        return tracking.database() != files.mlflow_database().resolve()
    if lock := claim(run_id):
        lock.release()
    return not lock


def _lock_file(run_id: str) -> Path:
    return files.scratch() / "runs" / f"{run_id}.lock"


def _is_left(run: Any) -> bool:
    """Tell whether the execution that started a run may have left it, and no longer continues it.

    The run is not whole, or its experiment was killed before DVC had recorded it, and no process
    writes to it. That may also be so between two stages. An execution whose run was taken over then
    gets a new one with its next stage, which logs everything again.
    """
    tags = run.data.tags
    name = tags.get("dvc.exp.name")
    is_whole = "logged.plot" in tags and not (name and _is_here(run))
    if is_whole or name in [experiment.name for experiment in pipeline.experiments()]:
        return False
    return run.info.status != "RUNNING" or not is_alive(run.info.run_id)


def _is_here(run: Any) -> bool:
    """Tell whether a run was made in this checkout, or in a temporary copy of it."""
    host, _, folder = run.data.tags.get(FOLDER, "").partition(":")
    return host == platform.node() and Path(folder).is_relative_to(files.root())


def _here() -> str:
    return f"{platform.node()}:{Path.cwd()}"

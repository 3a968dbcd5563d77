"""The MLflow run of a pipeline execution, while one of its stages writes to it."""

import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from cifarlab import pipeline
from cifarlab.errors import first_line
from cifarlab.params.sections import Params
from cifarlab.runtime import timings
from cifarlab.tracking.client import KEY, connect, experiment_id, wait_for_database
from cifarlab.tracking.upload import Execution, Upload

VERSIONS = ("torch", "numpy", "dvc", "mlflow")  # the packages whose versions are logged
SOURCE = {"mlflow.source.name": "dvc.yaml", "mlflow.source.type": "PROJECT"}  # for MLflow's pages


def track(
    stage: str, params: Params, conditions: dict[str, str] | None = None, *, take_over: bool = False
) -> "StageRun":
    """Return a context manager that logs to MLflow what its block writes as one stage.

    A failure of MLflow costs one warning; when the block ends, everything is tried once more.
    The run is KILLED by a KeyboardInterrupt, within about a second, and FAILED after any other
    exception.

    Parameters
    ----------
    conditions : on what a training runs: device, threads, precision, PyTorch
    take_over : continue the unfinished run of the same training, whichever experiment it belongs
        to: `dvc exp run` draws a new name for every try. Only for a train stage that knows that
        no other process trains the same network now.

    Raises
    ------
    UserError
        The data or the code is missing or damaged.
    """
    execution = Execution(params, pipeline.training_key(params), *pipeline.current_experiment())
    return StageRun(stage, execution, conditions or {}, take_over)


@dataclass
class StageRun:
    """The run of an execution, found by training key and DVC experiment, or created.

    So stages pass nothing to each other, and a stage that runs again finds its run. The run also
    gets the files of earlier stages that it lacks: the store may be new, a server may have been
    away, or DVC may have restored a stage from its cache.
    """

    stage: str
    execution: Execution
    conditions: dict[str, str] = field(default_factory=dict)
    take_over: bool = False
    upload: Upload | None = None
    """None while MLflow cannot be used."""
    warned: bool = False
    monitor: Any = None
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
        if self.monitor:  # it must end even if MLflow does not answer
            _within(0.5 if killed else 9, self.monitor.finish)
        if not killed:
            self._try_to_close("FAILED" if error else "FINISHED")
        elif self.upload:
            _within(1, lambda: self._try_to_close("KILLED"))

    def log_epochs(self) -> None:
        """Log the epochs of history.csv that the run lacks; warn if MLflow fails."""
        if self.upload:
            with self._warn_once():
                wait_for_database()
                self.upload.send_epochs()

    def open(self) -> Upload:
        """Find or create the run, and log what it lacks of the stages before this one."""
        client, execution = connect(), self.execution
        experiment = experiment_id(client, execution.params.tracking.experiment)
        name = execution.experiment
        origin = {"dvc.exp.name": name, "dvc.exp.baseline": execution.baseline if name else ""}
        if run := self._find(client, experiment):
            self.idle_since = run.info.end_time or int(1000 * self.started)
            client.update_run(run.info.run_id, "RUNNING", name or None)
        else:
            run = self._create(client, experiment, origin)
        changed = {k: v for k, v in origin.items() if run.data.tags.get(k, "") != v}
        upload = Upload(client, run, execution)
        upload.send_params(changed | self.conditions)
        for stage in pipeline.STAGES[: pipeline.STAGES.index(self.stage)]:
            upload.send_stage(stage)
        return upload

    def close(self, upload: Upload, status: str) -> None:
        """Log what this stage wrote, if it finished, and end the run."""
        if status == "FINISHED":
            upload.send_stage(self.stage)
        # The time between two stages does not count: a figure drawn a day later adds seconds.
        end = self.idle_since + int(1000 * (time.time() - self.started))
        upload.client.set_terminated(upload.run_id, status, end)

    def _try_to_close(self, status: str) -> None:
        with self._warn_once():
            upload = self.upload or self.open()  # MLflow may have come back
            wait_for_database()
            if self.monitor:  # a training shorter than the sampling interval needs a sample, too
                self.monitor.collect_metrics()
                self.monitor.publish_metrics(self.monitor.aggregate_metrics())
                self.monitor.mlflow_logger.flush()
            self.close(upload, status)

    def _find(self, client: Any, experiment: str) -> Any:
        runs = client.search_runs([experiment], f"tags.`{KEY}` = '{self.execution.key}'")
        name = self.execution.experiment
        found = [run for run in runs if run.data.tags["dvc.exp.name"] == name]
        if not found and self.take_over:
            found = [run for run in runs if "logged.train" not in run.data.tags]
        return found[0] if found else None

    def _create(self, client: Any, experiment: str, origin: dict[str, str]) -> Any:
        execution = self.execution
        variant, epochs = execution.params.model.describe(), timings.read(execution.key).epochs
        commit = execution.baseline or pipeline.git_commit()
        tags = {KEY: execution.key, "variant": variant, "version.python": platform.python_version()}
        tags |= {f"version.{package}": version(package) for package in VERSIONS}
        tags |= SOURCE | {"git.commit": commit, "mlflow.source.git.commit": commit} | origin
        tags = {k: v for k, v in tags.items() if v or k == "dvc.exp.name"}
        start = self.idle_since = int(1000 * self.started)
        if epochs and self.stage != "train":  # the training ran before
            ended, seconds = next(iter(epochs.values()))
            start, self.idle_since = int(ended - 1000 * seconds), max(epochs.values())[0]
        name = execution.experiment or variant
        return client.create_run(experiment, start, tags, run_name=name)

    @contextmanager
    def _warn_once(self) -> Iterator[None]:
        """Turn a failure into a warning, one for each stage, and stop using MLflow."""
        try:
            yield
        except Exception as error:  # MLflow, requests, SQLAlchemy and the disk raise their own
            self.upload = None
            if not self.warned:
                reason = f"{type(error).__name__}: {first_line(error)[:200]}"
                text = f"MLflow did not receive everything from the {self.stage} stage ({reason})"
                advice = "The files are complete; `make sync` logs what is missing."
                print(f"warning: {text}. {advice}", file=sys.stderr, flush=True)
            self.warned = True


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Do something that may hang, and stop waiting for it after some seconds."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)

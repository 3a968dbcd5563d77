"""Everything that knows MLflow. Files are the truth, MLflow is their mirror: no failure in here ends a stage."""

import functools
import hashlib
import json
import logging
import os
import platform
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec

import pandas as pd
import yaml
from filelock import FileLock

from cifarlab import first_line
from cifarlab.files import root
from cifarlab.params import Params

P = ParamSpec("P")
KEY = "cifarlab.key"
STAGES = ("train", "evaluate", "plot")
VERSIONS = ("torch", "numpy", "dvc", "mlflow")


def training_key(params: Params, folder: Path = Path()) -> str:
    """Hash what DVC calls the inputs of the train stage: its parameters, its code and the digest of its data.

    The same inputs give the same network, so this names a training wherever and however often it runs.
    """
    stage = yaml.safe_load((folder / "dvc.yaml").read_text("utf-8"))["stages"]["train"]
    inputs: dict[str, Any] = {k: v for k, v in params.flat().items() if any(k == p or k.startswith(f"{p}.") for p in stage["params"])}
    for dep in stage["deps"]:
        path = folder / dep
        inputs[dep] = json.loads((path / "dataset.json").read_text("utf-8"))["digest"] if path.is_dir() else _sha256(path)
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def lock_digest(lock: Path) -> str:
    """Hash the entries that dvc.lock has of the stages before plot: DVC writes plot's own when the stage is over."""
    stages = yaml.safe_load(lock.read_text("utf-8"))["stages"]
    return hashlib.sha256(json.dumps({s: stages.get(s) for s in ("download", "train", "evaluate")}, sort_keys=True).encode()).hexdigest()


def connect() -> Any:
    """Return an MlflowClient of MLFLOW_TRACKING_URI, or of mlflow.db at the root of the main checkout."""
    # A server that is away must cost seconds, not MLflow's own 7 retries of 120 seconds.
    for name, value in {"MAX_RETRIES": "1", "BACKOFF_FACTOR": "1", "TIMEOUT": "10"}.items():
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)

    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or _local_store())
    with _alone():
        return mlflow.MlflowClient()  # makes the tables of a new database


def experiment_id(client: Any, name: str) -> str:
    """Return the id of the MLflow experiment, made when missing, its artifacts at the root of the main checkout."""
    import mlflow

    with _alone():
        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":  # its name stays taken
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        artifacts = None
        if mlflow.get_tracking_uri() == _local_store():
            artifacts = (root() / "mlartifacts").as_uri()
            with sqlite3.connect(root() / "mlflow.db") as database:
                database.execute("PRAGMA journal_mode=WAL")  # a reader (the UI) and a writer do not stop each other
        return str(client.create_experiment(name, artifacts))


def _alone() -> FileLock:
    """Lock out the other stages of this checkout: two that make the store at the same time break each other."""
    return FileLock(root() / ".dvc" / "tmp" / "mlflow.lock", timeout=60)


def _local_store() -> str:
    return f"sqlite:///{root() / 'mlflow.db'}"


def harmless(method: "Callable[Concatenate[Mirror, P], None]") -> "Callable[Concatenate[Mirror, P], None]":
    """Turn any failure of MLflow into one warning; what follows is no longer logged."""

    @functools.wraps(method)
    def wrapper(self: "Mirror", /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.client is None:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # MLflow, requests, SQLAlchemy and the disk each raise their own
            self.client = None
            print(
                f"warning: MLflow does not get the rest of this {self.stage} stage ({type(error).__name__}: {first_line(error)[:200]}); "
                "the files are not affected",
                file=sys.stderr,
            )

    return wrapper


class Mirror:
    """The MLflow run of a pipeline execution, as one of its stages writes to it.

    The run is found by training key and DVC experiment, so stages pass nothing to each other and running a stage
    again goes to the same run. When there is none (the store is new, or DVC restored the earlier stages from its
    cache), it is made and gets what the earlier stages wrote, from their files.
    """

    def __init__(self, stage: str, params: Params) -> None:
        self.stage, self.params = stage, params
        self.client: Any = None
        self.run_id = ""
        self.monitor: Any = None
        self.opened = self.clock = time.perf_counter()
        self.idle_since: int | None = None

    def __enter__(self) -> "Mirror":
        try:
            self.client = connect()
        except Exception as error:  # a malformed MLFLOW_TRACKING_URI
            print(f"warning: MLflow cannot be reached ({first_line(error)[:200]}); the files are not affected", file=sys.stderr)
        self._open()
        self.clock = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.monitor:
            self.monitor.finish()  # raises nothing, and must end even where MLflow no longer answers
        self._close("FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED")

    @harmless
    def epoch(self, epoch: Any) -> None:
        """Log an epoch while training goes on."""
        now = time.perf_counter()
        row = {k: v for k, v in epoch._asdict().items() if k != "epoch"}
        self._epochs(pd.DataFrame([{**row, "epoch_seconds": now - self.clock}], index=[epoch.epoch]))
        self.clock = now

    @harmless
    def _open(self) -> None:
        experiment = experiment_id(self.client, self.params.tracking.experiment)
        key, name = training_key(self.params), os.environ.get("DVC_EXP_NAME", "")
        runs = self.client.search_runs([experiment], f"tags.`{KEY}` = '{key}' and tags.`dvc.exp.name` = '{name}'", max_results=1)
        tags = {
            KEY: key,
            "dvc.exp.name": name,
            "dvc.exp.baseline": os.environ.get("DVC_EXP_BASELINE_REV", ""),
            "git.commit": os.environ.get("DVC_EXP_BASELINE_REV") or _git_commit(),
            "variant": self.params.model.describe(),
            "version.python": platform.python_version(),
            **{f"version.{package}": version(package) for package in VERSIONS},
        }
        # Where the UI looks for them.
        tags |= {"mlflow.source.git.commit": tags["git.commit"], "mlflow.source.name": "dvc.yaml", "mlflow.source.type": "PROJECT"}
        if runs:
            self.run_id, self.idle_since = runs[0].info.run_id, runs[0].info.end_time
            self.client.update_run(self.run_id, "RUNNING")
        else:
            self.run_id = self.client.create_run(
                experiment, run_name=name or self.params.model.describe(), tags={k: v for k, v in tags.items() if v or k == "dvc.exp.name"}
            ).info.run_id
        self._log_params()
        if not runs:
            for stage in STAGES[: STAGES.index(self.stage)]:
                self._log_files(stage)
        if self.stage == "train":
            self._start_training()

    def _start_training(self) -> None:
        import mlflow
        import torch
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        from cifarlab.training import precision

        cuda = self.params.train.device != "cpu" and torch.cuda.is_available()
        self._set_tags(
            {
                "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
                "threads": str(torch.get_num_threads()),
                "precision": str(precision(self.params.train, torch.device("cuda" if cuda else "cpu"))).removeprefix("torch."),
            }
        )
        if self.params.tracking.system_metrics:
            self.monitor = SystemMetricsMonitor(
                self.run_id, sampling_interval=5, resume_logging=True, tracking_uri=mlflow.get_tracking_uri()
            )
            self.monitor.start()

    @harmless
    def _close(self, status: str) -> None:
        if self.monitor:
            # A training shorter than the sampling interval has a sample, too.
            self.monitor.collect_metrics()
            self.monitor.publish_metrics(self.monitor.aggregate_metrics())
            self.monitor.mlflow_logger.flush()
        if status == "FINISHED":
            self._log_files(self.stage)
        # The duration of a run is the time of its stages, not that between them: a figure drawn a day later adds seconds.
        end = None if self.idle_since is None else self.idle_since + int(1000 * (time.perf_counter() - self.opened))
        self.client.set_terminated(self.run_id, status, end)

    def _log_params(self) -> None:
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        params = {key: str(value) for key, value in self.params.flat().items()}
        self.client.log_batch(self.run_id, params=[Param(key, value) for key, value in params.items() if key not in known])
        # MLflow never changes a parameter; that of a later stage may have changed since the training.
        self._set_tags({f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value})

    def _log_files(self, stage: str) -> None:
        {"train": self._log_training, "evaluate": self._log_evaluation, "plot": self._log_figures}[stage]()

    def _log_training(self) -> None:
        history = pd.read_csv("plots/history.csv", index_col="epoch")
        self._epochs(history)
        final = json.loads(Path("metrics/train.json").read_text("utf-8"))
        self._metrics({name: value for name, value in final.items() if name not in history})
        self.client.log_artifact(self.run_id, "plots/history.csv", "tables")
        self._set_tags({"weights.sha256": _sha256(Path("models/network.safetensors"))})
        self._log_dataset()

    def _log_dataset(self) -> None:
        import mlflow.data
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.entities import DatasetInput, InputTag

        from cifarlab.datasets import Dataset

        data = Dataset.load(Path("data"))
        digest = json.loads(Path("data/dataset.json").read_text("utf-8"))["digest"]
        sources = ["sklearn.datasets.load_digits"] if self.params.data.name == "digits" else self.params.data.sources
        source = CodeDatasetSource({"sources": sources})
        # MLflow takes 36 characters, and would itself hash only the first 10,000 values.
        dataset = mlflow.data.from_numpy(data.images["train"], source, targets=data.labels["train"], name=data.name, digest=digest[:32])
        self.client.log_inputs(self.run_id, [DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])])

    def _log_evaluation(self) -> None:
        metrics = json.loads(Path("metrics/evaluate.json").read_text("utf-8"))
        per_class = metrics.pop("accuracy_per_class")
        self._metrics({f"test_{name}": value for name, value in metrics.items()})
        allowed = re.compile(r"[^/\w.: -]")  # in the name of a metric
        self._metrics({f"accuracy/{allowed.sub('_', name)}": value for name, value in per_class.items()})
        for table in ("predictions", "per_class", "confusion"):
            self.client.log_artifact(self.run_id, f"plots/{table}.csv", "tables")
        # What log_table writes, but replaced, not appended to, when the stage runs again.
        self.client.log_text(self.run_id, pd.read_csv("plots/confusion.csv").to_json(orient="split", index=False), "confusion_matrix.json")
        self._set_tags({"mlflow.loggedArtifacts": json.dumps([{"path": "confusion_matrix.json", "type": "table"}])})
        if self.params.tracking.log_model:
            self._log_model()

    def _log_model(self) -> None:
        import mlflow.pytorch
        import torch
        from mlflow.models import infer_signature

        from cifarlab import models
        from cifarlab.datasets import Dataset

        weights = Path("models/network.safetensors")
        logged = self.client.get_run(self.run_id)
        if logged.outputs and logged.outputs.model_outputs and logged.data.tags.get("logged.sha256") == _sha256(weights):
            return
        network = models.load(weights)
        # A batch of one would freeze the batch size of the exported graph to one.
        example = Dataset.load(Path("data")).images["test"][:2].transpose(0, 3, 1, 2).copy()
        with torch.inference_mode():
            signature = infer_signature(example, network(torch.from_numpy(example)).numpy())
        with mlflow.start_run(run_id=self.run_id):
            mlflow.pytorch.log_model(
                network,
                name="model",
                signature=signature,
                input_example=example,
                serialization_format="pt2",
                pip_requirements=[f"torch=={version('torch')}"],
            )
        self._set_tags({"logged.sha256": _sha256(weights)})

    def _log_figures(self) -> None:
        for figure in sorted(Path("plots").glob("*.png")):
            self.client.log_artifact(self.run_id, str(figure), "figures")
        if Path("dvc.lock").exists():  # not when a stage is run by hand before DVC ever ran
            self._set_tags({"dvc.lock": lock_digest(Path("dvc.lock"))})

    def _epochs(self, rows: pd.DataFrame) -> None:
        """Log one row per epoch, but for the epochs that the run already has."""
        from mlflow.entities import Metric

        done = {point.step for point in self.client.get_metric_history(self.run_id, "train_loss")}
        now = int(time.time() * 1000)
        metrics = [
            Metric(str(name), float(value), now, step)
            for step, row in zip(rows.index.astype(int).tolist(), rows.to_dict("records"), strict=True)
            if step not in done
            for name, value in row.items()
            if pd.notna(value)
        ]
        for start in range(0, len(metrics), 1000):  # MLflow's limit for a batch
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def _metrics(self, values: dict[str, float]) -> None:
        """Log final figures, but for those that the run already has."""
        known = self.client.get_run(self.run_id).data.metrics
        for name, value in values.items():
            if known.get(name) != value:
                self.client.log_metric(self.run_id, name, value)

    def _set_tags(self, tags: dict[str, str]) -> None:
        for name, value in tags.items():
            self.client.set_tag(self.run_id, name, value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def recent_runs(experiment: str, last: int) -> pd.DataFrame:
    """Return the newest runs, one a row, oldest first: name, variant, test figures, size and training time in seconds."""
    client = connect()
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], max_results=last) if found else []
    rows = []
    for run in reversed(runs):
        metrics = run.data.metrics
        seconds = sum(point.value for point in client.get_metric_history(run.info.run_id, "epoch_seconds"))
        rows.append(
            {
                "run": run.info.run_name,
                "variant": run.data.tags.get("variant", ""),
                "test accuracy": f"{metrics['test_accuracy']:.2%}" if "test_accuracy" in metrics else None,
                "test loss": f"{metrics['test_loss']:.3f}" if "test_loss" in metrics else None,
                "macro F1": f"{metrics['test_macro_f1']:.3f}" if "test_macro_f1" in metrics else None,
                "parameters": f"{metrics['parameters']:,.0f}" if "parameters" in metrics else None,
                "training s": f"{seconds:.0f}" if seconds else None,
            }
        )
    return pd.DataFrame(rows)


def timing(params: Params) -> dict[str, Any]:
    """Return device, threads and seconds per epoch of the training that `params` name, as MLflow has them.

    Empty where MLflow cannot be read or does not know the training.
    """
    try:
        return _timing(connect(), params)
    except Exception as error:  # MLflow's, SQLAlchemy's, requests'
        print(f"warning: MLflow cannot be read ({first_line(error)[:200]}); no timings are kept", file=sys.stderr)
        return {}


def _timing(client: Any, params: Params) -> dict[str, Any]:
    found = client.get_experiment_by_name(params.tracking.experiment)
    runs = client.search_runs([found.experiment_id], f"tags.`{KEY}` = '{training_key(params)}'") if found else []
    for run in runs:
        if points := client.get_metric_history(run.info.run_id, "epoch_seconds"):
            tags = run.data.tags
            return {
                "device": tags.get("device"),
                "threads": tags.get("threads"),
                "precision": tags.get("precision"),
                "epoch_seconds": [round(p.value, 1) for p in sorted(points, key=lambda p: p.step)],
            }
    return {}

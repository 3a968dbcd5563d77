"""Everything that knows MLflow. Files are the truth, MLflow is their mirror: no failure in here ends a stage."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock

from cifarlab import UserError, first_line
from cifarlab.files import root, write_json
from cifarlab.params import Params, load_params

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
        try:
            inputs[dep] = _sha256(path) if path.suffix else json.loads((path / "dataset.json").read_text("utf-8"))["digest"]
        except (OSError, ValueError, LookupError) as error:
            raise UserError(f"{path} is missing or damaged ({first_line(error)}); `dvc repro` makes data anew, git has the code") from error
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def outputs(stage: str, folder: Path = Path()) -> list[Path]:
    """Return the files that a stage of dvc.yaml writes, metrics included, relative to `folder`, that are there."""
    entry = yaml.safe_load((folder / "dvc.yaml").read_text("utf-8"))["stages"][stage]
    names = [next(iter(out)) if isinstance(out, dict) else out for out in [*entry["outs"], *entry.get("metrics", [])]]
    found = (path for name in names for path in [folder / name, *(folder / name).rglob("*")])
    return sorted(path.relative_to(folder) for path in found if path.is_file())


def lock_digest(lock: str) -> str:
    """Hash the entries that a dvc.lock has of the stages before plot: DVC writes plot's own when the stage is over."""
    try:
        stages = yaml.safe_load(lock)["stages"]
        entries = {stage: stages.get(stage) for stage in ("download", "train", "evaluate")}
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise UserError("its dvc.lock is damaged; `git checkout dvc.lock` or `dvc repro` mends it") from error
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def connect() -> Any:
    """Return an MlflowClient of MLFLOW_TRACKING_URI, or of mlflow.db at the root of the main checkout."""
    # A server that is away must cost seconds, not MLflow's own 7 retries of 120 seconds. None at all: what was asked for may be done
    # although the answer is lost, and a second request would make a second run.
    for name, value in {"HTTP_REQUEST_MAX_RETRIES": "0", "HTTP_REQUEST_TIMEOUT": "8", "DISABLE_TELEMETRY": "true"}.items():
        os.environ.setdefault(f"MLFLOW_{name}", value)
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it may hold a password
    import mlflow

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}")
    _wait_for_database()
    with _alone():
        if (path := _database()) and not path.exists():  # its tables are made elsewhere: half of them would never be mended
            new = path.with_name(f"{path.name}.new")
            new.write_bytes(b"")
            mlflow.MlflowClient(f"sqlite:///{new}")
            new.replace(path)
        return mlflow.MlflowClient()


def experiment_id(client: Any, name: str) -> str:
    """Return the id of the MLflow experiment, made when missing, its artifacts beside the database where that is SQLite."""
    with _alone():
        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":  # its name stays taken
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        artifacts = None
        if path := _database():  # MLflow's own default starts at the working folder, which a `--temp` run deletes
            artifacts = (path.parent / "mlartifacts").as_uri()
            with sqlite3.connect(path) as database:
                database.execute("PRAGMA journal_mode=WAL")  # a reader (the UI) and a writer do not stop each other
        return str(client.create_experiment(name, artifacts))


def _alone() -> FileLock:
    """Lock out the other stages of this checkout: two that make the store at the same time break each other."""
    return FileLock(root() / ".dvc" / "tmp" / "mlflow.lock", timeout=45)


def _database() -> Path | None:
    """Return the file of the SQLite store that `connect` has chosen; None for a server."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def diary(key: str, checkout: Path | None = None) -> Path:
    """Return the file, outside DVC's outputs, that says when each epoch of a training ended and on what it ran."""
    return (checkout or root()) / ".cache" / "trainings" / f"{key}.json"


def read_diary(key: str, checkout: Path | None = None) -> dict[str, Any]:
    """Return {"conditions": {name: value}, "epochs": {number: [end in ms since 1970, seconds it took]}}; empty where nothing is known."""
    try:
        content = json.loads(diary(key, checkout).read_text("utf-8"))
        return {"conditions": dict(content["conditions"]), "epochs": dict(content["epochs"])}
    except (OSError, ValueError, LookupError, TypeError):
        return {"conditions": {}, "epochs": {}}


def _wait_for_database() -> None:
    """Raise OperationalError where another process has locked the SQLite store for 5 s: MLflow itself would wait 20 s a call."""
    if (path := _database()) and path.exists():
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()


class Mirror:
    """The MLflow run of a pipeline execution, as one of its stages writes to it.

    The run is found by training key and DVC experiment, so stages pass nothing to each other and running a stage again goes to the same
    run. What it lacks of this stage and those before (the store is new, a server was away, DVC restored a stage) it gets from their files.

    Parameters
    ----------
    conditions : of a train stage, `training.conditions`
    adopt : continue a killed run of the same training whatever its experiment, for `dvc exp run` draws a new name every time; of a train
        stage that knows that no other process trains the same
    origin : name and baseline commit of the DVC experiment, if not those that DVC names to its stages
    """

    def __init__(
        self, stage: str, params: Params, conditions: dict[str, str] | None = None, *, adopt: bool = False, origin: tuple[str, ...] = ()
    ) -> None:
        self.stage, self.params, self.conditions, self.adopt = stage, params, conditions or {}, adopt
        self.origin = origin or (os.environ.get("DVC_EXP_NAME", ""), os.environ.get("DVC_EXP_BASELINE_REV", ""))
        self.key = training_key(params)
        self.diary = read_diary(self.key)
        self.client: Any = None
        self.monitor: Any = None
        self.tags: dict[str, str] = {}
        self.run_id, self.warned = "", False
        self.opened = self.clock = time.perf_counter()
        self.idle_since: int | None = None

    def __enter__(self) -> "Mirror":
        with self.harmless():
            self._open()
            if self.conditions and self.params.tracking.system_metrics:
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                self.monitor = SystemMetricsMonitor(self.run_id, sampling_interval=5, resume_logging=True)
                self.monitor.start()
        self.clock = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        killed = kind is KeyboardInterrupt
        if killed and hasattr(signal, "setitimer"):  # it was heard: see stages.run
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.monitor:  # must end even where MLflow no longer answers
            _within(1 if killed else 9, self.monitor.finish)
        if not killed:
            self._close("FINISHED" if kind is None else "FAILED")
        elif self.client:
            _within(1, lambda: self._close("KILLED"))

    @contextlib.contextmanager
    def harmless(self) -> Iterator[None]:
        """Turn any failure of MLflow into one warning a stage; nothing is logged until the stage ends and tries once more."""
        try:
            yield
        except Exception as error:  # MLflow, requests, SQLAlchemy and the disk each raise their own
            self.client = None
            if not self.warned:
                told = f"warning: MLflow does not get all of this {self.stage} stage ({type(error).__name__}: {first_line(error)[:200]})"
                print(f"{told}; the files are not affected, `make sync` logs what is missing", file=sys.stderr, flush=True)
            self.warned = True

    def epoch(self, epoch: int) -> None:
        """Note the end of an epoch, and log what history.csv has of it while training goes on."""
        now = time.perf_counter()
        before = {number: times for number, times in self.diary["epochs"].items() if int(number) < epoch}
        times = [int(time.time() * 1000), round(now - self.clock, 3)]
        self.diary = {"conditions": self.conditions, "epochs": before | {str(epoch): times}}
        self.clock = now
        with contextlib.suppress(OSError):  # a full disk costs the timings
            write_json(diary(self.key), self.diary)
        if self.client:
            with self.harmless():
                _wait_for_database()
                self._log_epochs()

    def _open(self) -> None:
        """Find the run, or make it, and log what it lacks of the stages before this one."""
        self.client = connect()
        experiment = experiment_id(self.client, self.params.tracking.experiment)
        name, baseline = self.origin
        same_key = f"tags.`{KEY}` = '{self.key}'"
        runs = self.client.search_runs([experiment], f"{same_key} and tags.`dvc.exp.name` = '{name}'", max_results=1)
        if not runs and self.adopt:
            runs = [run for run in self.client.search_runs([experiment], same_key) if "logged.train" not in run.data.tags]
        origin = {"dvc.exp.name": name, "dvc.exp.baseline": baseline if name else ""}
        if runs:
            self.run_id, self.idle_since, self.tags = runs[0].info.run_id, runs[0].info.end_time, runs[0].data.tags
            self.client.update_run(self.run_id, "RUNNING", name or None)
            self._set_tags({k: v for k, v in origin.items() if self.tags.get(k, "") != v})
        else:
            head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
            commit, variant = baseline or head, self.params.model.describe()
            tags = origin | {KEY: self.key, "git.commit": commit, "variant": variant, "version.python": platform.python_version()}
            tags |= {f"version.{package}": version(package) for package in VERSIONS}
            # Where the UI looks for them.
            tags |= {"mlflow.source.git.commit": commit, "mlflow.source.name": "dvc.yaml", "mlflow.source.type": "PROJECT"}
            known = [] if self.stage == "train" else list(self.diary["epochs"].values())
            self.run_id = self.client.create_run(
                experiment,
                start_time=int(known[0][0] - 1000 * known[0][1] if known else 1000 * (time.time() - time.perf_counter() + self.opened)),
                run_name=name or variant,
                tags={k: v for k, v in tags.items() if v or k == "dvc.exp.name"},
            ).info.run_id
            self.idle_since, self.tags = known[-1][0] if known else None, {}
        self._log_params()
        for stage in STAGES[: STAGES.index(self.stage)]:
            self._log_files(stage)
        self._set_tags(self.conditions)

    def _close(self, status: str) -> None:
        """Log what this stage wrote, where it ended well, and end the run."""
        with self.harmless():
            if not self.client:  # it may be back
                self._open()
            _wait_for_database()
            if self.monitor:  # a training shorter than the sampling interval has a sample, too
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
        """Log what a stage wrote, but for a run that has these very files already."""
        files = outputs(stage)
        digest = hashlib.sha256(json.dumps({str(path): _sha256(path) for path in files}, sort_keys=True).encode()).hexdigest()
        if self.tags.get(f"logged.{stage}") != digest:
            if stage == "train":
                self._log_training()
            elif stage == "evaluate":
                self._log_evaluation()
            for file in files:
                if folder := {".csv": "tables", ".png": "figures"}.get(file.suffix):
                    self.client.log_artifact(self.run_id, str(file), folder)
            self._set_tags({f"logged.{stage}": digest})
        if stage == "evaluate" and self.params.tracking.log_model:
            self._log_model()
        if stage == "plot" and Path("dvc.lock").exists():  # not when a stage is run by hand before DVC ever ran
            self._set_tags({"dvc.lock": lock_digest(Path("dvc.lock").read_text("utf-8"))})

    def _log_training(self) -> None:
        import mlflow.data
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.entities import DatasetInput, InputTag

        from cifarlab.datasets import Dataset

        self._log_epochs()
        final = json.loads(Path("metrics/train.json").read_text("utf-8"))
        self._log_metrics({name: value for name, value in final.items() if not name.endswith(("loss", "accuracy"))})
        self._set_tags({"weights.sha256": _sha256(Path("models/network.safetensors")), **self.diary["conditions"]})
        data, digest = Dataset.load(Path("data")), json.loads(Path("data/dataset.json").read_text("utf-8"))["digest"]
        sources = ["sklearn.datasets.load_digits"] if self.params.data.name == "digits" else self.params.data.sources
        source = CodeDatasetSource({"sources": sources})
        # MLflow takes 36 characters, and would itself hash only the first 10,000 values.
        dataset = mlflow.data.from_numpy(data.images["train"], source, targets=data.labels["train"], name=data.name, digest=digest[:32])
        self.client.log_inputs(self.run_id, [DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])])

    def _log_evaluation(self) -> None:
        metrics = json.loads(Path("metrics/evaluate.json").read_text("utf-8"))
        per_class = metrics.pop("accuracy_per_class")
        refused = re.compile(r"[^/\w.: -]")  # in the name of a metric
        self._log_metrics({f"test_{name}": value for name, value in metrics.items()})
        self._log_metrics({f"accuracy/{refused.sub('_', name)}": value for name, value in per_class.items()})
        # What log_table writes, but replaced, not appended to, when the stage runs again.
        self.client.log_text(self.run_id, pd.read_csv("plots/confusion.csv").to_json(orient="split", index=False), "confusion_matrix.json")
        self._set_tags({"mlflow.loggedArtifacts": json.dumps([{"path": "confusion_matrix.json", "type": "table"}])})

    def _log_model(self) -> None:
        """Log the network, but for a run that has it; what an earlier try left half done is completed."""
        import mlflow.pytorch
        import torch
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
        from mlflow.models import infer_signature

        from cifarlab import models
        from cifarlab.datasets import Dataset

        weights = Path("models/network.safetensors")
        run, tags = self.client.get_run(self.run_id), {"weights.sha256": _sha256(weights)}
        same = f"source_run_id = '{self.run_id}' AND tags.`weights.sha256` = '{tags['weights.sha256']}'"
        found = self.client.search_logged_models([run.info.experiment_id], same)
        model = found[0] if found else self.client.create_logged_model(run.info.experiment_id, "model", self.run_id, tags, run.data.params)
        if model.status != LoggedModelStatus.READY:
            network = models.load(weights)
            # A batch of one would freeze the batch size of the exported graph to one.
            example = Dataset.load(Path("data")).images["test"][:2].transpose(0, 3, 1, 2).copy()
            with torch.inference_mode():
                signature = infer_signature(example, network(torch.from_numpy(example)).numpy())
            mlflow.pytorch.log_model(
                network,
                model_id=model.model_id,
                signature=signature,
                input_example=example,
                serialization_format="pt2",
                pip_requirements=[f"torch=={version('torch')}"],
            )
        if model.model_id not in [output.model_id for output in (run.outputs.model_outputs if run.outputs else [])]:
            final = [p for name in run.data.metrics for p in self.client.get_metric_history(self.run_id, name) if p.step == 0]
            metrics = [Metric(p.key, p.value, p.timestamp, p.step, model_id=model.model_id) for p in final]
            self.client.log_batch(self.run_id, metrics)
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, 0)])

    def _log_epochs(self) -> None:
        """Log the rows of history.csv that the run lacks, at the time when the epoch ended, or now where that is not known."""
        from mlflow.entities import Metric

        done = {point.step for point in self.client.get_metric_history(self.run_id, "train_loss")}
        now = int(time.time() * 1000)
        for step, row in pd.read_csv("plots/history.csv", index_col="epoch").to_dict("index").items():
            if step not in done:
                ended, seconds = self.diary["epochs"].get(str(step), (now, None))
                values = {str(k): float(v) for k, v in row.items() if pd.notna(v)} | ({} if seconds is None else {"epoch_seconds": seconds})
                self.client.log_batch(self.run_id, metrics=[Metric(name, value, ended, step) for name, value in values.items()])

    def _log_metrics(self, values: dict[str, float]) -> None:
        """Log final figures, but for those that the run already has."""
        known = self.client.get_run(self.run_id).data.metrics
        for name, value in values.items():
            if known.get(name) != value:
                self.client.log_metric(self.run_id, name, value)

    def _set_tags(self, tags: dict[str, str]) -> None:
        for name, value in tags.items():
            self.client.set_tag(self.run_id, name, value)
        self.tags |= tags


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Do something that may hang, and leave it to itself after some seconds."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # MLflow's, SQLAlchemy's, requests'
        told = f"MLflow cannot be read ({first_line(error)[:200]})"
        raise UserError(f"{told}; is MLFLOW_TRACKING_URI right, mlflow.db whole? Without it `make sync` fills a new one") from error


@_readable()
def all_runs() -> list[Any]:
    """Return the runs of this project in every experiment of MLflow."""
    connect()
    import mlflow

    return list(mlflow.search_runs(filter_string=f"tags.`{KEY}` LIKE '%'", search_all_experiments=True, output_format="list"))


def compare(last: int) -> None:
    """Print the newest runs, one a row, oldest first: name, variant, test figures, size and training time in seconds."""
    columns = {
        "tags.mlflow.runName": ("run", "{}"),
        "tags.variant": ("variant", "{}"),
        "metrics.test_accuracy": ("test accuracy", "{:.2%}"),
        "metrics.test_loss": ("test loss", "{:.3f}"),
        "metrics.test_macro_f1": ("macro F1", "{:.3f}"),
        "metrics.parameters": ("parameters", "{:,.0f}"),
        "seconds": ("training s", "{:.0f}"),
    }
    experiment = load_params().tracking.experiment
    with _readable():
        client = connect()
        import mlflow

        runs = mlflow.search_runs(experiment_names=[experiment], max_results=last)[::-1]
        epochs = [client.get_metric_history(run, "epoch_seconds") for run in runs.run_id]
    runs["seconds"] = [sum(epoch.value for epoch in history) or float("nan") for history in epochs]
    runs = runs.reindex(columns=list(columns))
    table = pd.DataFrame({name: runs[column].map(form.format, na_action="ignore") for column, (name, form) in columns.items()})
    print(table.to_string(index=False, na_rep="–") if len(table) else "MLflow holds no run yet: `make demo` makes two in a few minutes")

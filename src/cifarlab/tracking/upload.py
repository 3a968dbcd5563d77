"""What the files of each stage become in MLflow."""

import hashlib
import json
import posixpath
import re
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from cifarlab import files, pipeline
from cifarlab.digest import json_digest
from cifarlab.errors import UserError
from cifarlab.params.sections import Params
from cifarlab.runtime import timings
from cifarlab.tracking.client import KEY, WEIGHTS_DIGEST, present_models, wait_for_database

ARTIFACTS = {".csv": "tables", ".png": "figures"}  # MLflow's folder for each kind of file
PARAMS, CODE = "cifarlab.params", "cifarlab.code"  # tags with digests of what decides the outputs
TEST_DIGEST = "cifarlab.test"  # the tag with the digest of the test images and their classes
NOTE = "mlflow.note.content"  # the tag that MLflow shows as the description, in Markdown
# MLflow draws the metrics with the same word before the / together, in alphabetical order, and
# those without a group last. So the groups are accuracy, loss, then this one.
GROUP = "per_class"
Values = dict[str, Any]


@dataclass(frozen=True)
class Execution:
    """One execution of the pipeline. MLflow shows it as one run."""

    params: Params
    key: str
    """The training key."""
    experiment: str
    """Name of the DVC experiment; empty for `dvc repro`."""
    baseline: str
    """The commit that it started from; may be empty for `dvc repro`."""
    folder: Path = Path()
    """Where the outputs are: the working folder, or a scratch copy of a commit."""

    @cached_property
    def deciding(self) -> dict[str, str]:
        """The tags that stand for everything that decides the outputs of all stages."""
        code = pipeline.stage_code(self.folder, pipeline.STAGES)
        return {KEY: self.key, PARAMS: params_digest(self.params), CODE: code}

    @property
    def identity(self) -> dict[str, str]:
        """The tags that a run must have to be the run of this execution.

        `dvc repro` has no name, and may run before or after a commit, so it has no baseline.
        """
        baseline = self.baseline if self.experiment else ""
        return self.deciding | {"dvc.exp.name": self.experiment, "dvc.exp.baseline": baseline}


def params_digest(params: Params) -> str:
    """Hash the parameters that decide an output: all except those of tracking."""
    flat = params.flat().items()
    return json_digest({name: value for name, value in flat if not name.startswith("tracking.")})


@dataclass(frozen=True)
class Upload:
    """Sends the files of an execution to a run, except for what the run already has.

    `run` is the run as MLflow described it when it was opened. Open it again after a failure, then
    sending everything again adds nothing twice.
    """

    client: Any
    run: Any
    execution: Execution

    @property
    def run_id(self) -> str:
        """The id of the run."""
        return str(self.run.info.run_id)

    def send_params(self, origin: dict[str, str], conditions: dict[str, str]) -> None:
        """Log the parameters, and as tags the origin of the execution and its conditions."""
        known, params = self.run.data.params, self.execution.params.flat()
        if conditions and "environment" in self.run.data.tags.keys() - conditions.keys():
            self.client.delete_tag(self.run_id, "environment")  # of an earlier, killed training
        new = {name: value for name, value in params.items() if name not in known}
        self._send(origin | conditions, {}, new)

    def send_stage(self, stage: str) -> None:
        """Log all that a stage wrote; then the tag `logged.STAGE` has the digest of its files."""
        digest = pipeline.output_digest(stage, self.execution.folder)
        if self.run.data.tags.get(f"logged.{stage}") != digest:
            send = {"train": self._send_training, "evaluate": self._send_evaluation}.get(stage)
            if send:
                send()
            for path in pipeline.outputs(stage, self.execution.folder):
                if folder := ARTIFACTS.get(path.suffix):
                    self.client.log_artifact(self.run_id, str(self._path(path)), folder)
            self._send({f"logged.{stage}": digest}, {}, {})

    def send_epochs(self) -> None:
        """Log the rows of history.csv with the times when the epochs ended, if they are known.

        MLflow divides them into requests. The loss of a row is logged last: if MLflow has it, the
        row is whole.
        """
        from mlflow.entities import Metric

        wait_for_database()
        known = self.client.get_metric_history(self.run_id, "loss/train")
        logged = {(point.step, point.value) for point in known}  # perhaps of an older training
        data = pd.read_csv(self._path(files.HISTORY), index_col="epoch").rename(columns=metric_name)
        times, now = timings.read(self.execution.key).epochs, int(1000 * time.time())
        points = []
        for epoch, row in data.iterrows():
            ended, seconds = times.get(str(epoch), (now, None))
            if (epoch, loss := row.pop("loss/train")) not in logged:
                values = {"epoch_seconds": seconds, **row, "loss/train": loss}
                points += [Metric(k, v, ended, epoch) for k, v in values.items() if pd.notna(v)]
        self.client.log_batch(self.run_id, points)

    def _path(self, path: Path) -> Path:
        return self.execution.folder / path

    def _send(self, tags: Values, metrics: Values, params: Values) -> None:
        """Log tags, final metrics and parameters."""
        from mlflow.entities import Metric, Param, RunTag

        known, now = self.run.data.metrics, int(1000 * time.time())
        changed = [Metric(k, v, now, 0) for k, v in metrics.items() if known.get(k) != v]
        new = [Param(k, str(v)) for k, v in params.items()]
        self.client.log_batch(self.run_id, changed, new, [RunTag(k, v) for k, v in tags.items()])

    def _send_training(self) -> None:
        self.send_epochs()
        self._send_dataset()
        final = files.read_json(self._path(files.TRAIN_METRICS))
        # The losses and accuracies are those of the last epoch.
        metrics = {k: v for k, v in final.items() if not k.endswith(("loss", "accuracy"))}
        digest = hashlib.sha256(self._path(files.WEIGHTS).read_bytes()).hexdigest()
        tags = timings.read(self.execution.key).conditions | {WEIGHTS_DIGEST: digest}
        self._send(tags, metrics, {})

    def _send_dataset(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        known = files.read_json(self._path(files.DATA / "dataset.json"))
        params = self.execution.params.data
        sources = {"digits": ["sklearn.datasets.load_digits"]}.get(params.name, params.sources)
        sources = [params.folder, *sources] if params.name == "folder" else sources
        source, digest = json.dumps({"tags": {"sources": sources}}), known["digest"][:32]
        dataset = Dataset(known["name"], digest, "code", source)  # MLflow takes 36 characters
        tags = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def _send_evaluation(self) -> None:
        per_class = read_table(self._path(files.PER_CLASS), "class")
        confusion = read_table(self._path(files.CONFUSION), "actual/predicted")
        tables = {"confusion_matrix.json": confusion, "per_class.json": per_class}
        for name, table in tables.items():
            # MLflow's log_table would write the same file, but append if the stage runs again.
            self.client.log_text(self.run_id, table.to_json(orient="split", index=False), name)
        shown = json.dumps([{"path": name, "type": "table"} for name in tables])
        found = files.read_json(self._path(files.EVALUATION))
        metrics = {metric_name(f"test_{name}"): value for name, value in found.items()}
        accuracies = dict(zip(per_class["class"], per_class.accuracy, strict=True))
        metrics |= {accuracy_of(label): share for label, share in accuracies.items()}
        tested = files.read_json(self._path(files.DATA / "dataset.json"))["test_digest"]
        tags = {"mlflow.loggedArtifacts": shown, TEST_DIGEST: tested}
        self._send(tags | self._describe(found["accuracy"], accuracies), metrics, {})

    def _describe(self, accuracy: float, accuracies: dict[str, float]) -> dict[str, str]:
        """Return the description of the run as a tag; empty if a person has written one."""
        execution = self.execution
        title = f"**{execution.params.model.describe()}**"
        if not self.run.data.tags.get(NOTE, title).startswith(title):
            return {}
        ends = (choose(accuracies, key=lambda name: accuracies[name]) for choose in (max, min))
        best, worst = (f"{name}, {accuracies[name]:.1%}" for name in ends)
        # The commit of an experiment is not known before its end, its name is.
        commit = "" if execution.experiment else execution.baseline
        origin = pipeline.Revision(execution.experiment, commit, "")
        later = "commit its results, then `cifarlab sync` names the command"
        restore = f"`{origin.restore}`" if origin.restore else later
        lines = [
            f"{title}: test accuracy **{accuracy:.2%}**\n",
            f"- best class: {best}; worst class: {worst}",
            "- confusion matrices, curves and mistakes: the folder `figures` of the artifacts",
            f"- restore it: {restore}",
        ]
        return {NOTE: "\n".join(lines)}

    def send_model(self, graph: Path) -> None:
        """Log the network with its test metrics; finish what an earlier try left incomplete.

        Parameters
        ----------
        graph : the exported network; if there is no such file, it is exported here
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

        client, run_id, run = self.client, self.run_id, self.client.get_run(self.run_id)
        model = next(iter(present_models(client, run)), None)
        if not model and pipeline.network_code(self.execution.folder) != pipeline.network_code():
            reason = "it has other code for the network; log it in a checkout of its commit"
            raise UserError(f"the model was not logged: {reason}")
        if not model:
            tags = {k: v for k, v in run.data.tags.items() if k in (WEIGHTS_DIGEST, NOTE)}
            new = (model_name(run.info.run_name), run_id, tags, run.data.params)
            model = client.create_logged_model(run.info.experiment_id, *new)
        name = model.model_id
        if model.status != LoggedModelStatus.READY or not client.list_logged_model_artifacts(name):
            self._write_model(name, graph)
        outputs = run.outputs.model_outputs if run.outputs else []
        if name not in [output.model_id for output in outputs]:
            # MLflow stores a point once, so the same points again, now with the id of the model,
            # are added to the model only.
            names = [k for k in run.data.metrics if re.match(rf"test_|\w+/test$|{GROUP}/", k)]
            points = [client.get_metric_history(run_id, k)[-1] for k in names]
            data = run.inputs.dataset_inputs[0].dataset
            of = (name, data.name, data.digest)
            again = [Metric(p.key, p.value, p.timestamp, p.step, *of) for p in points]
            client.log_batch(run_id, again)
            client.log_outputs(run_id, [LoggedModelOutput(name, 0)])

    def _write_model(self, model_id: str, graph: Path) -> None:
        from mlflow.entities import LoggedModelStatus
        from mlflow.models import Model

        from cifarlab.tracking.model import write

        path = self._path(files.WEIGHTS)
        data = files.read_json(self._path(files.DATA / "dataset.json"))
        known = {"classes": data["classes"], "dataset_digest": data["digest"]}
        known["training_key"] = self.execution.key
        ids = {"run_id": self.run_id, "model_id": model_id, "model_uuid": model_id}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            if not graph.is_file():
                from cifarlab.nn.weights import export_torch, load  # imports PyTorch

                graph = Path(name, "model.pt2")
                export_torch(load(path), graph)
            size = self.execution.params.data.image_size
            config = {"classes": data["classes"], "image_size": size}
            write(folder, path, graph, config, Model(**ids, metadata=known))
            self.client.log_model_artifacts(model_id, str(folder))
        self.client.finalize_logged_model(model_id, LoggedModelStatus.READY)


def read_table(table: Any, name: str) -> pd.DataFrame:
    """Read a table of the evaluate stage, a path or an open file.

    Parameters
    ----------
    name : the column with the names of classes; a class may be called 7 or NA
    """
    return pd.read_csv(table, dtype={name: str}, keep_default_na=False)


def model_name(run: str) -> str:
    """Return the name of a run without the characters that MLflow refuses in one of a model."""
    return re.sub(r"[/:.%\"']", "-", run)


def metric_name(name: str) -> str:
    """Return the name that a metric of the files has in MLflow: `accuracy/test`, `loss/train`."""
    return re.sub(r"^(train|val|test)_(accuracy|loss)$", r"\2/\1", name)


def accuracy_of(label: str) -> str:
    """Return the name of the metric that holds the accuracy of a class.

    MLflow refuses some characters, paths like `a//b` and long names. Then a digest keeps two
    classes apart whose names become the same.
    """
    name = f"{GROUP}/{label}"
    if re.fullmatch(r"[/\w.: -]{1,200}", name) and posixpath.normpath(name) == name:
        return name
    digest = hashlib.sha256(label.encode("utf-8", "surrogateescape")).hexdigest()
    readable = re.sub(r"[^\w.: -]", "_", label)
    return f"{GROUP}/{readable[:150]}-{digest[:8]}"

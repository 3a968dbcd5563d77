"""A checkout without Git and DVC's cache: its code, tiny data and what the train stage writes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml

from cifarlab.data.dataset import Dataset
from cifarlab.nn import weights
from cifarlab.nn.network import Network
from cifarlab.params.sections import Params
from tests.conftest import REPO

Make = Callable[..., Params]
CONDITIONS = {"device": "a processor", "threads": "1", "precision": "float32"}
HISTORY = """\
epoch,train_loss,train_accuracy,val_loss,val_accuracy,learning_rate,dead_units/1
1,0.5,0.9,,,0.1,0.25
2,0.4,0.95,,,0.05,0.125
"""
EVALUATION = {"accuracy": 0.75, "loss": 0.5}
PER_CLASS = "class,accuracy\ncat,0.5\ndog (small),1.0\n"
CONFUSION = "actual,cat,dog (small)\ncat,1,1\ndog (small),0,2\n"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an SQLite store without content, which MLflow takes seconds to create."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_params: Make, empty_store: Path
) -> Iterator[Path]:
    """Make the checkout with an empty store and enter it; MLflow forgets the store afterwards."""
    stages = yaml.safe_load((REPO / "dvc.yaml").read_text("utf-8"))["stages"]
    names = {dep for stage in ("train", "evaluate", "plot") for dep in stages[stage]["deps"]}
    code = [REPO / name for name in sorted(names) if name.startswith(("src", "stages"))]
    for source in [REPO / "dvc.yaml", *code]:
        target = tmp_path / source.relative_to(REPO)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy(
            source, target
        )
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
    monkeypatch.chdir(tmp_path)
    for folder in (".dvc/tmp", "metrics", "plots"):
        Path(folder).mkdir(parents=True)
    write_outputs(tmp_path, make_params())
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    yield tmp_path
    mlflow.set_tracking_uri(None)


def write_outputs(folder: Path, params: Params) -> None:
    """Write what download, train and evaluate write, as far as MLflow gets it."""
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    labels = np.arange(8) % 2
    classes = ["cat", "dog (small)"]
    split = {"train": images, "test": images[::-1].copy()}
    data = Dataset(split, {"train": labels, "test": labels[::-1].copy()}, classes, "tiny")
    data.save(folder / "data")
    network = Network(params.model, params.data.image_size, classes)
    weights.save(network, folder / "models/network.safetensors")
    texts = {
        "plots/history.csv": HISTORY,
        "metrics/train.json": json.dumps({"parameters": 7, "images": 8, "train_loss": 0.4}),
        "plots/confusion.csv": CONFUSION,
        "plots/per_class.csv": PER_CLASS,
        "metrics/evaluate.json": json.dumps(EVALUATION),
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")


@pytest.fixture
def params(make_params: Make) -> Params:
    """The committed parameters without the load of the machine and the exported network."""
    return make_params({"tracking.system_metrics": False, "tracking.log_model": False})


def write_timings(folder: Path, key: str, epochs: dict[str, list[float]]) -> None:
    """Write when epochs ended, as the train stage does."""
    path = folder / ".cache" / "trainings" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"conditions": CONDITIONS, "epochs": epochs}), "utf-8")


def client_of(folder: Path) -> mlflow.MlflowClient:
    """Return a client of the store in a checkout."""
    return mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def runs_in(folder: Path) -> list[Any]:
    """Return the runs in the store of a checkout."""
    client = client_of(folder)
    return list(client.search_runs([client.get_experiment_by_name("cifarlab").experiment_id]))


def points(folder: Path, metric: str) -> list[tuple[int, int, float]]:
    """Return (step, timestamp, value) of each point that the only run has of a metric."""
    [run] = runs_in(folder)
    found = client_of(folder).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.timestamp, point.value) for point in found)

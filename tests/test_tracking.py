"""The training key, and what a run of MLflow gets when a stage ends one way or another."""

import contextlib
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import yaml

from cifarlab import models, sources, tracking
from cifarlab.params import Params
from cifarlab.training import Epoch
from tests.conftest import REPO

Make = Callable[..., Params]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_params: Make) -> Iterator[Path]:
    """A folder with dvc.yaml, the code that train depends on, and what the train stage writes."""
    stage = yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"]["train"]
    for name in ["dvc.yaml", *(dep for dep in stage["deps"] if dep.endswith(".py"))]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    data = sources.digits()
    data.save(tmp_path / "data")
    models.save(models.Network(make_params().model, 32, data.classes), tmp_path / "models/network.safetensors")
    for folder in ("plots", "metrics", ".dvc/tmp"):
        (tmp_path / folder).mkdir(parents=True)
    pd.DataFrame([EPOCH.row()]).to_csv("plots/history.csv", index=False)
    Path("metrics/train.json").write_text(json.dumps({"parameters": 7, "train_loss": 0.5}))
    yield tmp_path
    mlflow.set_tracking_uri(None)


EPOCH = Epoch(1, 0.5, 0.9, None, None, 0.1, {"dead_units/1": 0.25})
CONDITIONS = {"device": "a processor", "threads": "1", "precision": "float32"}


def the_run(folder: Path) -> Any:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("cifarlab").experiment_id])
    return run


@pytest.mark.parametrize(
    ("change", "another"),
    [
        ("train.lr", 0.01),
        ("model.layers", 2),
        ("data.validation", 0.2),
        ("plot.dpi", 50),
        ("evaluate.batch_size", 7),
        ("tracking.experiment", "x"),
    ],
)
def test_the_key_names_what_training_depends_on(checkout: Path, make_params: Make, change: str, another: object) -> None:
    before = tracking.training_key(make_params())
    assert (tracking.training_key(make_params({change: another})) != before) == (
        change.split(".", maxsplit=1)[0] in ("train", "model", "data")
    )


@pytest.mark.parametrize("name", ["src/cifarlab/training.py", "data/dataset.json"])
def test_the_key_names_code_and_data(checkout: Path, make_params: Make, name: str) -> None:
    before = tracking.training_key(make_params())
    path = checkout / name
    content = path.read_text()
    path.write_text(content.replace('"digest": "', '"digest": "0') if name.endswith(".json") else content + "# another comment\n")
    assert tracking.training_key(make_params()) != before


def test_the_run_has_the_figures_and_what_it_was_trained_on(checkout: Path, make_params: Make) -> None:
    changes = {"data.sources": ["https://example.org/cifar.tar.gz"], "train.precision": "float32", "train.device": "cpu"}
    params = make_params({**changes, "tracking.system_metrics": False})
    with tracking.Mirror("train", params, CONDITIONS) as mirror:
        mirror.epoch(1)
    run = the_run(checkout)
    assert run.data.params["data.sources"] == "['https://example.org/cifar.tar.gz']"
    # A figure that is not there (nothing held out) is not logged; the final figures stand beside the epochs'.
    assert run.data.metrics.keys() == {"train_loss", "train_accuracy", "learning_rate", "epoch_seconds", "parameters", "dead_units/1"}
    assert CONDITIONS.items() <= run.data.tags.items()
    noted = tracking.read_diary(tracking.training_key(params))
    assert noted["conditions"] == CONDITIONS
    [point] = mlflow.MlflowClient().get_metric_history(run.info.run_id, "epoch_seconds")
    assert noted["epochs"] == {"1": [point.timestamp, point.value]}


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")])
def test_the_run_says_how_the_stage_ended(checkout: Path, make_params: Make, error: type[BaseException], status: str) -> None:
    params = make_params({"tracking.system_metrics": False})
    with pytest.raises(error), tracking.Mirror("train", params):
        raise error
    assert the_run(checkout).info.status == status
    # The next try goes to the same run and ends it well.
    with tracking.Mirror("train", params):
        pass
    assert the_run(checkout).info.status == "FINISHED"


def test_the_time_between_stages_is_no_time_of_the_run(checkout: Path, make_params: Make) -> None:
    params = make_params({"tracking.system_metrics": False})
    with tracking.Mirror("train", params):
        pass
    run = the_run(checkout)
    # As if the first stage had ended at once, and the next had come as late as it does.
    mlflow.MlflowClient().set_terminated(run.info.run_id, "FINISHED", run.info.start_time)
    started = time.perf_counter()
    with tracking.Mirror("train", params):
        pass
    second_stage = 1000 * (time.perf_counter() - started)
    assert 0 < the_run(checkout).info.end_time - run.info.start_time <= second_stage


def test_a_store_that_breaks_in_the_middle_costs_one_warning(checkout: Path, make_params: Make, capsys: pytest.CaptureFixture[str]) -> None:
    with tracking.Mirror("train", make_params({"tracking.system_metrics": False})) as mirror:
        for path in checkout.glob("mlflow.db*"):
            path.write_bytes(b"no database")
        for epoch in range(1, 4):
            mirror.epoch(epoch)
    assert capsys.readouterr().err.count("warning: MLflow") == 1


def test_a_deleted_experiment_comes_back(checkout: Path, make_params: Make, capsys: pytest.CaptureFixture[str]) -> None:
    params = make_params({"tracking.system_metrics": False})
    with tracking.Mirror("train", params):
        pass
    client = mlflow.MlflowClient()
    client.delete_experiment(client.get_experiment_by_name("cifarlab").experiment_id)
    with tracking.Mirror("train", params):
        pass
    assert "warning" not in capsys.readouterr().err
    assert client.get_experiment_by_name("cifarlab").lifecycle_stage == "active"


def test_a_database_elsewhere_has_its_artifacts_beside_it(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own default is relative to the working folder, which `dvc exp run --temp` deletes."""
    elsewhere = checkout / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere / 'other.db'}")
    client = tracking.connect()
    experiment = client.get_experiment(tracking.experiment_id(client, "cifarlab"))
    assert experiment.artifact_location == (elsewhere / "mlartifacts").as_uri()
    with contextlib.closing(sqlite3.connect(elsewhere / "other.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)

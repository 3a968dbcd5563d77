"""Connecting to MLflow."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cifarlab.tracking.client import connect, experiment_id, wait_for_database


def test_a_database_elsewhere_has_its_artifacts_beside_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own default is in the working folder, which `dvc exp run --temp` deletes."""
    elsewhere = checkout / "elsewhere"
    elsewhere.mkdir()
    (checkout / "mlflow.db").rename(elsewhere / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere / 'other.db'}")
    client = connect()
    experiment = client.get_experiment(experiment_id(client, "cifarlab"))
    assert experiment.artifact_location == (elsewhere / "mlartifacts").as_uri()
    with closing(sqlite3.connect(elsewhere / "other.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_deleted_experiment_is_restored(checkout: Path) -> None:
    client = connect()
    identifier = experiment_id(client, "cifarlab")
    client.delete_experiment(identifier)
    assert experiment_id(client, "cifarlab") == identifier
    assert client.get_experiment(identifier).lifecycle_stage == "active"


def test_the_store_is_in_the_main_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary experiment works elsewhere; DVC tells it where the main checkout is."""
    (checkout / "mlflow.db").unlink()
    copy = checkout / "copy"
    copy.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(checkout))
    monkeypatch.chdir(copy)
    connect()
    assert [path.name for path in checkout.glob("mlflow.db*")] == ["mlflow.db"]
    assert not list(copy.iterdir())


def test_a_locked_database_is_not_waited_for_long(checkout: Path) -> None:
    connect()
    with closing(sqlite3.connect("mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            wait_for_database()
    wait_for_database()


def test_the_environment_wins_over_the_defaults(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    connect()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_an_import_changes_no_environment_and_loads_no_mlflow() -> None:
    code = (
        "import os, sys; before = dict(os.environ);"
        "import cifarlab.tracking.run, cifarlab.tracking.sync, cifarlab.verify;"
        "assert dict(os.environ) == before; assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

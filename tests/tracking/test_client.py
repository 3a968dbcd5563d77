"""Connecting to MLflow."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifarlab.errors import UserError
from cifarlab.params.sections import Params
from cifarlab.tracking.client import (
    connect,
    database,
    experiment_id,
    serve,
    wait_for_database,
    within,
)
from cifarlab.tracking.run import track
from tests.conftest import REPO
from tests.support.forkserver import ForkServer
from tests.tracking.conftest import runs_in


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


@pytest.mark.parametrize("name", ["a b", "a?b", "a#b", "a%20b", "ü:é", "$(x)", "a\nb'\""])
def test_the_checkout_may_have_any_name(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (checkout / name / ".dvc/tmp").mkdir(parents=True)
    (checkout / "mlflow.db").rename(checkout / name / "mlflow.db")
    monkeypatch.setenv("DVC_ROOT", str(checkout / name))
    with track("train", params) as run:
        pass
    assert not run.warned
    assert not (checkout / "mlflow.db").exists()
    assert list((checkout / name / "mlartifacts").rglob("history.csv"))
    # MLflow would create the folder of an address whose characters are encoded.
    stray = {path.name for path in checkout.iterdir() if "%" in path.name} - {name}
    assert not stray or set(name) & set("%?#")


@pytest.mark.parametrize("address", ["sqlite:///own.db", "sqlite:///sub/../own.db"])
def test_a_relative_database_is_in_the_main_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    (checkout / "copy").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(checkout))
    monkeypatch.chdir(checkout / "copy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    (checkout / "mlflow.db").rename(checkout / "own.db")
    client = connect()
    experiment = client.get_experiment(experiment_id(client, "cifarlab"))
    assert experiment.artifact_location == (checkout / "mlartifacts").as_uri()
    assert not list((checkout / "copy").iterdir())


@pytest.mark.parametrize(
    "address",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "sqlite:/mlflow.db",
        "./mlruns",
        "mlruns",
        "file:mlruns",
        "file:///tmp/mlruns",
    ],
)
def test_a_store_that_keeps_nothing_is_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI=.*use sqlite:///mlflow\.db"):
        database()


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_checkout_that_was_copied_or_moved_has_its_own_artifacts(
    checkout: Path,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    fork_server: ForkServer,
    content: dict[str, Any],
    how: str,
) -> None:
    first, second = checkout / "first", checkout / "second"
    for name in ("src", "stages", "data", "models", "plots", "metrics", ".dvc"):
        shutil.copytree(checkout / name, first / name)
    for name in ("dvc.yaml", "mlflow.db"):
        shutil.copy(checkout / name, first)
    monkeypatch.chdir(first)
    with track("train", params):
        pass
    before = sorted(first.rglob("*"))
    shutil.copytree(first, second) if how == "copied" else first.rename(second)
    monkeypatch.chdir(second)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow has set it in this process
    Path("params.yaml").write_text(yaml.safe_dump(content))
    code = "from cifarlab.params.load import *; from cifarlab.tracking.run import *\n"
    code += "with track('evaluate', load_params()): pass"
    monkeypatch.setenv("PYTHONPATH", str(REPO / "src"))
    subprocess.run([fork_server.python, "-c", code], check=True)
    assert list((second / "mlartifacts").rglob("confusion.csv"))
    [run] = runs_in(second)
    assert run.info.artifact_uri.startswith((second / "mlartifacts").as_uri())
    assert sorted(first.rglob("*")) == (before if how == "copied" else [])


def test_waiting_for_mlflow_has_an_end() -> None:
    released = threading.Event()
    with pytest.raises(TimeoutError, match="did not answer"):
        within(0.1, released.wait)
    released.set()
    assert within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0)


def test_a_deleted_experiment_is_restored(checkout: Path) -> None:
    client = connect()
    identifier = experiment_id(client, "cifarlab")
    client.delete_experiment(identifier)
    assert experiment_id(client, "cifarlab") == identifier
    assert client.get_experiment(identifier).lifecycle_stage == "active"


def test_an_experiment_that_was_created_in_mlflows_page_can_be_used(checkout: Path) -> None:
    made = connect().create_experiment("pets", "mlflow-artifacts:/7")
    client = connect()
    assert experiment_id(client, "pets") == made
    run = client.create_run(made)
    client.log_text(run.info.run_id, "text", "file.txt")
    assert (checkout / "mlartifacts" / run.info.run_id / "artifacts/file.txt").exists()


@pytest.mark.parametrize(
    "kind", ["damaged", "of another version", pytest.param("locked", marks=pytest.mark.slow)]
)
def test_pages_of_a_store_that_cannot_be_read_end_in_a_sentence(checkout: Path, kind: str) -> None:
    store = checkout / "mlflow.db"
    with closing(sqlite3.connect(store)) as other:
        if kind == "damaged":
            store.write_bytes(b"no database")
        elif kind == "locked":
            other.execute("BEGIN EXCLUSIVE")
        else:
            other.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
            other.commit()
        with pytest.raises(UserError, match=r"MLflow cannot be read \(.*or move it away"):
            serve(5993, "cifarlab")


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

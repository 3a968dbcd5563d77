"""Connecting to MLflow: the store, how long a call may take, the experiment, MLflow's pages."""

import logging
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from filelock import FileLock

from cifarlab import files
from cifarlab.errors import UserError, first_line

KEY = "cifarlab.key"  # the tag that every run of this project has: its training key


def connect() -> Any:
    """Return an MlflowClient of MLFLOW_TRACKING_URI, or of mlflow.db in the main checkout.

    Makes the store the one that MLflow uses in this process. Sets how MLflow behaves, which it
    reads from the environment only; variables that are set win. By default MLflow tries for many
    minutes to reach a server that does not answer. Here a call may take 8 s and is not repeated: a
    request whose answer was lost may have been carried out, and a second one would make a second
    run.

    Raises
    ------
    OperationalError
        Another process has locked the SQLite store for 5 s.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it may contain a password
    import mlflow

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are reported in one place
    default = f"sqlite:///{files.mlflow_database()}"
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or default)
    wait_for_database()
    with _lock():
        path = _database()
        if path and not path.exists():
            # MLflow cannot repair an incomplete schema, so it creates it in a temporary file.
            new = path.with_name(f"{path.name}.new")
            new.write_bytes(b"")
            mlflow.MlflowClient(f"sqlite:///{new}")
            for left in ("-wal", "-shm"):  # of a store that was deleted: SQLite would mix them in
                path.with_name(f"{path.name}{left}").unlink(missing_ok=True)
            new.replace(path)
        return mlflow.MlflowClient()


def experiment_id(client: Any, name: str) -> str:
    """Return the id of the MLflow experiment; create or restore it if necessary."""
    with _lock():
        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":  # MLflow does not free the name
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        artifacts = None
        if path := _database():
            # MLflow's default is below the working folder, which a `--temp` run deletes.
            artifacts = (path.parent / "mlartifacts").as_uri()
            with closing(sqlite3.connect(path)) as database:
                # With a write-ahead log, MLflow's pages can read while a stage writes.
                database.execute("PRAGMA journal_mode=WAL")
        return str(client.create_experiment(name, artifacts))


def wait_for_database() -> None:
    """Wait up to 5 s for a locked SQLite store; MLflow itself would wait 20 s in every call.

    Raises
    ------
    OperationalError
        It is still locked.
    """
    path = _database()
    if path and path.exists():
        with closing(sqlite3.connect(path, timeout=5)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()


def all_runs() -> list[Any]:
    """Return the runs of this project in every experiment of MLflow.

    Raises
    ------
    UserError
        MLflow cannot be read.
    """
    query = {"filter_string": f"tags.`{KEY}` LIKE '%'", "search_all_experiments": True}
    try:
        connect()
        import mlflow

        return list(mlflow.search_runs(**query, output_format="list"))
    except Exception as error:  # MLflow, SQLAlchemy and requests raise their own
        reason = f"MLflow cannot be read ({first_line(error)[:200]}); check MLFLOW_TRACKING_URI"
        advice = "If mlflow.db is damaged, delete it: `make sync` then fills a new one"
        raise UserError(f"{reason}. {advice}") from error


def serve(port: int) -> None:
    """Replace this process by MLflow's server on 127.0.0.1, for the store of this checkout."""
    page = f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"
    print(f"open {page} (Ctrl-C stops the server)", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    store = f"sqlite:///{files.mlflow_database()}"
    os.execv(sys.executable, [*command, "--workers", "1", "--backend-store-uri", store])


def _lock() -> FileLock:
    """Keep other stages of this checkout out: two that create the store at once break it."""
    return FileLock(files.scratch() / "mlflow.lock", timeout=45)


def _database() -> Path | None:
    """Return the file of the SQLite store that `connect` has chosen; None for a server."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None

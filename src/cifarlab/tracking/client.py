"""Connecting to MLflow: the store, how long a call may take, the experiment, MLflow's pages."""

import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from cifarlab import files
from cifarlab.errors import UserError, first_line, in_a_sentence, without_secrets

KEY = "cifarlab.key"  # the tag that every run of this project has: its training key
WEIGHTS_DIGEST = "weights.sha256"  # the tag of a run, and of its models
# The columns of the table of runs that `cifarlab ui` opens. MLflow keeps such a view in a tag of
# the experiment, for links that people share; by default its table has no metrics.
COLUMNS = [f"metrics.`{name}`" for name in ("accuracy/test", "loss/test", "accuracy/val")]
COLUMNS += [f"params.`{name}`" for name in ("model.layers", "train.epochs")]
VIEW = "cifarlab"
ARTIFACTS = "mlartifacts"  # the folder beside an SQLite store that holds its artifacts
T = TypeVar("T")


def within(seconds: float, action: Callable[[], T]) -> T:
    """Do something in a thread and return its result.

    A call's own timeout is not enough: a server may send a byte every few seconds.

    Raises
    ------
    TimeoutError
        It takes longer. The action goes on in its thread, and its result is lost.
    """
    with closing(ThreadPool(1)) as pool:  # no thread of it keeps the program from ending
        answer = pool.apply_async(action)
    answer.wait(seconds)
    if not answer.ready():
        raise TimeoutError(f"it did not answer within {seconds:.0f} s")
    return answer.get()


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
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it may contain a password
    import mlflow

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are reported in one place
    path = database()
    mlflow.set_tracking_uri(_sqlite(path) if path else _given_uri())
    wait_for_database()
    with store_lock():
        if path and not path.exists():
            # MLflow cannot repair an incomplete schema, so it creates it in a temporary file.
            new = path.with_name(f"{path.name}.new")
            new.write_bytes(b"")
            mlflow.MlflowClient(_sqlite(new))
            for left in ("-wal", "-shm"):  # of a store that was deleted: SQLite would mix them in
                path.with_name(f"{path.name}{left}").unlink(missing_ok=True)
            new.replace(path)
        client = mlflow.MlflowClient()
        if path:
            _move_artifacts(path)
        return client


def database() -> Path | None:
    """Return the file of the SQLite store; None if MLFLOW_TRACKING_URI names another kind of store.

    Raises
    ------
    UserError
        The store would keep nothing: it is in memory only, or a folder, which MLflow has given up.
    """
    given = _given_uri()
    if not given:
        return files.mlflow_database().resolve()
    scheme, colon, _ = given.lower().partition(":")
    if scheme.startswith("databricks") or (colon and not scheme.startswith(("sqlite", "file"))):
        return None
    from sqlalchemy.engine import make_url

    problem = f"MLFLOW_TRACKING_URI={without_secrets(given)} names neither a server nor a file"
    refusal = f"{problem}; use sqlite:///mlflow.db or the address of a server, or unset it"
    with in_a_sentence(refusal):
        url = make_url(given)
    name = url.database or ""
    if scheme == "file" or name in ("", ":memory:") or url.query.get("mode") == "memory":
        raise UserError(refusal)
    # Relative paths start at the main checkout: a temporary copy of it is deleted with its files.
    return (files.root() / name.removeprefix("file:")).resolve()


def experiment_id(client: Any, name: str) -> str:
    """Return the id of the MLflow experiment; create or restore it if necessary."""
    with store_lock():
        path = database()
        # MLflow's default is below the working folder, which a `--temp` run deletes.
        artifacts = (path.parent / ARTIFACTS).as_uri() if path else None
        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":  # MLflow does not free the name
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        if path:  # with a write-ahead log, MLflow's pages can read while a stage writes
            _execute(path, "PRAGMA journal_mode=WAL")
        return str(client.create_experiment(name, artifacts))


def wait_for_database() -> None:
    """Wait up to 5 s for a locked SQLite store; MLflow itself would wait 20 s in every call.

    Raises
    ------
    OperationalError
        It is still locked.
    """
    if (path := database()) and path.exists():
        _execute(path, "BEGIN IMMEDIATE")


def all_runs(name: str = "") -> list[Any]:
    """Return the runs of this project in every experiment of MLflow.

    With `name`, those of DVC experiments called so. All of thousands would take seconds.

    Raises
    ------
    UserError
        MLflow cannot be read.
    """

    def search() -> list[Any]:
        connect()
        import mlflow

        named = f' AND tags.`dvc.exp.name` = "{name}"' if name else ""
        ours = {"filter_string": f"tags.`{KEY}` LIKE '%'{named}", "search_all_experiments": True}
        return list(mlflow.search_runs(**ours, output_format="list"))

    hint = "If mlflow.db is damaged, move it away: `make sync` fills a new one, without a champion"
    with in_a_sentence(f"MLflow cannot be read (%s); check MLFLOW_TRACKING_URI. {hint}"):
        return within(60, search)


def models_of(client: Any, run: Any) -> list[Any]:
    """Return the models of a run that nobody has deleted, also of earlier trainings."""
    query = f"source_run_id = '{run.info.run_id}'"
    return list(client.search_logged_models([run.info.experiment_id], query))


def present_models(client: Any, run: Any) -> list[Any]:
    """Return the models with the present weights of a run: it may be trained again."""
    weights = run.data.tags.get(WEIGHTS_DIGEST)
    return [m for m in models_of(client, run) if m.tags.get(WEIGHTS_DIGEST) == weights]


def try_to(action: Callable[[], T], otherwise: str) -> T | None:
    """Return the result of an action; None, with a warning, if MLflow fails or needs ten minutes.

    The files are the results, MLflow only shows them.
    """
    try:
        return within(600, action)
    except Exception as error:  # MLflow, requests, SQLAlchemy and the disk each raise their own
        print(f"warning: {otherwise}: {first_line(error)}", file=sys.stderr)
        return None


def warn(stage: str, reason: str) -> None:
    """Print that MLflow lacks something of a stage."""
    text = f"MLflow did not receive everything from the {stage} stage ({reason})"
    advice = "The files are complete; `make sync` logs what is missing."
    print(f"warning: {text}. {advice}", file=sys.stderr, flush=True)


def serve(port: int, experiment: str) -> None:
    """Run MLflow's server on 127.0.0.1 for the store of this checkout, until Ctrl-C.

    Prints the address of the table of runs as soon as the server answers.

    Raises
    ------
    UserError
        The runs are on another server, the port is taken, or the server does not start.
    """
    if not (path := database()):
        raise UserError(f"the runs are on {without_secrets(_given_uri())}; open it in a browser")
    if _answers(port):
        raise UserError(f"port {port} is taken; choose another: make ui PORT={port + 1}")
    view = json.dumps({"selectedColumns": COLUMNS})
    with in_a_sentence(f"MLflow cannot be read (%s); repair {path} or move it away"):
        number = experiment_id(client := connect(), experiment)
        client.set_experiment_tag(number, f"mlflow.sharedViewState.{VIEW}", view)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    # Its six processes for jobs, which only language models need, would take seconds to start.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command += ["--workers", "1", "--backend-store-uri", _sqlite(path)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with subprocess.Popen(command) as server, suppress(KeyboardInterrupt):
        try:
            while not _answers(port):
                if server.poll() is not None:
                    raise UserError("MLflow's server has ended; what it said is above")
                time.sleep(0.2)
            # Without the type, MLflow opens its pages for language models.
            options = f"workflowType=machine_learning&viewStateShareKey={VIEW}"
            page = f"http://127.0.0.1:{port}/#/experiments/{number}/runs?{options}"
            print(f"open {page} (Ctrl-C stops the server)", flush=True)
            server.wait()
        finally:
            server.terminate()


def _answers(port: int) -> bool:
    """Tell whether a server on this machine accepts connections."""
    with socket.socket() as test:
        return test.connect_ex(("127.0.0.1", port)) == 0


def store_lock() -> FileLock:
    """Keep other stages of this checkout out: two that create the store at once break it."""
    return FileLock(files.scratch() / "mlflow.lock", timeout=45)


def _given_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", "").strip()


def _sqlite(path: Path) -> str:
    """Return the URI of an SQLite file. Its name may hold any character."""
    # MLflow creates the folder of a path that is percent-encoded, so only what must be is encoded.
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F").replace("#", "%23")


def _execute(path: Path, statement: str, *values: object) -> list[Any]:
    """Execute a statement of SQL and return its rows. It waits up to 5 s for other processes."""
    with closing(sqlite3.connect(path, timeout=5)) as store, store:
        return store.execute(statement, values).fetchall()


def _move_artifacts(path: Path) -> None:
    """Make the artifacts of an SQLite store those beside it.

    They are not if it was copied or moved, because MLflow keeps absolute addresses, or if the
    experiment was created in MLflow's page: then only a server can write there. Addresses that were
    given by the user are left alone.
    """
    here = (path.parent / ARTIFACTS).as_uri()
    # The experiments come last, so that a kill in between leaves the old address to be found.
    columns = {"runs": "artifact_uri", "logged_models": "artifact_location"}
    columns |= {"model_versions": "storage_location", "experiments": "artifact_location"}
    query = "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location != ?1 AND"
    query += f" (artifact_location LIKE 'file:%/{ARTIFACTS}' OR artifact_location LIKE ?2)"
    for (old,) in _execute(path, query, here, "mlflow-artifacts:%"):
        for table, column in columns.items():
            change = f"{column} = ? || substr({column}, ?) WHERE instr({column}, ?) = 1"
            _execute(path, f"UPDATE {table} SET {change}", here, len(old) + 1, old)  # noqa: S608, fixed names

"""Checkouts of the project in temporary Git repositories.

Their networks and data are so small that the real DVC runs the pipeline in seconds.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import mlflow
import pytest
import yaml

from tests.support.forkserver import ForkServer

REPO = Path(__file__).resolve().parents[2]
SMALL = {
    "data": {"name": "digits"},
    "model": {"stem": "none", "layers": 2, "widths": [8, 16], "global_pool": "max"},
    "train": {"epochs": 3, "batch_size": 64, "threads": 1},
    "plot": {"samples": 8, "mistakes": 4, "dpi": 60},
}
FIGURES = {
    f"figures/{name}.png"
    for name in (
        "confusion",
        "confusion_recall",
        "curves",
        "mistakes",
        "per_class",
        "training_images",
    )
}
TABLES = {f"tables/{name}.csv" for name in ("confusion", "history", "per_class", "predictions")}
# Drawing is a large part of a small pipeline. Where a test does not look at the figures, this is
# drawn instead: its size depends on plot.dpi, and its colour on the predictions.
PLAIN_FIGURES = """

def draw_all(params, data, tables):
    import zlib
    from PIL import Image
    names = "confusion confusion_recall curves per_class training_images mistakes"
    for name in names.split():
        color = zlib.crc32((tables / "predictions.csv").read_bytes() + name.encode())
        figure = Image.new("RGB", (6 * params.plot.dpi, 4 * params.plot.dpi), color & 0xFFFFFF)
        figure.save(tables / f"{name}.png")
        yield tables / f"{name}.png"
"""
SHARED_ARTIFACTS = FIGURES | TABLES | {"confusion_matrix.json", "per_class.json"}


class Command:
    """A command in the checkout, with its own process group, whose lines are read as they come."""

    def __init__(self, command: tuple[str, ...], folder: Path, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=env | {"PYTHONUNBUFFERED": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def wait_for(self, text: str) -> bool:
        """Read until a line contains `text`; return False if the command ended before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return True
        return False

    def end(self, how: signal.Signals | None = None) -> int:
        """Send a signal to the whole group and return the exit code."""
        assert self.process.stdout is not None
        if how:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
        if not self.process.stdout.closed:
            self.output += self.process.stdout.read()
            self.process.stdout.close()
        return self.process.wait(120)


class Project:
    """A checkout in which a test runs commands and reads MLflow runs.

    Its `python` and `dvc` are those of the fork server.
    """

    def __init__(self, folder: Path, fork_server: ForkServer) -> None:
        self.folder = folder
        self.fork_server = fork_server
        self.lost_stores = 0
        inherited = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("DVC", "MLFLOW", "GIT", "PYTHONPATH"))
        }
        self.env = inherited | {
            "PATH": f"{fork_server.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Without ~/.gitconfig: another machine may not have one.
            "HOME": str(folder.parent),
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@example.org",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@example.org",
        }

    def run(
        self, *command: str, check: bool = True, seconds: int = 280, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the checkout; standard error goes to the same output."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=seconds,
        )
        assert not check or done.returncode == 0, (
            f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}"
        )
        return done

    def start(self, *command: str, **env: str) -> Command:
        """Start a command in the checkout."""
        return Command(command, self.folder, self.env | env)

    def dvc(self, *arguments: str, check: bool = True, **env: str) -> str:
        """Run DVC and return its output."""
        return self.run("dvc", *arguments, check=check, **env).stdout

    def edit(self, section: str, **values: object) -> None:
        """Change params.yaml."""
        path = self.folder / "params.yaml"
        content = yaml.safe_load(path.read_text("utf-8"))
        content[section].update(values)
        path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")

    def client(self, uri: str | None = None) -> mlflow.MlflowClient:
        """Return an MlflowClient of a store, by default of the checkout's own one."""
        # MLflow keeps a database open by its name, even if the file is deleted. So after
        # `lose_store` the database gets another name for the same path.
        client = mlflow.MlflowClient(
            uri or f"sqlite:///{self.folder}{'/.' * self.lost_stores}/mlflow.db"
        )
        if uri is None:
            # Without cached connections, it sees what other processes wrote.
            client._tracking_client.store.engine.dispose()
        return client

    def wait_for_a_run(self) -> None:
        """Wait until MLflow has a RUNNING run: it is logged beside the training.

        A client of MLflow would create the store.
        """
        database, query = self.folder / "mlflow.db", "SELECT 1 FROM runs WHERE status = 'RUNNING'"
        while True:
            if database.exists():
                with contextlib.closing(sqlite3.connect(database)) as store:
                    if store.execute(query).fetchall():
                        return
            time.sleep(0.05)

    def lose_store(self) -> None:
        """Delete the MLflow store and all artifacts."""
        # Otherwise a connection that closes later would delete the write-ahead log of a new
        # database with the same name.
        self.client()._tracking_client.store.engine.dispose()
        for path in self.folder.glob("mlflow.db*"):
            path.unlink()
        shutil.rmtree(self.folder / "mlartifacts")
        self.lost_stores += 1

    def runs(self, uri: str | None = None) -> dict[str, mlflow.entities.Run]:
        """Return the MLflow runs by the name of their DVC experiment; "" is `dvc repro`."""
        found = self.all_runs(uri)
        named = {run.data.tags["dvc.exp.name"]: run for run in found}
        assert len(named) == len(found), (
            f"two runs of one experiment: {sorted(run.data.tags['dvc.exp.name'] for run in found)}"
        )
        return named

    def all_runs(self, uri: str | None = None) -> list[mlflow.entities.Run]:
        """Return the MLflow runs."""
        client = self.client(uri)
        experiment = client.get_experiment_by_name("cifarlab")
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id]))

    def artifact_size(self, run: mlflow.entities.Run, path: str) -> int:
        """Return the bytes of an artifact of a run."""
        files = self.client().list_artifacts(run.info.run_id, str(Path(path).parent))
        return next(file.file_size for file in files if file.path == path)

    def artifacts(self, run_id: str, uri: str | None = None, folder: str = "") -> set[str]:
        """Return the paths of all artifacts of a run."""
        client, found = self.client(uri), set()
        for file in client.list_artifacts(run_id, folder):
            found |= self.artifacts(run_id, uri, file.path) if file.is_dir else {file.path}
        return found


def stages_run(output: str) -> list[str]:
    """Return the stages that DVC ran, according to its output."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def check_out(folder: Path, fork_server: ForkServer, *, real_figures: bool = False) -> Project:
    """Make a checkout with the small parameters, in which no stage has run."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in tracked.splitlines():
        if (REPO / name).exists() and not name.startswith(("docs/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)
    if not real_figures:
        with (folder / "src/cifarlab/figures/run.py").open("a", encoding="utf-8") as file:
            file.write(PLAIN_FIGURES)
    project = Project(folder, fork_server)
    for section, values in SMALL.items():
        project.edit(section, **values)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message=checkout")
    return project


def copy(project: Project, parent: Path) -> Project:
    """Copy the folder that holds a checkout; return the checkout in the copy."""
    old, new = project.folder.parent, parent
    shutil.copytree(old, new, symlinks=True, dirs_exist_ok=True)
    copied = Project(new / project.folder.name, project.fork_server)
    local = copied.folder / ".dvc/config.local"  # it names the folder of the cache
    if local.exists():
        local.write_text(local.read_text("utf-8").replace(str(old), str(new)), "utf-8")
    return copied


def move_into_a_repository(project: Project) -> Project:
    """Make a checkout a subfolder of another Git repository, with a new history."""
    outer = project.folder.parent / "outer"
    inner = Project(outer / "inner", project.fork_server)
    shutil.rmtree(project.folder / ".git")
    outer.mkdir()
    project.folder.rename(inner.folder)
    inner.run("git", "init", "--quiet", "--initial-branch=main", str(outer))
    inner.run("git", "add", "--all")
    inner.run("git", "commit", "--quiet", "--message=a project in a subfolder")
    return inner


Template = tuple[Project, dict[str, Any]]


def template(
    name: str,
    make: Callable[[Path], dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    fork_server: ForkServer,
) -> Template:
    """Return a checkout that all workers of pytest-xdist share, and notes about it.

    The first worker that needs it calls `make`, which fills the folder and returns the notes.
    """
    base = tmp_path_factory.getbasetemp()
    parent = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"template-{name}"
    parent.mkdir(exist_ok=True)
    notes = parent / "notes.json"
    with filelock.FileLock(parent / "lock"):
        if not notes.exists():
            notes.write_text(json.dumps(make(parent / "checkout/cifarlab")), "utf-8")
    return Project(parent / "checkout/cifarlab", fork_server), json.loads(notes.read_text("utf-8"))

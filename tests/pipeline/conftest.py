"""A checkout of the project in a temporary git repository, small enough to run the real DVC in seconds."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
SMALL = {
    "data": {"name": "digits"},
    "model": {"layers": 2, "widths": [8, 16], "global_pool": "max"},
    "train": {"epochs": 3, "batch_size": 64, "threads": 1},
    "plot": {"samples": 8, "mistakes": 4, "dpi": 60},
}


class Project:
    """The checkout: `dvc`, `git` and the MLflow runs that it left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lost_stores = 0
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC", "MLFLOW", "GIT", "PYTHONPATH"))}
        self.env = inherited | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # No ~/.gitconfig: a stranger's machine may have none.
            "HOME": str(folder.parent),
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@example.org",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@example.org",
        }

    def run(self, *command: str, check: bool = True, seconds: int = 280, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the checkout and return its output, standard error mixed in."""
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
        assert not check or done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}"
        return done

    def dvc(self, *arguments: str, check: bool = True, **env: str) -> str:
        return self.run("dvc", *arguments, check=check, **env).stdout

    def edit(self, section: str, **values: object) -> None:
        """Change params.yaml."""
        path = self.folder / "params.yaml"
        content = yaml.safe_load(path.read_text("utf-8"))
        content[section].update(values)
        path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")

    def client(self, uri: str | None = None) -> mlflow.MlflowClient:
        # MLflow keeps a database open by its name, also one that was deleted: a new file gets a new name.
        client = mlflow.MlflowClient(uri or f"sqlite:///{self.folder}{'/.' * self.lost_stores}/mlflow.db")
        if uri is None:
            client._tracking_client.store.engine.dispose()  # what other processes wrote is read anew
        return client

    def lose_store(self) -> None:
        """Delete all that MLflow has."""
        # A connection that outlives its file would, when it closes, delete the write-ahead log of the next file of that name.
        self.client()._tracking_client.store.engine.dispose()
        for path in self.folder.glob("mlflow.db*"):
            path.unlink()
        shutil.rmtree(self.folder / "mlartifacts")
        self.lost_stores += 1

    def runs(self, uri: str | None = None) -> dict[str, mlflow.entities.Run]:
        """Return the MLflow runs by the name of their DVC experiment, "" for those of `dvc repro`."""
        client = self.client(uri)
        experiment = client.get_experiment_by_name("cifarlab")
        assert experiment is not None
        found = client.search_runs([experiment.experiment_id])
        named = {run.data.tags["dvc.exp.name"]: run for run in found}
        assert len(named) == len(found), f"doubled: {sorted(run.data.tags['dvc.exp.name'] for run in found)}"
        return named

    def artifacts(self, run_id: str, uri: str | None = None, folder: str = "") -> set[str]:
        client, found = self.client(uri), set()
        for file in client.list_artifacts(run_id, folder):
            found |= self.artifacts(run_id, uri, file.path) if file.is_dir else {file.path}
        return found


def stages_run(output: str) -> list[str]:
    """Return the stages that DVC says it ran."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("checkout") / "cifarlab"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    for name in tracked.splitlines():
        if (REPO / name).exists() and not name.startswith(("docs/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)
    project = Project(folder)
    for section, values in SMALL.items():
        project.edit(section, **values)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message=checkout")
    yield project
    shutil.rmtree(folder, ignore_errors=True)

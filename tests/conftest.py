"""Fixtures: small variants of the committed parameters, checkouts of the project, servers."""

import copy
import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cifarlab import pipeline
from cifarlab.data.dataset import Dataset
from cifarlab.data.layout import Problem
from cifarlab.data.readers import prepare
from cifarlab.errors import UserError
from cifarlab.params.load import load_params
from cifarlab.params.sections import DataParams, Params, TrainParams
from cifarlab.studies import executors
from tests.support import cpu_seconds
from tests.support import project as projects
from tests.support.archives import ArchiveServer
from tests.support.forkserver import ForkServer
from tests.support.project import Project
from tests.support.servers import Server

for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"):  # as in a shell that sets neither
    os.environ.pop(name, None)
REPO = Path(__file__).resolve().parent.parent
VARIANTS: dict[str, dict[str, Any]] = yaml.safe_load((REPO / "variants.yaml").read_text("utf-8"))
NOTEBOOK = VARIANTS["notebook"]
# Plain settings for tests of single parts. A test can override them.
PLAIN_NETWORK = {
    "stem": "none",
    "norm_scale": True,
    "activation": "relu",
    "pool_at": "end",
    "init": "default",
    "logit_scale": 1,
}
PLAIN_TRAINING = {
    "optimizer": "sgd",
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 0.0005,
    "norm_bias_lr": 1,
    "schedule": "one_cycle",
}
MakeTrain = Callable[..., TrainParams]
# One thread: the tests' networks are tiny, and results do not depend on the machine's cores.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # nohup and & let the tests ignore them
        if signal.getsignal(number) == signal.SIG_IGN:
            ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if ctrl_c else signal.SIG_DFL)
    config.pluginmanager.register(cpu_seconds)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what may take longest, so that no core waits for it at the end."""

    def limit(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return marker.args[0] if marker else 300  # the limit in pyproject.toml

    items.sort(key=limit, reverse=True)


def pytest_collection_finish() -> None:
    """Let no collection of garbage look at the imported modules: statsmodels asks for many."""
    gc.freeze()


@pytest.fixture
def content() -> dict[str, Any]:
    """The committed params.yaml as plain dictionaries that a test may change."""
    return copy.deepcopy(yaml.safe_load((REPO / "params.yaml").read_text("utf-8")))


@pytest.fixture
def make_params(content: dict[str, Any], tmp_path: Path) -> Callable[..., Params]:
    """Return a function that loads the committed parameters with changes.

    For example make_params({"model.layers": 3}). They are validated from a file.
    """

    def make(changes: dict[str, Any] | None = None) -> Params:
        for key, value in (changes or {}).items():
            section, name = key.split(".")
            content.setdefault(section, {})[name] = value
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(content), "utf-8")
        return load_params(path)

    return make


@pytest.fixture
def train_params(content: dict[str, Any]) -> MakeTrain:
    """Return a function that makes the parameters of a plain, exact training on the CPU.

    For example train_params(lr=0.1) changes the learning rate.
    """
    exact = {
        "batch_size": 16,
        "label_smoothing": 0.1,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return lambda **changes: TrainParams(**content["train"] | PLAIN_TRAINING | exact | changes)


@pytest.fixture
def restored_torch() -> Iterator[None]:
    """Undo afterwards what `device.set_up` changes in the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Programs `python` and `dvc` that start without importing anything."""
    server = ForkServer(tmp_path_factory.mktemp("fork-server"))
    cpu_seconds.outside.append(server.cpu_seconds)
    yield server
    cpu_seconds.outside.remove(server.cpu_seconds)
    server.close()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real MLflow server that many tests share, because it starts slowly.

    A test that kills its server must use `own_mlflow_server`.
    """
    yield from started(tmp_path_factory.mktemp("server"))


@pytest.fixture
def own_mlflow_server(tmp_path: Path) -> Iterator[Server]:
    """A real MLflow server for one test."""
    (tmp_path / "server").mkdir()
    yield from started(tmp_path / "server")


def started(folder: Path) -> Iterator[Server]:
    """Start a server, yield it when it answers, and kill it afterwards."""
    server = Server(folder)
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Iterator[Project]:
    """A small checkout in which nothing has run. Its figures are plain."""
    project = projects.check_out(tmp_path_factory.mktemp("checkout") / "cifarlab", fork_server)
    yield project
    shutil.rmtree(project.folder.parent, ignore_errors=True)


@pytest.fixture
def drawing_project(
    tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer
) -> Iterator[Project]:
    """A small checkout in which nothing has run, and which draws its figures."""
    folder = tmp_path_factory.mktemp("checkout") / "cifarlab"
    project = projects.check_out(folder, fork_server, real_figures=True)
    yield project
    shutil.rmtree(project.folder.parent, ignore_errors=True)


@pytest.fixture(scope="session")
def reproduced(
    tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer
) -> projects.Template:
    """A checkout after `dvc repro`, which logged a model, with committed results. Do not change it.

    Its committed parameters no longer log models, because that takes seconds in every evaluation.
    """

    def make(folder: Path) -> dict[str, Any]:
        project = projects.check_out(folder, fork_server)
        output = project.dvc("repro")
        status = project.run(
            "git", "status", "--porcelain", "--untracked-files=all"
        ).stdout.split()[1::2]
        project.edit("tracking", log_model=False)
        project.run("git", "add", "--all")
        project.run("git", "commit", "--quiet", "--message=base")
        return {"output": output, "status": status}

    return projects.template("reproduced", make, tmp_path_factory, fork_server)


@pytest.fixture
def finished(
    reproduced: projects.Template, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """A copy of `reproduced` that a test may change."""
    project = projects.copy(reproduced[0], tmp_path_factory.mktemp("finished"))
    yield project
    shutil.rmtree(project.folder.parent, ignore_errors=True)


@pytest.fixture(scope="session")
def with_history(
    reproduced: projects.Template, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer
) -> Project:
    """A checkout with a commit and two experiments; tests use copies of it.

    Its DVC cache lies outside of it, as if several checkouts shared the cache.
    """

    def make(folder: Path) -> dict[str, object]:
        project = projects.copy(reproduced[0], folder.parent)
        (folder / ".dvc/cache").rename(folder.parent / "shared")
        project.dvc("cache", "dir", "--local", str(folder.parent / "shared"))
        project.dvc("exp", "run", "--temp", "--name", "other-seed", "-S", "train.seed=1")
        project.dvc(
            "exp",
            "run",
            "--temp",
            "--name",
            "with-mirror",
            "-S",
            "evaluate.views=2",
            "-S",
            "tracking.log_model=true",
        )
        return {}

    return projects.template("with-history", make, tmp_path_factory, fork_server)[0]


@pytest.fixture
def used(with_history: Project, tmp_path: Path) -> Project:
    """A copy of `with_history` that a test may change."""
    return projects.copy(with_history, tmp_path / "copy")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def small_project(
    tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer
) -> Iterator[Path]:
    """A repository whose stages copy a parameter, with a commit and two experiments."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("DVC", "GIT"))]:
            patch.delenv(name)
        for role in ("AUTHOR", "COMMITTER"):
            patch.setenv(f"GIT_{role}_NAME", "a")
            patch.setenv(f"GIT_{role}_EMAIL", "a@example.org")
        patch.setenv("DVC_NO_ANALYTICS", "1")
        patch.setenv("PATH", str(fork_server.folder), prepend=os.pathsep)
        patch.chdir(folder)
        run("git", "init", "--quiet", "--initial-branch=main")
        run("dvc", "init", "--quiet")
        stages = {
            stage: {"cmd": f"cp params.yaml {stage}.txt", "params": ["n"], "outs": [f"{stage}.txt"]}
            for stage in pipeline.STAGES
        }
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
        Path("params.yaml").write_text("n: 1\n")
        run("dvc", "repro", "--quiet")
        run("git", "add", "--all")
        run("git", "commit", "--quiet", "--message=first")
        for n in (2, 3):
            executors.run({f"n-{n}": {"n": n}}, 1, "", print)
        yield folder


# Archives and downloads (tests/support/archives.py)


@pytest.fixture
def archive_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ArchiveServer]:
    """A server on the loopback interface that sends the replies that a test sets."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ArchiveServer().running() as server:
        yield server


Read = Callable[..., tuple[Dataset, list[Problem]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return a function: read("folder", source, …, labels=…) returns images and problems.

    `cache` is its cache.
    """
    defaults = {"folder": "images", "labels": None, "test": 0.2, "sha256": None}
    defaults |= {"image_size": 32, "validation": 0.1, "validation_seed": 0}

    def read(name: str, *sources: Any, **more: Any) -> tuple[Dataset, list[Problem]]:
        given = {"name": name, "sources": [str(source) for source in sources]}
        params = DataParams(**defaults | given | more)
        problems: list[Problem] = []
        folders = (tmp_path, tmp_path / "cache", tmp_path / "data")
        return prepare(params, *folders, problems), problems

    return read


@pytest.fixture
def get(read: Read) -> Callable[..., Dataset]:
    """Return a function like `read` that returns the images only."""
    return lambda *args, **kwargs: read(*args, **kwargs)[0]


@pytest.fixture
def refused(get: Callable[..., Dataset]) -> Callable[..., str]:
    """Return a function like `get` that expects a refusal and returns its sentence."""

    def refused(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(UserError) as caught:
            get(*args, **kwargs)
        sentence = str(caught.value)
        assert "\n" not in sentence
        return sentence

    return refused

"""MLflow that is away, hangs, lies, is full or locked: the stages end well, in time, with the same files, and `sync` makes up for it.

A stage is run by hand where DVC adds nothing but time. What is forked is a whole process of its own: see nursery.py.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pandas as pd
import pytest

from cifarlab import first_line, tracking
from cifarlab.params import load_params
from tests.conftest import REPO
from tests.pipeline.conftest import Project, project, stages_run  # noqa: F401, a fixture
from tests.pipeline.test_pipeline import SHARED_ARTIFACTS
from tests.servers import Proxy, Server

OUTPUTS = ("data", "models", "plots", "metrics")
WARNING = "warning: MLflow does not get all of this"
SECRET = "hunter2"
# Of a call 8 s, of a stage at most three of them (in the middle, the monitor, at the end), and as much again for a slow machine.
CALL, STAGE = 12, 45


class Done(NamedTuple):
    """How a process ended."""

    code: int
    said: str
    seconds: float


class Lab:
    """The project of the pipeline's tests after `dvc repro` without MLflow, its stages run by hand."""

    def __init__(self, project: Project, first: Done) -> None:  # noqa: F811
        self.project, self.folder, self.first = project, project.folder, first
        self.reference = self.digests()
        self.looked = 0
        self.said = project.folder.parent / "said.txt"
        self.nursery = subprocess.Popen(
            [sys.executable, str(REPO / "tests/faults/nursery.py")],
            env=project.env | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, module: str, *arguments: str, uri: str = "") -> Done:
        """Run `python -m MODULE` in the project, with the store at `uri` or its own; machine load is sampled all the time."""
        env = self.project.env | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"}
        env |= {"PYTHONPATH": "src"} if module == "cifarlab" else {}
        request = {"module": module, "arguments": arguments, "folder": str(self.folder), "said": str(self.said), "env": env}
        assert self.nursery.stdin
        assert self.nursery.stdout
        started = time.monotonic()
        self.nursery.stdin.write(json.dumps(request) + "\n")
        self.nursery.stdin.flush()
        self.nursery.stdout.readline()
        code = int(self.nursery.stdout.readline())
        return Done(code, self.said.read_text(), time.monotonic() - started)

    def stage(self, name: str, uri: str = "") -> Done:
        """Run a stage whose outputs are not there."""
        for path in tracking.outputs(name, self.folder):
            (self.folder / path).unlink()
        return self.run(f"stages.{name}", uri=uri)

    def sync(self, uri: str = "") -> Done:
        return self.run("cifarlab", "sync", uri=uri)

    def digests(self) -> dict[str, str]:
        files = [path for name in OUTPUTS for path in (self.folder / name).rglob("*") if path.is_file() and path.name != ".gitignore"]
        return {str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def epochs(self) -> int:
        """Return how many epochs history.csv has."""
        path = self.folder / "plots/history.csv"
        return len(path.read_text().splitlines()) - 1 if path.exists() else 0

    def store(self, uri: str) -> str:
        """Return where to read; the project's own store under a name that changes when it is another file, for MLflow keeps it open."""
        return uri or f"sqlite:///{self.folder.parent / str(self.looked)}.db"

    def look_afresh(self) -> None:
        self.looked += 1
        (self.folder.parent / f"{self.looked}.db").symlink_to(self.folder / "mlflow.db")

    def client(self, uri: str = "") -> mlflow.MlflowClient:
        return self.project.client(self.store(uri))

    def forget(self, uri: str = "") -> None:
        """Make it the first time: no run, no checkpoint, no diary."""
        for name in ("checkpoints", "trainings"):
            shutil.rmtree(self.folder / ".cache" / name, ignore_errors=True)
        if not uri:
            self.look_afresh()
            for path in [*self.folder.glob("mlflow.db*"), self.folder / "mlartifacts"]:
                path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)
        elif experiment := self.client(uri).get_experiment_by_name("cifarlab"):
            for run in self.client(uri).search_runs([experiment.experiment_id]):
                self.client(uri).delete_run(run.info.run_id)

    def content(self, uri: str = "") -> dict[str, Any]:
        """Return all that the one run holds, but for the machine's load."""
        [run] = self.project.runs(self.store(uri)).values()
        names = [name for name in run.data.metrics if not name.startswith("system/")]
        history = {name: self.client(uri).get_metric_history(run.info.run_id, name) for name in names}
        return {
            "id": run.info.run_id,
            "status": run.info.status,
            "params": run.data.params,
            "tags": run.data.tags,
            "metrics": {name: sorted((p.step, p.timestamp, p.value) for p in points) for name, points in history.items()},
            "artifacts": self.project.artifacts(run.info.run_id, self.store(uri)),
            "models": [output.model_id for output in run.outputs.model_outputs] if run.outputs else [],
            "inputs": len(run.inputs.dataset_inputs),
        }

    def has_the_training(self, uri: str = "") -> dict[str, Any]:
        """Return what the one run holds; it has each epoch once, at the time when it ended."""
        content = self.content(uri)
        history = pd.read_csv(self.folder / "plots/history.csv", index_col="epoch")
        [diary] = (self.folder / ".cache/trainings").glob("*.json")
        times = {int(epoch): ended for epoch, (ended, _) in json.loads(diary.read_text())["epochs"].items()}
        for name in history:
            assert content["metrics"][name] == [
                (step, times[step], pytest.approx(value, abs=1e-6)) for step, value in history[name].items()
            ]
        assert [(step, at) for step, at, _ in content["metrics"]["epoch_seconds"]] == list(times.items())
        final = {name: points for name, points in content["metrics"].items() if name not in (*history, "epoch_seconds")}
        assert {len(points) for points in final.values()} == {1}
        assert content["inputs"] == 1
        return content

    def is_whole(self, uri: str = "") -> dict[str, Any]:
        """Return what the one run holds, which is everything."""
        content = self.has_the_training(uri)
        assert content["status"] == "FINISHED"
        assert content["artifacts"] == SHARED_ARTIFACTS
        assert {"logged.train", "logged.evaluate", "logged.plot", "dvc.lock", "device"} <= content["tags"].keys()
        assert content["metrics"]["test_accuracy"][0][2] == json.loads((self.folder / "metrics/evaluate.json").read_text())["accuracy"]
        return content


def warned(done: Done) -> None:
    """A stage that could not log ended well, said so once, and told nothing that is not for everybody's eyes."""
    assert done.code == 0, done.said
    assert done.said.count("warning") == done.said.count(WARNING) == done.said.count("`make sync`") == 1, done.said
    for word in ("Traceback", "Exception in thread", "ERROR", SECRET):
        assert word not in done.said


def silent(done: Done) -> None:
    assert done.code == 0, done.said
    assert "warning" not in done.said
    assert SECRET not in done.said


@pytest.fixture(scope="module")
def lab(project: Project) -> Iterator[Lab]:  # noqa: F811
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        uri = f"http://user:{SECRET}@127.0.0.1:{closed.getsockname()[1]}"
        started = time.monotonic()
        done = project.run("dvc", "repro", MLFLOW_TRACKING_URI=uri)
    lab = Lab(project, Done(done.returncode, done.stdout, time.monotonic() - started))
    yield lab
    lab.nursery.communicate()  # its input ends, and so does it


@pytest.fixture
def proxy(mlflow_server: Server, lab: Lab) -> Iterator[Proxy]:
    """A way to a server that holds no run, from a project that has trained nothing."""
    lab.forget(mlflow_server.uri)
    proxy = Proxy(mlflow_server.uri)
    yield proxy
    proxy.close()


@pytest.fixture
def no_model(lab: Lab) -> Iterator[None]:
    """The network is not exported: seconds of every evaluation."""
    lab.project.edit("tracking", log_model=False)
    yield
    lab.project.edit("tracking", log_model=True)


def secret(uri: str) -> str:
    return uri.replace("://", f"://user:{SECRET}@")


def test_without_a_server_the_pipeline_ends_and_sync_logs_all_of_it_once(lab: Lab, mlflow_server: Server) -> None:
    assert stages_run(lab.first.said) == ["download", "train", "evaluate", "plot"]
    assert lab.first.said.count(WARNING) == 3  # one a stage
    assert "Traceback" not in lab.first.said
    assert SECRET not in lab.first.said
    done = lab.sync(mlflow_server.uri)
    assert done.code == 0, done.said
    first = lab.is_whole(mlflow_server.uri)
    assert len(first["models"]) == 1
    info = lab.client(mlflow_server.uri).get_run(first["id"]).info
    times = [ended for _, ended, _ in first["metrics"]["train_loss"]]
    assert info.start_time <= times[0] < times[-1] <= info.end_time < times[-1] + 1000 * lab.first.seconds
    again = lab.sync(mlflow_server.uri)
    assert again.code == 0
    assert "was there" in again.said
    assert lab.content(mlflow_server.uri) == first
    assert lab.client(mlflow_server.uri).get_run(first["id"]).info.end_time == info.end_time


def test_undisturbed_stages_write_the_same_files_and_running_them_again_doubles_nothing(lab: Lab, mlflow_server: Server) -> None:
    lab.forget(mlflow_server.uri)
    for stage in tracking.STAGES:
        silent(lab.stage(stage, mlflow_server.uri))
    assert lab.digests() == lab.reference
    first = lab.is_whole(mlflow_server.uri)
    for stage in ("train", "train", "evaluate", "plot"):
        silent(lab.stage(stage, mlflow_server.uri))
    # `has_the_training` would see epochs logged again at the times of the second training.
    assert lab.content(mlflow_server.uri) == first
    assert len(first["models"]) == 1


@pytest.mark.usefixtures("no_model")
def test_a_server_that_goes_after_the_first_epoch_and_is_back_before_the_end(lab: Lab, proxy: Proxy) -> None:
    proxy.rule = lambda _: "refuse" if lab.epochs() == 2 else "pass"
    warned(lab.stage("train", secret(proxy.uri)))
    assert "refuse" in [action for _, action in proxy.seen]
    content = lab.has_the_training(proxy.uri)
    assert "logged.train" in content["tags"]
    assert lab.client(proxy.uri).get_run(content["id"]).info.start_time <= content["metrics"]["train_loss"][0][1]
    assert lab.digests() == lab.reference


@pytest.mark.usefixtures("no_model")
def test_a_server_killed_in_the_middle_is_back_before_evaluate(lab: Lab, proxy: Proxy, mlflow_server: Server) -> None:
    killed: list[str] = []

    def kill(request: str) -> str:
        if lab.epochs() == 2 and not killed:
            killed.append(request)
            mlflow_server.kill()
        return "pass"

    proxy.rule = kill
    warned(lab.stage("train", secret(proxy.uri)))
    assert killed
    assert lab.digests() == lab.reference
    mlflow_server.start()
    mlflow_server.wait()
    assert len(lab.content(proxy.uri)["metrics"]["train_loss"]) < 3
    silent(lab.stage("evaluate", secret(proxy.uri)))
    content = lab.has_the_training(proxy.uri)
    assert content["tags"].keys() >= {"logged.train", "logged.evaluate"}
    assert lab.digests() == lab.reference


@pytest.mark.usefixtures("no_model")
def test_a_server_that_goes_and_never_comes_back(lab: Lab, proxy: Proxy) -> None:
    proxy.rule = lambda _: "refuse" if lab.epochs() >= 2 else "pass"
    for stage in tracking.STAGES:
        warned(lab.stage(stage, secret(proxy.uri)))
    assert lab.digests() == lab.reference
    away = lab.sync(secret(proxy.uri))
    assert away.code == 1
    assert away.said.startswith("error: MLflow cannot be read")
    assert len(away.said.splitlines()) == 1
    assert SECRET not in away.said
    proxy.rule = lambda _: "pass"
    done = lab.sync(secret(proxy.uri))
    assert done.code == 0, done.said
    assert SECRET not in done.said
    lab.is_whole(proxy.uri)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("action", "middle"),
    [("stall", False), ("stall", True), ("cut", True), ("garbage", False), ("garbage", True), ("502", True), ("503", False), ("200", True)],
)
def test_an_answer_that_is_none(lab: Lab, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, action: str, middle: bool) -> None:
    # The shipped time is tried below; here it would only be waited for.
    monkeypatch.setitem(lab.project.env, "MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    proxy.rule = lambda _: action if lab.epochs() >= 2 or not middle else "pass"
    stage = lab.stage("train", secret(proxy.uri))
    warned(stage)
    assert stage.seconds < STAGE + lab.first.seconds
    assert lab.digests() == lab.reference


@pytest.mark.parametrize("action", ["stall", "503"])
def test_a_call_waits_seconds(lab: Lab, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    proxy.rule = lambda _: action
    monkeypatch.chdir(lab.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    client = tracking.connect()
    started = time.monotonic()
    with pytest.raises(mlflow.MlflowException):
        tracking.experiment_id(client, "cifarlab")
    assert time.monotonic() - started < CALL


def test_lost_answers_make_no_second_run_and_no_second_model(lab: Lab, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    lost: set[str] = set()

    def lose(request: str) -> str:
        """The server acts on every kind of request, and its first answer does not arrive."""
        kind = request.partition("artifacts/artifacts")[0]
        if request.startswith("GET") or kind in lost:
            return "pass"
        lost.add(kind)
        return "lose"

    proxy.rule = lose
    for _ in range(20):
        with tracking.Mirror("plot", load_params()) as mirror:
            pass
        if not mirror.warned:
            break
    assert not mirror.warned
    assert {f"POST /api/2.0/mlflow/{path}" for path in ("runs/create", "runs/outputs", "logged-models", "runs/log-batch")} <= lost
    content = lab.content(proxy.uri)
    assert content["artifacts"] == SHARED_ARTIFACTS
    assert len(content["models"]) == 1
    assert {len(points) for name, points in content["metrics"].items() if name.startswith("test")} == {1}
    found = lab.client(proxy.uri).search_logged_models(["1"], f"source_run_id = '{content['id']}'")
    assert [model.model_id for model in found] == content["models"]
    assert {"test_accuracy", "test_loss"} <= {metric.key for metric in found[0].metrics}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process holds the database."""
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('BEGIN EXCLUSIVE'); print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        yield
        process.stdin.close()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("new", [True, False])
def test_a_store_that_another_process_has_locked(lab: Lab, new: bool) -> None:
    lab.forget()
    if not new:
        assert lab.run("cifarlab", "compare").code == 0
    with locked(lab.folder / "mlflow.db"):
        done = lab.stage("train")
    warned(done)
    assert "locked" in done.said
    assert done.seconds < STAGE + lab.first.seconds
    assert lab.digests() == lab.reference
    assert lab.sync().code == 0
    lab.is_whole()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function: disk(path, "64k") makes the folder a disk of its own, of that size, or changes its size."""
    mounted: list[Path] = []

    def mount(path: Path, size: str) -> None:
        options = ["remount"] if path in mounted else []
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a full disk takes the right to mount one: {done.stderr.strip()}")
        mounted.append(path)

    yield mount
    for path in set(mounted):
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(folder: Path, room: int = 0) -> None:
    """Leave `room` bytes of a disk, in pages."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    os.truncate(folder / "filler", (folder / "filler").stat().st_size - room)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("what", ["no tables fit", "the tables fit", "mlartifacts"])
def test_a_full_disk_of_the_store(lab: Lab, disk: Callable[..., None], tmp_path: Path, what: str) -> None:
    lab.forget()
    full = tmp_path / "full"
    full.mkdir()
    disk(full, "200k" if what == "no tables fit" else "16m")
    name = "mlartifacts" if what == "mlartifacts" else "mlflow.db"
    (full / name).mkdir() if what == "mlartifacts" else None
    (lab.folder / name).symlink_to(full / name)
    if what == "the tables fit":
        assert lab.run("cifarlab", "compare").code == 0
    if what != "no tables fit":
        fill(full)
    warned(lab.stage("train"))
    assert lab.digests() == lab.reference
    (full / "filler").unlink(missing_ok=True)
    disk(full, "64m")
    done = lab.sync()
    assert done.code == 0, done.said
    lab.is_whole()
    assert (lab.folder / name).is_symlink()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("path", "stage", "room"),
    [
        ("data/train_images.npy", "download", 0),
        ("data/train_images.npy", "download", 65536),
        ("models/network.safetensors", "train", 0),
        ("plots/history.csv", "train", 0),
        ("plots/predictions.csv", "evaluate", 4096),
        ("plots/confusion.png", "plot", 4096),
    ],
)
def test_a_full_disk_for_what_a_stage_writes(
    lab: Lab, mlflow_server: Server, disk: Callable[..., None], path: str, stage: str, room: int
) -> None:
    lab.forget(mlflow_server.uri)
    place = (lab.folder / path).parent
    before = {file: file.read_bytes() for file in place.iterdir() if file.is_file()}
    disk(place, "16m")
    for file, content in before.items():
        file.write_bytes(content)
    fill(place, room)
    done = lab.run(f"stages.{stage}", uri=mlflow_server.uri)
    assert done.code == 1
    errors = [line for line in done.said.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, done.said
    assert path in errors[0]
    assert "make room" in errors[0]
    assert "Traceback" not in done.said
    (place / "filler").unlink()
    assert {file: file.read_bytes() for file in place.iterdir()} == before


@pytest.mark.usefixtures("no_model")
def test_a_full_disk_for_the_checkpoint_is_no_reason_to_stop(lab: Lab, disk: Callable[..., None], mlflow_server: Server) -> None:
    lab.forget(mlflow_server.uri)
    (lab.folder / ".cache").mkdir(exist_ok=True)
    disk(lab.folder / ".cache", "16m")
    fill(lab.folder / ".cache")
    done = lab.stage("train", mlflow_server.uri)
    assert done.code == 0, done.said
    assert done.said.count("cannot be written") == 3  # one an epoch
    assert "Traceback" not in done.said
    assert lab.digests() == lab.reference


@pytest.mark.usefixtures("no_model")
def test_a_store_that_is_deleted_or_damaged_between_stages(lab: Lab) -> None:
    lab.forget()
    silent(lab.stage("train"))
    (lab.folder / "mlflow.db").unlink()
    silent(lab.stage("evaluate"))
    assert lab.has_the_training()["tags"].keys() >= {"logged.train", "logged.evaluate"}
    for path in lab.folder.glob("mlflow.db*"):
        path.write_bytes(b"this is no database" * 1000)
    warned(lab.stage("plot"))
    assert lab.digests() == lab.reference
    done = lab.sync()
    assert done.code == 1
    assert len(done.said.splitlines()) == 1, done.said
    assert done.said.startswith("error: MLflow cannot be read (")
    for path in lab.folder.glob("mlflow.db*"):
        path.unlink()
    lab.look_afresh()
    assert lab.sync().code == 0
    lab.is_whole()


@pytest.mark.parametrize("action", ["pass", "401"])
def test_no_password_lands_anywhere(lab: Lab, proxy: Proxy, mlflow_server: Server, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    proxy.rule = lambda _: action
    monkeypatch.setitem(lab.project.env, "MLFLOW_TRACKING_USERNAME", "somebody")
    monkeypatch.setitem(lab.project.env, "MLFLOW_TRACKING_PASSWORD", f"{SECRET}-too")
    for stage in tracking.STAGES:
        done = lab.stage(stage, secret(proxy.uri))
        (silent if action == "pass" else warned)(done)
    for folder in (lab.folder, mlflow_server.folder):
        holding = [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
        assert not holding


@pytest.mark.parametrize("password", ["a", "a@b", "a:b", "a/b", "a%40b"])
def test_no_error_tells_a_password(password: str) -> None:
    said = first_line(ValueError(f"Failed to parse: http://user:{password}@host:5000/api, sorry"))
    assert said == "Failed to parse: http://…@host:5000/api, sorry"

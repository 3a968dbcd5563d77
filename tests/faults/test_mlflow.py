"""MLflow is away, hangs, answers nonsense, is locked, or its disk is full.

The stages must still succeed, in time and with the same files. `sync` must log what is missing.
Most tests run the stages directly, because DVC would only add time.
"""

import contextlib
import hashlib
import itertools
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

from cifarlab import pipeline
from cifarlab.errors import first_line
from cifarlab.params.load import load_params
from cifarlab.tracking.client import connect, experiment_id
from cifarlab.tracking.run import track
from tests.support.forkserver import ForkServer
from tests.support.project import (
    SHARED_ARTIFACTS,
    Project,
    Template,
    check_out,
    copy,
    stages_run,
    template,
)
from tests.support.servers import Proxy, Server

OUTPUTS = ("data", "models", "plots", "metrics")
WARNING = "warning: MLflow did not receive everything from the"
SECRET = "hunter2"
# A call may take 8 s. A stage waits for at most three of them: one in the middle, one for the
# monitor and one at the end. Both limits leave room for a slow machine.
CALL, STAGE = 12, 45


class Done(NamedTuple):
    """How a process ended."""

    code: int
    output: str
    seconds: float


class Lab:
    """A small project after a `dvc repro` without MLflow, in which single stages are run."""

    def __init__(self, project: Project, first: Done, away: str) -> None:
        self.project, self.folder, self.first, self.away = project, project.folder, first, away
        self.reference = self.digests()
        self.links = 0

    def run(self, module: str, *arguments: str, uri: str = "") -> Done:
        """Run `python -m MODULE` with the store at `uri`, or with the project's own store.

        The load of the machine is sampled often.
        """
        env = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"}
        env |= {"PYTHONPATH": "src"} if module == "cifarlab.cli" else {}
        started = time.monotonic()
        done = self.project.run("python", "-m", module, *arguments, check=False, **env)
        return Done(done.returncode, done.stdout, time.monotonic() - started)

    def stage(self, name: str, uri: str = "") -> Done:
        """Delete the outputs of a stage and run it."""
        for path in pipeline.outputs(name, self.folder):
            (self.folder / path).unlink()
        return self.run(f"stages.{name}", uri=uri)

    def sync(self, uri: str = "") -> Done:
        return self.run("cifarlab.cli", "sync", uri=uri)

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every output."""
        files = [
            path
            for name in OUTPUTS
            for path in (self.folder / name).rglob("*")
            if path.is_file() and path.name != ".gitignore"
        ]
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    def epochs(self) -> int:
        """Return how many epochs history.csv has."""
        path = self.folder / "plots/history.csv"
        return len(path.read_text().splitlines()) - 1 if path.exists() else 0

    def logs_an_epoch(self, request: str) -> bool:
        """Tell whether a request is about an epoch before the last one. They come a little late."""
        return "get-history" in request and self.epochs() < 3

    def store(self, uri: str) -> str:
        """Return the URI to read from.

        The project's own store is read through a link, because MLflow keeps a database open by its
        name. A new file gets a new link.
        """
        return uri or f"sqlite:///{self.folder.parent / str(self.links)}.db"

    def new_link(self) -> None:
        """Make a new link to the project's store, after its file was replaced."""
        self.links += 1
        (self.folder.parent / f"{self.links}.db").symlink_to(self.folder / "mlflow.db")

    def client(self, uri: str = "") -> mlflow.MlflowClient:
        return self.project.client(self.store(uri))

    def forget(self, uri: str = "") -> None:
        """Delete all runs, checkpoints and epoch times."""
        for name in ("checkpoints", "trainings"):
            shutil.rmtree(self.folder / ".cache" / name, ignore_errors=True)
        if not uri:
            self.new_link()
            for path in [*self.folder.glob("mlflow.db*"), self.folder / "mlartifacts"]:
                path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(
                    path, ignore_errors=True
                )
        elif experiment := self.client(uri).get_experiment_by_name("cifarlab"):
            for run in self.client(uri).search_runs([experiment.experiment_id]):
                self.client(uri).delete_run(run.info.run_id)

    def create_store(self) -> None:
        """Create the project's own store, without runs."""
        code = "from cifarlab.tracking.client import connect; connect()"
        self.project.run("python", "-c", code, PYTHONPATH="src")

    def content(self, uri: str = "") -> dict[str, Any]:
        """Return everything that the only run holds, except the load of the machine."""
        [run] = self.project.runs(self.store(uri)).values()
        names = [name for name in run.data.metrics if not name.startswith("system/")]
        history = {
            name: self.client(uri).get_metric_history(run.info.run_id, name) for name in names
        }
        return {
            "id": run.info.run_id,
            "status": run.info.status,
            "params": run.data.params,
            "tags": run.data.tags,
            "metrics": {
                name: sorted((p.step, p.timestamp, p.value) for p in points)
                for name, points in history.items()
            },
            "artifacts": self.project.artifacts(run.info.run_id, self.store(uri)),
            "models": [output.model_id for output in run.outputs.model_outputs]
            if run.outputs
            else [],
            "inputs": len(run.inputs.dataset_inputs),
        }

    def has_the_training(self, uri: str = "") -> dict[str, Any]:
        """Check that the only run has each epoch once, with its time; return the run."""
        content = self.content(uri)
        history = pd.read_csv(self.folder / "plots/history.csv", index_col="epoch")
        kinds = itertools.product(("train", "val"), ("loss", "accuracy"))
        history = history.rename(columns={f"{part}_{of}": f"{of}/{part}" for part, of in kinds})
        [timings] = (self.folder / ".cache/trainings").glob("*.json")
        times = {
            int(epoch): ended
            for epoch, (ended, _) in json.loads(timings.read_text())["epochs"].items()
        }
        for name in history:
            assert content["metrics"][name] == [
                (step, times[step], pytest.approx(value, abs=1e-6))
                for step, value in history[name].items()
            ]
        assert [(step, at) for step, at, _ in content["metrics"]["epoch_seconds"]] == list(
            times.items()
        )
        final = {
            name: points
            for name, points in content["metrics"].items()
            if name not in (*history, "epoch_seconds")
        }
        assert {len(points) for points in final.values()} == {1}
        assert content["inputs"] == 1
        return content

    def is_whole(self, uri: str = "") -> dict[str, Any]:
        """Check that the only run is complete, and return what it holds."""
        content = self.has_the_training(uri)
        assert content["status"] == "FINISHED"
        assert content["artifacts"] == SHARED_ARTIFACTS
        assert {"logged.train", "logged.evaluate", "logged.plot", "device"} <= content[
            "tags"
        ].keys()
        assert (
            content["metrics"]["accuracy/test"][0][2]
            == json.loads((self.folder / "metrics/evaluate.json").read_text())["accuracy"]
        )
        return content


def warned(done: Done) -> None:
    """Check that a stage that could not log succeeded, warned once and showed no password."""
    assert done.code == 0, done.output
    assert (
        done.output.count("warning")
        == done.output.count(WARNING)
        == done.output.count("`make sync`")
        == 1
    ), done.output
    for word in ("Traceback", "Exception in thread", "ERROR", SECRET):
        assert word not in done.output


def silent(done: Done) -> None:
    """Check that a stage succeeded without a warning."""
    assert done.code == 0, done.output
    assert "warning" not in done.output
    assert SECRET not in done.output


@pytest.fixture(scope="session")
def without_server(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Template:
    """A checkout after `dvc repro` with a server that cannot be reached. Do not change it."""

    def make(folder: Path) -> dict[str, Any]:
        project = check_out(folder, fork_server, real_figures=True)
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
            uri = f"http://user:{SECRET}@127.0.0.1:{closed.getsockname()[1]}"
            started = time.monotonic()
            output = project.dvc("repro", MLFLOW_TRACKING_URI=uri)
        return {"output": output, "seconds": time.monotonic() - started, "away": uri}

    return template("without-server", make, tmp_path_factory, fork_server)


@pytest.fixture(scope="module")
def lab(without_server: Template, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    project, notes = without_server
    first = Done(0, notes["output"], notes["seconds"])
    return Lab(copy(project, tmp_path_factory.mktemp("lab")), first, notes["away"])


@pytest.fixture
def proxy(mlflow_server: Server, lab: Lab) -> Iterator[Proxy]:
    """A proxy to a server without runs, for a project that has not trained yet."""
    lab.forget(mlflow_server.uri)
    proxy = Proxy(mlflow_server.uri)
    yield proxy
    proxy.close()


@pytest.fixture
def no_model(lab: Lab) -> Iterator[None]:
    """Switch off the export of the network, which takes seconds in every evaluation."""
    lab.project.edit("tracking", log_model=False)
    yield
    lab.project.edit("tracking", log_model=True)


def secret(uri: str) -> str:
    """Return the URI with a user name and a password."""
    return uri.replace("://", f"://user:{SECRET}@")


def test_without_a_server_the_pipeline_finishes_and_sync_logs_everything_once(
    lab: Lab, mlflow_server: Server
) -> None:
    assert stages_run(lab.first.output) == ["download", "train", "evaluate", "plot"]
    assert lab.first.output.count(WARNING) == 3  # one for each stage
    assert "Traceback" not in lab.first.output
    assert SECRET not in lab.first.output
    lab.forget(mlflow_server.uri)
    for stage in pipeline.STAGES:
        warned(lab.stage(stage, lab.away))
    done = lab.sync(mlflow_server.uri)
    assert done.code == 0, done.output
    first = lab.is_whole(mlflow_server.uri)
    assert len(first["models"]) == 1
    info = lab.client(mlflow_server.uri).get_run(first["id"]).info
    times = [ended for _, ended, _ in first["metrics"]["loss/train"]]
    assert (
        info.start_time
        <= times[0]
        < times[-1]
        <= info.end_time
        < times[-1] + 1000 * lab.first.seconds
    )
    again = lab.sync(mlflow_server.uri)
    assert again.code == 0
    assert "was there" in again.output
    assert lab.content(mlflow_server.uri) == first
    assert lab.client(mlflow_server.uri).get_run(first["id"]).info.end_time == info.end_time


@pytest.mark.slow
def test_with_a_server_the_files_are_the_same_and_a_second_run_of_a_stage_logs_nothing_twice(
    lab: Lab, mlflow_server: Server
) -> None:
    lab.forget(mlflow_server.uri)
    for stage in pipeline.STAGES:
        silent(lab.stage(stage, mlflow_server.uri))
    assert lab.digests() == lab.reference
    first = lab.is_whole(mlflow_server.uri)
    for stage in ("train", "train", "evaluate", "plot"):
        silent(lab.stage(stage, mlflow_server.uri))
    # If the second training had logged its epochs again, `has_the_training` would see other times.
    assert lab.content(mlflow_server.uri) == first
    assert len(first["models"]) == 1


@pytest.mark.usefixtures("no_model")
def test_a_server_that_goes_after_the_first_epoch_and_is_back_before_the_end(
    lab: Lab, proxy: Proxy
) -> None:
    def refuse_once(request: str) -> str:
        refused = "refuse" in [action for _, action in proxy.seen]
        return "refuse" if lab.logs_an_epoch(request) and not refused else "pass"

    proxy.rule = refuse_once
    warned(lab.stage("train", secret(proxy.uri)))
    assert "refuse" in [action for _, action in proxy.seen]
    content = lab.has_the_training(proxy.uri)
    assert "logged.train" in content["tags"]
    assert (
        lab.client(proxy.uri).get_run(content["id"]).info.start_time
        <= content["metrics"]["loss/train"][0][1]
    )
    assert lab.digests() == lab.reference


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
def test_a_server_killed_in_the_middle_is_back_before_evaluate(
    lab: Lab, own_mlflow_server: Server
) -> None:
    lab.forget(own_mlflow_server.uri)
    killed: list[str] = []

    def kill(request: str) -> str:
        if lab.logs_an_epoch(request) and not killed:
            killed.append(request)
            own_mlflow_server.kill()
        return "pass"

    with contextlib.closing(Proxy(own_mlflow_server.uri)) as proxy:
        proxy.rule = kill
        warned(lab.stage("train", secret(proxy.uri)))
        assert killed
        assert lab.digests() == lab.reference
        own_mlflow_server.start()
        own_mlflow_server.wait()
        assert len(lab.content(proxy.uri)["metrics"].get("loss/train", [])) < 3
        silent(lab.stage("evaluate", secret(proxy.uri)))
        content = lab.has_the_training(proxy.uri)
        assert content["tags"].keys() >= {"logged.train", "logged.evaluate"}
        assert lab.digests() == lab.reference


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
def test_a_server_that_goes_away_and_never_comes_back(lab: Lab, proxy: Proxy) -> None:
    proxy.rule = lambda _: "refuse" if lab.epochs() >= 2 else "pass"
    for stage in pipeline.STAGES:
        warned(lab.stage(stage, secret(proxy.uri)))
    assert lab.digests() == lab.reference
    away = lab.sync(secret(proxy.uri))
    assert away.code == 1
    assert away.output.startswith("error: MLflow cannot be read")
    assert len(away.output.splitlines()) == 1
    assert SECRET not in away.output
    proxy.rule = lambda _: "pass"
    done = lab.sync(secret(proxy.uri))
    assert done.code == 0, done.output
    assert SECRET not in done.output
    lab.is_whole(proxy.uri)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("action", "middle"),
    [
        ("garbage", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("stall", True),
                ("drip", False),
                ("drip", True),
                ("503", False),
                ("stall", False),
                ("cut", True),
                ("garbage", True),
                ("502", True),
                ("200", True),
            ]
        ),
    ],
)
def test_an_answer_that_is_none_of_mlflow(
    lab: Lab, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, action: str, middle: bool
) -> None:
    # A shorter timeout saves time; `test_a_call_waits_seconds` checks the default.
    monkeypatch.setitem(lab.project.env, "MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    proxy.rule = lambda _: action if lab.epochs() >= 2 or not middle else "pass"
    stage = lab.stage("train", secret(proxy.uri))
    warned(stage)
    assert stage.seconds < STAGE + lab.first.seconds
    assert lab.digests() == lab.reference


@pytest.mark.parametrize("action", [pytest.param("stall", marks=pytest.mark.slow), "503"])
def test_a_call_waits_seconds_not_minutes(
    lab: Lab, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    proxy.rule = lambda _: action
    monkeypatch.chdir(lab.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    client = connect()
    started = time.monotonic()
    with pytest.raises(mlflow.MlflowException):
        experiment_id(client, "cifarlab")
    assert time.monotonic() - started < CALL


@pytest.mark.slow
def test_lost_answers_make_no_second_run_and_no_second_model(
    lab: Lab, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    lost: set[str] = set()

    def lose(request: str) -> str:
        """Lose the first answer to each kind of request, after the server has acted."""
        kind = request.partition("artifacts/artifacts")[0]
        if request.startswith("GET") or kind in lost:
            return "pass"
        lost.add(kind)
        return "lose"

    proxy.rule = lose
    for _ in range(20):
        with track("plot", load_params()) as run:
            pass
        if not run.warned:
            break
    assert not run.warned
    assert {
        f"POST /api/2.0/mlflow/{path}"
        for path in ("runs/create", "runs/outputs", "logged-models", "runs/log-batch")
    } <= lost
    content = lab.content(proxy.uri)
    assert content["artifacts"] == SHARED_ARTIFACTS
    assert len(content["models"]) == 1
    assert {
        len(points) for name, points in content["metrics"].items() if name.startswith("test")
    } == {1}
    found = lab.client(proxy.uri).search_logged_models(["1"], f"source_run_id = '{content['id']}'")
    assert [model.model_id for model in found] == content["models"]
    assert {"accuracy/test", "loss/test"} <= {metric.key for metric in found[0].metrics}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let another process lock the database."""
    code = (
        "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('BEGIN EXCLUSIVE'); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        yield
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("new", [True, False])
def test_a_store_that_another_process_has_locked(lab: Lab, new: bool) -> None:
    lab.forget()
    if not new:
        lab.create_store()
    with locked(lab.folder / "mlflow.db"):
        done = lab.stage("train")
    warned(done)
    assert "locked" in done.output
    assert done.seconds < STAGE + lab.first.seconds
    assert lab.digests() == lab.reference
    assert lab.sync().code == 0
    lab.is_whole()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function: disk(path, "64k") mounts a disk of this size, or resizes it."""
    mounted: list[Path] = []

    def mount(path: Path, size: str) -> None:
        options = ["remount"] if path in mounted else []
        command = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            ",".join([*options, f"size={size}"]),
            "tmpfs",
            str(path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"the test may not mount a small disk: {done.stderr.strip()}")
        mounted.append(path)

    yield mount
    for path in set(mounted):
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(folder: Path, room: int = 0) -> None:
    """Fill a disk up to `room` free bytes, rounded to pages."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    os.truncate(folder / "filler", (folder / "filler").stat().st_size - room)


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("what", ["no tables fit", "the tables fit", "mlartifacts"])
def test_a_full_disk_of_the_store(
    lab: Lab, disk: Callable[..., None], tmp_path: Path, what: str
) -> None:
    lab.forget()
    full = tmp_path / "full"
    full.mkdir()
    disk(full, "200k" if what == "no tables fit" else "16m")
    name = "mlartifacts" if what == "mlartifacts" else "mlflow.db"
    (full / name).mkdir() if what == "mlartifacts" else None
    (lab.folder / name).symlink_to(full / name)
    if what == "the tables fit":
        lab.create_store()
    if what != "no tables fit":
        fill(full)
    warned(lab.stage("train"))
    assert lab.digests() == lab.reference
    (full / "filler").unlink(missing_ok=True)
    disk(full, "64m")
    done = lab.sync()
    assert done.code == 0, done.output
    lab.is_whole()
    assert (lab.folder / name).is_symlink()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("path", "stage", "room"),
    [
        ("models/network.safetensors", "train", 0),
        ("plots/predictions.csv", "evaluate", 4096),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("data/train_images.npy", "download", 0),
                ("data/train_images.npy", "download", 65536),
                ("plots/history.csv", "train", 0),
                ("plots/confusion.png", "plot", 4096),
            ]
        ),
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
    errors = [line for line in done.output.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, done.output
    assert path in errors[0]
    assert "make room" in errors[0]
    assert "Traceback" not in done.output
    (place / "filler").unlink()
    assert {file: file.read_bytes() for file in place.iterdir()} == before


@pytest.mark.usefixtures("no_model")
def test_a_full_disk_for_the_checkpoint_does_not_stop_the_training(
    lab: Lab, disk: Callable[..., None], mlflow_server: Server
) -> None:
    lab.forget(mlflow_server.uri)
    (lab.folder / ".cache").mkdir(exist_ok=True)
    disk(lab.folder / ".cache", "16m")
    fill(lab.folder / ".cache")
    done = lab.stage("train", mlflow_server.uri)
    assert done.code == 0, done.output
    assert done.output.count("cannot be written") == 3  # one for each epoch
    assert "Traceback" not in done.output
    assert lab.digests() == lab.reference


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
def test_a_store_that_is_deleted_or_damaged_between_stages(lab: Lab) -> None:
    lab.forget()
    silent(lab.stage("train"))
    (lab.folder / "mlflow.db").unlink()
    silent(lab.stage("evaluate"))
    assert lab.has_the_training()["tags"].keys() >= {"logged.train", "logged.evaluate"}
    for path in lab.folder.glob("mlflow.db*"):
        path.write_bytes(b"not a database" * 1000)
    warned(lab.stage("plot"))
    assert lab.digests() == lab.reference
    done = lab.sync()
    assert done.code == 1
    assert len(done.output.splitlines()) == 1, done.output
    assert done.output.startswith("error: MLflow cannot be read (")
    for path in lab.folder.glob("mlflow.db*"):
        path.unlink()
    lab.new_link()
    assert lab.sync().code == 0
    lab.is_whole()


@pytest.mark.slow
@pytest.mark.parametrize("action", ["pass", "401"])
def test_no_password_lands_anywhere(
    lab: Lab, proxy: Proxy, mlflow_server: Server, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    proxy.rule = lambda _: action
    monkeypatch.setitem(lab.project.env, "MLFLOW_TRACKING_USERNAME", "somebody")
    monkeypatch.setitem(lab.project.env, "MLFLOW_TRACKING_PASSWORD", f"{SECRET}-too")
    for stage in pipeline.STAGES:
        done = lab.stage(stage, secret(proxy.uri))
        (silent if action == "pass" else warned)(done)
    for folder in (lab.folder, mlflow_server.folder):
        holding = [
            path
            for path in folder.rglob("*")
            if path.is_file() and SECRET.encode() in path.read_bytes()
        ]
        assert not holding


@pytest.mark.parametrize("password", ["a", "a@b", "a:b", "a/b", "a%40b"])
def test_no_error_tells_a_password(password: str) -> None:
    message = first_line(
        ValueError(f"Failed to parse: http://user:{password}@host:5000/api, sorry")
    )
    assert message == "Failed to parse: http://…@host:5000/api, sorry"

"""The stages as commands: their files, their error messages, and Ctrl-C.

A stand-in replaces MLflow.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.metrics import accuracy_score

import stages
from cifarlab.data.dataset import Dataset
from cifarlab.nn.network import predict
from cifarlab.nn.weights import load
from cifarlab.params.load import load_params
from cifarlab.studies.points import _measures
from tests.conftest import REPO
from tests.support.forkserver import ForkServer
from tests.support.networks import coloured

STAGES = ["download", "train", "evaluate", "plot"]
STAND_IN = """
import json
from contextlib import contextmanager
from pathlib import Path

class Logger:
    def __init__(self, stage, params):
        self.stage = stage

    def log_epochs(self):
        rows = len(Path("plots/history.csv").read_text().splitlines()) - 1
        [clock] = Path(".cache/trainings").iterdir()
        print("logged", rows, *json.loads(clock.read_text())["epochs"])

    def log_model(self, network):
        print("model", network.classes)

    @contextmanager
    def run(self, conditions=None):
        print("track", self.stage, bool(conditions))
        yield
"""


@pytest.fixture
def folder(tmp_path: Path, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code without MLflow, to run stages in. `python` is that of the fork server."""
    monkeypatch.setenv("PATH", f"{fork_server.folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("src", "stages"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / "src/cifarlab/tracking/logger.py").write_text(STAND_IN)
    return tmp_path


def edit(folder: Path, **sections: dict[str, Any]) -> None:
    """Change params.yaml: edit(folder, train={"epochs": 2})."""
    params = yaml.safe_load((folder / "params.yaml").read_text("utf-8"))
    for section, changes in sections.items():
        params[section] |= changes
    (folder / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")


def python(
    folder: Path, *arguments: str, executable: str = "python"
) -> subprocess.CompletedProcess[str]:
    """Run Python in the folder, as DVC would."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DVC", "PYTHON"))}
    command = [executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120
    )


def error_of(folder: Path, *arguments: str, executable: str = "python") -> str:
    """Run Python and return its error message, which must be one line."""
    done = python(folder, *arguments, executable=executable)
    assert done.returncode == 1, done
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


# Their files


def test_train_and_evaluate_write_their_files(folder: Path) -> None:
    size = {"name": "folder", "sources": ["a.zip"], "sha256": None, "image_size": 8}
    edit(folder, data=size | {"validation": 0.25}, model={"layers": 2, "widths": [8, 16]})
    edit(folder, train={"epochs": 2, "batch_size": 16, "device": "cpu", "threads": 1})
    edit(folder, evaluate={"views": 2, "shifts": 2, "batch_size": 7})
    images, labels = (t.numpy() for t in coloured(60))
    names = ["a,b", "say what", "c"]
    data = Dataset(
        {"train": images, "test": images}, {"train": labels, "test": labels}, names, "noise"
    )
    data.save(folder / "data")

    done = python(folder, "-m", "stages.train")
    assert done.returncode == 0, done.stderr
    first, track, epoch, logged, _, logged_again = done.stdout.splitlines()
    assert first.startswith("noise: 2 layers 8-16")
    assert "no image is held out" not in first
    assert track == "track train True"
    assert epoch.startswith("epoch 1/2   loss ")
    # history.csv and the times of the epochs are written before MLflow reads them.
    assert [logged, logged_again] == ["logged 1 1", "logged 2 1 2"]
    history = pd.read_csv(folder / "plots/history.csv")
    results = ["train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    assert list(history) == ["epoch", *results, "learning_rate"]
    assert history["epoch"].tolist() == [1, 2]
    final = json.loads((folder / "metrics/train.json").read_text())
    network = load(folder / "models/network.safetensors")
    counts = {"parameters": network.count_parameters(), "training_images": 45}
    assert final == counts | history.iloc[-1][results].to_dict()

    assert len(list(folder.glob(".cache/checkpoints/*.pt"))) == 1
    done = python(folder, "-m", "stages.train")  # as DVC repeats a stage that was killed at its end
    assert "continuing after epoch 2 of 2" in done.stdout
    assert pd.read_csv(folder / "plots/history.csv").equals(history)

    # `dvc repro -s evaluate` looks at an older network: the interrupted training keeps its epochs.
    lock = folder / "dvc.lock"
    lock.write_text("stages: {train: {params: {params.yaml: {train.epochs: 1}}}}")
    assert python(folder, "-m", "stages.evaluate").returncode == 0
    assert len(list(folder.glob(".cache/checkpoints/*.pt"))) == 1
    lock.write_text("stages: {train: {params: {params.yaml: {train.epochs: 2}}}}")
    done = python(folder, "-m", "stages.evaluate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "track evaluate False"
    assert not list(folder.glob(".cache/checkpoints/*.pt"))
    metrics = json.loads((folder / "metrics/evaluate.json").read_text())
    found = predict(network, torch.from_numpy(images), 60).argmax(1)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, found), abs=1e-6)
    extra = {"accuracy_views_2", "accuracy_shifted_1", "accuracy_shifted_2"}
    assert extra < metrics.keys()
    # A study can ask for each.
    assert metrics.keys() <= _measures(load_params(folder / "params.yaml").flat())
    predictions = pd.read_csv(folder / "plots/predictions.csv")
    assert predictions["predicted"].tolist() == [names[i] for i in found]
    for table in ("predictions", "per_class", "confusion"):
        path = folder / f"plots/{table}.csv"
        again = pd.read_csv(path).to_csv(index=False, float_format="%.6f")
        assert path.read_text("utf-8") == again

    edit(folder, data={"validation": 0.01})  # of 20 images of each class
    first, *_ = python(folder, "-m", "stages.train").stdout.splitlines()
    assert first.endswith("; no image is held out")


# Their error messages


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_parameter_is_refused(folder: Path, stage: str) -> None:
    edit(folder, model={"layer": 3})
    assert "did you mean model.layers?" in error_of(folder, "-m", f"stages.{stage}")


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_missing_data_is_reported(folder: Path, stage: str) -> None:
    assert "dvc repro" in error_of(folder, "-m", f"stages.{stage}")


def test_a_python_without_the_requirements_is_reported(folder: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    bare = str(tmp_path / "bare/bin/python")
    message = error_of(folder, "-m", "stages.train", executable=bare)
    assert "source .venv/bin/activate" in message


def test_without_network_the_download_says_what_to_do(folder: Path) -> None:
    """No server listens on the port of these sources."""
    unreachable = ["http://127.0.0.1:9/a.tar.gz", "http://127.0.0.1:9/b.tar.gz"]
    edit(folder, data={"sources": unreachable})
    message = error_of(folder, "-m", "stages.download")
    assert "make demo" in message
    assert "data.sources" in message
    assert not (folder / "data").exists()


def test_importing_stages_does_not_change_the_process(folder: Path) -> None:
    script = """if True:
        import os, signal
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        import stages
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        stages.run(lambda params: print(os.environ["CUBLAS_WORKSPACE_CONFIG"]))
    """
    done = python(folder, "-c", script)
    assert (done.returncode, done.stdout) == (0, ":4096:8\n"), done.stderr


# A lack of memory


def allocate_with_torch() -> None:
    torch.empty(10**15)


def allocate_with_numpy() -> None:
    np.empty(10**17)


def raise_for_the_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def raise_on_windows() -> None:
    text = "DefaultCPUAllocator: not enough memory: you tried to allocate 4000 bytes."
    raise RuntimeError(f"[enforce fail at alloc_cpu.cpp:121] data. {text}")


@pytest.mark.parametrize(
    "fail", [allocate_with_torch, allocate_with_numpy, raise_for_the_gpu, raise_on_windows]
)
def test_a_lack_of_memory_is_recognised(fail: Any) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        fail()
    assert stages.explain(caught.value).startswith("not enough memory; lower train.batch_size")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Expected all tensors to share a memory format"),
        RuntimeError("unable to open shared memory object </torch_1> in read-write mode"),
    ],
    ids=str,
)
def test_other_errors_that_mention_memory_are_not_a_lack_of_it(error: RuntimeError) -> None:
    assert stages.explain(error) == ""


FAILING = """
import stages
def stage(params):
    raise {error}
stages.run(stage)
"""


def test_a_lack_of_memory_is_reported_in_one_sentence(folder: Path) -> None:
    message = error_of(folder, "-c", FAILING.format(error="MemoryError"))
    assert message.startswith("error: not enough memory; lower train.batch_size")


def test_an_illegal_memory_access_keeps_its_traceback(folder: Path) -> None:
    text = "CUDA error: an illegal memory access was encountered"
    done = python(folder, "-c", FAILING.format(error=f"RuntimeError({text!r})"))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == f"RuntimeError: {text}"


# Ctrl-C

TOLD_TO_END = """
import os, signal, stages
from cifarlab.errors import UserError
class Late(UserError):
    def __str__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return "the reason"
def stage(params):
    raise Late
stages.run(stage)
"""


def test_a_signal_while_an_error_is_reported_does_not_hide_the_reason(folder: Path) -> None:
    """If one of several processes fails, torchrun ends the others, which fail as well."""
    assert error_of(folder, "-c", TOLD_TO_END) == "error: the reason\n"


DROPPED = """
import time, stages
class Dropped:
    def __del__(self):
        print("here", flush=True)
        time.sleep(60)
def stage(params):
    Dropped()
    print("goes on", flush=True)
    time.sleep(60)
stages.run(stage)
"""
CLOSING = """
import time, stages
from contextlib import contextmanager
@contextmanager
def slow_to_close():
    try:
        yield
    finally:
        time.sleep(1)  # the KeyboardInterrupt would be repeated every 0.3 s
        print("goes on", flush=True)
def stage(params):
    with slow_to_close(), stages.interrupted_once():
        print("here", flush=True)
        time.sleep(60)
stages.run(stage)
"""


def interrupt(folder: Path, script: str) -> None:
    """Interrupt a script at "here"; it must print "goes on" and end with the message."""
    command = ["python", "-c", script]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, **pipes) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "goes on\n"
        assert process.wait(10) == 1
        message = process.stderr.read().splitlines()[-1]
    assert message == "interrupted; type the same command again and it continues"


def test_ctrl_c_is_repeated_if_python_drops_the_exception(folder: Path) -> None:
    """Python drops an exception that is raised in a destructor."""
    interrupt(folder, DROPPED)


def test_ctrl_c_is_not_repeated_while_the_run_is_closed(folder: Path) -> None:
    interrupt(folder, CLOSING)


@pytest.mark.skipif(sys.platform != "linux", reason="GCC's OpenMP prints its settings")
@pytest.mark.parametrize("given", [None, pytest.param("7", marks=pytest.mark.slow)])
def test_a_thread_of_a_stage_that_waits_leaves_its_core_to_others(given: str | None) -> None:
    program = "import stages; stages.run(lambda params: __import__('torch'))"
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    env |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"GOMP_SPINCOUNT": given} if given else {})
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPO,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{given or 1000}'" in done.stderr

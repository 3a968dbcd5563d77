"""What a stage says when it cannot run, and what evaluate writes about mirrored and shifted images."""

import json
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import accuracy_score

from cifarlab import models, tracking
from cifarlab.datasets import Dataset
from cifarlab.params import Params
from stages.evaluate import evaluate
from tests.conftest import REPO

STAGES = ["download", "train", "evaluate", "plot"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("src", "stages"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPO / name, tmp_path / name)
    return tmp_path


def ends_in_a_sentence(python: str, folder: Path, stage: str) -> str:
    done = subprocess.run([python, "-m", f"stages.{stage}"], cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_parameter(folder: Path, stage: str) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["model"]["layer"] = 3
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    assert "did you mean model.layers?" in ends_in_a_sentence(sys.executable, folder, stage)


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_data_that_is_not_there(folder: Path, stage: str) -> None:
    assert "dvc repro" in ends_in_a_sentence(sys.executable, folder, stage)


def test_a_python_without_the_requirements(folder: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    assert "source .venv/bin/activate" in ends_in_a_sentence(str(tmp_path / "bare/bin/python"), folder, "train")


def test_no_network(folder: Path) -> None:
    """The sources of params.yaml, on ports of this machine where nobody listens."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["data"]["sources"] = ["http://127.0.0.1:9/a.tar.gz", "http://127.0.0.1:9/b.tar.gz"]
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    said = ends_in_a_sentence(sys.executable, folder, "download")
    assert "make demo" in said
    assert "data.sources" in said
    assert not (folder / "data").exists()


@pytest.mark.parametrize("mirror", [True, False])
def test_accuracy_on_mirrored_and_on_shifted_images(
    make_params: Callable[..., Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: bool
) -> None:
    folder = {"data.name": "folder", "data.sources": ["a.zip"], "data.sha256": None, "data.image_size": 8}
    params = make_params({**folder, "model.widths": [8], "model.layers": 2, "evaluate.mirror": mirror, "evaluate.shifts": 2 * mirror})
    params = make_params({"evaluate.batch_size": 7})
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    torch.manual_seed(0)
    network = models.Network(params.model, 8, ["a", "b", "c"])

    def logits(pictures: np.ndarray) -> np.ndarray:
        return models.predict(network, torch.from_numpy(pictures.copy()), 60).double().numpy()

    mean = (logits(images) + logits(images[:, :, ::-1])) / 2
    labels = np.where(np.arange(60) % 4 == 0, 0, mean.argmax(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "Mirror", lambda *_: nullcontext())
    monkeypatch.setattr(tracking, "training_key", lambda _: "key")
    Dataset({"train": images, "test": images}, {"train": labels, "test": labels}, ["a", "b", "c"], "noise").save(Path("data"))
    models.save(network, Path("models/network.safetensors"))
    evaluate(params)
    metrics = json.loads(Path("metrics/evaluate.json").read_text())
    plain, mirrored = accuracy_score(labels, logits(images).argmax(1)), accuracy_score(labels, mean.argmax(1))
    assert plain != mirrored
    assert metrics["accuracy"] == pytest.approx(plain)
    assert metrics.get("accuracy_mirrored") == (pytest.approx(mirrored) if mirror else None)

    def shifted(pixels: int) -> float:
        padded = np.pad(images, [(0, 0), (pixels, pixels), (pixels, pixels), (0, 0)], mode="reflect")
        corners = [(0, pixels), (2 * pixels, pixels), (pixels, 0), (pixels, 2 * pixels)]
        return float(np.mean([accuracy_score(labels, logits(padded[:, y : y + 8, x : x + 8]).argmax(1)) for y, x in corners]))

    found = {key: value for key, value in metrics.items() if key.startswith("accuracy_shifted")}
    assert found == ({f"accuracy_shifted_{i}": pytest.approx(shifted(i), abs=1e-6) for i in (1, 2)} if mirror else {})


def test_a_ctrl_c_that_python_drops_is_heard_all_the_same(folder: Path) -> None:
    """What is raised in a destructor goes no further than a message."""
    script = """
import time, stages
class Dropped:
    def __del__(self):
        print("here", flush=True)
        time.sleep(60)
def stage(params):
    Dropped()
    print("dropped", flush=True)
    time.sleep(60)
stages.run(stage)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "dropped\n"
        assert process.wait(10) == 1
        said = process.stderr.read()
    assert said.splitlines()[-1] == "interrupted; type the same command again and it continues"

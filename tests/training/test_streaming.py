"""Training with images that stay on disk: the same bytes, within a limit of memory."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cifarlab.data.dataset import Dataset
from cifarlab.data.mapped import Mapped
from cifarlab.nn.layers import Normalize, Whiten
from cifarlab.params.sections import TrainParams
from cifarlab.runtime.device import free_memory
from cifarlab.training import graph, loop
from tests.conftest import REPO, MakeTrain
from tests.support.networks import SIZE, colour_network, coloured

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def stored(tmp_path: Path) -> Dataset:
    """Coloured images in files."""
    images, labels = (tensor.numpy() for tensor in coloured(60))
    names = ["red", "green", "blue"]
    both = {"train": images, "test": images}, {"train": labels, "test": labels}
    Dataset(*both, names, "noise").save(tmp_path / "data")
    return Dataset.load(tmp_path / "data")


RECIPES = [
    {"optimizer": "muon", "flip": "alternating", "translate": 2},
    {"optimizer": "sgd", "cutmix": 0.5, "class_weights": "balanced", "diagnostics": True},
    {"optimizer": "adam", "flip": "none", "translate": 0},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["optimizer"])
def test_images_on_disk_give_the_same_bytes_as_in_memory(
    stored: Dataset, make_params: Any, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"model.layers": 2, "model.widths": [8, 8], "model.dropout": 0.2}
    exact = {"precision": "float32", "device": "cpu", "batch_size": 16, "epochs": 2, "lr": 0.01}
    train = {f"train.{key}": value for key, value in (exact | recipe).items()}
    params = make_params(small | train | {"data.validation": 0.3, "data.image_size": SIZE}
                         | {"data.name": "folder"})  # fmt: skip
    monkeypatch.setattr(Whiten, "IMAGES", 20)  # every second one
    monkeypatch.setattr(Whiten, "BATCH", 8)
    monkeypatch.setattr(Normalize, "PIXELS", 10 * SIZE**2)
    found = []
    for stream in (False, True):
        network, images, held_out = loop.prepare(params, stored, CPU, stream=stream)
        assert isinstance(images.images, Mapped) == stream
        history = loop.fit(network, params.train, images, held_out)
        found.append((history, network.state_dict()))
    (expected, weights), (history, others) = found
    assert history == expected
    assert all(torch.equal(weights[name], other) for name, other in others.items())


def test_a_step_that_reads_from_disk_is_not_recorded(
    train_params: MakeTrain,
    content: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(graph, "record", None)
    images, labels = coloured(40)
    mapped = Mapped(images.numpy(), np.arange(40), CPU)
    params: TrainParams = train_params(epochs=1)
    loop.fit(colour_network(content["model"]), params, loop.Images(mapped, labels))
    reason = "the images stay on disk"
    assert capsys.readouterr().out == f"no CUDA graph, the training is slower: {reason}\n"


def test_the_limit_of_a_process_counts_as_free_memory() -> None:
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    before = free_memory(CPU)
    resource.setrlimit(resource.RLIMIT_DATA, (before // 2, limits[1]))
    try:
        assert free_memory(CPU) == before // 2
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


LIMIT = 1100 * MIB
PRINT_MEMORY = """
import runpy, sys
from pathlib import Path
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
status = Path("/proc/self/status").read_text()
print(status.partition("RssAnon:")[2].split()[0])
"""


@pytest.mark.slow
def test_images_larger_than_the_limit_of_memory_are_trained_on(
    tmp_path: Path,
) -> None:
    """RLIMIT_DATA counts what a process allocates, but not the pages of a file that it maps."""
    for name in ("src", "stages"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "dvc.yaml", tmp_path)
    data, count, size = tmp_path / "data", 95_000, 64
    data.mkdir()
    images = np.lib.format.open_memmap(
        data / "train_images.npy", "w+", np.uint8, (count, size, size, 3)
    )
    assert images.nbytes > LIMIT
    images[::100, :32] = 255  # the rest of the file has no blocks on disk
    del images
    (data / "test_images.npy").symlink_to("train_images.npy")
    for split in ("train", "test"):
        np.save(data / f"{split}_labels.npy", np.arange(count) % 2)
    meta = {"name": "sparse", "digest": "0" * 64, "test_digest": "0" * 64, "classes": ["a", "b"]}
    (data / "dataset.json").write_text(json.dumps(meta))
    params = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
    params["data"] |= {"name": "folder", "image_size": size, "validation": 0.9}
    params["model"] |= {"stem": "none", "layers": 1, "widths": [8], "pool": "stride"}
    params["model"] |= {"kernel_size": 1, "activation": "relu", "norm": "none"}
    params["train"] |= {"epochs": 1, "batch_size": 32, "optimizer": "sgd", "device": "cpu"}
    params["train"] |= {"lr": 1e-3, "translate": 0}
    params["tracking"] |= {"log_model": False, "system_metrics": False}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC", "MLFLOW"))}
        env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "OMP_NUM_THREADS": "1"}
        limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))  # noqa: E731
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=env, preexec_fn=limit,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    copied = run("-c", "import numpy; numpy.load('data/train_images.npy', 'r').copy()")
    assert "MemoryError" in copied.stderr
    trained = run("-c", PRINT_MEMORY, "stages.train")
    assert trained.returncode == 0, trained.stderr
    assert "; images that do not fit into memory stay on disk" in trained.stdout
    anonymous = int(trained.stdout.split()[-1]) * 1024
    assert anonymous < 0.8 * LIMIT, trained.stdout

"""Fixtures: the committed parameters, shrunk for tests."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cifarlab.params import Params, TrainParams, load_params
from tests.servers import Server

REPO = Path(__file__).resolve().parent.parent
VARIANTS: dict[str, dict[str, Any]] = yaml.safe_load((REPO / "variants.yaml").read_text("utf-8"))
NOTEBOOK = VARIANTS["notebook"]
# What the tests of a part go without, unless they say so.
PLAIN_NETWORK = {"stem": "none", "norm_scale": True, "activation": "relu", "pool_at": "end", "init": "default", "logit_scale": 1}
PLAIN_TRAINING = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0005, "norm_bias_lr": 1, "schedule": "one_cycle"}
MakeTrain = Callable[..., TrainParams]
# One thread: the tests' networks are tiny, and results do not depend on the machine's cores.
torch.set_num_threads(1)


@pytest.fixture
def content() -> dict[str, Any]:
    """The committed params.yaml as plain dictionaries, to be changed at will."""
    return copy.deepcopy(yaml.safe_load((REPO / "params.yaml").read_text("utf-8")))


@pytest.fixture
def make_params(content: dict[str, Any], tmp_path: Path) -> Callable[..., Params]:
    """Return a function: make_params({"model.layers": 3}) gives the committed parameters with changes, validated from a file."""

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
    """Return a function: train_params(lr=0.1) gives the parameters of a plain and exact training on the CPU, with changes."""
    exact = {"batch_size": 16, "label_smoothing": 0.1, "precision": "float32", "device": "cpu", "threads": 1}
    return lambda **changes: TrainParams(**content["train"] | PLAIN_TRAINING | exact | changes)


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real MLflow server: some seconds to start."""
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    server.wait()
    yield server
    server.kill()

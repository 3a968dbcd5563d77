"""Fixtures: the committed parameters, shrunk for tests."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cifarlab.params import Params, load_params

REPO = Path(__file__).resolve().parent.parent
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


NOTEBOOK = {
    "model.layers": 3,
    "model.widths": [64, 128, 256],
    "model.padding": "valid",
    "model.norm": "batch",
    "model.activation": "relu",
    "model.pool": "max",
    "model.global_pool": "none",
    "model.dropout": [0, 0.1, 0],
    "model.residual": False,
    "model.head": [128, 256],
    "model.init": "default",
}

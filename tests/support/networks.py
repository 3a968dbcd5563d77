"""Small images and networks for tests of training."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import yaml

from cifarlab.nn.network import Network
from cifarlab.params.geometry import ModelParams
from cifarlab.training.batches import Images
from tests.conftest import PLAIN_NETWORK, REPO

SIZE = 8
MakeNetwork = Callable[..., Network]


def coloured(n: int, seed: int = 0) -> Images:
    """Return noise that is a little brighter in the colour channel of the label."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 200, (n, SIZE, SIZE, 3))
    images[np.arange(n), :, :, labels] += 50
    return Images(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


def small_params(**changes: Any) -> ModelParams:
    """Return the committed model section, made small, with changes."""
    content = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))["model"]
    return ModelParams(**content | {"layers": 2, "widths": [8, 8]} | changes)


def colour_network(model: dict[str, Any], **changes: Any) -> Network:
    """Return a small plain network for coloured images: a model section, with changes."""
    torch.manual_seed(0)
    small = {"layers": 2, "widths": [8, 8]}
    params = ModelParams(**model | small | PLAIN_NETWORK | changes)
    network = Network(params, SIZE, ["red", "green", "blue"])
    network.measure(coloured(96).images)
    return network

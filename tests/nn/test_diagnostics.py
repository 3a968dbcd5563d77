"""Diagnostics of networks with known filters, activations and gradients."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cifarlab.nn.diagnostics import count_distinct, diagnose
from cifarlab.nn.network import Network
from cifarlab.params.sections import Params
from cifarlab.training.batches import Images
from cifarlab.training.loop import fit

MakeParams = Callable[..., Params]
PLAIN = {
    "model.stem": "none",
    "model.layers": 2,
    "model.widths": [8, 16],
    "model.norm": "none",
    "model.activation": "relu",
}
TRAINED = {
    "train.device": "cpu",
    "train.precision": "float32",
    "train.threads": 1,
    "train.optimizer": "sgd",
    "train.norm_bias_lr": 1,
}


def build(params: Params) -> Network:
    torch.manual_seed(0)
    return Network(params.model, 32, [str(i) for i in range(10)])


def images(n: int = 40) -> Images:
    generator = torch.Generator().manual_seed(1)
    return Images(
        torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (n,), generator=generator),
    )


def test_equal_filters_count_once() -> None:
    rows = torch.eye(5)
    assert count_distinct(rows) == 5
    assert count_distinct(torch.zeros(5, 9)) == 1
    assert count_distinct(torch.cat([rows, rows * 1.0005, -rows, rows * 1.01])) == 15


def test_all_classes_are_examined_also_if_the_images_are_sorted(make_params: MakeParams) -> None:
    network = build(make_params({**PLAIN, "model.init": "kaiming"}))
    labels = torch.arange(3).repeat_interleave(600)
    pixels = (100 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    seen = []

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.extend(labels.tolist())
        return F.cross_entropy(logits, labels)

    diagnose(network, pixels, labels, loss_of)
    assert Counter(seen) == {0: 200, 1: 200, 2: 200}


def test_dead_units_and_gradients_are_those_of_the_layer(make_params: MakeParams) -> None:
    network, data = build(make_params({**PLAIN, "model.init": "kaiming"})), images()
    first, second = (m for m in network.stages.modules() if isinstance(m, nn.Conv2d))
    assert first.bias is not None
    with torch.no_grad():
        first.bias[:3] = -1e4  # no input brings these above zero
    network.train()
    found = diagnose(network, *data, F.cross_entropy)
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    F.cross_entropy(network(data.images.permute(0, 3, 1, 2)), data.labels).backward()
    assert diagnose(network, *data, F.cross_entropy) == found  # the last batch left gradients
    assert set(found) == {
        f"{what}/{i}"
        for what in ("distinct_filters", "dead_units", "gradient_norm")
        for i in (1, 2)
    }
    assert found["dead_units/1"] >= 3 / 8
    high = first(network.normalize(data.images.permute(0, 3, 1, 2))).amax((0, 2, 3))
    # Pooling at the start of the stage takes the maximum first, which changes nothing here.
    assert found["dead_units/1"] == (high <= 0).double().mean().item()
    # The gradient of one weight, approximated by a difference of losses.
    network.double()
    with torch.no_grad():
        loss = []
        step = torch.zeros_like(second.weight)
        step[2, 3, 1, 1] = 1e-6
        for sign in (1, -1):
            second.weight += sign * step
            loss.append(
                F.cross_entropy(
                    network.head(network.global_pool(network.stages(features(network, data))))
                    * 0.111,
                    data.labels,
                )
            )
            second.weight -= sign * step
    network.zero_grad()
    logits = (
        network.head(network.global_pool(network.stages(features(network, data))))
        * network.params.logit_scale
    )
    F.cross_entropy(logits, data.labels).backward()
    assert second.weight.grad is not None
    assert torch.isclose(
        second.weight.grad[2, 3, 1, 1], (loss[0] - loss[1]) / 2e-6, rtol=1e-3, atol=1e-9
    )
    assert abs(found["gradient_norm/2"] / second.weight.grad.norm().item() - 1) < 1e-4


def features(network: Network, data: Images) -> torch.Tensor:
    return network.normalize(data.images.permute(0, 3, 1, 2)).double()


def test_equal_filters_stay_equal_and_diagnostics_do_not_change_the_training(
    make_params: MakeParams,
) -> None:
    weights: dict[bool, Any] = {}
    for examined in (False, True):
        params = make_params(
            {
                **PLAIN,
                **TRAINED,
                "model.init": "constant",
                "model.init_gain": 0.01,
                "train.epochs": 2,
                "train.batch_size": 8,
            }
            | {"train.diagnostics": examined, "train.lr": 0.01}
        )
        network = build(params)
        history = fit(network, params.train, images())
        weights[examined] = network.state_dict()
        assert [row.get("distinct_filters/2") for row in history] == (
            [1.0, 1.0] if examined else [None, None]
        )
    assert all(torch.equal(weights[True][name], tensor) for name, tensor in weights[False].items())

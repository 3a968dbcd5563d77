"""Steps of the optimizers, Muon, and learning rate schedules."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifarlab.nn.network import Network
from cifarlab.params.geometry import ModelParams
from cifarlab.training.optimizers import Muon, make_optimizers, orthogonalize, schedule
from tests.conftest import PLAIN_NETWORK, MakeTrain

MakeNetwork = Callable[..., Network]


@pytest.fixture
def make_network(content: dict[str, Any]) -> MakeNetwork:
    """Return a function that makes a small network with a stem, gradients and norm biases."""

    def make(**changes: Any) -> Network:
        torch.manual_seed(0)
        params = ModelParams(
            **content["model"]
            | PLAIN_NETWORK
            | {"stem": "whiten", "layers": 2, "widths": [8, 16]}
            | changes
        )
        network = Network(params, 8, ["a", "b", "c"]).to(memory_format=torch.channels_last)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(module.bias)
        images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
        F.cross_entropy(network(images), torch.arange(24) % 3).backward()
        return network

    return make


def copies(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


# Steps


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # One step from 2 with gradient 1; weight decay 0.5 makes it 1 + 0.5 · 2 = 2.
        ({"optimizer": "sgd", "momentum": 0}, 2 - 0.1 * 2),
        # Nesterov momentum looks one step ahead.
        ({"optimizer": "sgd", "momentum": 0.9}, 2 - 0.1 * (2 + 0.9 * 2)),
        ({"optimizer": "adam"}, 2 - 0.1),  # the first step has length lr
        ({"optimizer": "adamw"}, 2 * (1 - 0.1 * 0.5) - 0.1),  # decoupled weight decay
        ({"optimizer": "muon", "momentum": 0}, 2 - 0.1 * 2),  # not a filter, so SGD moves it
    ],
)
def test_first_step_of_the_optimizers(
    train_params: MakeTrain, changes: dict[str, Any], expected: float
) -> None:
    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 2)
    params = train_params(lr=0.1, weight_decay=0.5, schedule="constant", **changes)
    [optimizer] = make_optimizers(weight, params, torch.float32)
    weight(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert weight.weight.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_norm_biases_learn_faster_and_decay_like_other_weights(
    train_params: MakeTrain, make_network: MakeNetwork, norm: str, optimizer: str
) -> None:
    network = make_network(norm=norm)
    before = copies(network)
    params = train_params(
        optimizer=optimizer,
        lr=0.1,
        momentum=0,
        weight_decay=0.5,
        norm_bias_lr=64,
        schedule="constant",
    )
    sgd = make_optimizers(network, params, torch.float32)[0]
    sgd.step()
    fast, frozen = {"stages.0.first.1.bias", "stages.1.first.1.bias"}, {"stem.0.weight"}
    if optimizer == "muon":
        frozen |= {"stages.0.first.0.weight", "stages.1.first.0.weight"}
    assert fast | frozen < before.keys()
    for name, p in network.named_parameters():
        if name in frozen:
            assert torch.equal(p, before[name]), name
        else:
            step = 0.1 * (64 if name in fast else 1) * p.grad + 0.1 * 0.5 * before[name]
            assert step.any()
            torch.testing.assert_close(p.detach(), before[name] - step, msg=name)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_first_steps_of_adam_are_as_long_as_the_learning_rates(
    train_params: MakeTrain, make_network: MakeNetwork, optimizer: str
) -> None:
    network = make_network()
    before = copies(network)
    params = train_params(
        optimizer=optimizer, lr=0.001, weight_decay=0, norm_bias_lr=16, schedule="constant"
    )
    [adam] = make_optimizers(network, params, torch.float32)
    adam.step()
    moved = {name: (p - before[name]).abs().max().item() for name, p in network.named_parameters()}
    assert moved["stages.0.first.1.bias"] == pytest.approx(0.016, rel=1e-3)
    assert [moved["stages.0.first.1.weight"], moved["stem.0.bias"]] == pytest.approx(
        [0.001, 0.001], rel=1e-3
    )


# Muon


def test_muon_takes_filters_of_convolutions_only(train_params: MakeTrain) -> None:
    """It rescales what it takes, which would be wrong for other tensors with four axes."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    network.scale = nn.Parameter(torch.full((1, 4, 1, 1), 0.1))
    network[0].weight.requires_grad = False
    rest, muon = make_optimizers(network, train_params(optimizer="muon"), torch.float32)
    taken = [p for group in muon.param_groups for p in group["params"]]
    assert [id(p) for p in taken] == [id(network[1].weight)]
    assert any(p is network.scale for group in rest.param_groups for p in group["params"])


def test_muon_moves_only_the_filters_and_all_directions_equally(
    train_params: MakeTrain, make_network: MakeNetwork
) -> None:
    network = make_network()
    before = copies(network)
    params = train_params(optimizer="muon", muon_lr=0.1, weight_decay=0, schedule="constant")
    [_, muon] = make_optimizers(network, params, torch.float32)
    muon.step()
    before = {
        name: b * len(b) ** 0.5 / b.norm() if name.startswith("stages") and b.ndim == 4 else b
        for name, b in before.items()
    }
    moved = {
        name: before[name] - p.detach()
        for name, p in network.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert moved.keys() == {"stages.0.first.0.weight", "stages.1.first.0.weight"}
    for name, step in moved.items():
        assert step.shape == before[name].shape
        gradient = network.get_parameter(name).grad
        u, _, v = np.linalg.svd(gradient.flatten(1).numpy(), full_matrices=False)
        # The step has about the same length, 0.7 to 1.2, in each singular direction of the gradient
        # and no component outside of them.
        lengths = np.einsum("oi,ok,ki->k", step.flatten(1).numpy() / 0.1, u, v)
        assert 0.6 < lengths[:-1].min() < lengths.max() < 1.3, name
        assert np.linalg.norm(step.flatten(1).numpy() / 0.1) ** 2 == pytest.approx(
            (lengths**2).sum(), rel=0.02
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-3), (torch.float32, 0.02)])
def test_muon_of_filters_matches_torchs_muon_of_matrices(
    train_params: MakeTrain, make_network: MakeNetwork, dtype: torch.dtype, tolerance: float
) -> None:
    network = make_network()
    filters = [network.get_parameter(f"stages.{stage}.first.0.weight") for stage in (0, 1)]
    matrices = [nn.Parameter(w.detach().flatten(1).clone()) for w in filters]
    start = [m.detach().clone() for m in matrices]
    # PyTorch's Muon always computes in bfloat16.
    theirs = torch.optim.Muon(matrices, lr=0.1, momentum=0.6, weight_decay=0, ns_steps=3)
    params = train_params(
        optimizer="muon", muon_lr=0.1, muon_momentum=0.6, weight_decay=0.05, schedule="constant"
    )
    [_, ours] = make_optimizers(network, params, dtype)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for weight, matrix in zip(filters, matrices, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            matrix.grad = weight.grad.flatten(1).clone()
            matrix.data *= len(matrix) ** 0.5 / matrix.data.norm()
        ours.step()
        theirs.step()
    for weight, matrix, initial in zip(filters, matrices, start, strict=True):
        assert (weight.flatten(1) - matrix).norm() < tolerance * (matrix - initial).norm()


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 5)])
def test_orthogonalizing_in_float32_changes_only_the_singular_values(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    s /= np.linalg.norm(s)
    for _ in range(3):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(orthogonalize(matrix[None], torch.float32)[0], u * s @ v, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_filters_of_one_shape_move_as_each_would_alone(
    train_params: MakeTrain, channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4, 3, 3), (4, 6, 3, 3), (6, 4, 3, 3), (6, 4, 3, 3)]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    start = [torch.randn(shape, generator=generator).to(memory_format=layout) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]

    def moved(chosen: list[int]) -> list[torch.Tensor]:
        filters = [nn.Parameter(start[i].clone()) for i in chosen]
        muon = Muon(filters, 0.1, 0.6, torch.float32)
        for _ in range(3):
            for weight, i in zip(filters, chosen, strict=True):
                weight.grad = gradients[i].clone()
            muon.step()
        return [weight.detach() for weight in filters]

    together, alone = moved([0, 1, 2, 3]), [moved([i])[0] for i in range(4)]
    for one, other, before in zip(together, alone, start, strict=True):
        assert not torch.allclose(one, before, atol=1e-2)
        torch.testing.assert_close(one, other)


# Schedules


@pytest.mark.parametrize("name", ["linear", "constant"])
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_schedules_are_those_of_pytorch(name: str, steps: int) -> None:
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    theirs = {
        "linear": torch.optim.lr_scheduler.LinearLR(sgd, 1, 0, steps),
        "constant": torch.optim.lr_scheduler.ConstantLR(sgd, 1),
    }[name]
    expected = [1.0]
    for _ in range(steps):
        sgd.step()
        theirs.step()
        expected.append(sgd.param_groups[0]["lr"])
    assert schedule(name, steps) == pytest.approx(np.array(expected), abs=1e-9)


def test_one_cycle_rises_for_a_quarter_and_falls_to_zero() -> None:
    rates = schedule("one_cycle", 200)
    assert (len(rates), rates.argmax(), rates[0], rates.max(), rates[-1]) == (201, 50, 0.2, 1, 0)
    assert np.ptp(np.diff(rates[:51])) < 1e-9  # straight lines
    assert np.ptp(np.diff(rates[50:])) < 1e-9


@pytest.mark.parametrize("steps", range(1, 9))
def test_one_cycle_works_for_the_shortest_trainings(steps: int) -> None:
    rates = schedule("one_cycle", steps)
    assert (rates[:-1] > 0).all()
    assert rates[-1] == 0

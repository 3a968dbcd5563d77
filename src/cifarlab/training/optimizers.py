"""Optimizers, and the schedule of their learning rates."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from cifarlab.params.sections import TrainParams


class Muon(Optimizer):
    """Muon (Jordan 2024) with Nesterov momentum, for convolution filters as rows of a matrix.

    Torch's own Muon takes only matrices, and always computes in bfloat16, which is slow where the
    processor emulates it. As in airbench (Jordan 2024) there are three Newton–Schulz iterations.
    Before each step the filter bank is rescaled to norm √out, which keeps the relative step size
    constant. Filter banks of one shape are computed together.
    """

    def __init__(
        self, filters: list[nn.Parameter], lr: float, momentum: float, dtype: torch.dtype
    ) -> None:
        """Take the weights (out, in, height, width), and the dtype of the iterations."""
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for weight in filters:
            shapes.setdefault(weight.shape, []).append(weight)
        super().__init__([{"params": alike} for alike in shapes.values()], {"lr": lr})
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the filters from their gradients."""
        for group in self.param_groups:
            weights = group["params"]
            state = self.state[weights[0]]  # for all of this shape
            gradients = stack([weight.grad for weight in weights])
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradients)
            buffer = state["momentum_buffer"].lerp_(gradients, 1 - self.momentum)
            update = orthogonalize(gradients.lerp_(buffer, self.momentum), self.dtype)
            banks = stack(weights)
            _, rows, columns = banks.shape
            banks *= rows**0.5 / banks.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            banks -= update * (group["lr"] * max(1, rows / columns) ** 0.5)
            for weight, bank in zip(weights, banks, strict=True):
                channels_last = weight.permute(0, 2, 3, 1)
                channels_last.copy_(bank.view(channels_last.shape))


def stack(banks: list[Tensor]) -> Tensor:
    """Copy filters (out, in, height, width) of one shape to (banks, out, height · width · in)."""
    return torch.stack([bank.permute(0, 2, 3, 1) for bank in banks]).flatten(2)


def orthogonalize(matrices: Tensor, dtype: torch.dtype, iterations: int = 3) -> Tensor:
    """Return matrices (N, rows, columns) with all singular values moved close to 1.

    Newton–Schulz iterations in `dtype`, with the polynomial of Jordan (2024): 3.4445 σ - 4.775 σ³
    + 2.0315 σ⁵. It is steep at 0; after a few iterations the values lie within 0.7 … 1.2.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    wide = (matrices.mT if tall else matrices).to(dtype)
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        wide = torch.baddbmm(wide, polynomial, wide, beta=3.4445)
    return (wide.mT if tall else wide).to(matrices.dtype)


# Points (share of the training, share of the highest learning rate), with lines between them.
SCHEDULES: dict[str, list[tuple[float, float]]] = {
    "constant": [(0, 1), (1, 1)],
    "linear": [(0, 1), (1, 0)],
    "one_cycle": [(0, 0.2), (0.25, 1), (1, 0)],
}


def schedule(name: str, steps: int) -> npt.NDArray[np.float64]:
    """Return the learning rate at each of the steps and after the last, (steps + 1,), highest 1."""
    when, share = zip(*SCHEDULES[name], strict=True)
    rates: npt.NDArray[np.float64] = np.interp(np.arange(steps + 1) / steps, when, share)
    return rates


def make_optimizers(network: nn.Module, params: TrainParams, dtype: torch.dtype) -> list[Optimizer]:
    """Return the optimizers of a network, with the highest learning rates.

    `dtype` is for Muon's matrix products. The biases of normalisation layers have a learning rate
    `norm_bias_lr` times as high; their weight decay is divided by it, so that with SGD and AdamW
    the decay in each step stays the same.
    """
    factor, muon = params.norm_bias_lr, params.optimizer == "muon"
    trained = [p for p in network.parameters() if p.requires_grad]
    convolved = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)] if muon else []
    filters = [p for p in trained if any(p is weight for weight in convolved)]
    biases = [m.bias for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    others = [p for p in trained if not any(p is other for other in filters + biases)]
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": params.lr, "weight_decay": params.weight_decay},
        {"params": biases, "lr": params.lr * factor, "weight_decay": params.weight_decay / factor},
    ]
    sgd = partial(SGD, momentum=params.momentum, nesterov=params.momentum > 0)
    kinds: dict[str, Callable[..., Optimizer]] = {"adam": Adam, "adamw": AdamW}
    # With muon, sgd is for all parameters but the filters.
    optimizers = [kinds.get(params.optimizer, sgd)(groups, params.lr, fused=True)]
    if filters:
        optimizers.append(Muon(filters, params.muon_lr, params.muon_momentum, dtype))
    return optimizers

"""Optimizers, and the schedules of their learning rates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, OneCycleLR

from cifarlab.params.sections import TrainParams

Groups = list[dict[str, Any]]
Scheduled = tuple[torch.optim.Optimizer, LRScheduler]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with Nesterov momentum, for convolution filters as rows of a matrix.

    Torch's own Muon takes only matrices, and always computes in bfloat16, which is slow where the
    processor emulates it. As in airbench (Jordan 2024) there are three Newton–Schulz iterations.
    Before each step the filter bank is rescaled to norm √out, which keeps the relative step size
    constant.
    """

    def __init__(
        self, filters: list[nn.Parameter], lr: float, momentum: float, dtype: torch.dtype
    ) -> None:
        """Take the weights (out, in, height, width), and the dtype of the iterations."""
        super().__init__(filters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the filters from their gradients."""
        [group] = self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        for weight in group["params"]:
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
            update = orthogonalize(weight.grad.lerp(buffer, momentum).flatten(1), self.dtype)
            weight.mul_(len(weight) ** 0.5 / weight.norm().clamp(min=1e-7))
            rows, columns = update.shape
            weight.add_(update.view_as(weight), alpha=-lr * max(1, rows / columns) ** 0.5)


def orthogonalize(matrix: Tensor, dtype: torch.dtype, iterations: int = 3) -> Tensor:
    """Return the matrix (rows, columns) with all singular values moved close to 1.

    Newton–Schulz iterations in `dtype`, with the polynomial of Jordan (2024): 3.4445 σ - 4.775 σ³
    + 2.0315 σ⁵. It is steep at 0; after a few iterations the values lie within 0.7 … 1.2.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if tall else matrix).to(dtype)
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = wide @ wide.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        wide = torch.addmm(wide, polynomial, wide, beta=3.4445)
    return (wide.T if tall else wide).to(matrix.dtype)


def _sgd(groups: Groups, params: TrainParams) -> torch.optim.Optimizer:
    nesterov = params.momentum > 0
    return torch.optim.SGD(groups, params.lr, params.momentum, nesterov=nesterov, fused=True)


OPTIMIZERS: dict[str, Callable[[Groups, TrainParams], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "muon": _sgd,  # for all parameters but the filters
    "adam": lambda groups, params: torch.optim.Adam(groups, params.lr, fused=True),
    "adamw": lambda groups, params: torch.optim.AdamW(groups, params.lr, fused=True),
}


def _one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    peaks = [group["lr"] for group in optimizer.param_groups]
    # The rise ends at step pct_start * total_steps - 1, which must not be 0, the first step.
    start = 0.25 if steps != 3 else 0.5
    shape: dict[str, Any] = {"anneal_strategy": "linear", "cycle_momentum": False, "div_factor": 5}
    return OneCycleLR(optimizer, peaks, steps + 1, pct_start=start, **shape)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, steps: LambdaLR(optimizer, lambda _: 1.0),
    "linear": lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.0, steps),
    "one_cycle": _one_cycle,
}


def make_optimizers(
    network: nn.Module, params: TrainParams, steps: int, dtype: torch.dtype = torch.float32
) -> list[Scheduled]:
    """Return the optimizers of a network, each with its learning-rate schedule over `steps` steps.

    `dtype` is for Muon's matrix products. The biases of normalisation layers have a learning rate
    `norm_bias_lr` times as high; their weight decay is divided by it, so that with SGD and AdamW
    the decay in each step stays the same.
    """
    factor, muon = params.norm_bias_lr, params.optimizer == "muon"
    trained = [p for p in network.parameters() if p.requires_grad]
    filters = [p for p in trained if p.ndim == 4] if muon else []
    biases = [m.bias for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    others = [p for p in trained if not any(p is other for other in filters + biases)]
    groups: Groups = [
        {"params": others, "lr": params.lr, "weight_decay": params.weight_decay},
        {"params": biases, "lr": params.lr * factor, "weight_decay": params.weight_decay / factor},
    ]
    optimizers = [OPTIMIZERS[params.optimizer](groups, params)]
    if filters:
        optimizers.append(Muon(filters, params.muon_lr, params.muon_momentum, dtype))
    return [(optimizer, SCHEDULES[params.schedule](optimizer, steps)) for optimizer in optimizers]

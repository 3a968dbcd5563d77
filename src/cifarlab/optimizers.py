"""Optimisers of a network's parameters, and the schedule of their learning rates. Torch's, but for Muon."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, OneCycleLR

from cifarlab.params import TrainParams


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with Nesterov momentum for the filters of convolutions, each a row of a matrix.

    Torch's own takes matrices only and always computes in bfloat16, which costs most of a training's time where the
    processor has to emulate it. As in airbench (Jordan 2024) three Newton–Schulz iterations do, and each bank has the norm √out
    before its step, so that steps stay as large beside it as they were.
    """

    def __init__(self, filters: list[nn.Parameter], lr: float, momentum: float, dtype: torch.dtype) -> None:
        """Take the weights (out, in, height, width) of convolutions, and the type to orthogonalise in."""
        super().__init__(filters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update from the gradients of the filters."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"]
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(buffer, group["momentum"]).flatten(1), self.dtype)
                weight.mul_(len(weight) ** 0.5 / weight.norm().clamp(min=1e-7))
                rows, columns = update.shape
                weight.add_(update.view_as(weight), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrix: Tensor, dtype: torch.dtype, iterations: int = 3) -> Tensor:
    """Return the matrix (rows, columns) with all its singular values near 1, by Newton–Schulz iterations in `dtype`.

    The polynomial 3.4445 σ - 4.775 σ³ + 2.0315 σ⁵ is that of Jordan (2024): steep at 0, and after some iterations within 0.7 … 1.2.
    """
    wide = (matrix if len(matrix) <= matrix.shape[1] else matrix.T).to(dtype)
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445)
    return (wide if len(matrix) <= matrix.shape[1] else wide.T).to(matrix.dtype)


def make_optimizers(
    network: nn.Module, params: TrainParams, steps: int, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.optim.Optimizer, LRScheduler]]:
    """Return the optimisers of a network, each with the schedule of its learning rate over `steps` batches.

    Muon, which multiplies matrices in `dtype`, moves the filters only; the other parameters go by SGD. The biases of
    normalisation layers learn `norm_bias_lr` times as fast as those; with SGD and AdamW their decay per step stays the same.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    filters = [p for p in trained if p.ndim == 4] if params.optimizer == "muon" else []
    biases = [m.bias for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    apart = {id(p) for p in filters + biases}
    rest = [p for p in trained if id(p) not in apart]
    factor = params.norm_bias_lr
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": params.lr, "weight_decay": params.weight_decay},
        {"params": biases, "lr": params.lr * factor, "weight_decay": params.weight_decay / factor},
    ]
    optimizers: list[torch.optim.Optimizer]
    if params.optimizer in ("sgd", "muon"):
        optimizers = [torch.optim.SGD(groups, params.lr, params.momentum, nesterov=params.momentum > 0, fused=True)]
    else:
        kind = torch.optim.Adam if params.optimizer == "adam" else torch.optim.AdamW
        optimizers = [kind(groups, params.lr, fused=True)]
    if filters:
        optimizers.append(Muon(filters, params.muon_lr, params.muon_momentum, dtype))
    return [(optimizer, _schedule(optimizer, params.schedule, steps)) for optimizer in optimizers]


def _schedule(optimizer: torch.optim.Optimizer, name: str, steps: int) -> LRScheduler:
    if name == "constant":
        return LambdaLR(optimizer, lambda _: 1.0)
    if name == "linear":
        return LinearLR(optimizer, 1.0, 0.0, steps)
    # The rise ends at pct_start * total_steps - 1, which must not be 0, the first step itself.
    return OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=steps + 1,
        pct_start=0.25 if steps != 3 else 0.5,
        anneal_strategy="linear",
        cycle_momentum=False,
        div_factor=5,
        final_div_factor=1e4,
    )

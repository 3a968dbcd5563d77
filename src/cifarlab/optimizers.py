"""Optimisers of a network's parameters, and the schedule of their learning rates. Torch's, but for the shape that Muon asks for."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, OneCycleLR

from cifarlab.params import TrainParams


class ConvolutionMuon(torch.optim.Muon):
    """Torch's Muon (Jordan 2024), which takes matrices, for filters: each is a row, channels-last as it lies in memory.

    Orthogonalising the update does not mind the order of columns, so this is Muon of the usual (out, in · height · width).
    As in airbench (Jordan 2024) three Newton–Schulz iterations do, and each bank has the norm √out before its step, so
    that steps stay as large beside it as they were.
    """

    def __init__(self, weights: list[nn.Parameter], **options: Any) -> None:
        """Take the weights (out, in, height, width) of convolutions in channels-last memory."""
        self.weights = weights
        # Matrices of the same memory, which view() insists on: a step changes the weights.
        self.matrices = [nn.Parameter(w.detach().permute(0, 2, 3, 1).view(len(w), -1)) for w in weights]
        super().__init__(self.matrices, **options)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update from the gradients of the weights."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.permute(0, 2, 3, 1).flatten(1)
            matrix.data.mul_(len(matrix) ** 0.5 / matrix.data.norm().clamp(min=1e-7))
        super().step(closure)  # type: ignore[no-untyped-call]


def make_optimizers(network: nn.Module, params: TrainParams, steps: int) -> list[tuple[torch.optim.Optimizer, LRScheduler]]:
    """Return the optimisers of a network in channels-last memory, each with the schedule of its learning rate over `steps` batches.

    Muon moves the filters only; the other parameters go by SGD. The biases of normalisation layers learn `norm_bias_lr`
    times as fast as those; with SGD and AdamW their decay per step stays the same.
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
        optimizers.append(ConvolutionMuon(filters, lr=params.muon_lr, momentum=params.muon_momentum, weight_decay=0, ns_steps=3))
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

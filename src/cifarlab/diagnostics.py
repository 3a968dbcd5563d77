"""What goes on inside a network while it trains: filters that are the same, units that are dead, gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cifarlab.models import ACTIVATIONS, Network

SAME = 1e-3  # of the longer filter: rounding alone drives filters that should be the same no further apart


def diagnose(network: Network, images: Tensor, labels: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """Look into each convolution, numbered from 1, in evaluation mode and float32; the network is left as it was.

    Parameters
    ----------
    images : uint8 (N, height, width, 3), with labels int64 (N,)
    loss_of : mean loss of logits (N, classes) and labels

    Returns
    -------
    Per layer i: distinct_filters/i, how many filters differ from all before them by more than a thousandth;
    dead_units/i, the share of channels whose activation gets nothing above zero on any of the images;
    gradient_norm/i, the Euclidean norm of the gradient of the loss with respect to the filters.
    """
    highest: list[Tensor] = []
    activations = [m for m in network.stages.modules() if isinstance(m, tuple(ACTIVATIONS.values()))]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: highest.append(inputs[0].detach().amax((0, 2, 3)))) for m in activations]
    was_training = network.training
    network.eval()
    loss_of(network(images.permute(0, 3, 1, 2)), labels).backward()  # type: ignore[no-untyped-call]
    found: dict[str, float] = {}
    convolutions = [m for m in network.stages.modules() if isinstance(m, nn.Conv2d)]
    for i, (convolution, high) in enumerate(zip(convolutions, highest, strict=True), 1):
        assert convolution.weight.grad is not None
        found[f"distinct_filters/{i}"] = float(distinct(convolution.weight.detach().flatten(1)))
        found[f"dead_units/{i}"] = (high <= 0).double().mean().item()
        found[f"gradient_norm/{i}"] = convolution.weight.grad.norm().item()
    for hook in hooks:
        hook.remove()
    network.zero_grad()
    network.train(was_training)
    return found


def distinct(filters: Tensor) -> int:
    """Count the rows (N, weights) that differ from all before them by more than SAME of the longer one."""
    norms = filters.norm(dim=1)
    same = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist") <= SAME * torch.maximum(norms[:, None], norms)
    return len(filters) - int(same.tril(-1).any(1).sum())

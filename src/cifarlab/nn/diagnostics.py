"""What happens inside a network: equal filters, dead units, the size of gradients."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from cifarlab.data.mapped import Rows
from cifarlab.nn.layers import ACTIVATIONS
from cifarlab.nn.network import Network

# Filters that differ by less than this share of their norm count as equal: rounding alone separates
# filters that should stay equal by less.
TOLERANCE = 1e-3
IMAGES = 512


def diagnose(
    network: Network, images: Rows, labels: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float]:
    """Examine each convolution in evaluation mode and float32. The network stays unchanged.

    Parameters
    ----------
    images : uint8 (N, height, width, 3), with labels int64 (N,); IMAGES of them
        or a few more are used, evenly spread
    loss_of : mean loss of logits (N, classes) and labels

    Returns
    -------
    For each convolution i = 1, 2, …: distinct_filters/i, the number of different filters;
    dead_units/i, the share of channels whose activation gets no input above zero on any image;
    gradient_norm/i, the Euclidean norm of the loss's gradient with respect to the filters.
    """
    maxima: list[Tensor] = []  # for each activation, the maximum input of each channel

    def note(_: nn.Module, inputs: tuple[Tensor]) -> None:
        maxima.append(inputs[0].detach().amax((0, 2, 3)))

    # From the whole range, because a folder's images are sorted by class.
    some = slice(None, None, max(1, len(labels) // IMAGES))
    was_training = network.training
    network.eval()
    with ExitStack() as hooks:
        for module in network.stages.modules():
            if isinstance(module, tuple(ACTIVATIONS.values())):
                hooks.enter_context(module.register_forward_pre_hook(note))
        loss = loss_of(network(images[some].permute(0, 3, 1, 2)), labels[some])
    network.zero_grad()  # there are those of the last batch
    loss.backward()  # type: ignore[no-untyped-call]
    filters = [m.weight for m in network.stages.modules() if isinstance(m, nn.Conv2d)]
    found: dict[str, float] = {}
    for i, (weight, maximum) in enumerate(zip(filters, maxima, strict=True), 1):
        assert weight.grad is not None
        found[f"distinct_filters/{i}"] = float(count_distinct(weight.detach().flatten(1)))
        found[f"dead_units/{i}"] = (maximum <= 0).double().mean().item()
        found[f"gradient_norm/{i}"] = weight.grad.norm().item()
    network.zero_grad()
    network.train(was_training)
    return found


def count_distinct(filters: Tensor) -> int:
    """Count the rows of (N, weights) that differ from every row before them.

    Two rows are equal if their distance is at most TOLERANCE times the longer one's norm.
    """
    norms = filters.norm(dim=1)
    distances = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist")
    equal = distances <= TOLERANCE * torch.maximum(norms[:, None], norms)
    return len(filters) - int(equal.tril(-1).any(1).sum())

"""Augmentation of whole batches, on the device that holds them (CPU or GPU)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Draws(NamedTuple):
    """The random choices for each of N images."""

    mirrored: Tensor
    """bool (N,): swap left and right?"""
    shifts: Tensor
    """int64 (N, 2): move the image up and to the left by this number of pixels."""


def draw(
    n: int, seed: int, epoch: int, *, flip: Literal["none", "random", "alternating"], translate: int
) -> Draws | None:
    """Draw the random choices for all `n` images in an epoch (1, 2, …).

    They are drawn on the CPU, so they are the same for every device. Returns None where nothing
    is to be done.

    `random` mirrors each image with probability ½ in every epoch. `alternating` does so in the
    first epoch, and then mirrors each image in every second epoch, so that two epochs in a row
    show different views (Jordan 2024, airbench).
    """
    if flip == "none" and not translate:
        return None
    # alternating draws only once, for all epochs.
    flip_draws = np.random.default_rng([seed, 0 if flip == "alternating" else epoch])
    mirrored = flip_draws.random(n) < 0.5 if flip != "none" else np.zeros(n, dtype=bool)
    if flip == "alternating" and epoch % 2 == 0:
        mirrored = ~mirrored
    shift_draws = np.random.default_rng([seed, epoch, 1])
    shifts = shift_draws.integers(-translate, translate, (n, 2), endpoint=True)
    return Draws(torch.from_numpy(mirrored), torch.from_numpy(shifts))


def augment(images: Tensor, draws: Draws | None) -> Tensor:
    """Mirror and shift every image of a batch as drawn, with reflection at the border.

    One gather does both: it takes each pixel from the row and the column that the image needs.

    Parameters
    ----------
    images : uint8 (N, height, width, channels)
    draws : for these N images, on the same device; the shifts are below height and width

    Returns
    -------
    uint8 (N, channels, height, width), channels last in memory
    """
    if draws is None:
        return images.permute(0, 3, 1, 2)
    n, height, width, _ = images.shape
    device = images.device
    rows = _reflect(torch.arange(height, device=device) + draws.shifts[:, :1], height)
    columns = torch.arange(width, device=device)
    columns = torch.where(draws.mirrored[:, None], width - 1 - columns, columns)
    columns = _reflect(columns + draws.shifts[:, 1:], width)
    number = torch.arange(n, device=device)[:, None, None]
    return images[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutmix(share: float, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function that applies CutMix (Yun et al. 2019) to a `share` of the batches.

    It takes images (N, channels, height, width) and labels int64 (N,). With CutMix, one rectangle
    of each image is replaced by that of the image before it in the batch, and the labels become
    shares of the classes, float (N, classes). Otherwise both are returned unchanged. It draws from
    torch's global generator.
    """
    if not share:
        return lambda images, labels: (images, labels)
    # This import takes 2 s. Trainings without CutMix need not wait for it.
    from torchvision.transforms.v2 import CutMix, RandomApply

    return RandomApply([CutMix(num_classes=classes)], share)  # type: ignore[no-any-return]


def _reflect(index: Tensor, size: int) -> Tensor:
    """Reflect indices in [-size, 2 size - 2] into [0, size). The border pixel is not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)

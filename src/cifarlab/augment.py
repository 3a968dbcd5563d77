"""Augmentation of whole batches where they lie, on CPU or GPU."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Draws(NamedTuple):
    """What chance has decided for each of N images."""

    mirrored: Tensor
    """bool (N,): left and right swapped."""
    shifts: Tensor
    """int64 (N, 2): pixels by which the picture moves up and to the left."""


def draw(n: int, seed: int, epoch: int, *, flip: Literal["none", "random", "alternating"], translate: int) -> Draws | None:
    """Draw the augmentation of all `n` images for an epoch (1, 2, …), on the CPU, the same whatever the device; None for none.

    random mirrors with probability ½ in each epoch; alternating does so in the first, and from then on shows each
    image the other way round every time, so that two epochs in a row never repeat a view (Jordan 2024, airbench).
    """
    if flip == "none" and not translate:
        return None
    # Alternating tosses its coins once for all epochs.
    coins = np.random.default_rng([seed, 0 if flip == "alternating" else epoch])
    mirrored = coins.random(n) < 0.5 if flip != "none" else np.zeros(n, dtype=bool)
    if flip == "alternating" and epoch % 2 == 0:
        mirrored = ~mirrored
    shifts = np.random.default_rng([seed, epoch, 1]).integers(-translate, translate, (n, 2), endpoint=True)
    return Draws(torch.from_numpy(mirrored), torch.from_numpy(shifts))


def augment(images: Tensor, draws: Draws | None) -> Tensor:
    """Mirror and shift every image of a batch as drawn; what a shift uncovers is reflected at the border.

    One gather does both, of the pixels whose row and column each image asks for.

    Parameters
    ----------
    images : uint8 (N, height, width, channels)
    draws : of these N images, on the same device; shifts less than height and width

    Returns
    -------
    uint8 (N, channels, height, width) in channels-last memory
    """
    if draws is None:
        return images.permute(0, 3, 1, 2)
    n, height, width, _ = images.shape
    device = images.device
    columns = torch.arange(width, device=device)
    rows = _reflect(torch.arange(height, device=device) + draws.shifts[:, :1], height)
    columns = _reflect(torch.where(draws.mirrored[:, None], width - 1 - columns, columns) + draws.shifts[:, 1:], width)
    return images[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutmix(share: float, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function that does CutMix (Yun et al. 2019) to `share` of the batches it is given, as torch's global generator draws.

    It maps images (N, channels, height, width) and labels int64 (N,) to images in which a rectangle, the same for all, is
    that of the image before, and to the share of each class in them, float (N, classes); or returns both as they are.
    """
    if not share:
        return lambda images, labels: (images, labels)
    from torchvision.transforms.v2 import CutMix, RandomApply  # 2 s that other trainings need not wait for

    return RandomApply([CutMix(num_classes=classes)], share)  # type: ignore[no-any-return]


def _reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices in [-size, 2 size - 2] back into [0, size) without repeating the border."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)

"""Augmentation of whole batches, on the device that holds them (CPU or GPU)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifarlab.params.sections import TrainParams


class Draws(NamedTuple):
    """The random choices for each of N images."""

    mirrored: Tensor
    """bool (N,): swap left and right?"""
    shifts: Tensor
    """int64 (N, 2): move the image up and to the left by this number of pixels."""


def draw(n: int, params: TrainParams, epoch: int) -> Draws | None:
    """Draw the random choices for all `n` images in an epoch (1, 2, …).

    They are drawn on the CPU, so they are the same for every device. Returns None where nothing
    is to be done.

    train.flip: `random` mirrors each image with probability ½ in every epoch. `alternating` does so
    in the first epoch, and then mirrors each image in every second epoch, so that two epochs in a
    row show different views (Jordan 2024, airbench).
    """
    if params.flip == "none" and not params.translate:
        return None
    # alternating draws only once, for all epochs.
    flip_draws = np.random.default_rng([params.seed, 0 if params.flip == "alternating" else epoch])
    mirrored = flip_draws.random(n) < (0 if params.flip == "none" else 0.5)
    if params.flip == "alternating" and epoch % 2 == 0:
        mirrored = ~mirrored
    shift_draws = np.random.default_rng([params.seed, epoch, 1])
    shifts = shift_draws.integers(-params.translate, params.translate, (n, 2), endpoint=True)
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


def draw_boxes(steps: int, size: int, params: TrainParams, epoch: int) -> Tensor:
    """Draw the rectangles that CutMix replaces in an epoch: in a share of the batches.

    As in Yun et al. 2019, the area is uniform in 0…1 of the image, before it is cut at the border,
    and the centre is uniform in the image.

    Parameters
    ----------
    size : height and width of the images in pixels

    Returns
    -------
    int64 (steps, 4): the first row and the one after the last, then the columns likewise. Batches
    that stay as they are have an empty rectangle.
    """
    draws = np.random.default_rng([params.seed, epoch, 2])
    mixed = draws.random(steps) < params.cutmix
    half = (size * np.sqrt(draws.random(steps)) / 2).astype(np.int64) * mixed
    centre = draws.integers(size, size=(2, steps))
    edges = [np.clip(edge, 0, size) for c in centre for edge in (c - half, c + half)]
    return torch.from_numpy(np.stack(edges, axis=1))


def cutmix(images: Tensor, shares: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Replace a rectangle of each image by that of the image before it (CutMix, Yun et al. 2019).

    Parameters
    ----------
    images : (N, channels, height, width)
    shares : of each class in each image, float (N, classes)
    box : a row of `draw_boxes`

    Returns
    -------
    Images and shares of the same shapes; the shares follow the pixels.
    """
    top, bottom, left, right = box
    height, width = (torch.arange(size, device=images.device) for size in images.shape[2:])
    rows, columns = (height >= top) & (height < bottom), (width >= left) & (width < right)
    inside = rows[:, None] & columns
    mixed = torch.where(inside, images.roll(1, 0), images)
    return mixed, shares.lerp(shares.roll(1, 0), inside.float().mean())


def _reflect(index: Tensor, size: int) -> Tensor:
    """Reflect indices in [-size, 2 size - 2] into [0, size). The border pixel is not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)

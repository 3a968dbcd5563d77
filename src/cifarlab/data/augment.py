"""Augmentation of whole batches, on the device that holds them (CPU or GPU)."""

import torch
from torch import Tensor

from cifarlab.data.draws import Draws


def augment(images: Tensor, draws: Draws | None) -> Tensor:
    """Mirror and shift every image of a batch as drawn, with reflection at the border.

    One gather does both: it takes each pixel from the row and the column that the image needs.

    Parameters
    ----------
    images : uint8 (N, height, width, channels)
    draws : tensors for these N images, on the same device; the shifts are below height and width

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

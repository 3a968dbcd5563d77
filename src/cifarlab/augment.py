"""Augmentation of whole batches where they lie, on CPU or GPU."""

import torch
from torch import Tensor


def augment(images: Tensor, generator: torch.Generator, *, flip: bool, translate: int) -> Tensor:
    """Mirror and shift every image of a batch on its own.

    One gather does both: column and row indices are drawn for each image, reflected at the border.

    Parameters
    ----------
    images : uint8 (N, height, width, channels)
    generator : on the CPU, so that the draws are the same on every device
    flip : mirror left and right with probability ½
    translate : shift by up to this many pixels, less than height and width, in both directions

    Returns
    -------
    uint8 (N, channels, height, width) in channels-last memory
    """
    n, height, width, _ = images.shape
    rows, columns = torch.arange(height).expand(n, -1), torch.arange(width).expand(n, -1)
    if translate:
        shift = torch.randint(-translate, translate + 1, (2, n, 1), generator=generator)
        rows, columns = _reflect(rows + shift[0], height), _reflect(columns + shift[1], width)
    if flip:
        mirrored = torch.rand((n, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if flip or translate:
        rows, columns = rows.to(images.device), columns.to(images.device)
        images = images[torch.arange(n, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images.permute(0, 3, 1, 2)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices in [-size, 2 size - 2] back into [0, size) without repeating the border."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)

"""The random choices of an epoch. Drawing them needs no PyTorch."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cifarlab.params.sections import TrainParams


class Draws(NamedTuple):
    """The random choices for each of N images, as NumPy arrays or as tensors."""

    mirrored: Any
    """bool (N,): swap left and right?"""
    shifts: Any
    """int64 (N, 2): move the image up and to the left by this number of pixels."""


def draw(n: int, params: TrainParams, epoch: int) -> Draws | None:
    """Draw the random choices for all `n` images in an epoch (1, 2, …).

    They are NumPy arrays, the same for every device; None where nothing is to be done.

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
    return Draws(mirrored, shifts)


def draw_boxes(steps: int, size: int, params: TrainParams, epoch: int) -> npt.NDArray[np.int64]:
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
    return np.stack(edges, axis=1)

"""Random mirroring and shifts, and their effect on images, compared with numpy."""

from collections import Counter
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from cifarlab.data.augment import augment
from cifarlab.data.draws import Draws, draw
from cifarlab.figures.run import moved_image
from cifarlab.params.sections import TrainParams

HEIGHT, WIDTH = 5, 6  # not square, so that a mix-up of rows and columns is noticed
N = 20_000  # coin tosses: their share of heads is within 0.018 of ½, five standard deviations


def image() -> npt.NDArray[np.uint8]:
    """Return an image without equal values, so that its shifted and mirrored versions differ."""
    return np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)


def pixels(n: int) -> Tensor:
    return torch.randint(
        0, 256, (n, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def transformed(
    picture: npt.NDArray[np.uint8], down: int, right: int, mirrored: bool
) -> npt.NDArray[np.uint8]:
    """Return the augmented picture, made by padding, cropping and mirroring."""
    margin = max(abs(down), abs(right))
    padded = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    crop = padded[margin + down :, margin + right :][:HEIGHT, :WIDTH]
    return crop[:, ::-1] if mirrored else crop


def params(**given: object) -> TrainParams:
    return TrainParams.model_construct(None, **given)


def drawn(n: int, seed: int = 0, epoch: int = 1, flip: str = "random", translate: int = 2) -> Draws:
    draws = draw(n, params(seed=seed, flip=flip, translate=translate), epoch)
    assert draws is not None
    return Draws(*map(torch.from_numpy, draws))


def agreement(a: Tensor, b: Tensor) -> float:
    """Return the share of equal values; a row of a matrix counts as one value."""
    same = a == b
    return (same if same.ndim == 1 else same.all(1)).double().mean().item()


# Random decisions


@pytest.mark.parametrize("flip", ["random", "alternating", "none"])
def test_each_image_gets_a_random_mirroring_and_shift(flip: str) -> None:
    draws = drawn(7, flip=flip)
    assert (draws.mirrored.dtype, draws.mirrored.shape) == (torch.bool, (7,))
    assert (draws.shifts.dtype, draws.shifts.shape) == (torch.int64, (7, 2))


@pytest.mark.parametrize("seed", [0, 3])
def test_alternating_mirrors_each_image_in_every_second_epoch(seed: int) -> None:
    epochs = [drawn(N, seed, epoch, "alternating").mirrored for epoch in range(1, 7)]
    for before, after in pairwise(epochs):
        assert torch.equal(after, ~before)
    assert epochs[0].double().mean().item() == pytest.approx(0.5, abs=0.018)


def test_random_mirrors_another_half_of_the_images_in_every_epoch() -> None:
    epochs = [drawn(N, epoch=epoch).mirrored for epoch in range(1, 6)]
    assert [m.double().mean().item() for m in epochs] == pytest.approx([0.5] * 5, abs=0.018)
    assert [agreement(epochs[i], epochs[j]) for i in range(5) for j in range(i)] == pytest.approx(
        [0.5] * 10, abs=0.018
    )


def test_mirroring_and_translation_can_be_switched_off() -> None:
    assert not drawn(N, flip="none").mirrored.any()
    assert not drawn(N, translate=0).shifts.any()
    assert draw(N, params(seed=0, flip="none", translate=0), 1) is None


@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
@pytest.mark.parametrize("translate", [1, 2, 4])
def test_shifts_are_uniform_and_differ_between_epochs(flip: str, translate: int) -> None:
    one, two = (
        drawn(N, epoch=1, flip=flip, translate=translate).shifts,
        drawn(N, epoch=2, flip=flip, translate=translate).shifts,
    )
    kinds = (2 * translate + 1) ** 2
    found = Counter(map(tuple, one.tolist()))
    assert set(found) == {
        (y, x) for y in range(-translate, translate + 1) for x in range(-translate, translate + 1)
    }
    assert all(abs(count - N / kinds) < 5 * (N / kinds) ** 0.5 for count in found.values())
    assert agreement(one, two) == pytest.approx(1 / kinds, abs=5 * (1 / kinds / N) ** 0.5)


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_the_seed_decides_mirroring_and_shifts(flip: str) -> None:
    first, again, other = drawn(N, 5, flip=flip), drawn(N, 5, flip=flip), drawn(N, 6, flip=flip)
    assert all(map(torch.equal, first, again))
    assert agreement(first.mirrored, other.mirrored) == pytest.approx(0.5, abs=0.018)
    assert agreement(first.shifts, other.shifts) == pytest.approx(0.04, abs=0.01)


def test_the_global_random_generator_is_not_used() -> None:
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), drawn(50)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(map(torch.equal, drawn(50), first))


@pytest.mark.parametrize("flip", ["random", "alternating"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_mirroring_shifts_and_order_are_independent(flip: str, epoch: int) -> None:
    draws = drawn(N, 7, epoch, flip)
    torch.manual_seed(7 * 100_003 + epoch)  # as the training loop does
    order = torch.randperm(N)
    assert order[draws.mirrored[order]].double().mean().item() == pytest.approx(N / 2, rel=0.03)
    values = torch.stack([draws.mirrored, *draws.shifts.T, order, order.argsort()]).double()
    assert (torch.corrcoef(values) - torch.eye(5)).abs().max() < 5 / N**0.5


@pytest.mark.parametrize("epoch", [1, 2])
def test_augmentation_uses_other_random_numbers_than_the_order(epoch: int) -> None:
    draws = drawn(N, 7, epoch)
    torch.manual_seed(7 * 100_003 + epoch)  # the seed of the order
    assert agreement(torch.rand(N) < 0.5, draws.mirrored) == pytest.approx(0.5, abs=0.018)
    torch.manual_seed(7 * 100_003 + epoch)
    assert agreement(torch.randint(-2, 3, (N, 2)), draws.shifts) == pytest.approx(0.04, abs=0.01)


# Augmented images


@pytest.mark.parametrize("translate", [0, 1, HEIGHT - 1])
def test_every_image_is_mirrored_and_shifted_as_drawn(translate: int) -> None:
    shifts = [
        (y, x, m)
        for y in range(-translate, translate + 1)
        for x in range(-translate, translate + 1)
        for m in (False, True)
    ]
    images = pixels(len(shifts))
    draws = Draws(
        torch.tensor([m for *_, m in shifts]), torch.tensor([(y, x) for y, x, _ in shifts])
    )
    expected = np.stack(
        [
            transformed(picture, *choice)
            for picture, choice in zip(images.numpy(), shifts, strict=True)
        ]
    )
    np.testing.assert_array_equal(augment(images, draws).permute(0, 2, 3, 1), expected)
    # The figure of the training images has its own way, one image at a time.
    one_by_one = [
        moved_image(*seen) for seen in zip(*map(np.asarray, (images, *draws)), strict=True)
    ]
    np.testing.assert_array_equal(one_by_one, expected)


@pytest.mark.parametrize(
    ("flip", "translate"),
    [("random", 2), ("none", 2), ("alternating", 0), ("alternating", 1), ("none", HEIGHT - 1)],
)
def test_every_shift_and_mirroring_occurs_equally_often_and_nothing_else(
    flip: str, translate: int
) -> None:
    shifts, ways = range(-translate, translate + 1), [False] if flip == "none" else [False, True]
    # Two shifts can give the same picture, for example by the largest translation up and down. Then
    # it counts twice.
    expected = Counter(
        transformed(image(), y, x, way).tobytes() for y in shifts for x in shifts for way in ways
    )
    batch = torch.from_numpy(image()).expand(100 * expected.total(), -1, -1, -1)
    out = augment(batch, drawn(len(batch), flip=flip, translate=translate))
    found = Counter(picture.tobytes() for picture in out.permute(0, 2, 3, 1).numpy())
    assert found.keys() == expected.keys()
    # The count is binomial with a standard deviation of 10 √weight; the bound is five of them.
    assert all(
        abs(found[version] - 100 * weight) < 50 * weight**0.5
        for version, weight in expected.items()
    )


@pytest.mark.parametrize(
    ("flip", "translate"), [("none", 0), ("random", 0), ("none", 2), ("alternating", 2)]
)
def test_augment_keeps_the_type_and_its_input(flip: str, translate: int) -> None:
    batch = pixels(8)
    before = batch.clone()
    nothing = flip == "none" and not translate
    draws = None if nothing else drawn(8, 1, flip=flip, translate=translate)
    out = augment(batch, draws)
    assert out.dtype == torch.uint8
    assert out.shape == (8, 3, HEIGHT, WIDTH)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, before)


def test_without_draws_the_images_are_unchanged() -> None:
    assert torch.equal(augment(pixels(8), None).permute(0, 2, 3, 1), pixels(8))

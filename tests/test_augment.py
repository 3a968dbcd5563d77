from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cifarlab.augment import augment

HEIGHT, WIDTH = 5, 6  # not square: rows and columns cannot be mistaken for each other


def image() -> npt.NDArray[np.uint8]:
    """Every pixel of every channel is different, so that each shifted or mirrored version is."""
    return np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)


def versions(flip: bool, translate: int) -> list[npt.NDArray[np.uint8]]:
    """Every picture that augmentation may return, by padding, cropping and mirroring."""
    padded = np.pad(image(), ((translate, translate), (translate, translate), (0, 0)), mode="reflect")
    shifts = range(2 * translate + 1)
    crops = [padded[y : y + HEIGHT, x : x + WIDTH] for y in shifts for x in shifts]
    return crops + [crop[:, ::-1] for crop in crops] if flip else crops


@pytest.mark.parametrize(("flip", "translate"), [(True, 2), (False, 2), (True, 0), (True, 1), (False, HEIGHT - 1)])
def test_every_shift_and_mirroring_occurs_equally_often_and_nothing_else(flip: bool, translate: int) -> None:
    # Shifts by the whole height, up and down, reflect to the same picture: it counts twice.
    expected = Counter(version.tobytes() for version in versions(flip, translate))
    batch = torch.from_numpy(image()).expand(100 * expected.total(), -1, -1, -1)
    out = augment(batch, torch.Generator().manual_seed(0), flip=flip, translate=translate)
    found = Counter(picture.tobytes() for picture in out.permute(0, 2, 3, 1).numpy())
    assert found.keys() == expected.keys()
    # Binomial with a standard deviation of 10 times the root of the weight: five of them.
    assert all(abs(found[version] - 100 * weight) < 50 * weight**0.5 for version, weight in expected.items())


def test_images_do_not_mix_and_keep_their_order() -> None:
    batch = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(7, HEIGHT, WIDTH, 3)
    out = augment(batch, torch.Generator().manual_seed(0), flip=True, translate=3)
    assert torch.equal(out, batch.permute(0, 3, 1, 2))


@pytest.mark.parametrize(("flip", "translate"), [(False, 0), (True, 0), (False, 2), (True, 2)])
def test_type_layout_and_input(flip: bool, translate: int) -> None:
    batch = torch.randint(0, 256, (8, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = batch.clone()
    out = augment(batch, torch.Generator().manual_seed(1), flip=flip, translate=translate)
    assert out.dtype == torch.uint8
    assert out.shape == (8, 3, HEIGHT, WIDTH)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, before)


def test_off_returns_the_images_and_draws_nothing() -> None:
    batch = torch.from_numpy(image())[None]
    generator = torch.Generator().manual_seed(3)
    out = augment(batch, generator, flip=False, translate=0)
    assert torch.equal(out.permute(0, 2, 3, 1), batch)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_same_seed_same_images_other_seed_others() -> None:
    batch = torch.from_numpy(image()).expand(50, -1, -1, -1)
    first, again, other = (augment(batch, torch.Generator().manual_seed(s), flip=True, translate=2) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

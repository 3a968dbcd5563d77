"""Images that stay on disk: the same pixels as in memory, read in order and one batch ahead."""

import itertools
import mmap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cifarlab.data.mapped import Mapped

CPU = torch.device("cpu")
ROWS = np.array([1, 2, 5, 6, 7, 11])


@pytest.fixture
def array(tmp_path: Path) -> Any:
    """Twelve images in a file, mapped to be read."""
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    return np.load(tmp_path / "images.npy", "r")


class Noting:
    """An array that notes which rows are read."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.read, self.base = array, array.shape, [], None
        self.reading = threading.Event()

    def __getitem__(self, rows: Any) -> Any:
        self.read.append(rows.tolist())
        self.reading.set()
        return self.array[rows]


def test_a_slice_is_a_tensor_of_the_chosen_images(array: Any) -> None:
    mapped = Mapped(array, ROWS, CPU)
    assert (len(mapped), mapped.shape) == (6, (6, 4, 4, 3))
    assert torch.equal(mapped[1:4], torch.from_numpy(array[[2, 5, 6]]))
    assert torch.equal(mapped[:], torch.from_numpy(array[ROWS]))
    assert mapped[4:100].dtype == torch.uint8
    assert len(mapped[4:100]) == 2


def test_batches_have_the_order_of_the_epoch_and_are_read_in_that_of_the_disk(array: Any) -> None:
    noting, order = Noting(array), torch.tensor([[5, 0, 3], [4, 2, 1]])
    batches = list(Mapped(noting, ROWS, CPU).batches(order))
    for batch, chosen in zip(batches, order, strict=True):
        assert torch.equal(batch, torch.from_numpy(array[ROWS[chosen]]))
    assert noting.read == [[1, 6, 11], [2, 5, 7]]


def test_one_batch_is_read_ahead(array: Any) -> None:
    noting = Noting(array)
    batches = Mapped(noting, ROWS, CPU).batches(torch.arange(6)[:, None])
    next(batches)
    noting.reading.clear()
    next(batches)
    assert noting.reading.wait(10)  # in a thread
    batches.close()  # it waits for the thread
    assert noting.read == [[1], [2], [5]]


def test_an_error_of_the_thread_is_raised(array: Any) -> None:
    batches = Mapped(array[:3], ROWS, CPU).batches(torch.tensor([[0], [5]]))
    next(batches)
    with pytest.raises(IndexError):
        next(batches)


def test_the_kernel_is_asked_for_the_images_and_for_nothing_else(
    tmp_path: Path,
) -> None:
    """Of 128 KiB at most in each call, because it may read no more than that."""
    size, asked = 3 * 2**17, []
    np.save(tmp_path / "a.npy", np.zeros((9, 256, 512, 3), np.uint8))

    class Noting(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            asked.append((start, start + length))
            super().madvise(option, start, length)

    with (tmp_path / "a.npy").open("r+b") as file:
        noting = Noting(file.fileno(), 0)
    offset = noting.size() - 9 * size
    images = np.ndarray((9, 256, 512, 3), np.uint8, noting, offset)
    Mapped(images, np.arange(9), CPU)[5:7]
    assert asked[0][0] % mmap.PAGESIZE == 0
    assert asked[0][0] <= offset + 5 * size < asked[0][0] + mmap.PAGESIZE
    assert asked[-1][1] == offset + 7 * size
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(asked))
    assert all(end - start <= 2**17 for start, end in asked)

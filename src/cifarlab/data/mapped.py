"""Images that stay on disk and are read when a batch needs them."""

import mmap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cifarlab.data.dataset import Labels, Pixels

READ = 2**17  # bytes that every kernel reads when it is asked for them


class Mapped:
    """Some images of a memory-mapped array. A slice reads them: uint8 (n, height, width, 3).

    The kernel keeps what was read in its page cache as long as nobody else needs that memory.

    Parameters
    ----------
    array : uint8 (N, height, width, 3)
    rows : the numbers of the images in the array, ascending
    device : for the images that are read
    """

    def __init__(self, array: Pixels, rows: Labels, device: torch.device) -> None:
        self.array, self.rows, self.device = array, rows, device
        self.shape = (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice) -> Tensor:
        return torch.from_numpy(self._from_disk(self.rows[chosen])).to(self.device)

    def batches(self, order: Tensor) -> Iterator[Tensor]:
        """Yield the images of each row of `order`, int64 (batches, n), on any device.

        A thread reads the next batch meanwhile.
        """
        left = iter(order.cpu().numpy())
        with ThreadPoolExecutor(1) as thread:
            ahead: Future[Tensor] | None = thread.submit(self._read, next(left))
            while ahead:
                images, following = ahead.result(), next(left, None)
                ahead = None if following is None else thread.submit(self._read, following)
                yield images.to(self.device, non_blocking=True)

    def _read(self, chosen: Labels) -> Tensor:
        """Return images in the order `chosen`; they are read in the order on disk."""
        rows = self.rows[chosen]
        places = rows.argsort()
        images = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        # PyTorch uses page-locked memory again only after the copy from it to the GPU has ended.
        images = images.pin_memory() if self.device.type == "cuda" else images
        images.numpy()[places] = self._from_disk(rows[places])
        return images

    def _from_disk(self, rows: Labels) -> Pixels:
        """Return the images with these numbers, which are ascending.

        The kernel is asked for all of them at once. By itself, it would read one page after the
        other, and much around each.
        """
        kernel: Any = self.array.base
        if isinstance(kernel, mmap.mmap) and len(rows):
            size, page = self.array[:1].nbytes, mmap.ALLOCATIONGRANULARITY
            first = self.array.ctypes.data % page  # where the array begins in its map
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                start, end = first + int(run[0]) * size, first + (int(run[-1]) + 1) * size
                for part in range(start - start % page, end, READ):
                    kernel.madvise(mmap.MADV_WILLNEED, part, min(READ, end - part))
        return self.array[rows]


Rows = Tensor | Mapped
"""Images, uint8 (N, height, width, 3), of which a slice is a tensor."""

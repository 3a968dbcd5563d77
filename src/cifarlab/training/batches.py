"""The batches of an epoch, which depend on the seed and the epoch only."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cifarlab.data.augment import augment, cutmix
from cifarlab.data.draws import Draws, draw, draw_boxes
from cifarlab.data.mapped import Mapped, Rows
from cifarlab.params.sections import TrainParams
from cifarlab.training.ranks import Ranks


class Images(NamedTuple):
    """Images, uint8 (N, height, width, 3), and labels, int64 (N,), on the training device.

    Images that do not fit there stay on disk.
    """

    images: Rows
    labels: Tensor


class Batches:
    """Batches of augmented images; of several processes, each has its part of every batch.

    `begin` draws all random choices of an epoch and puts them into tensors that stay where they
    are in memory. `next` reads them at a position that is itself a tensor. So reading a batch
    needs nothing of the CPU, and can be recorded as part of a CUDA graph, unless the images are
    on disk.
    """

    def __init__(self, data: Images, params: TrainParams, classes: int, ranks: Ranks) -> None:
        self.data, self.params, self.classes, self.ranks = data, params, classes, ranks
        # Images that are left over come in other epochs.
        self.size = min(params.batch_size, len(data.labels))
        self.steps = len(data.labels) // self.size
        device = data.images.device
        self.part = ranks.part(self.size)
        order = torch.zeros(self.steps, self.part.stop - self.part.start, dtype=torch.int64)
        self.order, draws = order.to(device), draw(len(data.labels), params, 1)
        self.draws = draws and Draws(*(torch.from_numpy(d)[order].to(device) for d in draws))
        self.boxes = torch.zeros(self.steps, 4, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.reading: Iterator[Tensor] = iter(())  # of images on disk

    def begin(self, epoch: int) -> None:
        """Draw the random choices of an epoch (1, 2, …) and go to its first batch.

        It seeds torch's global generators, from which dropout draws in the steps.
        """
        labels, params = self.data.labels, self.params
        torch.manual_seed(params.seed * 100_003 + epoch)
        order = torch.randperm(len(labels))[: self.steps * self.size].view(self.steps, self.size)
        order = order[:, self.part]
        if self.ranks.rank:  # dropout draws in each process for itself
            torch.manual_seed(params.seed * 100_003 + epoch + self.ranks.rank * 2**40)
        self.order.copy_(order)
        draws = draw(len(labels), params, epoch)
        for buffer, drawn in zip(self.draws or (), draws or (), strict=True):
            buffer.copy_(torch.from_numpy(drawn)[order])
        if params.cutmix:
            boxes = draw_boxes(self.steps, self.data.images.shape[1], params, epoch)
            self.boxes.copy_(torch.from_numpy(boxes))
        self.position.zero_()
        if isinstance(self.data.images, Mapped):
            self.reading = self.data.images.batches(order)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch at the position, and move on.

        Returns
        -------
        Augmented images, uint8 (N, 3, height, width). Targets: the labels or, with CutMix, the
        share of each class, float (N, classes). Labels, int64 (N,): with CutMix, the class of the
        image that got a piece of another.
        """
        chosen = self.row(self.order)
        labels = self.data.labels[chosen]
        draws = self.draws and Draws(*map(self.row, self.draws))
        images = self.data.images
        pixels = next(self.reading) if isinstance(images, Mapped) else images[chosen]
        images, targets = augment(pixels, draws), labels
        if self.params.cutmix:
            shares = F.one_hot(labels, self.classes).float()
            images, targets = cutmix(images, shares, self.row(self.boxes))
        self.position.add_(1).remainder_(self.steps)
        return images, targets, labels

    def row(self, values: Tensor) -> Tensor:
        """Return what belongs to the batch at the position."""
        return values.index_select(0, self.position)[0]

"""The processes of one training. Each computes a part of every batch, and all take the same step.

They talk through torch.distributed, which `torchrun` sets up: gloo on CPUs, NCCL on GPUs.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cifarlab.errors import in_a_sentence

LOST = "another process of the training has ended"
# The others wait while the first one validates. The end of a process is noticed without it.
LONGEST_WAIT = timedelta(days=1)


class Ranks(NamedTuple):
    """A process among those of a training: its number, and how many there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> "Ranks":
        """Meet the other processes that torchrun started, all with devices of one kind."""
        if not dist.is_torchelastic_launched():
            return ALONE
        backend = "nccl" if device.type == "cuda" else "gloo"
        with in_a_sentence(LOST, RuntimeError):
            dist.init_process_group(backend, timeout=LONGEST_WAIT)
        return cls(dist.get_rank(), dist.get_world_size())

    def say(self, text: str) -> None:
        """Print a text once."""
        if self.rank == 0:
            print(text, flush=True)

    def part(self, images: int) -> slice:
        """Return which images of a batch are those of this process."""
        first, end = (rank * images // self.size for rank in (self.rank, self.rank + 1))
        return slice(first, end)

    def average(self, tensors: Sequence[Tensor], share: float) -> None:
        """Replace tensors by their mean over the processes; `share` is the weight of this one.

        Raises
        ------
        UserError
            Another process has ended.
        """
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors]) * share
        with in_a_sentence(LOST, RuntimeError):
            dist.all_reduce(flat)
        means = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def from_first(self, value: Any) -> Any:
        """Return the value of the first process, in all of them."""
        box = [value]
        if self.size > 1:
            with in_a_sentence(LOST, RuntimeError):
                dist.broadcast_object_list(box)
        return box[0]


ALONE = Ranks()

"""A training step as a CUDA graph: one launch instead of hundreds.

NVIDIA's "CUDA Graphs" (CUDA 10, 2018), through torch.cuda.CUDAGraph. A recorded step reads and
writes the same memory at every replay, so it works on tensors that are filled beforehand.
"""

from collections.abc import Callable

import torch

DEVICES = ("cuda",)
WARM_UP = 3  # steps before the recording: cuDNN and cuBLAS choose and allocate in the first ones


def record(step: Callable[[], None]) -> Callable[[], None]:
    """Run the step on a side stream until it is warm, record it, and return how to replay it.

    The current device must be a GPU. What the steps changed is for the caller to restore; the
    recording itself runs nothing.

    Raises
    ------
    RuntimeError
        The step waits for the GPU, or something in it cannot be recorded.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay

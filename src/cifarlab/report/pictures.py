"""The pictures of the page: images and filters as PNG, and the ticks of its charts."""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.ticker import MaxNLocator
from PIL import Image
from safetensors.numpy import load

LARGEST = 48  # pixels; larger images are made smaller, so that the page stays small
FILTERS = 96  # the most that are shown


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """Return pixels, uint8 (height, width, 3), as the address of a picture."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((LARGEST, LARGEST))
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def rows(file: BinaryIO, numbers: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield some images of an .npy file of uint8, of which only these are read."""
    np.lib.format.read_magic(file)
    shape, *_ = np.lib.format.read_array_header_1_0(file)
    start, size = file.tell(), int(np.prod(shape[1:]))
    for number in numbers:
        file.seek(start + number * size)
        yield np.frombuffer(file.read(size), np.uint8).reshape(shape[1:])


def filters(weights: bytes) -> dict[str, Any]:
    """Draw the filters of the first layer of a network.safetensors, each as a picture.

    Zero is grey. Each filter is scaled by its largest weight.
    """
    tensors = load(weights)
    whitening = "stem.0.weight" in tensors
    every = tensors["stem.0.weight" if whitening else "stages.0.first.0.weight"]
    shown = every[:FILTERS].transpose(0, 2, 3, 1)
    largest = np.abs(shown).max((1, 2, 3), keepdims=True).clip(1e-12)
    colors = np.rint(127.5 + 127.5 * shown / largest).astype(np.uint8)
    sizes = {"size": every.shape[-1], "count": len(every), "whitening": whitening}
    return {"sources": [png(color) for color in colors]} | sizes


def chart(title: str, lines: "list[tuple[str, int, bool, pd.Series[float]]]") -> dict[str, Any]:
    """Return a chart of curves with round ticks, for the template.

    Parameters
    ----------
    lines : label, number of the colour, whether dashed, and finite values with the epoch as index
    """
    every = pd.concat([values for *_, values in lines])
    x = MaxNLocator(6, integer=True).tick_values(0, every.index.max())
    y = MaxNLocator(5).tick_values(every.min(), max(every.max(), every.min() + 0.01))
    return {"title": title, "lines": lines, "x": [*x], "y": [*y]}

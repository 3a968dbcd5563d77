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
FILTERS, IN_A_ROW = 96, 12


def png(pixels: npt.NDArray[np.uint8], largest: int = LARGEST) -> str:
    """Return pixels, uint8 (height, width, 3 or 4), as the address of a picture."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((largest, largest))
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
    """Draw the filters of the first layer of a network.safetensors, in one picture.

    Zero is grey. Each filter is scaled by its largest weight. The gaps are transparent.
    """
    tensors = load(weights)
    whitening = "stem.0.weight" in tensors
    every = tensors["stem.0.weight" if whitening else "stages.0.first.0.weight"]
    shown, size = every[:FILTERS], every.shape[-1]
    largest = np.abs(shown).max((1, 2, 3), keepdims=True).clip(1e-12)
    colors = np.pad(127.5 + 127.5 * shown / largest, ((0, 0), (0, 1), (0, 1), (0, 1)))
    colors[:, 3, :size, :size] = 255
    tiles = np.zeros((-(-len(shown) // IN_A_ROW) * IN_A_ROW, size + 1, size + 1, 4), np.uint8)
    tiles[: len(shown)] = np.rint(colors.transpose(0, 2, 3, 1)).astype(np.uint8)
    grid = tiles.reshape(-1, IN_A_ROW, size + 1, size + 1, 4).transpose(0, 2, 1, 3, 4)
    pixels = grid.reshape(-1, IN_A_ROW * (size + 1), 4)
    sizes = {"size": size, "count": len(every), "shown": len(shown), "width": pixels.shape[1]}
    return {"source": png(pixels, max(pixels.shape)), "whitening": whitening} | sizes


def chart(title: str, lines: "list[tuple[str, int, bool, pd.Series[float]]]") -> dict[str, Any]:
    """Return a chart of curves with round ticks, for the template.

    Parameters
    ----------
    lines : label, number of the colour, whether dashed, and finite values with the epoch as index
    """
    every = pd.concat([values for *_, values in lines])
    x = MaxNLocator(6, integer=True).tick_values(every.index.min(), every.index.max())
    y = MaxNLocator(5).tick_values(every.min(), every.max())
    return {"title": title, "lines": lines, "x": [*x], "y": [*y]}

"""Decode images of any format into RGB squares, within limits of memory."""

import io
from contextlib import suppress
from functools import cache
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from cifarlab.data.dataset import Pixels

MAX_IMAGE = 50_000_000
"""Pixels of one image, and of the images that are decoded at the same time."""
LARGE_JPEG = 16_000_000
"""Pixels of a JPEG image that is decoded at a smaller size."""
MAX_TEXT = 2**22
"""Characters of the texts in one PNG image, unpacked."""
# They run another program, or Pillow knows their names only.
REFUSED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FPX", "MIC"}
EXTRA = {".heic": "pillow-heif", ".heif": "pillow-heif", ".avif": "a Pillow with AVIF"}
"""What opens formats that Pillow may not know."""


@cache
def formats() -> dict[str, str]:
    """Return the suffixes of images that can be opened, such as ".jpg", and their formats."""
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT  # by default 64 MiB
    Image.MAX_IMAGE_PIXELS = MAX_IMAGE // 2  # Pillow warns above it, and refuses twice as many
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    known = Image.registered_extensions().items()
    return {suffix: name for suffix, name in known if name in {*Image.OPEN} - REFUSED}


def is_image(name: str) -> bool:
    """Tell from its suffix whether a file should be an image."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in formats() or suffix in EXTRA


def count_pixels(file: io.BytesIO) -> int:
    """Return width × height of an image, from its header.

    Damaged images raise any exception, and too large ones do.
    """
    with _open(file) as image:
        return image.width * image.height


def decode(file: io.BytesIO, size: int) -> Pixels:
    """Return the middle square of an image, turned upright, as uint8 (size, size, 3), RGB.

    Of an animation it is the first picture, and what is transparent has the colour that is stored
    there. Damaged images raise any exception, and too large ones do.
    """
    # It is opened again, because unpacked texts and profiles in its header can take much memory.
    with _open(file) as image:
        if image.width * image.height > LARGE_JPEG:
            # JPEG can be decoded at a half, a quarter or an eighth of its size. The pixels then
            # differ a little, so smaller images are decoded in full.
            image.draft(None, (2 * size, 2 * size))
        image.load()
        with suppress(Exception):  # Pillow turns it first, and may then fail to write its EXIF
            ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(ImageOps.fit(_rgb(image), (size, size)))


def _open(file: io.BytesIO) -> Image.Image:
    return Image.open(file, formats=sorted({*formats().values()}))


def _rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB. Values of more than 8 bits are scaled to 0…255."""
    # convert() would turn everything but the darkest grey of these into white.
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, np.float32))
        usual = (255, 65535) if image.mode == "I" else (1, 255, 65535)
        top = next((top for top in usual if values.max() <= top), values.max())
        return Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")

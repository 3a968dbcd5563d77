"""Small images with names, as folders and archives of images hold them."""

import io
from pathlib import Path

from PIL import Image


def picture(number: int, kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    """Return an image of one colour that depends on `number`."""
    colour = (number * 37 % 256, number * 11 % 256, number % 256)
    file = io.BytesIO()
    Image.new("RGB", (40, 24), colour).convert(mode).save(file, kind, **options)
    return file.getvalue()


def pictures(count: int, *classes: str) -> dict[str, bytes]:
    """Return images <class>/<number>.png, all of other colours."""
    names = [f"{label}/{i}.png" for label in classes for i in range(count)]
    return {name: picture(i) for i, name in enumerate(names)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def under(top: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{top}/{name}": content for name, content in files.items()}


CATS = pictures(10, "cat", "dog")

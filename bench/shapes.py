"""`python -m bench.shapes FOLDER`: draw circles, squares and triangles, to try own images with."""

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CORNERS = {"circle": 60, "square": 4, "triangle": 3}
COUNT = 40  # images of each class
SIZE = 80  # pixels


def draw(corners: int, rng: np.random.Generator) -> Image.Image:
    """Return one regular polygon of random colour, size, angle and place."""
    paper, ink = (tuple(int(v) for v in rng.integers(low, low + 100, 3)) for low in (0, 150))
    x, y = rng.uniform(0.4, 0.6, 2) * SIZE
    radius, start = rng.uniform(0.2, 0.38) * SIZE, rng.uniform(0, 2 * math.pi)
    angles = [start + 2 * math.pi * i / corners for i in range(corners)]
    image = Image.new("RGB", (SIZE, SIZE), paper)
    points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    ImageDraw.Draw(image).polygon(points, fill=ink)
    return image


def main(folder: Path) -> None:
    """Write FOLDER/<class>/<number>.png."""
    rng = np.random.default_rng(0)
    for name, corners in CORNERS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(COUNT):
            draw(corners, rng).save(folder / name / f"{number}.png")
    print(f"{folder}: {COUNT} images each of {', '.join(CORNERS)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Draw the pictures: the tables in plots/ and data/ → plots/*.png."""

from pathlib import Path

from cifarlab.params import Params
from stages import run


def plot(params: Params) -> None:
    """Draw every figure; titles carry dataset, variant and accuracy."""
    from cifarlab import figures
    from cifarlab.tracking import Mirror

    with Mirror("plot", params):
        for path in figures.draw_all(params, Path("data"), Path("plots")):
            print(path)


if __name__ == "__main__":
    run(plot)

"""Draw the figures of a run: the tables in plots/, and data/ → plots/*.png."""

from stages import Params, interrupted_once, run


def plot(params: Params) -> None:
    """Draw every figure. Titles name the data set, the variant and its accuracy."""
    from cifarlab.tracking.logger import Logger

    logger = Logger("plot", params)
    from cifarlab import files
    from cifarlab.figures.run import draw_all

    with logger.run(), interrupted_once():
        for path in draw_all(params, files.DATA, files.PLOTS):
            print(path)


if __name__ == "__main__":
    run(plot)

"""The look of all pictures, and how they are saved."""

import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

from cifarlab.files import atomic


def reset() -> None:
    """Draw into files only, without a display, and forget what the user's matplotlibrc says."""
    mpl.rcParams.update(mpl.rcParamsDefault)
    plt.switch_backend("Agg")


def apply() -> None:
    """Use the theme of the project, whatever the settings of the user are."""
    reset()
    # A class may be called $x$, so no text is taken for mathematics.
    settings = {"figure.constrained_layout.use": True, "text.parse_math": False}
    # It comes with matplotlib; seaborn would prefer Arial where it is installed.
    sns.set_theme(style="whitegrid", rc=settings | {"font.sans-serif": ["DejaVu Sans"]})
    # Of a script that it lacks. Other fonts would give other bytes where they are installed.
    warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a picture and close it.

    The file does not name the version of matplotlib: the same figure gives the same bytes.
    """
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
    plt.close(figure)

"""The look of all pictures, and how they are saved."""

from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

from cifarlab.files import atomic


def apply() -> None:
    """Draw into files only, without a display, and with the theme of the project."""
    plt.switch_backend("Agg")
    # A class may be called $x$, so no text is taken for mathematics.
    settings = {"figure.constrained_layout.use": True, "text.parse_math": False}
    sns.set_theme(style="whitegrid", rc=settings)


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a picture and close it.

    The file does not name the version of matplotlib: the same figure gives the same bytes.
    """
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
    plt.close(figure)

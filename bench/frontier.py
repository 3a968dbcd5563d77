"""Draw accuracy against the arithmetic of a training: `python -m bench.frontier`.

Reads docs/frontier.csv and writes docs/frontier.png. The table names the source of each accuracy.
The arithmetic of this project's variants is counted here, and written into the table.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from bench.measure import pflop
from cifarlab.figures import style

TABLE, PICTURE = Path("docs/frontier.csv"), Path("docs/frontier.png")
LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("cifarlab, JPEG copy", {"marker": "o", "s": 60, "color": "C0"}),
    "notebook": ("the notebook's way, JPEG copy", {"marker": "s", "s": 60, "color": "C1"}),
    "published": (
        "published, original images",
        {"marker": "D", "s": 45, "facecolors": "none", "edgecolors": "0.4"},
    ),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw a point for each row, with its name beside it. The axis of the PFLOP is logarithmic."""
    style.apply()
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for kind, (label, look) in LOOKS.items():
        part = table[table.kind == kind]
        axes.scatter(part.pflop, part.accuracy, label=label, zorder=3, **look)
    for row in table.to_dict("records"):
        place = row["pflop"], row["accuracy"]
        left = row["variant"] == "gpu"  # close to the default
        where, side = ((-7, -4), "right") if left else ((7, -4), "left")
        axes.annotate(row["name"], place, where, textcoords="offset points", ha=side)
    axes.set(xscale="log", xlabel="arithmetic of a training, PFLOP", ylabel="test accuracy")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.yaxis.set_major_locator(MultipleLocator(5))
    axes.margins(x=0.2, y=0.1)
    axes.legend(loc="lower right")
    return figure


def main() -> None:
    """Count what is missing, then write the table and draw it."""
    table = pd.read_csv(TABLE)
    counted = table.kind != "published"
    table.loc[counted, "pflop"] = table[counted].variant.map(pflop)
    table.to_csv(TABLE, index=False, float_format="%.4g")
    style.save(draw(table), PICTURE, dpi=110)


if __name__ == "__main__":
    main()

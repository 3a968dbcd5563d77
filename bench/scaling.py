"""`make bench-scaling`: measure how time and memory of a training grow with its parameters.

Writes docs/scaling.csv and docs/scaling.png. The images are synthetic.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from bench.__main__ import measured
from cifarlab.figures import style

TABLE, PICTURE = Path("docs/scaling.csv"), Path("docs/scaling.png")
SMALL = "model.widths=[16,32,32]"  # saves time where there are many images
# What grows → its values, each with the number of training images and the changes to params.yaml.
POINTS: dict[str, list[tuple[int, int, list[str]]]] = {
    "layers": [(n, 4096, [f"model.layers={n}"]) for n in (3, 6, 9, 12, 18)],
    "width of the last stage": [
        (w, 4096, [f"model.widths=[{w // 4},{w},{w}]"]) for w in (32, 64, 128, 256, 512)
    ],
    "batch size": [
        (b, 4096, [f"train.batch_size={b}"]) for b in (16, 32, 64, 128, 256, 512, 1024, 2048)
    ],
    "training images": [(n, n, [SMALL]) for n in (10_000, 30_000, 100_000, 200_000, 500_000)],
}
FIELDS = {"milliseconds_per_image": "milliseconds per image", "memory_mb": "peak memory, MB"}


def points() -> pd.DataFrame:
    """Measure every point in its own process; return one row for each."""
    rows: list[dict[str, Any]] = []
    for what, values in POINTS.items():
        for value, images, changes in values:
            result = measured("cost", str(images), *changes)
            rows.append({"against": what, "value": value, **result})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Draw a column for each quantity that grows: time per image above, peak memory below."""
    style.reset()
    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(
        len(FIELDS), len(POINTS), figsize=(4 * len(POINTS), 6.5), sharex="col", layout="constrained"
    )
    for column, what in zip(axes.T, POINTS, strict=True):
        part = table[table["against"] == what]
        for panel, field in zip(column, FIELDS, strict=True):
            draw_panel(panel, part, field)
        column[-1].set_xlabel(what)
    for panel, label in zip(axes[:, 0], FIELDS.values(), strict=True):
        panel.set_ylabel(label)
    return figure


def draw_panel(panel: Axes, part: pd.DataFrame, field: str) -> None:
    """Draw one field of the measurements in which one quantity grows."""
    sns.lineplot(x=part["value"], y=part[field], marker="o", ax=panel)
    if field == "milliseconds_per_image" and part["gflop_per_image"].nunique() > 1:
        base = part.iloc[1]
        arithmetic = base[field] * part["gflop_per_image"] / base["gflop_per_image"]
        panel.plot(part["value"], arithmetic, "--", color="0.5", label="as the arithmetic grows")
        panel.legend(frameon=False)
    highest = max(float(np.max(np.asarray(line.get_ydata()))) for line in panel.lines)
    panel.set(xscale="log", xlabel="", ylabel="", ylim=(0, 1.1 * highest))
    panel.set_xticks(part["value"])
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(axis="x", rotation=45)


if __name__ == "__main__":
    frame = points()
    frame.to_csv(TABLE, index=False, float_format="%.4g")
    draw(frame).savefig(PICTURE, dpi=110, metadata={"Software": None})

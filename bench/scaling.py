"""`make bench-scaling`: how speed and memory of a training grow, from synthetic images, as docs/scaling.csv and docs/scaling.png."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

mpl.use("agg")
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from bench.__main__ import measured

SMALL = "model.widths=[16,32,32]"  # for many images in little time
POINTS: dict[str, list[tuple[int, int, list[str]]]] = {
    # what grows: its value, training images, changes to params.yaml
    "layers": [(n, 4096, [f"model.layers={n}"]) for n in (3, 6, 9, 12, 18)],
    "width of the last stage": [(w, 4096, [f"model.widths=[{w // 4},{w},{w}]"]) for w in (32, 64, 128, 256, 512)],
    "batch size": [(b, 4096, [f"train.batch_size={b}"]) for b in (16, 32, 64, 128, 256, 512, 1024, 2048)],
    "training images": [(n, n, [SMALL]) for n in (10_000, 30_000, 100_000, 200_000, 500_000)],
}


def points() -> pd.DataFrame:
    """Measure every point in a process of its own."""
    rows: list[dict[str, Any]] = []
    for what, values in POINTS.items():
        for value, images, changes in values:
            rows.append({"against": what, "value": value, **measured("cost", str(images), *changes)})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """One column for each quantity that grows: time of an image above, peak memory below."""
    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(2, len(POINTS), figsize=(4 * len(POINTS), 6.5), sharex="col", layout="constrained")
    for column, what in enumerate(POINTS):
        part = table[table["against"] == what]
        for row, (field, label) in enumerate({"milliseconds_per_image": "milliseconds per image", "memory_mb": "peak memory, MB"}.items()):
            panel = axes[row, column]
            sns.lineplot(x=part["value"], y=part[field], marker="o", ax=panel)
            if field == "milliseconds_per_image" and what in ("layers", "width of the last stage"):
                base = part.iloc[1]
                arithmetic = base[field] * part["gflop_per_image"] / base["gflop_per_image"]
                panel.plot(part["value"], arithmetic, "--", color="0.5", label="as the arithmetic grows")
                panel.legend(frameon=False)
            panel.set(
                xscale="log",
                ylabel=label if column == 0 else "",
                xlabel=what if row else "",
                ylim=(0, 1.1 * max(line.get_ydata().max() for line in panel.lines)),
            )
            panel.set_xticks(part["value"])
            panel.xaxis.set_major_formatter(ScalarFormatter())
            panel.xaxis.set_minor_locator(NullLocator())
            panel.tick_params(axis="x", rotation=45)
    return figure


if __name__ == "__main__":
    frame = points()
    frame.to_csv(Path("docs/scaling.csv"), index=False, float_format="%.4g")
    draw(frame).savefig("docs/scaling.png", dpi=110, metadata={"Software": None})

"""The pictures of a study: effects, learning curves, classes, and what happens in each layer."""

import textwrap
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator
from pandas import DataFrame
from pandas.api.types import is_numeric_dtype

from cifarlab.figures import style
from cifarlab.studies.points import Tables
from cifarlab.studies.question import Study
from cifarlab.studies.statistics import interval_margin

BARS: dict[str, Any] = {"err_style": "bars", "err_kws": {"capsize": 3}, "marker": "o"}
ROWS = 12  # variants for which the effect on each class is drawn: those with the largest ones


def draw_study(path: Path, study: Study, effects: DataFrame, tables: Tables) -> None:
    """Draw the effects with intervals, the learning curves with bands, and each class.

    Parameters
    ----------
    effects : what `studies.statistics.effects` returns
    tables : the results and the epochs of the study
    """
    style.apply()
    names, label = list(effects.index), f"{study.answer_by} accuracy"
    results = tables.results.assign(accuracy=100 * tables.results.accuracy)
    # A row for each variant; without a grid there are no columns.
    grid = DataFrame.from_dict(study.variants, orient="index")[list(study.grid)]
    epochs, seen = _in_percent(tables.epochs)
    heights = (max(4.2, 1.4 + 0.26 * len(names)), 1.4 + 0.32 * min(len(names) - 1, ROWS))
    figure, panels = plt.subplot_mosaic("ab;cc", figsize=(12, sum(heights)), height_ratios=heights)
    left, middle, right = panels.values()
    one_epoch = epochs.epoch.nunique() == 1  # its line and band could not be seen
    bands = {"err_kws": {"alpha": min(0.1, 0.7 / len(names))}}
    if len(grid.columns) and is_numeric_dtype(grid.iloc[:, 0]) and grid.iloc[:, 0].nunique() > 2:
        parameter, *others = grid.columns
        line = ", ".join(others) or None
        if line:
            grid = grid.assign(**{line: grid[others].astype(str).agg(", ".join, axis=1)})
        results, epochs = (table.join(grid, on="variant") for table in (results, epochs))
        lines = BARS | {"hue": line, "style": line}
        _lines(left, label, results, parameter, lines)
        shades = bands | {"hue": parameter, "style": line, "palette": "flare", "legend": "full"}
        x, look = (parameter, lines | {"legend": False}) if one_epoch else ("epoch", shades)
        _lines(middle, seen, epochs, x, look)
    else:
        palette = ["black", *sns.color_palette("husl", len(names) - 1)]
        _effects(left, effects, palette, label, study.margin)
        hues = {"hue": "variant", "hue_order": names, "palette": palette, "legend": False}
        if one_epoch:
            _rows(middle, seen, epochs, names, hues)
        else:
            _lines(middle, seen, epochs, "epoch", bands | hues)
    _each_class(right, results, names)
    figure.suptitle(study.question)
    style.save(figure, path, dpi=100)


def draw_layers(path: Path, layers: DataFrame, names: list[str]) -> None:
    """Draw the diagnostics of each layer, means over the seeds.

    After one epoch, a quantity is drawn against the layer, with a line for each variant.

    Parameters
    ----------
    layers : columns called quantity/layer, indexed by variant and epoch; each quantity is a column
        of panels
    names : the variants; each is a row of panels
    """
    style.apply()
    means = layers.groupby(["variant", "epoch"]).mean()
    means.columns = means.columns.str.split("/", expand=True)
    quantities = list(means.columns.unique(0))
    one_epoch, width = means.index.unique("epoch").size == 1, 3.2 * len(quantities)
    if one_epoch:
        figure, panels = plt.subplots(1, len(quantities), figsize=(width + 2, 3), squeeze=False)
        for axes, quantity in zip(panels[0], quantities, strict=True):
            values = means[quantity].droplevel("epoch").loc[names]
            axes.plot(values.T, marker="o", label=names, alpha=0.7)
    else:
        grid, size = (len(names), len(quantities)), (width + 1.5, 1.5 * len(names) + 0.7)
        figure, panels = plt.subplots(*grid, figsize=size, squeeze=False, sharex=True, sharey="col")
        for axes, (name, quantity) in zip(panels.flat, product(names, quantities), strict=True):
            table = means.loc[name][quantity]
            # Not by pandas, which hides the numbers at axes that are shared.
            axes.set_prop_cycle(color=sns.color_palette("viridis", len(table.columns)))
            axes.plot(table.index, table.to_numpy(), marker=".", label=list(table.columns))
            axes.locator_params("x", integer=True, min_n_ticks=1)
        for axes, name in zip(panels[:, 0], names, strict=True):
            axes.set_ylabel(textwrap.fill(name, 14), fontsize=11)
    plt.setp(panels[-1], xlabel="layer" if one_epoch else "epoch")
    for axes, quantity in zip(panels[0], quantities, strict=True):
        _quantity(axes, quantity, means[quantity])
    lines, title = axes.get_legend_handles_labels(), None if one_epoch else "layer"
    figure.legend(*lines, title=title, loc="outside right center")
    style.save(figure, path, dpi=100)


def _quantity(axes: Any, quantity: str, values: Any) -> None:
    """Title a panel of drawn values, and let its axis begin at zero."""
    axes.set_title(quantity.replace("_", " "))
    if quantity == "gradient_norm" and values.max().max() > 1000 * values.min().min():
        # Many powers of ten, and perhaps zero.
        axes.set_yscale("symlog", linthresh=1e-6)
        axes.yaxis.get_major_locator().set_params(numticks=4)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)


def _interval(values: Any) -> tuple[float, float]:
    mean, margin = values.mean(), interval_margin(values)
    return mean - margin, mean + margin


def _in_percent(epochs: DataFrame) -> tuple[DataFrame, str]:
    """Return the epochs with a column `accuracy` in percent, and what it is."""
    if "val_accuracy" in epochs and epochs.val_accuracy.notna().any():
        return epochs.assign(accuracy=100 * epochs.val_accuracy), "validation accuracy"
    return epochs.assign(accuracy=100 * epochs.train_accuracy), "training accuracy"


def _lines(axes: Axes, label: str, table: DataFrame, x: str, look: dict[str, Any]) -> None:
    """Draw the accuracy against the epoch, or against a parameter that is a number."""
    sns.lineplot(table, x=x, y="accuracy", errorbar=_interval, ax=axes, **look)
    axes.set(title="Mean and 95 % interval", ylabel=f"{label}, %")
    axes.locator_params("x", integer=True, min_n_ticks=1)
    if x != "epoch":
        axes.set_xticks(sorted(table[x].unique()))
    elif axes.get_legend():
        sns.move_legend(axes, "center left", bbox_to_anchor=(1, 0.5), fontsize=9, frameon=False)
    else:
        axes.set(xlabel="epoch (colours as on the left)")


def _rows(axes: Axes, label: str, table: DataFrame, rows: list[str], look: dict[str, Any]) -> None:
    """Draw the accuracy of each variant, in rows as on the left."""
    look |= {"errorbar": _interval, "linestyle": "none", "capsize": 0.15, "err_kws": {"lw": 1.5}}
    sns.pointplot(table, x="accuracy", y="variant", order=rows, ax=axes, **look)
    axes.set(title="Mean and 95 % interval", xlabel=f"{label}, %", ylabel="", yticklabels=[])


def _effects(axes: Axes, effects: DataFrame, palette: list[Any], label: str, margin: float) -> None:
    first, places = effects.index[0], range(len(effects))
    for place, colour, (_, row) in zip(places, palette, effects.iterrows(), strict=True):
        interval = row.difference_margin if place else row.accuracy_margin
        fill = "white" if row.verdict == "undecided" and place else colour
        look = {"fmt": "s" if row.verdict == "equivalent" else "o", "color": colour, "mfc": fill}
        axes.errorbar(row.difference, place, xerr=interval, capsize=3, **look)
    axes.axvline(0, color="0.4", lw=1)
    axes.axvspan(-margin, margin, color="0.5", alpha=0.15, lw=0)
    note, sizes = f"grey: up to {margin:g}", effects.difference[1:].abs()
    if sizes.max() > max(5, 10 * sizes.median()):  # it would squeeze the others together
        axes.set_xscale("symlog", linthresh=5)
        axes.xaxis.set_major_locator(FixedLocator([-50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50]))
        axes.xaxis.set_major_formatter("{x:g}")
        note += "; logarithmic beyond 5"
    axes.set(yticks=places, yticklabels=effects.index, ylim=(len(effects) - 0.5, -0.5))
    axes.set(title="Effect, 95 % interval (hollow: undecided, square: equivalent)")
    axes.set(xlabel=f"{label}, points compared with {first}\n({note})")


def _each_class(axes: Axes, results: DataFrame, names: list[str]) -> None:
    # The table may also have the classes of other data sets.
    accuracies = results.set_index(["variant", "seed"]).filter(like="accuracy/")
    accuracies = 100 * accuracies.dropna(axis=1, how="all")
    accuracies.columns = accuracies.columns.str.removeprefix("accuracy/")
    # Paired by seed, because the first variant may have more seeds than another.
    pairs = accuracies.sub(accuracies.loc[names[0]], level="seed")
    difference = pairs.groupby("variant").mean().loc[names[1:]]
    largest = difference.abs().mean(axis=1).nlargest(ROWS).index
    chosen = difference[difference.index.isin(largest)]
    sizes = chosen.abs().stack()  # one variant would leave no colour to the others
    full = max(1, min(sizes.max(), 4 * sizes.median()))
    numbers = {"annot": True, "fmt": ".1f", "annot_kws": {"size": 10}, "cbar": False}
    sns.heatmap(chosen, cmap="vlag", vmin=-full, vmax=full, ax=axes, **numbers)
    which = "" if len(chosen) == len(difference) else f"{ROWS} variants with the largest effects; "
    note = f"({which}full colour from {full:.3g})"
    title = f"Effect on each class, in points, compared with {names[0]} {note}"
    axes.set(title=title, xlabel="", ylabel="")
    axes.tick_params(axis="x", labelrotation=30)
    axes.tick_params(axis="y", labelrotation=0)

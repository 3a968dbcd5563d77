"""The pictures of a study."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from cifarlab.figures import style
from cifarlab.studies.pictures import draw_layers, draw_study
from cifarlab.studies.points import Tables
from cifarlab.studies.question import Study
from cifarlab.studies.statistics import effects


@pytest.mark.parametrize("count", [1, 2])
def test_learning_curves_of_one_epoch_can_be_seen(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, *_, **__: drawn.append(figure))
    rows = [
        {"variant": variant, "seed": seed, "accuracy": mean + seed / 100, "accuracy/cat": mean}
        for variant, mean in (("one", 0.7), ("other", 0.8))
        for seed in range(3)
    ]
    # The table also has a class of another data set.
    results = pd.DataFrame(rows).assign(**{"accuracy/0": np.nan})
    epochs = pd.concat(
        results.assign(epoch=epoch, train_accuracy=results.accuracy - 0.1 / epoch)
        for epoch in range(1, count + 1)
    )
    study = Study(question="?", variants={"one": {}, "other": {}}, seeds=[0, 1, 2])
    effect = effects(study, results)
    tables = Tables(results, epochs)
    draw_study(Path("-"), study, effect, tables)
    _, curves, classes = drawn[0].axes
    assert [label.get_text() for label in classes.get_xticklabels()] == ["cat"]
    if count == 1:  # a row of its own for each variant
        points = [line.get_xydata() for line in curves.lines if line.get_marker() == "o"]
        drawn_points = [point for line in points for point in line if not np.isnan(point).any()]
        assert np.array(drawn_points) == pytest.approx(np.array([[61, 0], [71, 1]]))
    else:
        lines = [line for line in curves.lines if len(line.get_xdata()) == count]
        heights = sorted({float(line.get_ydata()[0]) for line in lines})
        assert heights == pytest.approx([61, 71])


def test_accuracies_after_one_epoch_are_drawn_against_the_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, *_, **__: drawn.append(figure))
    study = Study(question="?", grid={"model.layers": [1, 2, 4]}, seeds=[0, 1])
    rows = [
        {"variant": variant, "seed": seed, "accuracy": 0.5 + 0.1 * place, "accuracy/cat": 0.5}
        for place, variant in enumerate(study.variants)
        for seed in (0, 1)
    ]
    results = pd.DataFrame(rows)
    epochs = results.assign(epoch=1, train_accuracy=results.accuracy - 0.1)
    effect, tables = effects(study, results), Tables(results, epochs)
    draw_study(Path("-"), study, effect, tables)
    for axes, mean in zip(drawn[0].axes, ([50, 60, 70], [40, 50, 60]), strict=False):
        [line] = [line for line in axes.lines if line.get_marker() == "o"]
        assert line.get_xdata().tolist() == [1, 2, 4]
        assert line.get_ydata().tolist() == pytest.approx(mean)
    assert [axes.get_ylabel() for axes in drawn[0].axes[:2]] == [
        "test accuracy, %",
        "training accuracy, %",
    ]


@pytest.mark.parametrize("smallest", [0.5, 1e-5, 0.0])
def test_the_axis_of_gradients_shows_more_than_one_number(
    smallest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, *_, **__: drawn.append(figure))
    index = pd.MultiIndex.from_product([["one", "other"], [1, 2]], names=["variant", "epoch"])
    norms = {"gradient_norm/1": [smallest, 2, 3, 4], "gradient_norm/2": [3.0, 3, 3, 3]}
    draw_layers(Path("-"), pd.DataFrame(norms, index=index), ["one", "other"])
    drawn[0].canvas.draw()
    for axes in drawn[0].axes:
        low, high = axes.get_ylim()
        shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
        assert len(shown) >= 3, shown
        assert axes.get_yscale() == ("linear" if smallest == 0.5 else "symlog")


def test_layers_after_one_epoch_are_drawn_as_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, *_, **__: drawn.append(figure))
    index = pd.MultiIndex.from_product([["one", "other"], [1], [0, 1]])
    index = index.set_names(["variant", "epoch", "seed"])
    layers = {f"dead_units/{layer}": [layer, layer + 2.0, 0, 0] for layer in (1, 2)}
    draw_layers(Path("-"), pd.DataFrame(layers, index=index), ["one", "other"])
    [axes] = drawn[0].axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[2, 3], [0, 0]]
    assert axes.get_xlabel() == "layer"


def test_effects_on_classes_are_paired_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, *_, **__: drawn.append(figure))
    study = Study(question="?", variants={"one": {}, "other": {}}, seeds=[0, 1, 2], looks=[2, 3])
    # Only the first variant has the third seed, which is much better than the others.
    rows = [("one", 0, 0.5), ("one", 1, 0.6), ("one", 2, 0.9), ("other", 0, 0.4), ("other", 1, 0.5)]
    table = pd.DataFrame(rows, columns=["variant", "seed", "accuracy"])
    results = table.assign(**{"accuracy/cat": table.accuracy})
    epochs = results.assign(epoch=1, train_accuracy=results.accuracy)
    draw_study(Path("-"), study, effects(study, results), Tables(results, epochs))
    *_, classes = drawn[0].axes
    assert [text.get_text() for text in classes.texts] == ["-10.0"]


@pytest.mark.parametrize(("far", "size"), [(0.68, 1), (0.1, 1), (0.74, 1), (0.704, 0.01)])
def test_one_large_effect_does_not_hide_the_others(
    far: float, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, *_, **__: drawn.append(figure))
    means = {"one": 0.7, "worse": 0.7 - 0.02 * size, "better": 0.7 + 0.01 * size, "far": far}
    study = Study(question="?", variants={name: {} for name in means}, seeds=[0, 1])
    table = pd.DataFrame(
        [(name, seed, mean + seed / 1e3) for name, mean in means.items() for seed in (0, 1)],
        columns=["variant", "seed", "accuracy"],
    )
    results = table.assign(**{"accuracy/cat": table.accuracy})
    epochs = results.assign(epoch=1, train_accuracy=results.accuracy)
    draw_study(Path("-"), study, effects(study, results), Tables(results, epochs))
    left, _, classes = drawn[0].axes
    [cells] = classes.collections
    # Differences of 2, 1 and 2, 60 or 4 points: their median is 2. Smaller ones are pale.
    full = {0.1: 8, 0.68: 2, 0.74: 4, 0.704: 1}[far]
    assert cells.get_clim() == pytest.approx((-full, full))
    assert left.get_xscale() == ("symlog" if far == 0.1 else "linear")
    assert ("logarithmic beyond 5" in left.get_xlabel()) == (far == 0.1)
    # The intervals of the effects on the left keep their places apart.
    to_pixels = left.transData.transform
    (worse, _), (better, _) = to_pixels([(-2 * size, 0), (size, 0)])
    assert size < 1 or better - worse > left.bbox.width / 5

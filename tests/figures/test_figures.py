"""The pictures of a run: all six, correct, reproducible and legible for all kinds of classes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import confusion_matrix, recall_score

from cifarlab.data.dataset import Dataset
from cifarlab.evaluation.metrics import evaluate
from cifarlab.figures.run import confusion_heatmap, draw_all
from cifarlab.files import write_json
from cifarlab.params.load import load_params
from cifarlab.params.sections import Params
from tests.support.forkserver import ForkServer

DPI = 60
SCENARIOS: dict[str, dict[str, Any]] = {
    "four classes": {"classes": ["bird", "cat", "dog", "horse"], "errors": 9},
    "two classes, one mistake, one epoch": {"classes": ["cat", "dog"], "errors": 1, "epochs": 1},
    "no mistakes, no validation": {"classes": ["cat", "dog"], "errors": 0, "validation": False},
    "two long names": {
        "classes": [f"{i}: a name that fills a line of its own, and runs on and on" for i in "ab"],
        "errors": 3,
    },
    "hundred long names": {
        "classes": [f"{i:02} is the number of this class" for i in range(100)],
        "errors": 60,
    },
    "odd names": {"classes": ["7", "NaN", "None", "$x_1$"], "errors": 6},
    "numbers": {"classes": ["1", "01", "1e0"], "errors": 3},
    "names of columns": {"classes": ["actual", "class", "predicted"], "errors": 3},
}

STAGES = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text("utf-8"))["stages"]
LONG = ("hundred long names", "numbers", "names of columns", "two long names")


class Run:
    """What the stages write for a run on synthetic images, and the figures as they were saved.

    Every image has one colour: red depends on its class and blue on its index, so that a test
    recognises it in a picture. Colours are even numbers, because resizing may change them by one.
    """

    def __init__(
        self,
        folder: Path,
        classes: list[str],
        errors: int,
        epochs: int = 3,
        validation: bool = True,
    ) -> None:
        self.folder, self.classes = folder, classes
        rng, n = np.random.default_rng(0), len(classes)
        labels = {split: np.arange(count * n) % n for split, count in (("train", 3), ("test", 4))}
        images = {name: np.zeros((len(y), 16, 16, 3), np.uint8) for name, y in labels.items()}
        for name, y in labels.items():
            images[name][..., 0] = 2 * y[:, None, None]
            images[name][..., 2] = 2 * (np.arange(len(y)) % 128)[:, None, None]
        self.images = images["test"]
        Dataset(images, labels, classes, "synthetic").save(folder / "data")

        self.actual = labels["test"]
        self.predicted = self.actual.copy()
        self.wrong = rng.permutation(len(self.actual))[:errors]
        self.predicted[self.wrong] = (self.predicted[self.wrong] + rng.integers(1, n, errors)) % n
        self.confidence = rng.uniform(0.6, 1, len(self.actual))
        probabilities = np.repeat((1 - self.confidence[:, None]) / (n - 1), n, 1)
        probabilities[np.arange(len(self.actual)), self.predicted] = self.confidence
        metrics, tables = evaluate(probabilities, self.actual, classes, 15)

        history = pd.DataFrame({"epoch": range(1, epochs + 1)})
        history["train_loss"], history["train_accuracy"] = 2 / history.epoch, 1 - 0.5**history.epoch
        history["val_loss"] = 2.1 / history.epoch if validation else None
        history["val_accuracy"] = 0.9 - 0.5**history.epoch if validation else None
        write_json(folder / "metrics" / "evaluate.json", metrics)
        (folder / "plots").mkdir()
        for name, table in {**tables, "history": history}.items():
            path = folder / "plots" / f"{name}.csv"
            pd.DataFrame(table).to_csv(path, index=False, float_format="%.6f")

    def draw(self, params: Params) -> None:
        drawn: list[Figure] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plt, "close", drawn.append)  # called for every figure after saving it
            self.paths = list(draw_all(params, self.folder / "data", self.folder / "plots"))
        self.figures = dict(zip([path.stem for path in self.paths], drawn, strict=True))


@pytest.fixture(scope="module")
def params() -> Params:
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    return params.model_copy(update={"plot": params.plot.model_copy(update={"dpi": DPI})})


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in SCENARIOS
    ],
)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, params: Params
) -> Iterator[Run]:
    run = Run(tmp_path_factory.mktemp("run"), **SCENARIOS[request.param])
    try:
        run.draw(params)
        yield run
    finally:
        plt.close("all")


def shown(texts: list[Text]) -> list[str]:
    # Escaping a dollar is as good as turning mathematics off.
    return [text.get_text().replace(r"\$", "$") for text in texts]


def abbreviates(text: str, name: str) -> bool:
    start = text.removesuffix("…")
    return start == name or (name.startswith(start) and len(start) > 10)


def sticks_out(figure: Figure) -> float:
    """Return by how many inches the drawing exceeds the figure, at the worst side."""
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return max(-box.x0, -box.y0, box.x1 - width, box.y1 - height)


def test_all_six_pictures_show_everything_inside_the_figure(run: Run) -> None:
    names = ("confusion", "confusion_recall", "curves", "per_class", "training_images", "mistakes")
    assert {path.name for path in run.paths} == {f"{name}.png" for name in names}
    # DVC knows them all: what it does not know is not in the commit of an experiment.
    assert {f"plots/{path.name}" for path in run.paths} == {*STAGES["plot"]["outs"]}
    for path in run.paths:
        figure = run.figures[path.stem]
        with Image.open(path) as image:
            darkest, brightest = image.convert("L").getextrema()
            assert darkest < 100 < brightest
            assert image.size == pytest.approx(figure.get_size_inches() * DPI, abs=1)
            assert 2 * DPI <= min(image.size) <= max(image.size) <= 30 * DPI
        assert sticks_out(figure) < 0.05, path.stem


def test_title_of_a_long_variant_stays_inside(tmp_path: Path, params: Params) -> None:
    changes = {"layers": 16, "widths": [64, 128, 256, 512, 1024], "norm": "group"}
    changes |= {"activation": "leaky_relu", "residual": True}
    run = Run(tmp_path, **SCENARIOS["four classes"])
    run.draw(params.model_copy(update={"model": params.model.model_copy(update=changes)}))
    plt.close("all")
    assert [name for name, figure in run.figures.items() if sticks_out(figure) > 0.05] == []


@pytest.mark.filterwarnings("error")
def test_names_in_scripts_that_the_font_lacks_cause_no_warning(
    tmp_path: Path, params: Params
) -> None:
    Run(tmp_path, classes=["猫", "कुत्ता"], errors=3).draw(params)
    plt.close("all")


def test_no_text_is_parsed_as_mathematics(run: Run) -> None:
    texts = [text for figure in run.figures.values() for text in figure.findobj(Text)]
    parsed = [text.get_text() for text in texts if text.get_parse_math()]
    assert [text for text in parsed if is_math_text(text)] == []


@pytest.mark.parametrize("name", ["confusion", "confusion_recall"])
def test_heatmap_shows_the_confusion_matrix_and_every_class(run: Run, name: str) -> None:
    axes = run.figures[name].axes[0]
    rows, columns = axes.get_yticklabels(), axes.get_xticklabels()
    for labels in (rows, columns):
        assert len(labels) == len(run.classes)
        assert all(map(abbreviates, shown(labels), run.classes))
    # Boxes of labels at an angle of 45° overlap even where the letters do not.
    for labels in [rows, *([columns] if columns[0].get_rotation() == 90 else [])]:
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))

    counts = confusion_matrix(run.actual, run.predicted)
    expected = counts / counts.sum(1, keepdims=True) if name == "confusion_recall" else counts
    assert np.allclose(np.asarray(axes.collections[0].get_array()).ravel(), expected.ravel())
    if len(run.classes) <= 30:
        numbers = "{:.2f}" if name == "confusion_recall" else "{}"
        texts = [numbers.format(value) if value else "" for value in expected.flat]
        assert shown(axes.texts) == texts


def test_no_number_of_a_heatmap_is_zero() -> None:
    counts = pd.DataFrame([[996, 4], [0, 1000]], ["cat", "dog"], ["cat", "dog"])
    for normalized, texts in ((True, ["1.00", "", "", "1.00"]), (False, ["996", "4", "", "1000"])):
        figure = confusion_heatmap(counts, normalized=normalized)
        assert shown(figure.axes[0].texts) == texts
        plt.close(figure)


def test_bars_show_the_accuracies_in_the_order_of_the_classes(run: Run) -> None:
    axes = run.figures["per_class"].axes[0]
    top_down = sorted(axes.patches, key=lambda bar: -axes.transData.transform((0, bar.get_y()))[1])
    lengths = [bar.get_width() for bar in top_down]
    assert len(lengths) == len(run.classes)
    assert all(map(abbreviates, shown(axes.get_yticklabels()), run.classes))
    recall = recall_score(run.actual, run.predicted, average=None)
    for label, length in zip(shown(axes.get_yticklabels()), lengths, strict=True):
        pairs = zip(run.classes, recall, strict=True)
        expected = [value for name, value in pairs if abbreviates(label, name)]
        assert expected == [pytest.approx(length, abs=1e-6)]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_the_axis_of_the_loss_names_the_label_smoothing(run: Run, params: Params) -> None:
    label = run.figures["curves"].axes[0].get_ylabel()
    assert f"label smoothing {params.train.label_smoothing}" in label


def test_curves_show_the_history(run: Run) -> None:
    history = pd.read_csv(run.folder / "plots" / "history.csv")
    for axes, quantity in zip(run.figures["curves"].axes, ("loss", "accuracy"), strict=True):
        columns = {"training": f"train_{quantity}", "validation": f"val_{quantity}"}
        lines = {line.get_label(): line for line in axes.lines}
        drawn = {label for label, column in columns.items() if history[column].notna().all()}
        assert set(lines) == drawn
        for label, line in lines.items():
            assert np.array_equal(line.get_xydata(), history[["epoch", columns[label]]])
        first, last = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if first <= tick <= last]
        assert all(tick == round(tick) for tick in ticks)  # no epoch 0.96


def test_curves_of_images_mixed_by_cutmix_say_so(tmp_path: Path, params: Params) -> None:
    run = Run(tmp_path, **SCENARIOS["four classes"])
    run.draw(params.model_copy(update={"train": params.train.model_copy(update={"cutmix": 0.5})}))
    plt.close("all")
    for axes in run.figures["curves"].axes:
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["training, images mixed by CutMix", "validation"]
    assert sticks_out(run.figures["curves"]) < 0.05


def pictures(figure: Figure) -> list[tuple[str, list[int]]]:
    """Return the caption and the colour of each picture of a gallery."""
    (axes,) = figure.axes
    captions = [text for text in axes.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in captions]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    grid = axes.images[0].get_array()
    assert grid is not None
    # A caption lies below its picture.
    colours = [grid[int(y) - 20, int(x)].tolist() for x, y in (t.get_position() for t in captions)]
    return list(zip(shown(captions), colours, strict=True))


def test_training_images_are_shown_above_their_class(run: Run, params: Params) -> None:
    found = pictures(run.figures["training_images"])
    # With three images per class, none are held out for validation.
    assert len(found) == min(params.plot.samples, 3 * len(run.classes))
    for caption, (red, _, _) in found:
        assert abbreviates(caption, run.classes[(red + 1) // 2])


def test_mistakes_are_the_most_confident_ones(run: Run, params: Params) -> None:
    figure = run.figures["mistakes"]
    if not len(run.wrong):
        assert "no mistakes on the test set" in shown(figure.texts)
        return
    expected = sorted(run.wrong, key=lambda i: -run.confidence[i])[: params.plot.mistakes]
    found = pictures(figure)
    assert np.allclose([colour for _, colour in found], run.images[expected, 0, 0], rtol=0, atol=1)
    for (caption, _), i in zip(found, expected, strict=True):
        actual, predicted = caption.split("\n→ ")
        name, confidence = predicted.rsplit(" ", 1)
        assert abbreviates(actual, run.classes[run.actual[i]])
        assert abbreviates(name, run.classes[run.predicted[i]])
        assert confidence == f"{run.confidence[i]:.0%}"


def test_same_run_gives_the_same_bytes(tmp_path: Path, params: Params) -> None:
    drawn: list[dict[str, bytes]] = []
    for folder in ("first", "second"):
        run = Run(tmp_path / folder, **SCENARIOS["four classes"])
        run.draw(params)
        plt.close("all")
        drawn.append({path.name: path.read_bytes() for path in run.paths})
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0].values())) == 6


def test_importing_the_pictures_changes_no_setting_of_matplotlib(fork_server: ForkServer) -> None:
    code = (
        "import matplotlib; before = matplotlib.rcParams.copy()\n"
        "import cifarlab.figures.run, cifarlab.studies.pictures\n"
        "assert matplotlib.rcParams.copy() == before"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([fork_server.python, "-c", code], env=environment, check=True, timeout=120)

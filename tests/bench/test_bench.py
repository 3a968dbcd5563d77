"""The benchmark: its measurements, its table, and how it continues after an interruption."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from bench import __main__ as bench
from bench import measure, notebook
from cifarlab.data.dataset import Dataset
from cifarlab.nn.network import Network

REPO = Path(__file__).resolve().parents[2]
CLASSES = list("abcdefghij")


@pytest.fixture
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put sixty noisy images into data/, brighter from class to class, and a narrow network."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 10
    noise = rng.integers(0, 20, (60, 32, 32, 3))
    images = (noise + 22 * labels[:, None, None, None]).astype(np.uint8)
    splits = ("train", "test")
    data = Dataset(dict.fromkeys(splits, images), dict.fromkeys(splits, labels), CLASSES, "noise")
    data.save(tmp_path / "data")
    params = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
    params["model"]["widths"], params["train"]["threads"] = [8, 8, 8], 1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
    (tmp_path / "variants.yaml").write_text((REPO / "variants.yaml").read_text("utf-8"), "utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small_data")
def test_both_implementations_train_the_same_network() -> None:
    params = measure.variant("notebook")
    here, there = Network(params.model, 32, CLASSES), notebook.network()
    assert [p.shape for p in here.parameters()] == [p.shape for p in there.parameters()]
    train = params.train
    assert (train.batch_size, train.epochs) == (notebook.BATCH, notebook.EPOCHS)
    assert (train.optimizer, train.lr) == ("adam", 1e-3)


@pytest.mark.usefixtures("small_data")
def test_the_notebooks_loop_trains_on_every_image_and_learns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notebook, "EPOCHS", 6)
    monkeypatch.setattr(notebook, "BATCH", 10)  # more steps from few images
    run = measure.reference(0)
    assert run["accuracy"] > 0.4
    assert run["images_per_second"] == pytest.approx(6 * 60 / run["seconds"])
    assert run["parameters"] == 538_506


@pytest.mark.usefixtures("small_data")
def test_a_measurement_of_few_images_gives_the_speed_and_no_accuracy() -> None:
    run = measure.reference(0, 32)
    assert run["accuracy"] is None
    assert run["images_per_second"] == pytest.approx(notebook.EPOCHS * 60 / run["seconds"])
    run = measure.ours("default", 0, 1, 20)
    assert run["accuracy"] is None
    assert run["images_per_second"] == pytest.approx(20 / run["seconds"])


@pytest.mark.usefixtures("small_data")
def test_our_measurement_counts_images_and_operations() -> None:
    run = measure.ours("default", 0, 1)
    plan = list(measure.variant("default").model.plan(32))
    # Two operations for each weight and output pixel. The backward pass takes them twice, once for
    # the gradient of the weights and once for that of the input. The stem is not trained.
    convolutions = sum(2 * c.in_channels * c.out_channels * 9 * c.out_size**2 for c in plan)
    forward = convolutions + 2 * 8 * 10
    stem = 2 * 24 * 12 * 31**2
    assert run["images_per_second"] == pytest.approx(60 / run["seconds"])  # no image is held out
    operations = (3 * forward + stem) * run["images_per_second"]
    assert run["gflop_per_second"] * 1e9 == pytest.approx(operations, rel=1e-6)


def test_the_arithmetic_of_a_training_is_counted() -> None:
    """By hand, for the notebook: two operations for each weight and output pixel."""
    first = 2 * 30**2 * 64 * 27  # its input needs no gradient
    others = 2 * (13**2 * 128 * 576 + 4**2 * 256 * 1152 + 1024 * 128 + 128 * 256 + 256 * 10)
    expected = (2 * first + 3 * others) * 8 * 50_000 / 1e15
    assert measure.pflop("reference") == pytest.approx(expected, rel=1e-9)
    assert measure.pflop("notebook") == pytest.approx(expected, rel=1e-2)
    table = pd.read_csv(REPO / "docs/frontier.csv").dropna(subset="variant")
    counted = [measure.pflop(variant) for variant in table.variant]
    assert [*table.pflop] == pytest.approx(counted, rel=1e-3)


@pytest.mark.usefixtures("small_data")
def test_cost_is_measured_with_the_given_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fit(network: Network, params: Any, train: Any, *_: Any, **__: Any) -> None:
        seen.append((network, params, train))

    monkeypatch.setattr(measure, "fit", fit)
    run = measure.cost(40, "model.layers=4", "train.batch_size=16")
    [(network, params, train)] = seen
    assert (network.params.layers, params.batch_size, len(train.labels)) == (4, 16, 40)
    assert run["memory_mb"] > 50


@pytest.mark.usefixtures("small_data")
def test_the_compiled_network_takes_turns_with_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def fit(network: Network, *_: Any, **__: Any) -> None:
        seen.append(network._compiled_call_impl is not None)

    monkeypatch.setattr(measure, "fit", fit)
    run = measure.compiled(40)
    assert seen == [False, True] * 4
    assert len(run["seconds_of_the_first_epoch"]) == 2


def runs() -> dict[str, list[dict[str, Any]]]:
    """Return made-up results of all measurements."""

    def run(seconds: float, speed: float, accuracy: float) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "images_per_second": speed,
            "accuracy": accuracy,
            "evaluation_seconds": 2.0,
            "gflop_per_second": 60.0,
            "memory_mb": 900,
        }

    return {
        "reference": [run(100, 10, 0.7), run(120, 12, 0.8), run(140, 11, 0.75)],
        "ours tiny": [run(9, 1, 0.8), run(8, 1, 0.8), run(10, 1, 0.8)],
        "ours default": [run(90, 1, 0.9), run(91, 1, 0.9), run(89, 1, 0.9)],
        "ours notebook": [run(50, 22, 0.8), run(50, 30, 0.8), run(50, 20, 0.8)],
        "matmul": [{"gflop_per_second": 120.0}],
        "pipeline": [{"whole": 30.0, "nothing": 1.0, "epoch": 8.0}],
    }


def cells(table: str) -> dict[str, list[str]]:
    """Return the cells of each row of a Markdown table, by the row's label."""
    rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    return {label: others for label, *others in rows}


def test_the_table_has_medians_extremes_and_ratios() -> None:
    rows = cells(bench.table(runs()))
    arithmetic = f"{measure.pflop('reference'):.3f} and 0.001"  # 9 s · 60 GFLOP/s
    times = ["120 (100–140)", "9 (8–10)", "0.07", arithmetic]
    assert rows["training time of `tiny`, s"][1:] == times
    speed = rows["training speed with the notebook's network and batch size, images/s"]
    assert speed[1:4] == ["11 (10–12)", "22 (20–30)", "2.00"]
    assert "20.0" in rows["`dvc repro` without training and evaluation, s"]  # 30 - 8 - 2


@pytest.mark.parametrize("page", ["docs/performance.md", "bench/results/full.md"])
def test_the_table_on_each_page_matches_the_recorded_runs(page: str) -> None:
    recorded: dict[str, list[dict[str, Any]]] = {}
    for line in (REPO / "bench/results/full.jsonl").read_text("utf-8").splitlines():
        run = json.loads(line)
        recorded.setdefault(bench.label(run["measurement"]), []).append(run["result"])
    counts = {len(recorded[kind]) for kind in ("reference", "ours default", "ours tiny")}
    assert len(counts) == 1
    assert min(counts) >= 3
    assert bench.table(recorded) in (REPO / page).read_text("utf-8")


def test_the_quick_table_compares_tiny_with_the_time_the_notebook_would_take() -> None:
    quick = runs()
    quick["reference"] = [quick["reference"][0] | {"accuracy": None}]
    rows = cells(bench.table(quick))
    assert rows["training time of `tiny`, s"][1:4] == ["100", "9 (8–10)", "0.09"]
    assert "80.00% (80.00%–80.00%)" in rows["test accuracy of `tiny`"]
    assert not any("default parameters" in label for label in rows)
    assert any("default parameters" in label for label in cells(bench.table(runs())))


def test_an_interrupted_benchmark_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, ...]] = []

    def measured(*arguments: str) -> dict[str, Any]:
        made.append(arguments)
        if len(made) == 4:
            raise KeyboardInterrupt
        return runs()[bench.label(arguments)][0]

    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "machine", lambda: {"processor": "x"})
    monkeypatch.setattr(bench, "measured", measured)
    monkeypatch.setattr(bench, "pipeline", lambda: runs()["pipeline"][0])
    monkeypatch.setattr("sys.argv", ["bench", "--seeds", "2"])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    assert not list(tmp_path.glob("*.md"))
    bench.main()
    planned = [m for m in bench.plan(False, 2) if m != ("pipeline",)]
    assert made[:3] + made[4:] == planned  # the fourth was interrupted and made again
    assert len((tmp_path / "full.jsonl").read_text("utf-8").splitlines()) == len(planned) + 1
    made.clear()
    bench.main()
    assert made == []
    assert "- processor: x" in (tmp_path / "full.md").read_text("utf-8")

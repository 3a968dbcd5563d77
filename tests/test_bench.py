import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bench import __main__ as bench
from bench import measure, notebook
from cifarlab.datasets import Dataset
from cifarlab.models import Network

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty images of noise in data/, the classes apart by brightness; cheap networks."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 10
    images = (rng.integers(0, 20, (60, 32, 32, 3)) + 22 * labels[:, None, None, None]).astype(np.uint8)
    Dataset(dict.fromkeys(("train", "test"), images), dict.fromkeys(("train", "test"), labels), list("abcdefghij"), "noise").save(
        tmp_path / "data"
    )
    params = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
    params["model"]["widths"], params["train"]["threads"] = [8, 8, 8], 1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
    (tmp_path / "variants.yaml").write_text((REPO / "variants.yaml").read_text("utf-8"), "utf-8")
    monkeypatch.chdir(tmp_path)


def test_both_ways_train_the_same_network() -> None:
    here = Network(measure.variant("notebook").model, 32, list("abcdefghij"))
    there = notebook.network()
    assert [p.shape for p in here.parameters()] == [p.shape for p in there.parameters()]
    params = measure.variant("notebook").train
    assert (params.batch_size, params.epochs, params.optimizer, params.lr) == (notebook.BATCH, notebook.EPOCHS, "adam", 1e-3)


def test_the_notebooks_way_sees_every_image_and_learns(small_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "EPOCHS", 20)
    run = measure.reference(0)
    assert run["accuracy"] > 0.4
    assert run["images_per_second"] == pytest.approx(20 * 60 / run["seconds"])
    assert run["parameters"] == 538_506


def test_a_part_tells_the_speed_and_the_time_of_the_whole(small_data: None) -> None:
    run = measure.reference(0, 32)
    assert run["accuracy"] is None
    assert run["images_per_second"] == pytest.approx(notebook.EPOCHS * 60 / run["seconds"])
    run = measure.ours("default", 0, 1, 20)
    assert run["accuracy"] is None
    assert run["images_per_second"] == pytest.approx(20 / run["seconds"])


def test_ours_counts_images_and_operations(small_data: None) -> None:
    run = measure.ours("default", 0, 1)
    params = measure.variant("default")
    plan = list(params.model.plan(32))
    # Two operations for each weight and output pixel; again for the gradient of the weights, and for that of the input.
    forward = sum(2 * c.in_channels * c.out_channels * 9 * c.out_size**2 for c in plan) + 2 * 8 * 10
    stem = 2 * 24 * 12 * 31**2
    assert run["images_per_second"] == pytest.approx(60 / run["seconds"])  # none is held out
    assert run["gflop_per_second"] * 1e9 == pytest.approx((3 * forward + stem) * run["images_per_second"], rel=1e-6)


def test_cost_changes_what_it_is_told(small_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(measure.training, "fit", lambda network, params, train, *_: seen.append((network, params, train)))
    run = measure.cost(40, "model.layers=4", "train.batch_size=16")
    [(network, params, train)] = seen
    assert (network.params.layers, params.batch_size, len(train.labels)) == (4, 16, 40)
    assert run["memory_mb"] > 50


def runs() -> dict[str, list[dict[str, float]]]:
    def run(seconds: float, speed: float, accuracy: float) -> dict[str, float]:
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


def test_table_has_medians_and_ratios() -> None:
    lines = {line.split(" | ")[0].strip("| "): line for line in bench.table(runs()).splitlines()}
    assert "120 (100–140) | 9 (8–10) | 0.07 |" in lines["training of `tiny`, s"]
    assert "11 (10–12) | 22 (20–30) | 2.00 |" in lines["the notebook's network and batch size, images/s"]
    assert "| 20.0 |" in lines["`dvc repro` beside training and evaluating, s"]  # 30 - 8 - 2


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md", "bench/results/full.md"])
def test_the_table_on_the_pages_is_that_of_the_recorded_runs(page: str) -> None:
    recorded: dict[str, list[dict[str, float]]] = {}
    for line in (REPO / "bench/results/full.jsonl").read_text("utf-8").splitlines():
        run = json.loads(line)
        recorded.setdefault(" ".join(a for a in run["measurement"] if not a.isdigit()), []).append(run["result"])
    assert len(recorded["reference"]) == len(recorded["ours default"]) == len(recorded["ours tiny"]) >= 3
    assert bench.table(recorded) in (REPO / page).read_text("utf-8")


def test_the_quick_table_has_tiny_against_the_time_the_notebook_would_take() -> None:
    quick = runs()
    quick["reference"] = [quick["reference"][0] | {"accuracy": None}]  # type: ignore[dict-item]
    table = bench.table(quick)
    assert "| 100 | 9 (8–10) | 0.09 |" in table
    assert "| test accuracy of `tiny` | ≥ 1 |  | 80.00% (80.00%–80.00%) |  |" in table
    assert "default parameters" not in table
    assert "default parameters" in bench.table(runs())


def test_an_interrupted_benchmark_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []

    def measured(*arguments: str) -> dict[str, float]:
        made.append(arguments)
        if len(made) == 4:
            raise KeyboardInterrupt
        return runs()[" ".join(a for a in arguments if not a.isdigit())][0]

    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "machine", lambda: {"processor": "x"})
    monkeypatch.setattr(bench, "measured", measured)
    monkeypatch.setattr(bench, "pipeline", lambda: runs()["pipeline"][0])
    monkeypatch.setattr("sys.argv", ["bench", "--seeds", "2"])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    assert not list(tmp_path.glob("*.md"))
    bench.main()
    wanted = [m for m in bench.plan(False, 2) if m != ("pipeline",)]
    assert made[:3] + made[4:] == wanted  # the fourth, interrupted, was made again
    assert len([json.loads(line) for line in (tmp_path / "full.jsonl").read_text().splitlines()]) == len(wanted) + 1
    made.clear()
    bench.main()
    assert made == []
    assert "**" not in (tmp_path / "full.md").read_text()

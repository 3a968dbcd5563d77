"""The lines and the bar of a training, and the times of its epochs in .cache/trainings."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from cifarlab.runtime import timings
from cifarlab.runtime.timings import Progress, Timings

CONDITIONS = {"device": "Abacus", "threads": "1"}


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets, in seconds since 1970, with an empty folder as the checkout."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    now = [1000.0]
    monkeypatch.setattr(timings.time, "time", lambda: now[0])
    monkeypatch.setattr(timings.time, "perf_counter", lambda: now[0] - 990)
    return now


def end(progress: Progress, epoch: int, **changes: float) -> None:
    """Report the end of an epoch of 2000 images."""
    row: dict[str, Any] = {"epoch": epoch, "train_loss": 0.25, "train_accuracy": 0.5}
    row |= {"val_loss": None, "val_accuracy": None}
    progress.batch(epoch, 2000, 2000, lambda: (0.25, 0.5))
    progress.epoch(row | changes)


# Timings


def test_the_time_of_an_epoch_is_written_when_it_ends(clock: list[float], tmp_path: Path) -> None:
    progress = Progress("key", CONDITIONS, 2)
    clock[0] += 2.5
    end(progress, 1)
    assert timings.read("key") == Timings(CONDITIONS, {"1": (1_002_500, 2.5)})
    clock[0] += 1.25
    end(progress, 2)
    expected = Timings(CONDITIONS, {"1": (1_002_500, 2.5), "2": (1_003_750, 1.25)})
    assert timings.read("key") == timings.read("key", tmp_path) == expected
    content = json.loads((tmp_path / ".cache/trainings/key.json").read_text("utf-8"))
    epochs = {"1": [1_002_500, 2.5], "2": [1_003_750, 1.25]}
    assert content == {"conditions": CONDITIONS, "epochs": epochs}


@pytest.mark.parametrize(("resumed", "kept"), [(3, ["1", "2", "3"]), (2, ["1", "2"]), (1, ["1"])])
def test_a_resumed_training_keeps_its_earlier_epochs(
    clock: list[float], resumed: int, kept: list[str]
) -> None:
    first = Progress("key", CONDITIONS, 3)
    for epoch in (1, 2):
        clock[0] += 1
        end(first, epoch)
    clock[0] += 100
    again = Progress("key", CONDITIONS, 3)
    clock[0] += 4
    end(again, resumed)
    epochs = timings.read("key").epochs
    assert list(epochs) == kept
    assert epochs[str(resumed)] == (1_106_000, 4)


def test_a_full_disk_costs_only_the_timings(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    progress = Progress("key", CONDITIONS, 1)
    clock[0] += 1
    monkeypatch.setattr(timings.files, "write_json", no_space)
    end(progress, 1)
    assert timings.read("key") == Timings({}, {})


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"conditions": {}, "epochs": {"1": 3}}'])
def test_a_damaged_file_counts_as_missing(clock: list[float], tmp_path: Path, content: str) -> None:
    path = tmp_path / ".cache/trainings/key.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert timings.read("key") == Timings({}, {})


# Printed lines, and the bar


@pytest.mark.parametrize(
    ("changes", "middle"),
    [
        ({}, ""),
        ({"val_loss": 1.5, "val_accuracy": 0.125}, "   validation loss 1.500, accuracy 12.5%"),
    ],
)
def test_a_line_for_each_epoch(
    clock: list[float],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, float],
    middle: str,
) -> None:
    progress = Progress("key", CONDITIONS, 5)
    clock[0] += 2
    end(progress, 3, **changes)
    # 1000 images a second, two epochs of 2000 images are left.
    first, last = "epoch 3/5   loss 0.250, accuracy 50.0%", "   1,000 images/s, 4 s left\n"
    printed = capsys.readouterr()
    assert printed.out == first + middle + last
    assert printed.err == ""  # no bar in a log file


def test_a_terminal_shows_a_bar_with_loss_and_accuracy(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(timings, "tqdm", functools.partial(tqdm, mininterval=0))
    progress = Progress("key", CONDITIONS, 2)
    for epoch in (1, 2):
        for step in range(1, 21):
            progress.batch(epoch, 10 * step, 200, lambda: (0.5, 0.9))
        shown = capsys.readouterr().err
        assert f"epoch {epoch}/2" in shown
        assert "20/200" in shown
        assert re.search(r"accuracy=90\.0%, loss=0\.500|loss=0\.500, accuracy=90\.0%", shown)
        assert progress.bar is None  # closed

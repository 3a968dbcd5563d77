"""The watch over DVC's queue, with a queue that the test makes up."""

from collections.abc import Iterator
from typing import Any

import pytest

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.studies import study
from cifarlab.studies.points import Point

PATIENCE = 0.2  # seconds


class Queue:
    """A queue whose tasks are given for one look after the other; the last ones stay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *looks: dict[str, str]) -> None:
        self.looks = list(looks)
        self.started: list[list[str]] = []
        monkeypatch.setattr(pipeline, "queue_tasks", self.tasks)
        monkeypatch.setattr(pipeline, "start_queue", lambda jobs, *o: self.started.append([*o]))

    def tasks(self) -> dict[str, dict[str, Any]]:
        now = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return {f"rev-{name}": {"name": name, "status": status} for name, status in now.items()}


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task has used more processor time at every look."""
    seconds: Iterator[int] = iter(range(10**9))
    monkeypatch.setattr(study, "_processor_time", lambda rev: next(seconds))


@pytest.mark.usefixtures("busy")
def test_the_watch_ends_with_the_queue_and_calls_back_at_every_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = ["Queued", "Running", "Running", "Success"]
    queue = Queue(monkeypatch, *({"old": "Failed", "a": status} for status in looks))
    changes: list[str] = []
    study.watch(1, PATIENCE, lambda: changes.append(capsys.readouterr().out))
    assert changes == [
        "queue: 0 success, 1 running, 0 queued, 0 failed\n",
        "queue: 1 success, 0 running, 0 queued, 0 failed\n",
    ]
    assert queue.started[0] == []


@pytest.mark.usefixtures("busy")
def test_a_failed_task_is_named_but_not_one_that_had_failed_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {"old": "Failed"}
    Queue(monkeypatch, before, before | {"a": "Running"}, before | {"a": "Failed", "b": "Success"})
    with pytest.raises(UserError, match=r"^failed: a; `dvc queue logs NAME` says why$"):
        study.watch(2, PATIENCE)


@pytest.mark.usefixtures("busy")
def test_a_worker_that_died_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [{"a": "Running", "b": "Queued"}] * 12 + [{"a": "Success", "b": "Success"}]
    queue = Queue(monkeypatch, *looks)
    study.watch(2, PATIENCE)
    assert queue.started[0] == []
    assert ["--quiet"] in queue.started[1:]


def test_a_queue_that_hangs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "_processor_time", lambda rev: 7)
    Queue(monkeypatch, {}, {"a": "Running", "b": "Queued"})
    with pytest.raises(
        UserError, match="the queue hangs: a, b; `dvc queue stop --kill`, then `make queue`"
    ):
        study.watch(1, PATIENCE)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == ["warning: a hangs; `dvc queue kill a`, then queue it again"]


@pytest.mark.usefixtures("busy")
def test_points_that_are_queued_already_are_not_queued_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queued: list[tuple[str, bool]] = []
    done = {"a": "Success", "b": "Success", "c": "Success"}
    Queue(monkeypatch, {"a": "Running", "b": "Success"}, {"b": "Success"}, done)
    monkeypatch.setattr(
        pipeline, "run_experiment", lambda name, changes, queue: queued.append((name, queue))
    )
    points = [Point("v", 0, name, {}, {}) for name in "abc"]
    study.run_points(points, 2, lambda: None)
    assert queued == [("b", True), ("c", True)]
    assert "c queued" in capsys.readouterr().out

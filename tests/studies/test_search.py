"""How a search chooses the trials that go on. test_study.py trains a real one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from pydantic import ValidationError

from cifarlab.errors import UserError
from cifarlab.studies import search
from cifarlab.studies.points import Point
from cifarlab.studies.question import Search
from tests.conftest import REPO


@pytest.mark.parametrize("rungs", [[1, 2, 4], [1, 3, 9], [2, 4, 5]])
def test_a_search_passes_on_a_third_after_every_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rungs: list[int]
) -> None:
    """Every trial is better than those before on the first rung, and worse on the second."""

    def finished(points: list[Point]) -> Iterator[tuple[dict[str, Any], None]]:
        _, trial, epochs = points[0].experiment.split("-")
        place = rungs.index(int(epochs))
        accuracy = 0.5 + 0.01 * int(trial) if place == 0 else 0.9 - 0.01 * int(trial)
        yield {"val_accuracy": accuracy, "seconds": 1.0, "experiment": points[0].experiment}, None

    for name in ("params.yaml", "src", "stages", "dvc.yaml"):
        (tmp_path / name).symlink_to(REPO / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search.executors, "run", lambda *_: None)
    monkeypatch.setattr(search, "finished", finished)
    monkeypatch.setattr(search.files, "cache", lambda: tmp_path / ".cache")
    content = {"question": "?", "space": {"train.lr": {"low": 0.1, "high": 0.2}}}
    asked = Search.model_validate(content | {"rungs": rungs, "seconds": 100, "trials": 6})
    study = search._open("s", asked, "")
    study.optimize(lambda trial: search._train("s", asked, trial), asked.trials)
    ended = [trial.user_attrs["rungs"][-1]["epochs"] for trial in study.trials]
    assert ended == [rungs[2], *[rungs[1]] * 5]


VALID: dict[str, Any] = {"question": "?", "rungs": [1], "seconds": 9, "trials": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"space": {"train.lr": {"low": 2, "high": 1}}},
        {"space": {"train.lr": {"low": 0, "high": 1, "log": True}}},
        {"space": {"train.lr": []}},
        {"rungs": [0, 1]},
        {"rungs": [3, 1]},
        {"trials": 0},
        {"seconds": 0},
        {"space": {"train.epochs": [4, 8]}},
        {"base": {"train.epochs": 4}},
    ],
)
def test_a_search_that_cannot_be_made_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Search.model_validate(VALID | {"space": {"train.lr": [1, 2]}} | change)


def test_a_parameter_that_does_not_exist_is_the_reason_why_no_trial_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPO)
    space = {"model.layers": {"low": 2, "high": 4}, "train.muonlr": [0.1]}
    asked = Search.model_validate(VALID | {"space": space})
    study = optuna.create_study()
    study.optimize(lambda trial: search._train("s", asked, trial), asked.trials)
    assert all(isinstance(trial.params["model.layers"], int) for trial in study.trials)
    with pytest.raises(UserError, match=r"studies/s.yaml: unknown key train.muonlr"):
        search._page("s", asked, study.trials, "digits")

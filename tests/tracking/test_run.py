"""The run of a stage: how it is found, how it ends, and what a failure of MLflow costs."""

import os
import shutil
import time
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.params.sections import Params
from cifarlab.tracking.run import FOLDER, track
from tests.tracking.conftest import CONDITIONS, Make, client_of, runs_in


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")]
)
def test_the_run_says_how_the_stage_ended(
    checkout: Path, params: Params, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), track("train", params):
        raise error
    [run] = runs_in(checkout)
    assert run.info.status == status
    assert "logged.train" not in run.data.tags
    # The next try goes to the same run and finishes it.
    with track("train", params):
        pass
    [again] = runs_in(checkout)
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    assert "logged.train" in again.data.tags


def test_an_experiment_has_its_own_run(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with track("plot", params):
        pass
    monkeypatch.setenv("DVC_EXP_NAME", "try")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "a" * 40)
    with track("train", params):
        pass
    with track("plot", params):
        pass
    named = {run.data.tags["dvc.exp.name"]: run for run in runs_in(checkout)}
    assert named.keys() == {"", "try"}
    run = named["try"]
    assert run.info.run_name == "try"
    assert run.data.tags["dvc.exp.baseline"] == run.data.tags["git.commit"] == "a" * 40
    assert not named[""].data.tags["dvc.exp.baseline"]


def test_a_whole_run_of_another_checkout_is_not_overwritten(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parameters give other numbers on another machine."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{checkout}/shared.db")
    shutil.copy("mlflow.db", "shared.db")
    for _ in range(2):
        with track("plot", params):
            pass
    client = mlflow.MlflowClient(f"sqlite:///{checkout}/shared.db")
    [experiment] = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    [run] = client.search_runs([experiment])  # this checkout finds its own
    client.set_tag(run.info.run_id, FOLDER, "her-machine:/home/alice/cifarlab")
    with track("train", params):
        pass
    assert len(client.search_runs([experiment])) == 2
    assert client.get_run(run.info.run_id).data.tags[FOLDER].startswith("her-machine")


def test_a_tag_that_somebody_deletes_costs_nothing(checkout: Path, params: Params) -> None:
    with pytest.raises(KeyboardInterrupt), track("train", params):
        raise KeyboardInterrupt
    [run] = runs_in(checkout)
    client_of(checkout).delete_tag(run.info.run_id, "dvc.exp.name")
    with track("train", params) as tracked:
        pass
    assert not tracked.warned


def test_a_model_that_the_server_refuses_costs_the_model_only(
    checkout: Path,
    make_params: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A proxy may limit the size of a file; an old server knows no logged models."""

    def refuse(*_: object) -> None:
        raise MlflowException("413 Request Entity Too Large")

    monkeypatch.setattr(mlflow.MlflowClient, "log_model_artifacts", refuse)
    params = make_params({"tracking.system_metrics": False, "tracking.log_model": True})
    for stage in pipeline.STAGES:
        with track(stage, params):
            pass
    [run] = runs_in(checkout)
    assert run.info.status == "FINISHED"
    assert {f"logged.{stage}" for stage in pipeline.STAGES} <= run.data.tags.keys()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2  # of evaluate, and of plot, which tries again
    for warning in warnings:
        assert (
            "the model was not logged: 413 Request Entity Too Large; tracking.log_model" in warning
        )
    monkeypatch.undo()


def test_every_evaluation_of_a_training_has_its_own_run(checkout: Path, make_params: Make) -> None:
    for bins in (15, 2, 15):
        changes = {"tracking.system_metrics": False, "tracking.log_model": False}
        with track("plot", make_params(changes | {"evaluate.calibration_bins": bins})):
            pass
    shown = sorted(run.data.params["evaluate.calibration_bins"] for run in runs_in(checkout))
    assert shown == ["15", "2"]


@pytest.mark.parametrize(
    ("stage", "end"),
    [
        ("train", "Ctrl-C"),
        ("train", "SIGKILL"),
        ("evaluate", "SIGKILL"),
        ("plot", "SIGKILL"),
        ("evaluate", "between two stages"),
    ],
)
def test_a_killed_execution_is_continued_under_the_new_name_of_its_experiment(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch, stage: str, end: str
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "first")
    if end == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt), track(stage, params):
            raise KeyboardInterrupt
    elif end == "SIGKILL":
        killed = track(stage, params).__enter__()
        assert killed.lock
        killed.lock.release(force=True)  # as the kernel does
    else:
        with track(stage, params):
            pass
    monkeypatch.setenv("DVC_EXP_NAME", "second")
    for _ in range(2):
        with track("plot", params, CONDITIONS):
            pass
    recorded = [pipeline.Revision("second", "", "")]  # by DVC
    monkeypatch.setattr(pipeline, "experiments", lambda: recorded)
    monkeypatch.setenv("DVC_EXP_NAME", "third")
    with track("train", params, CONDITIONS):
        pass
    found = {run.data.tags["dvc.exp.name"]: run.info.status for run in runs_in(checkout)}
    assert found == {"second": "FINISHED", "third": "FINISHED"}  # a whole run is not taken over


def test_the_run_of_a_process_that_lives_is_left_alone(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with track("train", params):
        monkeypatch.setenv("DVC_EXP_NAME", "second")
        with track("train", params):
            states = {run.data.tags["dvc.exp.name"]: run.info.status for run in runs_in(checkout)}
            assert states == {"": "RUNNING", "second": "RUNNING"}


def test_a_run_whose_process_was_killed_does_not_stay_running(
    checkout: Path, params: Params, make_params: Make
) -> None:
    killed = track("train", params).__enter__()
    assert killed.lock
    killed.lock.release(force=True)  # as the kernel does
    other = make_params({"train.seed": 5, "tracking.system_metrics": False})
    with track("train", other):
        pass
    states = {run.data.params["train.seed"]: run.info.status for run in runs_in(checkout)}
    assert states == {str(params.train.seed): "KILLED", "5": "FINISHED"}


def test_the_time_between_stages_does_not_count(checkout: Path, params: Params) -> None:
    with track("train", params):
        pass
    [run] = runs_in(checkout)
    # As if the first stage had ended at once, and the next had come as late as it does.
    client_of(checkout).set_terminated(run.info.run_id, "FINISHED", run.info.start_time)
    started = time.time()
    with track("train", params):
        pass
    second_stage = 1000 * (time.time() - started)
    [again] = runs_in(checkout)
    assert 0 < again.info.end_time - again.info.start_time <= second_stage


def test_a_store_that_breaks_while_training_costs_one_warning(
    checkout: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    with track("train", params) as run:
        for path in checkout.glob("mlflow.db*"):
            path.write_bytes(b"not a database")
        for _ in range(3):
            run.log_epochs()
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert output.err.startswith(
        "warning: MLflow did not receive everything from the train stage ("
    )
    assert output.err.endswith("The files are complete; `make sync` logs what is missing.\n")


def test_a_store_that_comes_back_gets_everything_at_the_end(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = checkout / "plots/hidden.csv"
    with track("train", params) as run:
        (checkout / "plots/history.csv").rename(hidden)
        run.log_epochs()  # fails: as far as the run knows, MLflow is away
        assert run.warned
        hidden.rename(checkout / "plots/history.csv")
    [stored] = runs_in(checkout)
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics["loss/train"] == 0.4


def test_password_and_environment_stay_private(
    checkout: Path,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:hunter2@127.0.0.1:9")
    before = {name: os.environ.get(name) for name in ("DVC_ROOT", "PWD")}
    with track("train", params):
        pass
    assert "hunter2" not in (error := capsys.readouterr().err)
    assert error.count("warning: MLflow") == 1
    assert {name: os.environ.get(name) for name in before} == before
    assert Path.cwd() == checkout


def test_missing_data_is_not_a_failure_of_mlflow(checkout: Path, params: Params) -> None:
    (checkout / "data/dataset.json").unlink()
    with pytest.raises(UserError, match=r"data/dataset.json is missing or damaged"):  # noqa: SIM117
        with track("train", params):
            pytest.fail("the stage must not start")

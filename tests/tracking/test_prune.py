"""What prune does when something is damaged. test_revisions.py removes real experiments."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.params.load import changed
from cifarlab.params.sections import Params
from cifarlab.pipeline import Revision
from cifarlab.tracking import client, prune
from cifarlab.tracking.upload import PARAMS
from tests.support.forkserver import ForkServer
from tests.tracking.conftest import client_of

DIGITS = {"data.name": "digits"}


def test_a_damaged_table_of_a_study_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs/studies").mkdir(parents=True)
    (tmp_path / "docs/studies/whole.csv").write_text("experiment,accuracy\na-0,0.5\n")
    assert prune._in_studies() == {"a-0"}
    for content in ("<<<<<<< HEAD\nexperiment,accuracy\na,1\n", "experiment\na,1\na,1,2\n", ""):
        (tmp_path / "docs/studies/damaged.csv").write_text(content)
        with pytest.raises(UserError, match=r"docs/studies/damaged\.csv is damaged \("):
            prune._in_studies()


def test_nothing_is_removed_while_an_experiment_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("all_runs", "connect"):
        monkeypatch.setattr(client, name, lambda: pytest.fail("asked MLflow"))
    copy = tmp_path / ".dvc/tmp/exps/abc"
    copy.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"], cwd=copy) as experiment:
        try:
            with pytest.raises(UserError, match="an experiment is running"):
                prune._remove([Revision("a", "c", "b")])
        finally:
            experiment.kill()


def test_damaged_metrics_of_an_experiment_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "read_text", lambda *_: "<<<<<<< HEAD")
    with pytest.raises(UserError, match=r"metrics/train\.json of relu is damaged \("):
        prune._accuracy(Revision("relu", "c", "b"))


@pytest.mark.parametrize("shared", [False, True])
def test_a_cache_that_other_checkouts_may_use_is_left_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shared: bool,
) -> None:
    root, calls = tmp_path / "lab", list[str]()

    def dvc(*arguments: str) -> str:
        calls.append(arguments[0])
        return f"{(tmp_path if shared else root) / 'cache'}\n"

    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setattr(pipeline, "dvc", dvc)
    pipeline.remove_experiments([])
    assert ("gc" in calls) is not shared
    assert ("other checkouts may need them" in capsys.readouterr().out) is shared


def test_the_experiment_of_a_champion_stays_also_if_its_run_was_trained_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = {"dvc.exp.name": "relu", "dvc.exp.baseline": "b", PARAMS: "digest"}
    run = SimpleNamespace(data=SimpleNamespace(tags=origin | {"logged.train": "other files"}))
    monkeypatch.setattr(pipeline, "experiments", lambda: [Revision("relu", "c", "b")])
    monkeypatch.setattr(prune, "_accuracy", lambda _: 0.5)
    monkeypatch.setattr(prune, "_registered", lambda: [run])
    monkeypatch.setattr(prune, "shows", lambda *_: False)
    for name, state in (("relu", "stays: its model is registered"), ("other", "goes")):
        found = origin | {"dvc.exp.name": name}
        monkeypatch.setattr(prune, "origin_of", lambda _, found=found: found)
        prune.prune([], 0, remove=False)
        assert state in capsys.readouterr().out


def test_the_best_of_each_data_set_stay(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = {"photos": 0.5, "worse-photos": 0.4, "digits": 0.99, "worse-digits": 0.98}
    images = dict.fromkeys(("photos", "worse-photos"), "/home/me/photos.zip")

    def params_of(revision: Revision) -> Params | None:
        if revision.name == "old":
            return None
        folder = images.get(revision.name)
        return changed({"data.name": "folder", "data.folder": folder} if folder else DIGITS)

    accuracy["old"] = 1
    found = [Revision(name, name, "b") for name in accuracy]
    monkeypatch.setattr(pipeline, "experiments", lambda: found)
    monkeypatch.setattr(pipeline, "params_of", params_of)
    monkeypatch.setattr(prune, "_accuracy", lambda revision: accuracy[revision.name])
    monkeypatch.setattr(prune, "_registered", list)
    prune.prune([], 1, remove=False)
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in ("photos", "digits", "old"):
        assert shown[name].endswith("stays: among the best 1")
    for name in ("worse-photos", "worse-digits"):
        assert shown[name].endswith("goes")
    assert " photos " in shown["worse-photos"]


def test_runs_of_another_experiment_of_that_name_stay(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, fork_server: ForkServer
) -> None:
    """Two people may use one server, one commit, and one name."""
    store = client_of(checkout)
    experiment = store.create_experiment("cifarlab", (checkout / "mlartifacts").as_uri())
    origin = {"dvc.exp.name": "relu", "dvc.exp.baseline": "b"}
    for digest in ("mine", "hers"):
        tags = origin | {client.KEY: digest, PARAMS: digest}
        store.create_run(experiment, run_name="relu", tags=tags)
    monkeypatch.setattr(sys, "executable", fork_server.python)
    monkeypatch.setattr(prune, "origin_of", lambda _: origin | {PARAMS: "mine"})
    monkeypatch.setattr(pipeline, "remove_experiments", lambda _: None)
    prune._remove([Revision("relu", "c", "b")])
    [left] = store.search_runs([experiment])
    assert left.data.tags[PARAMS] == "hers"


def test_dvc_keeps_everything_if_mlflow_refuses_to_delete_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(run_id: str) -> None:
        raise MlflowException("Permission denied")

    tags = {"dvc.exp.name": "a", "dvc.exp.baseline": "b"}
    info = SimpleNamespace(run_id="1", experiment_id="0")
    run = SimpleNamespace(data=SimpleNamespace(tags=tags), info=info, outputs=None)
    store = SimpleNamespace(delete_run=refuse, search_logged_models=lambda *_: [])
    monkeypatch.setattr(client, "all_runs", lambda: [run])
    monkeypatch.setattr(pipeline, "params_of", lambda _: None)
    monkeypatch.setattr(client, "connect", lambda: store)
    monkeypatch.setattr(pipeline, "remove_experiments", lambda _: pytest.fail("removed from DVC"))
    with pytest.raises(UserError, match=r"Permission denied.*nothing was removed from DVC"):
        prune._remove([Revision("a", "c", "b")])

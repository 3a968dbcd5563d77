"""What prune does when something is damaged. test_revisions.py removes real experiments."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.pipeline import Revision
from cifarlab.tracking import client, prune


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


def test_dvc_keeps_everything_if_mlflow_refuses_to_delete_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(run_id: str) -> None:
        raise MlflowException("Permission denied")

    tags = {"dvc.exp.name": "a", "dvc.exp.baseline": "b"}
    info = SimpleNamespace(run_id="1")
    run = SimpleNamespace(data=SimpleNamespace(tags=tags), info=info, outputs=None)
    monkeypatch.setattr(client, "all_runs", lambda: [run])
    monkeypatch.setattr(client, "connect", lambda: SimpleNamespace(delete_run=refuse))
    monkeypatch.setattr(pipeline, "remove_experiments", lambda _: pytest.fail("removed from DVC"))
    with pytest.raises(UserError, match=r"Permission denied.*nothing was removed from DVC"):
        prune._remove([Revision("a", "c", "b")])

"""What sync lists. test_revisions.py compares real experiments, commits and runs."""

from pathlib import Path

import pytest

from cifarlab import pipeline
from cifarlab.params.sections import Params
from cifarlab.pipeline import Revision
from cifarlab.tracking import sync
from cifarlab.tracking.run import track


def test_where_only_download_has_run_there_is_nothing_to_log(
    checkout: Path,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with track("train", params):
        pass
    (checkout / "dvc.lock").write_text("schema: '2.0'\nstages: {download: {cmd: x, outs: []}}\n")
    monkeypatch.setattr(pipeline, "experiments", list[Revision])
    monkeypatch.setattr(pipeline, "commits", list[Revision])
    sync.sync()
    [row] = capsys.readouterr().out.splitlines()[1:]  # the run belongs to nothing
    assert row.endswith("finished, but no experiment or commit has this run")

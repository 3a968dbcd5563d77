"""Experiments in clones of a small checkout: several at a time, failing, stopped, queued."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from dvc.config import Config

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.studies import clone, executors
from tests.conftest import REPO


@pytest.fixture
def project(small_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter the small project."""
    monkeypatch.chdir(small_project)
    return small_project


def value(name: str) -> bytes:
    """Return what an experiment at the present commit has written."""
    head = pipeline.git_commit()
    [found] = [e for e in pipeline.experiments() if (e.name, e.baseline) == (name, head)]
    return pipeline.read(Path("train.txt"), found.commit)


def run_one(name: str, changes: dict[str, object]) -> None:
    executors.run({name: changes}, 1, "", print)


def test_several_at_a_time_end_well_and_one_that_fails_is_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[str] = []
    changes = {"m-1": {"n": 10}, "broken": {"no-such-key": 1}, "m-2": {"n": 11}}
    with pytest.raises(UserError, match=r"^broken failed: .*broken\.log\)$"):
        executors.run(changes, 2, "", ended.append)
    assert sorted(ended) == ["m-1", "m-2"]
    assert [value(name) for name in ("m-1", "m-2")] == [b"n: 10\n", b"n: 11\n"]
    lines = capsys.readouterr().out.splitlines()
    assert "broken failed, " in "\n".join(lines)
    assert lines[2].endswith(", 0 left")
    assert not [*(project / ".dvc/tmp/clones").iterdir()]


def test_an_experiment_of_the_same_name_is_replaced_unless_the_new_one_fails(project: Path) -> None:
    run_one("n-2", {"n": 20})
    assert value("n-2") == b"n: 20\n"
    with pytest.raises(UserError, match=r"n-2 failed: .*n-2\.log"):
        run_one("n-2", {"no-such-key": 1})
    assert value("n-2") == b"n: 20\n"


def test_the_reason_of_a_failure_shows_no_password(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("https://me:secret@host does not answer")

    monkeypatch.setattr(executors.clone, "work", fail)
    with pytest.raises(UserError, match="host does not answer") as failed:
        run_one("n-3", {"n": 1})
    assert "secret" not in str(failed.value)


def test_changes_that_are_not_committed_are_part_of_an_experiment(project: Path) -> None:
    before = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(before.replace("cp params.yaml train.txt", "echo new >train.txt"))
    try:
        run_one("uncommitted", {"n": 30})
    finally:
        Path("dvc.yaml").write_text(before)
    assert value("uncommitted") == b"new\n"
    assert not pipeline.git("status", "--porcelain", "--untracked-files=no")


def test_code_that_git_does_not_know_is_named(project: Path) -> None:
    Path("src").mkdir()
    Path("src/new.py").write_text("")
    try:
        with pytest.raises(UserError, match=r"Git does not know src/new\.py, .*git add"):
            run_one("lacking", {"n": 30})
    finally:
        shutil.rmtree("src")


def test_settings_of_dvc_of_this_checkout_count_in_a_clone(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    settings = (
        "['remote \"there\"']\n    url = s3://b\n    token = a=b%\n[cache]\n    type = copy\n"
    )
    clone.configure(tmp_path, settings, "/a cache")
    written = (tmp_path / ".dvc/config.local").read_text()
    for line in ("['remote \"there\"']", "token = a=b%", "type = copy", 'dir = "/a cache"'):
        assert line in written


@pytest.mark.parametrize("path", ["/C#/lab", "/a, b", '/a "b" #', "/it's #1", "/{x} %s $y = z"])
def test_dvc_finds_a_cache_whose_path_has_any_character(tmp_path: Path, path: str) -> None:
    (tmp_path / ".dvc").mkdir()
    clone.configure(tmp_path, "", path)
    assert Config(str(tmp_path / ".dvc"))["cache"]["dir"] == path


WORKER = """
import sys
from cifarlab.studies import executors
executors.run({"long": {"n": 40}, "later": {"n": 41}}, 1, "", print)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_runs_ends_with_the_process_that_runs_it(project: Path, how: signal.Signals) -> None:
    before = Path("dvc.yaml").read_text()
    text = before.replace(
        "cp params.yaml train.txt", "echo $$ >train.txt; touch up; exec sleep 600"
    )
    Path("dvc.yaml").write_text(text)
    # A fork server would not pass a signal on to the whole group.
    env = os.environ | {"PYTHONPATH": str(REPO / "src"), "REAL_PROGRAMS": "1"}
    try:
        worker = subprocess.Popen([sys.executable, "-c", WORKER], env=env, start_new_session=True)
        clones = Path(".dvc/tmp/clones")
        wait_until(lambda: any(clones.glob("long-*/clone/up")))
        [started] = clones.glob("long-*/clone/train.txt")
        stage = psutil.Process(int(started.read_text()))
        os.kill(worker.pid, how)
        assert worker.wait(30) != 0
        wait_until(lambda: not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE)
        wait_until(lambda: not [*clones.iterdir()])
    finally:
        Path("dvc.yaml").write_text(before)
    assert "later" not in {found.name for found in pipeline.experiments()}


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)  # before it looks again


def test_ray_that_is_not_installed_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^Ray is not installed; `make cluster` installs it$"):
        executors.run({"a": {"n": 1}}, 1, "ray", print)

"""Folders that may not be written to, at every stage."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.project import Project

# Root may write everywhere, unless it gives this power up.
POWER = "-dac_override,-dac_read_search,-fowner"
POWERLESS = ("setpriv", f"--bounding-set={POWER}", f"--inh-caps={POWER}")


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Forbid to write to a file, or to a folder and all folders in it."""
    folders = [inner for inner in path.rglob("*") if inner.is_dir()]
    modes = {place: place.stat().st_mode for place in (path, *folders)}
    for place in modes:
        place.chmod(0o555)
    yield
    for place, mode in modes.items():
        place.chmod(mode)


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("setpriv"), reason="needs setpriv of util-linux"
)
def test_what_may_not_be_written_is_named_and_the_same_command_continues(finished: Project) -> None:
    powerless = POWERLESS if os.geteuid() == 0 else ()

    def repro() -> tuple[int, str]:
        # The children of the fork server have all powers.
        done = finished.run(*powerless, "dvc", "repro", check=False, REAL_PROGRAMS="1")
        assert "Traceback" not in done.stdout
        return done.returncode, done.stdout

    finished.edit("train", seed=5)
    with read_only(finished.folder / ".cache"):  # for checkpoints
        code, output = repro()
    assert code == 255
    assert f"error: Permission denied: {finished.folder}/.cache/" in output
    with read_only(finished.folder / "mlartifacts"):
        code, output = repro()
    assert code == 0
    assert "warning: MLflow did not receive everything from the " in output
    finished.run("python", "-m", "cifarlab.cli", "sync", PYTHONPATH="src")
    assert {run.info.status for run in finished.all_runs()} <= {"FINISHED", "KILLED"}
    assert len([run for run in finished.all_runs() if run.info.status == "FINISHED"]) == 2

"""What a stage says when it cannot run."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO

STAGES = ["download", "train", "evaluate", "plot"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("src", "stages"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPO / name, tmp_path / name)
    return tmp_path


def ends_in_a_sentence(python: str, folder: Path, stage: str) -> str:
    done = subprocess.run([python, "-m", f"stages.{stage}"], cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_parameter(folder: Path, stage: str) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["model"]["layer"] = 3
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    assert "did you mean model.layers?" in ends_in_a_sentence(sys.executable, folder, stage)


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_data_that_is_not_there(folder: Path, stage: str) -> None:
    assert "dvc repro" in ends_in_a_sentence(sys.executable, folder, stage)


def test_a_python_without_the_requirements(folder: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    assert "source .venv/bin/activate" in ends_in_a_sentence(str(tmp_path / "bare/bin/python"), folder, "train")


def test_no_network(folder: Path) -> None:
    """The sources of params.yaml, on ports of this machine where nobody listens."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["data"]["sources"] = ["http://127.0.0.1:9/a.tar.gz", "http://127.0.0.1:9/b.tar.gz"]
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    said = ends_in_a_sentence(sys.executable, folder, "download")
    assert "make demo" in said
    assert "data.sources" in said
    assert not (folder / "data").exists()

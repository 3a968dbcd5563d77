"""What the stages import: only what is installed on a GPU machine, and not what takes seconds."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPO

SCRIPT = """
import importlib, pkgutil, sys
for name in ("dvc", "mlflow", "pandas"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
for name in ("nn", "data", "evaluation", "training"):
    package = importlib.import_module(f"cifarlab.{name}")
    for module in pkgutil.iter_modules(package.__path__, f"cifarlab.{name}."):
        importlib.import_module(module.name)
        print(module.name)
assert "cifarlab.runtime" not in sys.modules
"""


FIGURES = """
import sys
import cifarlab.figures.run, cifarlab.tracking.run, stages.plot
assert "torch" not in sys.modules
"""
LOGGER = """
import sys
import stages, cifarlab.tracking.logger
from pathlib import Path
assert not {"numpy", "torch", "mlflow", "pandas"} & {*sys.modules}
assert len([*Path("/proc/self/task").iterdir()]) == 1
"""


@pytest.mark.parametrize("script", [FIGURES, LOGGER])
def test_a_stage_imports_no_more_than_it_needs(script: str) -> None:
    """Importing PyTorch takes seconds. A process with several threads should not fork a logger."""
    env = os.environ | {"PYTHONPATH": f"{REPO / 'src'}:{REPO}"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=REPO, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_training_works_without_dvc_mlflow_and_pandas() -> None:
    env = os.environ | {"PYTHONPATH": str(REPO / "src")}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    modules = {"nn.network", "data.dataset", "evaluation.metrics", "training.loop"}
    assert {f"cifarlab.{module}" for module in modules} <= set(done.stdout.splitlines())

"""What the stages import: only what is installed on a GPU machine, and nothing slow in vain."""

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


# Both take seconds, in every run of the pipeline.
SLOW = {
    "a training does not need the compiler": """
from torch import nn
from cifarlab.params.load import load_params
from cifarlab.runtime.device import set_up
from cifarlab.training.optimizers import make_optimizers
import sys, torch
params = load_params().train
set_up(params)
assert "torch._dynamo" not in sys.modules
for optimizer in make_optimizers(nn.Sequential(nn.Conv2d(3, 4, 3)), params, torch.float32):
    print(type(optimizer).__name__)
assert "torch._dynamo" not in sys.modules
""",
    "the figures do not need PyTorch": """
import sys
import cifarlab.figures.run, cifarlab.tracking.run, stages.plot
assert "torch" not in sys.modules
""",
}


@pytest.mark.parametrize("script", SLOW.values(), ids=SLOW)
def test_what_is_slow_to_import_is_left_out(script: str) -> None:
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

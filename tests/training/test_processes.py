"""One training in several processes: parts of each batch, one result, and an end together."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from cifarlab.errors import UserError
from cifarlab.runtime import processes
from cifarlab.training.batches import Batches
from cifarlab.training.ranks import LOST, Ranks
from tests.conftest import REPO, MakeTrain
from tests.support.forkserver import ForkServer
from tests.support.networks import coloured

STAND_IN = """
import os, signal
from contextlib import contextmanager
from pathlib import Path

class Logger:
    def __init__(self, stage, params):
        pass

    def log_epochs(self):
        if Path("die").exists():
            Path("die").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def run(self, conditions=None):
        yield
"""
OUTPUTS = ("models/network.safetensors", "plots/history.csv", "metrics/train.json")
SMALL = {
    "data": {"name": "digits", "validation": 0.5},
    "model": {"stem": "none", "layers": 2, "widths": [8, 16]},
    "train": {"epochs": 2, "batch_size": 64, "device": "cpu", "precision": "float32", "threads": 1},
}


class Folder:
    """A copy of the code without MLflow and with digits, to train in.

    Its `python`, in each process, is that of the fork server.
    """

    def __init__(self, path: Path, fork_server: ForkServer) -> None:
        self.path, kept = path, shutil.ignore_patterns("__pycache__")
        for name in ("src", "stages"):
            shutil.copytree(REPO / name, path / name, ignore=kept)
        for name in ("params.yaml", "dvc.yaml"):
            shutil.copy(REPO / name, path)
        (path / "src/cifarlab/tracking/logger.py").write_text(STAND_IN)
        for section, values in SMALL.items():
            self.edit(section, **values)
        foreign = ("DVC", "PYTHON", "TORCHELASTIC")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.env["PATH"] = f"{fork_server.folder}{os.pathsep}{os.environ['PATH']}"
        # torchrun starts `PYTHON_EXEC -u -m stages.train`; the fork server knows no -u.
        (path / "without-u").write_text('#!/bin/sh\nshift\nexec python "$@"\n')
        (path / "without-u").chmod(0o755)
        self.env["PYTHON_EXEC"] = str(path / "without-u")
        assert self.run("download").returncode == 0

    def edit(self, section: str, **values: Any) -> None:
        """Change params.yaml."""
        content = yaml.safe_load((self.path / "params.yaml").read_text("utf-8"))
        content[section] |= values
        (self.path / "params.yaml").write_text(yaml.safe_dump(content), "utf-8")

    def run(self, stage: str = "train") -> subprocess.CompletedProcess[str]:
        """Run a stage."""
        return subprocess.run(
            ["python", "-m", f"stages.{stage}"], cwd=self.path, env=self.env, timeout=200,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def trained(self, **values: Any) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
        """Train from the start with other parameters; return history and weights."""
        self.edit("train", **values)
        done = self.run()
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        weights = load_file(self.path / "models/network.safetensors")
        return pd.read_csv(self.path / "plots/history.csv"), weights

    def outputs(self) -> list[bytes]:
        """Return what the stage has written."""
        return [(self.path / name).read_bytes() for name in OUTPUTS]


@pytest.fixture
def folder(tmp_path: Path, fork_server: ForkServer) -> Folder:
    return Folder(tmp_path, fork_server)


# The data


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_parts_of_all_processes_are_the_batches_of_one(
    train_params: MakeTrain, size: int
) -> None:
    params = train_params(translate=1, flip="random", cutmix=0.5, processes=size)
    data = coloured(50)
    alone = Batches(data, params, 3, Ranks())
    parts = [Batches(data, params, 3, Ranks(rank, size)) for rank in range(size)]
    for epoch in (1, 2):
        alone.begin(epoch)
        for part in parts:
            part.begin(epoch)
            assert torch.equal(part.boxes, alone.boxes)
        assert torch.equal(torch.cat([part.order for part in parts], 1), alone.order)
        for i, drawn in enumerate(alone.draws or ()):
            assert torch.equal(torch.cat([(part.draws or ())[i] for part in parts], 1), drawn)
        assert torch.equal(torch.cat([part.next()[2] for part in parts]), alone.next()[2])


def test_dropout_draws_in_each_process_for_itself(train_params: MakeTrain) -> None:
    drawn = []
    for rank in (0, 1):
        Batches(coloured(50), train_params(), 3, Ranks(rank, 2)).begin(1)
        drawn.append(torch.rand(4))
    assert not torch.equal(*drawn)


# The training


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_train_like_one(folder: Folder, count: int) -> None:
    """Without batch normalisation they differ by rounding only, although 64 / 3 is not whole."""
    folder.edit("model", norm="none", init="kaiming", logit_scale=1)
    recipe = {"optimizer": "muon", "lr": 0.01, "muon_lr": 0.02, "norm_bias_lr": 1}
    expected, weights = folder.trained(processes=1, **recipe)
    assert expected["train_loss"][1] < 0.98 * expected["train_loss"][0]
    history, others = folder.trained(processes=count)
    np.testing.assert_allclose(history, expected, rtol=1e-3, atol=2e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_training_which_can_continue(folder: Folder) -> None:
    """The same two processes write the same bytes again, killed or not."""
    folder.trained(processes=2)
    expected = folder.outputs()
    shutil.rmtree(folder.path / ".cache/checkpoints")
    (folder.path / "die").touch()
    died = folder.run()
    sentence = "error: process 1 of 2 ended with SIGKILL, and with it the training"
    assert died.returncode == 1
    assert died.stderr == f"{sentence}; type the same command again and it continues\n"
    resumed = folder.run()
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing after epoch 1 of 2" in resumed.stdout
    assert folder.outputs() == expected


@pytest.mark.slow
def test_an_error_in_every_process_is_one_sentence(folder: Folder) -> None:
    folder.edit("train", processes=2, optimizer="sgd", lr=1e6, momentum=0.99)
    folder.edit("model", norm="none")
    failed = folder.run()
    assert failed.returncode == 1
    assert re.fullmatch("error: the training diverged in epoch 1.*\n", failed.stderr)


# What went wrong


@pytest.fixture
def failures(tmp_path: Path) -> Any:
    """Return a function that makes the failures of torchrun: exit codes and sentences."""

    def make(*ends: tuple[int, str]) -> list[Any]:
        found = []
        for rank, (code, said) in enumerate(ends):
            file = tmp_path / (f"{rank}" if said else "none")
            if said:
                file.touch()
            found.append(SimpleNamespace(
                local_rank=rank, exitcode=code, message=said, error_file=str(file)
            ))  # fmt: skip
        return found

    return make


def test_the_sentence_of_the_process_that_failed_first_is_kept(failures: Any) -> None:
    found = failures((1, LOST), (1, "no memory"), (-signal.SIGKILL, ""))
    assert processes.explain(found, 3) == "no memory"
    killed = processes.explain(failures((1, LOST), (-signal.SIGSEGV, "")), 2)
    assert killed.startswith("process 2 of 2 ended with SIGSEGV, and with it the training")
    crashed = processes.explain(failures((1, ""), (-signal.SIGKILL, "")), 2)
    assert crashed.startswith("process 1 of 2 ended with code 1")


def test_too_small_a_batch_is_refused(make_params: Any) -> None:
    with pytest.raises(UserError, match=r"train\.processes = 5: leaves .* = 9 for each; lower it"):
        make_params({"train.processes": 5, "train.batch_size": 9})


# Signals


def running(folder: Folder) -> list[psutil.Process]:
    """Return the processes that work in the folder."""
    found = psutil.process_iter(["cwd"])
    return [process for process in found if process.info["cwd"] == str(folder.path)]


def rank_of(process: psutil.Process) -> str:
    """Return the number that torchrun has given a process; empty for other processes."""
    with contextlib.suppress(psutil.Error):
        return str(process.environ().get("RANK", ""))
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "number", "output"),
    [
        ("1", signal.SIGKILL, "error: process 2 of 2 ended with SIGKILL, and with it the training"),
        ("torchrun", signal.SIGINT, "interrupted; type the same command again and it continues"),
        ("torchrun", signal.SIGTERM, "interrupted; type the same command again and it continues"),
        ("torchrun", signal.SIGKILL, ""),
    ],
)
def test_no_process_stays(folder: Folder, target: str, number: int, output: str) -> None:
    folder.edit("train", processes=2, epochs=10_000)
    # A process of the fork server is no child of torchrun, which the kernel could end with it.
    real = {"REAL_PROGRAMS": "1"} if not output else {}
    command, pipe = ["python", "-m", "stages.train"], subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder.path, env=folder.env | real, text=True, stdout=pipe,
        stderr=subprocess.STDOUT, start_new_session=True,
    ) as popen:  # fmt: skip
        assert popen.stdout
        assert any("epoch " in line for line in popen.stdout)
        ranks = {rank_of(process): process for process in running(folder)}
        (ranks.get(target) or popen).send_signal(number)
        lines = [line for line in popen.stdout if not line.startswith("epoch ")]
        assert popen.wait(60) == (1 if output else -signal.SIGKILL)
    assert len(lines) == bool(output), lines
    assert "".join(lines).startswith(output)
    _, alive = psutil.wait_procs(running(folder), 30)
    assert not alive

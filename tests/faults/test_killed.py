"""A killed training continues and ends with the same bytes as one that was never killed."""

import hashlib
import io
import os
import random
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cifarlab.errors import UserError
from cifarlab.runtime.checkpoints import KEPT_DAYS, Checkpoint, path_of
from cifarlab.training.loop import fit
from tests.conftest import REPO, MakeTrain
from tests.support.forkserver import ForkServer
from tests.support.networks import colour_network, coloured
from tests.support.project import Command, Project

OUTPUTS = ("models/network.safetensors", "plots/history.csv", "metrics/train.json")
CONDITIONS = {"threads": "1"}


def train(project: Project, **env: str) -> Command:
    """Start the train stage."""
    return project.start("python", "-m", "stages.train", **env)


def without_outputs(project: Project) -> None:
    """Delete the outputs, as DVC does before it starts a stage."""
    for name in OUTPUTS:
        (project.folder / name).unlink(missing_ok=True)


def digests(project: Project) -> dict[str, str]:
    """Return the SHA-256 of every output of the train stage."""
    return {
        name: hashlib.sha256((project.folder / name).read_bytes()).hexdigest() for name in OUTPUTS
    }


def checkpoints(project: Project) -> list[Path]:
    return list((project.folder / ".cache/checkpoints").glob("*.pt"))


def forget(project: Project) -> None:
    """Delete the checkpoints, as the evaluate stage does first."""
    for path in checkpoints(project):
        path.unlink()


@pytest.fixture
def prepared(project: Project) -> Project:
    """The checkout with its data and without a training, and with enough epochs to be killed in."""
    project.run("python", "-m", "stages.download")
    project.edit("train", epochs=6)
    project.edit("tracking", system_metrics=False, log_model=False)
    return project


MUON = {
    "model": {"dropout": 0.1},
    "train": {"flip": "alternating", "cutmix": 0.5, "batch_size": 16},
}
ADAM = {
    "model": {"norm_momentum": 0.1},
    "train": {"optimizer": "adam", "lr": 0.001, "schedule": "one_cycle", "batch_size": 16},
}
SGD = {
    "data": {"validation": 0},
    "train": {"optimizer": "sgd", "flip": "random", "translate": 2, "batch_size": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "kills", "changes"),
    [
        (1, 7, MUON),
        (2, 7, ADAM),
        (3, 6, SGD),
    ],
)
def test_killed_at_random_epochs_and_batches(
    prepared: Project, seed: int, kills: int, changes: dict[str, dict[str, object]]
) -> None:
    for section, values in changes.items():
        prepared.edit(section, **values)
    started = time.monotonic()
    never_killed = train(prepared, DVC_EXP_NAME=f"never-{seed}")
    assert never_killed.wait_for("epoch 1/6")
    first_epoch = time.monotonic()
    assert never_killed.end() == 0, never_killed.output
    an_epoch = (time.monotonic() - first_epoch) / 6
    expected = digests(prepared)
    forget(prepared)

    chance, done, attempt = random.Random(seed), 0, 0
    print(
        f"seed {seed}: an epoch takes about {an_epoch:.2f} s, "
        f"the whole stage {time.monotonic() - started:.1f} s"
    )
    while True:
        # Each attempt has another name, like `dvc exp run` without --name.
        attempt += 1
        without_outputs(prepared)
        stage = train(prepared, DVC_EXP_NAME=f"try-{seed}-{attempt}")
        had = len(checkpoints(prepared))
        if done == kills:
            break
        # Kill it before the first epoch, in or between epochs, or while it writes the outputs.
        if not chance.random() < 0.1 and stage.wait_for("epoch " if not had else "continuing"):
            threading.Event().wait(chance.random() * 1.3 * an_epoch)
        if stage.end(signal.SIGKILL) == -signal.SIGKILL:
            done += 1
            print(
                f"kill {done}: {len(checkpoints(prepared))} checkpoint, "
                f"after {stage.output.splitlines()[-1:]}"
            )
        else:  # it ended before the signal
            assert digests(prepared) == expected
            forget(prepared)
    assert stage.end() == 0, stage.output
    assert digests(prepared) == expected
    forget(prepared)
    # A killed attempt and its continuation share a run.
    client, runs = prepared.client(), prepared.runs()
    tries = [run for name, run in runs.items() if name.startswith(f"try-{seed}-")]
    assert {run.info.status for run in tries} == {"FINISHED"}
    for run in tries:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/train")]
        assert sorted(steps) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_temporary_copy_that_was_killed_continues_in_the_workspace(prepared: Project) -> None:
    prepared.edit("train", epochs=30)
    copy = prepared.start(
        "dvc", "exp", "run", "--temp", "-S", "train.seed=7", "-S", "train.batch_size=16"
    )
    assert copy.wait_for("epoch 2/30"), copy.output
    prepared.wait_for_a_run()
    copy.end(signal.SIGKILL)
    [killed] = [run for run in prepared.runs().values() if run.info.status == "RUNNING"]
    assert len(checkpoints(prepared)) == 1
    output = prepared.dvc(
        "exp", "run", "--name", "typed-again", "-S", "train.seed=7", "-S", "train.batch_size=16"
    )
    assert "continuing after epoch" in output
    run = prepared.runs()["typed-again"]
    assert run.info.run_id == killed.info.run_id
    assert run.info.status == "FINISHED"
    assert not checkpoints(prepared)


def test_ctrl_c_ends_at_once_and_says_how_to_continue(prepared: Project) -> None:
    prepared.edit("train", batch_size=16, seed=11, epochs=100)
    prepared.edit("tracking", system_metrics=True)
    took = []
    for attempt in range(2):
        stage = train(prepared, DVC_EXP_NAME="interrupted")
        assert stage.wait_for(f"epoch {2 * attempt + 2}/100"), stage.output
        pressed = time.monotonic()
        assert stage.end(signal.SIGINT) == 1
        took.append(time.monotonic() - pressed)
        assert (
            stage.output.splitlines()[-1]
            == "interrupted; type the same command again and it continues"
        )
        assert "Traceback" not in stage.output
        assert prepared.runs()["interrupted"].info.status == "KILLED"
    assert re.search(r"continuing after epoch \d", stage.output)
    assert min(took) < 2, took


@pytest.mark.slow
def test_a_closed_terminal_ends_the_run_and_loses_nothing(finished: Project) -> None:
    """The kernel sends SIGHUP to the programs of a terminal that is closed."""
    command = ("dvc", "exp", "run", "--temp", "--name", "closed", "-S", "train.epochs=40")
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        command,
        cwd=finished.folder,
        env=finished.env,
        preexec_fn=lambda: os.login_tty(inside),  # noqa: PLW1509, no thread runs here
    )
    os.close(inside)
    output = b""
    while b"epoch 3/40" not in output:
        output += os.read(terminal, 1000)
    os.close(terminal)
    process.wait(60)
    deadline = time.monotonic() + 60
    while finished.runs()["closed"].info.status != "KILLED":
        assert time.monotonic() < deadline
        time.sleep(0.2)  # before it looks again
    assert "continuing after epoch" in finished.dvc(*command[1:])
    assert finished.runs()["closed"].info.status == "FINISHED"


@pytest.mark.slow
def test_the_same_training_twice_at_the_same_time(prepared: Project) -> None:
    prepared.edit("train", batch_size=16, seed=12, epochs=5)
    first = train(prepared, DVC_EXP_NAME="first")
    assert first.wait_for("epoch 1/5"), first.output
    second = train(prepared, DVC_EXP_NAME="second")
    assert second.wait_for("another process"), second.output
    assert first.end() == 0
    one = digests(prepared)
    assert second.end() == 0
    # Both write the same history file, so it may have been half overwritten when `one` was read.
    assert {k: v for k, v in digests(prepared).items() if "history" not in k} == {
        k: v for k, v in one.items() if "history" not in k
    }
    assert {"first", "second"} <= prepared.runs().keys()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The main checkout, as an empty folder."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def test_a_checkpoint_returns_what_was_saved(here: Path) -> None:
    saved = {"network": {"w": torch.randn(64)}, "history": [(1, 0.1, None)]}
    Checkpoint("k", CONDITIONS).save(saved)
    loaded = Checkpoint("k", CONDITIONS).load()
    assert loaded is not None
    assert torch.equal(loaded["network"]["w"], saved["network"]["w"])
    assert loaded["history"] == saved["history"]
    path_of("k").unlink()
    assert Checkpoint("k", CONDITIONS).load() is None


def test_a_damaged_checkpoint_is_refused_wherever_the_damage_is(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint("k", CONDITIONS)
    state = {"network": {"w": torch.arange(512.0)}, "history": []}
    checkpoint.save(state)
    whole = checkpoint.path.read_bytes()
    for place in range(0, len(whole), 97):
        checkpoint.path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
        )
        assert checkpoint.load() is None
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        checkpoint.path.write_bytes(whole[:size])
        assert checkpoint.load() is None
    assert "training starts over" in capsys.readouterr().out


def test_a_hostile_checkpoint_runs_nothing_and_training_starts_over(
    here: Path, train_params: MakeTrain, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {here / 'executed'}",)

    hostile, checkpoint = io.BytesIO(), Checkpoint("k", CONDITIONS)
    torch.save({"conditions": checkpoint.conditions, "state": Hostile()}, hostile)
    data = hostile.getvalue()
    checkpoint.path.write_bytes(hashlib.sha256(data).digest() + data)
    network, params = colour_network(content["model"]), train_params(epochs=2)
    history = fit(network, params, coloured(48), None, lambda _: None, checkpoint=checkpoint)
    assert [row["epoch"] for row in history] == [1, 2]
    output = capsys.readouterr().out
    assert "cannot be used" in output
    assert "starts over" in output
    assert not (here / "executed").exists()


@pytest.mark.parametrize(
    ("key", "conditions", "named"),
    [
        ("other", CONDITIONS, "key"),
        ("k", {"threads": "2"}, "threads 1, now it is 2"),
        ("k", CONDITIONS | {"environment": "A=1"}, "environment none, now it is A=1"),
        ("k", {}, "threads 1, now it is none"),
    ],
)
def test_a_checkpoint_of_other_conditions_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], key: str, conditions: dict[str, str], named: str
) -> None:
    made = Checkpoint("k", CONDITIONS)
    made.save({"history": []})
    other = Checkpoint(key, conditions)
    made.path.rename(other.path)
    assert other.load() is None
    assert named in capsys.readouterr().out


def test_old_checkpoints_are_pruned(here: Path) -> None:
    old, young = "0" * 64, "1" * 64
    for key, days in ((old, KEPT_DAYS + 1), (young, KEPT_DAYS - 1), ("mine", KEPT_DAYS + 1)):
        checkpoint = Checkpoint(key, CONDITIONS)
        checkpoint.save({"history": []})
        made = time.time() - days * 86400
        os.utime(checkpoint.path, (made, made))
    (checkpoint.path.parent / "folder").mkdir()
    os.utime(checkpoint.path.parent / "folder", (made, made))
    Checkpoint("another", CONDITIONS)
    # The folder may be shared: what is not a checkpoint of ours stays.
    assert {path.stem for path in here.glob(".cache/checkpoints/*.pt")} == {young, "mine"}


def test_a_relative_folder_of_checkpoints_is_in_the_main_checkout(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("CIFARLAB_CHECKPOINTS", "shared")
    monkeypatch.chdir(tmp_path_factory.mktemp("copy"))
    assert path_of("k") == here / "shared/checkpoints/k.pt"


@pytest.mark.usefixtures("here")
def test_a_checkpoint_that_another_process_removes_meanwhile_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / f"{'0' * 64}.pt"]))
    assert Checkpoint("another", CONDITIONS).load() is None


def test_divergence_keeps_the_last_good_checkpoint(
    here: Path, train_params: MakeTrain, content: dict[str, Any]
) -> None:
    network, checkpoint = colour_network(content["model"]), Checkpoint("k", CONDITIONS)

    def break_after_two(history: list[object]) -> None:
        if len(history) == 2:
            next(network.parameters()).data.fill_(float("nan"))

    with pytest.raises(UserError, match="diverged in epoch 3"):
        fit(
            network,
            train_params(epochs=5),
            coloured(48),
            None,
            break_after_two,
            checkpoint=checkpoint,
        )
    state = checkpoint.load()
    assert state is not None
    assert len(state["history"]) == 2
    assert all(bool(tensor.isfinite().all()) for tensor in state["parts"][0].values())


def test_two_trainings_take_turns_on_a_gpu(tmp_path: Path, fork_server: ForkServer) -> None:
    code = (
        "import sys; from pathlib import Path; import torch; "
        "from cifarlab.runtime.device import take_gpu; "
        "torch.cuda.set_device = lambda index: print('took', index, flush=True); "
        "lock = take_gpu(Path(sys.argv[1]), int(sys.argv[2])); sys.stdin.read()"
    )
    env = os.environ | {"PYTHONPATH": str(REPO / "src")}

    def start(count: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [fork_server.python, "-c", code, str(tmp_path), str(count)],
            env=env,
            stdin=-1,
            stdout=-1,
            text=True,
        )

    first = start(1)
    assert first.stdout is not None
    assert first.stdout.readline() == "took 0\n"
    with first, start(1) as waiting, start(2) as free:
        assert free.stdout is not None
        assert waiting.stdout is not None
        assert free.stdout.readline() == "took 1\n"
        assert "waits for its turn" in waiting.stdout.readline()
        assert waiting.poll() is None
        first.kill()
        assert waiting.stdout.readline() == "took 0\n"
        waiting.kill()
        free.kill()

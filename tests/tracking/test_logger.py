"""The process beside a stage that logs it."""

import contextlib
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import REPO
from tests.support.forkserver import ForkServer
from tests.tracking.conftest import points, runs_in

START = """
import os, signal, sys, time
from cifarlab.params.load import load_params
from cifarlab.tracking.logger import Logger
logger = Logger("train", load_params())
print(logger.process, flush=True)
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(
    checkout: Path,
    fork_server: ForkServer,
    content: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Return a function that runs a stage of its own, which has a logger."""
    content["tracking"] |= {"system_metrics": False, "log_model": False}
    Path("params.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setenv("PYTHONPATH", str(REPO / "src"))

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [fork_server.python, "-c", START + code]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)

    return run


@pytest.mark.parametrize(
    ("error", "status"),
    [("", "FINISHED"), ("KeyboardInterrupt", "KILLED"), ("SystemExit(3)", "FAILED")],
)
def test_the_run_says_how_the_stage_ended(
    checkout: Path, run: Run, error: str, status: str
) -> None:
    done = run(f"with logger.run():\n    {'raise ' + error if error else 'pass'}")
    assert (done.returncode == 0) == (not error)
    assert "warning" not in done.stderr
    [found] = runs_in(checkout)
    assert found.info.status == status
    assert ("logged.train" in found.data.tags) == (not error)
    assert not psutil.pid_exists(int(done.stdout))


def test_a_stage_that_fails_before_its_run_logs_nothing(checkout: Path, run: Run) -> None:
    before = Path("mlflow.db").read_bytes()
    done = run("sys.exit('no data')")
    assert done.stderr == "no data\n"
    assert Path("mlflow.db").read_bytes() == before


def test_an_interrupted_stage_keeps_the_epochs_that_have_ended(checkout: Path, run: Run) -> None:
    run("with logger.run():\n    logger.log_epochs()\n    raise KeyboardInterrupt")
    [found] = runs_in(checkout)
    assert found.info.status == "KILLED"
    assert [step for step, *_ in points(checkout, "loss/train")] == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_of_the_terminal_does_not_end_it(
    checkout: Path, run: Run, number: signal.Signals
) -> None:
    code = f"""
def ignored():
    [line] = [l for l in open(f"/proc/{{logger.process}}/status") if l.startswith("SigIgn")]
    return int(line.split()[1], 16) >> {number.value - 1} & 1

with logger.run():
    while not ignored():
        time.sleep(0.01)
    os.kill(logger.process, {number.value})
"""
    assert run(code).stderr == ""
    [found] = runs_in(checkout)
    assert found.info.status == "FINISHED"


def test_the_load_of_the_machine_is_measured(
    checkout: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    content = yaml.safe_load(Path("params.yaml").read_text())
    content["tracking"]["system_metrics"] = True
    Path("params.yaml").write_text(yaml.safe_dump(content))
    code = """
import sqlite3
with logger.run(), sqlite3.connect("mlflow.db") as store:
    while not store.execute("SELECT 1 FROM metrics WHERE key LIKE 'system/cpu%'").fetchall():
        time.sleep(0.05)
"""
    assert run(code).returncode == 0


def test_it_ends_with_a_stage_that_is_killed(checkout: Path, run: Run) -> None:
    done = run("with logger.run():\n    os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(60)


def test_it_ends_with_the_stage_also_in_a_call_to_a_silent_server(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1000")
        code = "import psutil\nwith logger.run():\n"
        code += "    while not psutil.Process(logger.process).net_connections():\n"
        code += "        time.sleep(0.05)\n    os.kill(os.getpid(), signal.SIGKILL)"
        done = run(code)
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int(done.stdout)).wait(60)


def test_if_it_dies_the_stage_goes_on_with_one_warning(checkout: Path, run: Run) -> None:
    code = "with logger.run():\n    os.kill(logger.process, signal.SIGKILL)\n"
    code += "    for _ in range(9):\n        logger.log_epochs()\nprint('done')"
    done = run(code)
    assert done.returncode == 0
    assert done.stdout.endswith("done\n")
    assert done.stderr.startswith("warning: MLflow did not receive everything from the train stage")
    assert done.stderr.count("\n") == 1


def test_the_stage_does_not_wait_for_a_server(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1000")
        code = "with logger.run():\n    for _ in range(1000):\n        logger.log_epochs()\n"
        code += "    print('worked')\n    raise KeyboardInterrupt"
        done = run(code)
    assert "worked" in done.stdout
    assert not psutil.pid_exists(int(done.stdout.split()[0]))


def test_a_stage_ends_although_the_process_reads_nothing(run: Run) -> None:
    code = "with logger.run():\n    os.kill(logger.process, signal.SIGSTOP)\n"
    code += "    for _ in range(10_000):\n        logger.log_epochs()\n"
    done = run(f"{code}    print('worked')\n    raise KeyboardInterrupt")
    assert "worked" in done.stdout
    assert not psutil.pid_exists(int(done.stdout.split()[0]))


def test_the_network_is_handed_over(checkout: Path, run: Run) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text())
    content["tracking"]["log_model"] = True
    Path("params.yaml").write_text(yaml.safe_dump(content))
    code = """
from pathlib import Path
from cifarlab.nn.weights import load
logger = Logger("evaluate", load_params())
with logger.run():
    logger.log_model(load(Path("models/network.safetensors")))
    logger.graph.write_bytes(logger.graph.read_bytes() + b"handed over")
print(logger.graph.exists())
"""
    done = run(code)
    assert (done.stderr, done.stdout.split()[-1]) == ("", "False")
    [graph] = checkout.glob("mlartifacts/**/model.pt2")
    assert graph.read_bytes().endswith(b"handed over")


def test_an_address_that_keeps_nothing_is_refused_before_the_stage_works(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite://")
    done = run("print('worked')")
    assert done.returncode == 1
    assert "MLFLOW_TRACKING_URI=sqlite:// names neither" in done.stderr
    assert not done.stdout

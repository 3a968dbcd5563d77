"""`python` and `dvc` of the fork server behave like the real programs."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.forkserver import ForkServer

SLEEPER = (
    "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); "
    "print(p.pid, flush=True); p.wait()"
)


@pytest.fixture
def env(fork_server: ForkServer) -> dict[str, str]:
    return os.environ | {"PATH": f"{fork_server.folder}:{os.environ['PATH']}", "PYTHONPATH": ""}


def start(code: str, env: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["python", "-c", code], env=env, text=True, stdout=subprocess.PIPE, start_new_session=True
    )


def wait_for_end(pid: int) -> None:
    """Wait until a process has ended."""
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)  # before it looks again


@pytest.mark.parametrize(
    "code",
    [
        "",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('no')",
        "1 / 0",
        "import os; os.abort()",
        "raise KeyboardInterrupt",
    ],
)
def test_a_command_ends_like_with_the_real_python(env: dict[str, str], code: str) -> None:
    ours, real = (
        subprocess.run(
            [python, "-c", f"print('a')\n{code}"],
            env=env | {"PYTHONUNBUFFERED": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        for python in ("python", sys.executable)
    )
    assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout)
    assert ours.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_a_command_has_the_environment_limits_and_folder_of_its_parent(
    env: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "import json, os, resource, sys; "
        "print(json.dumps([sys.argv, sys.path, os.getcwd(), dict(os.environ), os.umask(0), "
        "resource.getrlimit(resource.RLIMIT_FSIZE), __name__]))"
    )
    (tmp_path / "script.py").write_text(code)
    (tmp_path / "with/in").mkdir(parents=True)
    for arguments in (["-c", code, "x"], ["-m", "script", "x"], ["script.py", "x"]):
        shell = ["sh", "-c", 'umask 027; ulimit -f 1000; "$@"', "sh"]
        ours, real = (
            subprocess.run(
                [*shell, python, *arguments],
                cwd=tmp_path,
                env=env | {"PYTHONPATH": "with/in"},
                capture_output=True,
                text=True,
                check=True,
            )
            for python in ("python", sys.executable)
        )
        assert ours.stdout == real.stdout
    assert "torch" in start("import sys; print(*sys.modules)", env).communicate()[0].split()


def test_a_variable_starts_a_new_interpreter(env: dict[str, str]) -> None:
    assert (
        "torch"
        not in start("import sys; print(*sys.modules)", env | {"REAL_PROGRAMS": "1"})
        .communicate()[0]
        .split()
    )


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_command(env: dict[str, str], sent: signal.Signals) -> None:
    code = (
        f"import signal, sys; signal.signal({sent}, lambda *_: sys.exit(7)); "
        "print('ready', flush=True); signal.pause()"
    )
    with start(code, env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        assert process.wait(60) == 7
    with start(
        code.replace("sys.exit(7)", "1").replace(f"signal.signal({sent}, ", "id("), env
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(sent)
        assert process.wait(60) == -sent


def test_killing_a_program_kills_its_child_and_grandchild(env: dict[str, str]) -> None:
    nested = f"import subprocess; subprocess.run(['python', '-c', {SLEEPER!r}])"
    for code in (SLEEPER, nested):
        with start(code, env) as process:
            assert process.stdout is not None
            sleeper = int(process.stdout.readline())
            process.kill()
            assert process.wait(60) == -signal.SIGKILL
            wait_for_end(sleeper)


def test_a_process_that_left_the_group_survives(env: dict[str, str]) -> None:
    with start(SLEEPER.replace("'600']", "'600'], start_new_session=True"), env) as process:
        assert process.stdout is not None
        sleeper = int(process.stdout.readline())
        process.kill()
        process.wait(60)
        assert psutil.Process(sleeper).is_running()
        os.kill(sleeper, signal.SIGKILL)


def test_children_are_listed_with_their_own_command_lines(env: dict[str, str]) -> None:
    code = "import time; print(__import__('os').getpid(), flush=True); time.sleep(600)"
    with start(code, env) as process:
        assert process.stdout is not None
        assert psutil.Process(int(process.stdout.readline())).cmdline()[:2] == ["python", "-c"]
        process.kill()


def test_the_end_of_the_server_kills_its_children(tmp_path: Path) -> None:
    server = ForkServer(tmp_path / "another", modules=())
    with start(
        SLEEPER.replace("p.wait()", "print(__import__('os').getpid(), flush=True); p.wait()"),
        os.environ | {"PATH": f"{server.folder}:{os.environ['PATH']}"},
    ) as process:
        assert process.stdout is not None
        sleeper, child = int(process.stdout.readline()), int(process.stdout.readline())
        server.close()
        wait_for_end(child)
        assert process.wait(60) == -signal.SIGKILL
        os.kill(sleeper, signal.SIGKILL)


def test_python_may_lie_in_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "a $(b) 'c\" d/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    server = ForkServer(tmp_path, [])
    code = "import os, sys; print(os.getppid(), sys.argv)"
    command = [server.python, "-c", code, "a b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert server.process
    assert done.stdout == f"{server.process.pid} ['-c', 'a b']\n", done.stderr
    server.close()

"""Run `python` and `dvc` without their slow imports.

A server imports the installed packages once and forks a child for each command. The child imports
the code of the project itself, and has its own environment and working folder. `ForkServer` starts
the server and makes a folder with `python`, `python3` and `dvc` for PATH. These behave like the
real programs:

- exit code, death by a signal, standard files, umask, limits and CPU affinity are passed on
- signals are forwarded; those that a terminal sends go to the whole process group of the child
- when the program dies, also by SIGKILL, the server kills the process group of the child, but not
  processes that have left the group
- the real program runs if the environment has a variable of BARE, or if there is no server

Differences that remain: the parent of the child is the server, NumPy's BLAS has one thread, and all
children have the same hash seed. On other systems than Linux the real programs run.
"""

import atexit
import builtins
import contextlib
import ctypes
import gc
import importlib
import logging
import marshal
import os
import resource
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

# A command with one of these variables needs a new interpreter.
BARE = {
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_CBWR",
    "LD_PRELOAD",
    "PYTHONHASHSEED",
    "PYTHONWARNINGS",
    "PYTHONMALLOC",
    "PYTHONIOENCODING",
    "PYTHONUTF8",
    "PYTHONOPTIMIZE",
    "PYTHONSAFEPATH",
    "MATPLOTLIBRC",
    "REAL_PROGRAMS",  # for tests that look at the tree of processes, or need new hash seeds
}
TERMINAL_SIGNALS = {signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
MODULES = [
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "mlflow",
    "mlflow.data",
    "mlflow.pyfunc",
    "mlflow.pytorch",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.system_metrics.system_metrics_monitor",
    "pandas",
    "PIL.Image",
    "pooch",
    "psutil",
    "pydantic",
    "safetensors.torch",
    "scipy.stats",
    "seaborn",
    "sklearn.metrics",
    "statsmodels.api",
    "torch",
    "torch.export",
    "torch._dynamo",
    "yaml",
    "click",
    "filelock",
    "optuna",
    "dvc.cli",
    "dvc.cli.parser",
    "dvc.repo",
    "dvc.api",
    "dvc.repo.experiments.queue.celery",
    "dvc.repo.experiments.queue.tempdir",
    "dvc.repo.experiments.queue.workspace",
    "dvc_render",
    "celery.worker",
    "dvc_task.worker.temporary",
    "tabulate",
]


class ForkServer:
    """A running server. Put `folder` at the start of PATH; `python` is the path of its Python."""

    def __init__(self, folder: Path, modules: Sequence[str] = MODULES) -> None:
        self.folder = folder / "bin"
        self.modules = modules
        self.python = str(self.folder / "python")
        self.process: subprocess.Popen[bytes] | None = None
        self.folder.mkdir(parents=True)
        # The path of a Unix socket has at most 107 bytes.
        self.socket = Path(tempfile.mkdtemp(prefix="fork-")) / "socket"
        real = Path(sys.executable).parent
        values = f"SOCKET = {str(self.socket)!r}\nREAL = {str(real)!r}\nBARE = {BARE!r}\n"
        program = Path(__file__).with_name("shim.py").read_text("utf-8")
        # The kernel would cut the path of an interpreter at a space. So sh reads the first line and
        # starts Python, which takes the first two lines for a string.
        start = f"#!/bin/sh\n'''exec' {shlex.quote(sys.executable)} -IS \"$0\" \"$@\"\n' '''\n"
        for name in ("python", "python3", "dvc"):
            (self.folder / name).write_text(f"{start}{values}{program}", "utf-8")
            (self.folder / name).chmod(0o755)
        if hasattr(os, "pidfd_open"):
            self.start()

    def start(self) -> None:
        """Start the server and wait until it has imported everything."""
        import matplotlib as mpl

        env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("DVC", "MLFLOW", "GIT", "PYTHON"))
        }
        # The threads of OpenBLAS and of PyArrow's allocator would not survive a fork.
        env |= {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        env |= {"GOMP_SPINCOUNT": "1000"}  # as a stage sets it, but torch is loaded before
        env |= {"MPLCONFIGDIR": mpl.get_cachedir()}  # for its list of fonts
        env |= {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = [sys.executable, __file__, str(self.socket), self.python, ",".join(self.modules)]
        # Space for the command line of a child, see `show_command_line`.
        command.append(" " * 4096)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True
        )
        assert self.process.stdout
        ready = self.process.stdout.readline()
        assert ready == b"ready\n", "the fork server did not start"

    def cpu_seconds(self) -> float:
        """Return the processor time of the server and of its children that have ended."""
        import psutil

        return float(sum(psutil.Process(self.process.pid).cpu_times()[:4])) if self.process else 0.0

    def close(self) -> None:
        """End the server; its children die with it."""
        if self.process:
            assert self.process.stdin
            assert self.process.stdout
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()
        self.socket.parent.rmdir()


class Request(NamedTuple):
    """A command, and the surroundings in which to run it."""

    parent: int
    folder: str
    env: dict[str, str]
    umask: int
    arguments: list[str]
    fds: list[int]


def receive(connection: socket.socket) -> Request:
    """Read a request; ConnectionError if the program died while it sent the request."""
    connection.settimeout(60)
    head, fds, _, _ = socket.recv_fds(connection, 4, 3)
    size, content = int.from_bytes(head, "big"), b""
    while len(content) < size and (part := connection.recv(size - len(content))):
        content += part
    if len(head) < 4 or len(content) < size or len(fds) < 3:
        for fd in fds:
            os.close(fd)
        raise ConnectionError("an incomplete request")
    return Request(*marshal.loads(content), fds)


class Server:
    """The server: one thread that waits for programs, signals and the end of children."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        # Standard input ends when the process ends that started the server.
        self.selector.register(0, selectors.EVENT_READ)
        self.pidfds: dict[int, int] = {}
        """The process id of each child, by its file descriptor."""
        self.programs: dict[int, socket.socket] = {}
        """The connection to each program that is alive, by the process id of its child."""

    def serve(self) -> Request:
        """Fork for every request. This function returns only in a child."""
        while True:
            for key, _ in self.selector.select():
                if key.fd == 0:
                    os._exit(0)  # the kernel ends the children
                elif key.fileobj is self.listener:
                    if request := self.accept():
                        return request
                elif key.fd in self.pidfds:
                    self.end(key.fd)
                elif key.data in self.programs:
                    self.forward(key.data)

    def accept(self) -> Request | None:
        """Fork for a program; return its request in the child."""
        connection, _ = self.listener.accept()
        try:
            request = receive(connection)
        except (OSError, ValueError):
            connection.close()
            return None
        child = os.fork()
        if not child:
            # With a copy of its connection open, a program would not notice if the server died.
            for fd in (
                connection.fileno(),
                *(key.fd for key in self.selector.get_map().values() if key.fd != 0),
            ):
                os.close(fd)
            self.selector.close()
            return request
        with contextlib.suppress(OSError):
            os.setpgid(child, child)  # as the child does; either may be first
        for fd in request.fds:
            os.close(fd)
        self.programs[child] = connection
        self.selector.register(connection, selectors.EVENT_READ, child)
        pidfd = os.pidfd_open(child)
        self.pidfds[pidfd] = child
        self.selector.register(pidfd, selectors.EVENT_READ)
        return None

    def forward(self, child: int) -> None:
        """Send a child the signals of its program; kill its process group if the program died."""
        try:
            numbers = self.programs[child].recv(64)
        except OSError:
            numbers = b""
        with contextlib.suppress(ProcessLookupError):
            for number in numbers:
                (os.killpg if number in TERMINAL_SIGNALS else os.kill)(child, number)
            if not numbers:
                self.hang_up(child)
                os.killpg(child, signal.SIGKILL)

    def end(self, pidfd: int) -> None:
        """Tell the program how its child ended."""
        child = self.pidfds.pop(pidfd)
        self.selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(child, 0)
        if child in self.programs:
            with contextlib.suppress(OSError):
                self.programs[child].sendall(
                    os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True)
                )
            self.hang_up(child)

    def hang_up(self, child: int) -> None:
        """Close the connection to the program of a child."""
        connection = self.programs.pop(child)
        self.selector.unregister(connection)
        connection.close()


def become(request: Request, server: int, path: list[str]) -> None:
    """Give this process the surroundings of a new interpreter."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != server:
        os._exit(1)
    for name in (name for name in dir(resource) if name.startswith("RLIMIT_")):
        limit = getattr(resource, name)
        resource.setrlimit(limit, resource.prlimit(request.parent, limit))
    os.sched_setaffinity(0, os.sched_getaffinity(request.parent))
    for new, fd in enumerate(request.fds):
        os.dup2(fd, new)
        os.close(fd)
    os.chdir(request.folder)
    os.umask(request.umask)
    os.environ.clear()
    os.environ.update(request.env)
    show_command_line(["python", *request.arguments])

    time.tzset()
    tempfile.tempdir = None
    sys.path[:] = [
        *map(os.path.abspath, filter(None, request.env.get("PYTHONPATH", "").split(os.pathsep))),
        *path,
    ]
    sys.dont_write_bytecode = bool(request.env.get("PYTHONDONTWRITEBYTECODE"))
    sys.stdout.reconfigure(line_buffering=bool(request.env.get("PYTHONUNBUFFERED")))  # type: ignore[union-attr]
    refresh_modules(request.env)


def refresh_modules(env: dict[str, str]) -> None:
    """Update modules that read the environment when they were imported."""
    loaded = sys.modules
    if "numpy" in loaded:
        loaded["numpy"].random.seed()  # otherwise all children would have the same state
    if "torch" in loaded and (threads := env.get("OMP_NUM_THREADS")):
        loaded["torch"].set_num_threads(int(threads))
    if "matplotlib" in loaded and (backend := env.get("MPLBACKEND")):
        loaded["matplotlib"].rcParams["backend"] = backend
    if "pygit2" in loaded:
        pygit2 = loaded["pygit2"]
        pygit2.settings.search_path[pygit2.enums.ConfigLevel.GLOBAL] = env.get("HOME", "")


def show_command_line(arguments: list[str]) -> None:
    """Let `ps` show these arguments instead of those of the server."""
    with open("/proc/self/stat") as file:
        start, stop = (int(field) for field in file.read().rpartition(")")[2].split()[45:47])
    text = " ".join(arguments).encode()[: stop - start - 2]
    # Linux shows the text up to the first zero byte, if the last byte is not zero.
    ctypes.memmove(start, text.ljust(stop - start - 1, b"\0") + b".", stop - start)


def run(arguments: list[str], python: str) -> None:
    """Do what `python ARGUMENTS` does after its start."""
    kind, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if kind not in ("-m", "-c") and (not kind or kind.startswith("-")):
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.executable = python
    sys.orig_argv = [python, *arguments]
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = ["-m", *rest[1:]]
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
        sys.argv = arguments
        main.__file__ = kind
        with open(kind, "rb") as file:
            exec(compile(file.read(), kind, "exec"), main.__dict__)


def finish(arguments: list[str], python: str) -> NoReturn:
    """Run the command and exit like an interpreter, but without the slow deletion of objects."""
    code, killed = 0, False
    try:
        run(arguments, python)
    except SystemExit as error:
        if isinstance(error.code, int):
            code = error.code & 0xFF
        elif error.code is not None:
            print(error.code, file=sys.stderr)
            code = 1
    except BaseException as error:
        code, killed = 1, isinstance(error, KeyboardInterrupt)
        frames = error.__traceback__
        sys.excepthook(type(error), error, frames and frames.tb_next and frames.tb_next.tb_next)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120
    if killed:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def main() -> None:
    """Import the modules and serve requests; in a child, run the command."""
    gc.disable()  # imports make many objects, and there is nothing to collect
    sys.path.pop(0)  # the folder of this file
    socket_path, python, modules = sys.argv[1:4]
    for name in filter(None, modules.split(",")):
        importlib.import_module(name)
    logging.getLogger().handlers.clear()  # mlflow.pytorch adds one
    logging.getLogger().setLevel(logging.WARNING)
    gc.freeze()
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1, "only a process with one thread can be forked"
    server, path = os.getpid(), list(sys.path)
    listening = Server(socket_path)
    print("ready", flush=True)
    request = listening.serve()
    become(request, server, path)
    finish(request.arguments, python)


if __name__ == "__main__":
    main()

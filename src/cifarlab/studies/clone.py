"""What a worker does: run an experiment in a clone of its own, on this machine or another one.

Experiments in clones share no lock of DVC. Started side by side in one checkout, they would take
each other's parameters from its stash. This module imports the standard library only: Ray sends it
to machines that have no checkout.
"""

import configparser
import contextlib
import getpass
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import IO, NamedTuple

# It reads the process group of each command that starts, and 0 when it has ended. If its standard
# input ends before that, this process was ended: the group is told to stop, and killed after three
# seconds. It works in the background of a shell that ends at once, because Ray kills the children
# of a worker that it ends.
WATCHER = """exec 3<&0 2>/dev/null; { group=0; while read -r next; do group=$next; done
[ "$group" = 0 ] || { kill -TERM -$group; sleep 3; kill -KILL -$group; sleep 1; }
rm -rf "$1"; } <&3 &"""
NO_SERVER = "http://127.0.0.1:9"  # where nothing listens
TIMES = """import sys; sys.path.insert(0, "src")
from cifarlab import pipeline
from cifarlab.params.load import load_params
from cifarlab.runtime import timings
print(timings.path_of(pipeline.training_key(load_params())))"""  # the file of the epoch times
GIT = ("git", "-c", "core.autocrlf=false", "-c", "gc.auto=0")

Outcomes = Generator[tuple[str, str], None, None]
"""Whenever an experiment has ended, its name and what went wrong, or ""."""

pipes = set[IO[str]]()  # to the watchers


class Order(NamedTuple):
    """What the experiments of one command have in common."""

    source: str
    """The Git repository: a folder, or the URL of a remote."""
    baseline: str
    """The commit that the experiments start from."""
    snapshot: str
    """A commit with the changes of the workspace; `baseline` if there are none."""
    prefix: str
    """The folder of the project in the repository."""
    env: Mapping[str, str]
    """Variables for Git, DVC and the stages; on another machine, beside those that it has."""
    checkout: str = ""
    """The main checkout if it is on this machine: its caches and its MLflow store are used."""
    cache: str = ""
    """The cache of DVC; if empty, one that all workers of a machine share."""
    settings: str = ""
    """The content of the checkout's .dvc/config.local."""


def reference(baseline: str, name: str) -> str:
    """Return the Git reference of an experiment."""
    return f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"


def work(order: Order, name: str, options: Sequence[str]) -> dict[str, str]:
    """Run an experiment in a new clone, and send it to the repository that was cloned.

    Over a remote, its outputs and the run cache go to DVC's remote. If the repository of a remote
    has an experiment of this name, nothing runs: an earlier try may have ended after it was sent.

    Returns
    -------
    The epoch times of the training: content by file name. Empty if nothing was trained, or if the
    times are in `order.checkout`.

    Raises
    ------
    RuntimeError
        A command failed. The message has its last line, and the path of the log if there is one.
    """
    shared = Path(tempfile.gettempdir(), f"cifarlab-{getpass.getuser()}")
    base = Path(order.checkout, ".dvc/tmp/clones") if order.checkout else shared
    base.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=base))
    log = Path(order.checkout, ".dvc/tmp", f"{name}.log") if order.checkout else folder / "log"
    own = {"CIFARLAB_ROOT": order.checkout, "DVC_SITE_CACHE_DIR": str(folder / "site")}
    env = {**order.env, **own}
    if not order.checkout:
        env = os.environ | env
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        env.setdefault("MLFLOW_TRACKING_URI", NO_SERVER)
        env.setdefault("CIFARLAB_CHECKPOINTS", str(shared / "checkpoints"))
    start = partial(Popen[str], env=env, process_group=0, stdin=DEVNULL, text=True)
    with watcher(folder) as watching, log.open("w") as output:

        def run(*command: str, where: Path = folder / "clone" / order.prefix) -> str:
            to = output if command[0] == "dvc" else PIPE
            process = start(command, cwd=where, stdout=to, stderr=output)
            watching(process.pid)
            answer, _ = process.communicate()
            watching(0)
            if process.returncode:
                said = log.read_text("utf-8", "replace").strip().splitlines()
                *_, last = [f"{command[0]} failed", *said]
                raise RuntimeError(f"{last} ({log})" if order.checkout else last)
            return answer or ""

        return _work(order, name, options, run, folder)


def _work(
    order: Order, name: str, options: Sequence[str], run: Callable[..., str], folder: Path
) -> dict[str, str]:
    """Do the commands of `work` with the function `run`."""
    top, ref, remote = folder / "clone", reference(order.baseline, name), not order.checkout
    if remote and run("git", "ls-remote", order.source, ref, where=folder):
        return {}
    alike = () if remote else ("--shared",)
    run(*GIT, "clone", "--quiet", "--no-checkout", *alike, order.source, str(top), where=folder)
    run(*GIT, "checkout", "--quiet", "--detach", order.snapshot, where=top)
    run(*GIT, "reset", "--quiet", "--soft", order.baseline, where=top)
    configure(top / order.prefix, order.settings, order.cache or str(folder.parent / "dvc"))
    more = ("--pull",) if remote else ()
    run("dvc", "exp", "run", "--quiet", *more, "--name", name, *options)
    if not remote:
        run(*GIT, "push", "--quiet", "--force", "--no-verify", order.source, f"{ref}:{ref}")
        return {}
    run("dvc", "push", "--quiet", "--run-cache")  # first: who sees the experiment takes it as whole
    run("dvc", "exp", "push", "--quiet", "origin", name)
    # If the name is taken, `dvc exp push` sends nothing and does not fail.
    if run("git", "ls-remote", "origin", ref) != run("git", "ls-remote", ".", ref):
        raise RuntimeError(f"another experiment with the name {name} was sent meanwhile")
    times = Path(run(sys.executable, "-c", TIMES).strip())
    return {times.name: times.read_text("utf-8")} if times.exists() else {}


def configure(project: Path, settings: str, cache: str) -> None:
    """Write .dvc/config.local: the settings, with another cache, which processes may share."""
    config = configparser.RawConfigParser()
    config.read_string(settings)
    mark = "'" if '"' in cache else '"'  # a path may hold # or a comma
    config.read_dict({"cache": {"dir": f"{mark}{cache}{mark}"}})
    with (project / ".dvc/config.local").open("w", encoding="utf-8") as file:
        config.write(file)


@contextlib.contextmanager
def watcher(folder: Path) -> Iterator[Callable[[int], None]]:
    """Delete a folder when the block ends, or when this process dies.

    Yields a function for the process group of a command that starts, or 0 when it has ended. What
    still runs is ended first.
    """
    command = ["sh", "-c", WATCHER, "sh", str(folder)]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True) as process:
        pipe = process.stdin
        assert pipe and process.stdout  # noqa: PT018

        def watch(group: int) -> None:
            if not pipe.closed:
                print(group, file=pipe, flush=True)

        pipes.add(pipe)
        try:
            yield watch
        finally:
            pipes.discard(pipe)
            pipe.close()
            process.stdout.read()  # until it has ended


def stop() -> None:
    """End all experiments that this process runs."""
    for pipe in list(pipes):
        pipe.close()

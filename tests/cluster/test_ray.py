"""A study on a Ray cluster of three nodes, of which one is killed; a Slurm job with stand-ins."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from filelock import FileLock

from tests.conftest import REPO
from tests.support.project import Project
from tests.support.servers import Server

ray = pytest.importorskip("ray", reason="Ray is not installed: `make cluster-test` installs it")
cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STUDY = ("python", "-m", "cifarlab.cli", "study", "demo", "--workers")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Wait until no other test runs a cluster: Ray finds clusters of this machine."""
    with FileLock(Path(tempfile.gettempdir(), "cifarlab-test-ray.lock")):
        yield


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the workers. Ray's sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="w-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def shared(project: Project, tmp_path: Path) -> Project:
    """A checkout with a Git remote, a DVC remote that has the data, and a study of four points."""
    question = project.folder / "studies/demo.yaml"
    content = yaml.safe_load(question.read_text("utf-8"))
    del content["variants"]["one epoch"]
    content["base"] |= {"train.epochs": 12, "train.batch_size": 32}
    question.write_text(yaml.safe_dump(content | {"seeds": [0, 1]}, sort_keys=False), "utf-8")
    (tmp_path / "store").mkdir()
    project.dvc("remote", "add", "--quiet", "--default", "store", str(tmp_path / "store"))
    project.dvc("repro", "--quiet", "download")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message=shared")
    project.dvc("push", "--quiet")
    project.run("git", "init", "--quiet", "--bare", str(tmp_path / "remote.git"))
    project.run("git", "remote", "add", "origin", str(tmp_path / "remote.git"))
    project.env |= {"PYTHONPATH": "src"}
    project.env |= {"CIFARLAB_CHECKPOINTS": str(tmp_path / "checkpoints")}
    return project


@pytest.fixture
def cluster(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A head without processors, and two nodes with one each; workers use the real programs."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    memory = {"object_store_memory": 80_000_000}
    found = cluster_utils.Cluster(True, head_node_args={"num_cpus": 0, **memory})
    found.nodes = [found.add_node(num_cpus=1, **memory) for _ in range(2)]
    yield found
    found.shutdown()


def trainings(folder: Path) -> list[psutil.Process]:
    """Return the train stages that run below a folder."""
    found = psutil.process_iter(["cmdline", "cwd"])
    running = [p for p in found if "stages.train" in (p.info["cmdline"] or [])]
    return [p for p in running if str(folder) in (p.info["cwd"] or "")]


def test_a_node_and_the_coordinator_are_killed_and_nothing_is_lost_or_done_twice(
    shared: Project,
    cluster: cluster_utils.Cluster,
    own_mlflow_server: Server,
    tmp_path: Path,
    scratch: Path,
) -> None:
    uri = own_mlflow_server.uri
    shared.env |= {"MLFLOW_TRACKING_URI": uri}
    missing = shared.run(*STUDY, "ray", check=False, RAY_ADDRESS=cluster.address).stdout
    assert "the Git remote origin, which lacks this commit; `git push origin`" in missing
    shared.run("git", "push", "--quiet", "origin", "main")
    first = shared.start(*STUDY, "ray", RAY_ADDRESS=cluster.address)
    with first:
        wait_until(lambda: len(trainings(scratch)) == 2)
        wait_until(lambda: len([*(tmp_path / "checkpoints/checkpoints").glob("*.pt")]) == 2)
        # The server shows curves while the workers still train.
        wait_until(lambda: [*live_losses(shared, uri)])
        lost = trainings(scratch)
        cluster.remove_node(cluster.nodes[0], allow_graceful=False)
        wait_until(lambda: sum(process.is_running() for process in lost) < 2)
        assert first.wait_for("done, 3 left"), first.output
        first.end(signal.SIGKILL)
    wait_until(lambda: not trainings(scratch))
    wait_until(lambda: not [*scratch.glob("cifarlab-*/demo-*")])  # the clones
    sent = shared.run("git", "ls-remote", "origin", "refs/exps/*").stdout
    output = shared.run(*STUDY, "ray", RAY_ADDRESS=cluster.address, seconds=1500).stdout
    assert "4 trainings, 1 done, 3 to run" in output
    assert "done, 0 left" in output
    now = shared.run("git", "ls-remote", "origin", "refs/exps/*").stdout
    assert set(sent.splitlines()) < set(now.splitlines())  # it was not made again
    assert len(now.splitlines()) == 4
    table = pd.read_csv(shared.folder / "docs/studies/demo.csv")
    assert len(table) == 4
    assert (table.seconds > 0).all()
    assert table.machine.str.contains("1 threads").all()
    epochs = pd.read_csv(shared.folder / "docs/studies/demo-epochs.csv")
    assert set(epochs.groupby("experiment").epoch.max()) == {12}
    # Another checkout, which has neither tables nor experiments, fetches all and trains nothing.
    runs = [
        run for run in shared.all_runs(uri) if "dvc.exp.name" in run.data.tags
    ]  # not the study's
    assert sorted(run.data.tags["dvc.exp.name"] for run in runs) == sorted(table.experiment)
    assert {run.info.status for run in runs} == {"FINISHED"}
    shared.dvc("exp", "remove", "--quiet", "--all-commits")
    for path in (shared.folder / "docs/studies").glob("demo*"):
        path.unlink()
    before = [path.stat().st_mtime for path in (tmp_path / "checkpoints/trainings").iterdir()]
    assert "4 to run" in shared.run(*STUDY, "ray", RAY_ADDRESS=cluster.address).stdout
    assert before == [p.stat().st_mtime for p in (tmp_path / "checkpoints/trainings").iterdir()]
    # Alone, one of them gives the same network.
    name = "demo-four-epochs-0"
    [sent] = [line.split()[0] for line in now.splitlines() if line.endswith(name)]
    shared.dvc("exp", "remove", "--quiet", name)
    run = "executors.run({point.experiment: point.changes}, 1, '', print)"
    load = "from cifarlab.studies import executors, points; point = points.load('demo')[1][0]"
    shared.run("rm", "-r", ".dvc/cache/runs")
    shared.run("python", "-c", f"{load}; {run}", OMP_NUM_THREADS="1")
    refs = shared.run(
        "git", "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps"
    ).stdout
    [alone] = [line.split()[0] for line in refs.splitlines() if line.endswith(name)]
    assert shared.run("git", "diff", sent, alone, "--", "dvc.lock").stdout == ""
    # A name that is taken by something else.
    question = shared.folder / "studies/demo.yaml"
    question.write_text(question.read_text("utf-8").replace("train.epochs: 12", "train.epochs: 1"))
    taken = shared.run(*STUDY, "ray", RAY_ADDRESS=cluster.address, check=False).stdout
    assert "origin has another experiment of this name; `dvc exp remove --git-remote" in taken


def live_losses(project: Project, uri: str) -> Iterator[float]:
    """Yield the loss of each run that is still training."""
    if project.client(uri).get_experiment_by_name("cifarlab"):
        for run in project.all_runs(uri):
            if run.info.status == "RUNNING" and "loss/train" in run.data.metrics:
                yield run.data.metrics["loss/train"]


def wait_until(condition: object) -> None:
    """Wait for a condition, ten minutes at most."""
    deadline = time.monotonic() + 600
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.1)  # before it looks again


def test_without_a_cluster_one_sentence_says_how_to_start_one(shared: Project) -> None:
    shared.run("git", "push", "--quiet", "origin", "main")
    done = shared.run(*STUDY, "ray", check=False)
    assert done.returncode == 1
    assert "error: no Ray cluster answers at ray; `ray start --head` starts one" in done.stdout


def test_a_slurm_job_asks_a_study(shared: Project, tmp_path: Path, scratch: Path) -> None:
    shared.run("git", "push", "--quiet", "origin", "main")
    question = shared.folder / "studies/demo.yaml"
    question.write_text(question.read_text("utf-8").replace("train.epochs: 12", "train.epochs: 1"))
    text = (REPO / "docs/scale.md").read_text("utf-8")
    [script] = [block for block in text.split("```")[1::2] if "#SBATCH" in block]
    (shared.folder / "study.sbatch").write_text(script.partition("\n")[2], "utf-8")
    stand_ins = {
        "sbatch": "export SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=127.0.0.1 SLURM_SUBMIT_DIR=$PWD"
        '\nexec bash "$1"',
        "srun": 'exec "$@"',
        "scontrol": "echo 127.0.0.1",
        "cifarlab": 'exec python -m cifarlab.cli "$@"',
    }
    programs = shared.folder / ".venv/bin"
    programs.mkdir(parents=True)
    for name, line in stand_ins.items():
        (programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{shared.env['PATH']}"
    (programs / "activate").write_text(f"export PATH={path}\n")
    shared.env |= {"TMPDIR": str(scratch), "PATH": path}
    output = shared.run("sbatch", "study.sbatch", seconds=1500).stdout
    assert "done, 0 left" in output
    assert len(pd.read_csv(shared.folder / "docs/studies/demo.csv")) == 4

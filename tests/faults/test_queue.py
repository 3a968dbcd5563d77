"""Experiments side by side: a queue of DVC with several workers, and one of its workers that stands still."""

import os
import signal
import time

import psutil
import pytest

from cifarlab import UserError, queue
from tests.pipeline.conftest import Project

SEEDS = range(8)


def results(project: Project, name: str) -> dict[str, object]:
    """Return what an experiment's commit holds: the hashes of all that its stages wrote."""
    ref = project.run("git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}").stdout.strip()
    return {
        file: project.run("git", "show", f"{ref}:{file}").stdout for file in ("dvc.lock", "metrics/evaluate.json", "metrics/train.json")
    }


@pytest.mark.timeout(900)
def test_eight_experiments_over_four_workers_from_no_database(project: Project) -> None:
    project.edit("train", epochs=2)
    project.dvc("repro", "download")
    project.run("git", "commit", "--quiet", "--all", "--message=base")
    for seed in SEEDS:
        project.dvc("exp", "run", "--queue", "--name", f"parallel-{seed}", "-S", f"train.seed={seed}")
    assert not (project.folder / "mlflow.db").exists()
    # The queue's command ends when the queue does.
    watching = project.run("python", "-m", "cifarlab", "queue", "--jobs", "4", PYTHONPATH="src", seconds=800).stdout
    assert "8 success, 0 running, 0 queued, 0 failed" in watching
    logs = "".join(project.dvc("queue", "logs", f"parallel-{seed}") for seed in SEEDS)
    assert "warning" not in logs
    assert "locked" not in logs
    runs = project.runs()  # which asserts that none is doubled
    assert sorted(runs) == [f"parallel-{seed}" for seed in SEEDS]
    client = project.client()
    for run in runs.values():
        assert run.info.status == "FINISHED"
        assert sorted(p.step for p in client.get_metric_history(run.info.run_id, "train_loss")) == [1, 2]
        assert {"test_accuracy", "accuracy/9", "parameters"} <= run.data.metrics.keys()
        assert len(project.artifacts(run.info.run_id)) == 11
        assert len(run.outputs.model_outputs) == 1
    # Alone, without DVC's memory of the eight: the same bytes.
    project.dvc("exp", "run", "--temp", "--force", "--name", "alone", "-S", "train.seed=5")
    assert results(project, "alone") == results(project, "parallel-5")


def test_a_queue_with_a_failure_says_where_to_look(project: Project) -> None:
    project.dvc("exp", "run", "--queue", "--name", "impossible", "-S", "model.kernel_size=31", "-S", "model.padding=valid")
    done = project.run("python", "-m", "cifarlab", "queue", check=False, PYTHONPATH="src")
    assert done.returncode == 1
    assert "error: failed: impossible; `dvc queue logs NAME` says why" in done.stdout
    assert "Traceback" not in done.stdout
    assert "error:" in project.dvc("queue", "logs", "impossible")


def test_a_worker_that_stands_still_is_named(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    project.dvc("exp", "run", "--queue", "--name", "stopped", "-S", "train.seed=77", "-S", "train.epochs=10000")
    monkeypatch.chdir(project.folder)
    for name, value in project.env.items():
        monkeypatch.setenv(name, value)
    watched = os.fork()
    if not watched:  # a user who types `kill -STOP`, as soon as the training is there
        training: list[psutil.Process] = []
        while not training:
            time.sleep(0.2)  # between two looks
            training = [
                p
                for p in psutil.process_iter(["cmdline", "cwd"])
                if "stages.train" in (p.info["cmdline"] or []) and str(project.folder) in (p.info["cwd"] or "")
            ]
        for process in training:
            process.send_signal(signal.SIGSTOP)
        os._exit(0)
    with pytest.raises(UserError, match="the queue stands still: stopped; `dvc queue stop --kill`"):
        queue.watch(1, patience=15)
    os.waitpid(watched, 0)
    assert "warning: stopped stands still; `dvc queue kill stopped` ends it" in capsys.readouterr().out
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if str(project.folder) in (process.info["cwd"] or "") and process.pid != os.getpid():
            process.kill()

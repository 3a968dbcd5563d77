"""DVC's queue with several workers, with a failure, and with a worker that hangs."""

import os
import signal
import time

import psutil
import pytest

from cifarlab.errors import UserError
from cifarlab.studies.study import watch
from tests.support.project import Project


def results(project: Project, name: str) -> dict[str, object]:
    """Return the metrics of an experiment and its dvc.lock, which has the hashes of its outputs."""
    ref = project.run(
        "git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}"
    ).stdout.strip()
    return {
        file: project.run("git", "show", f"{ref}:{file}").stdout
        for file in ("dvc.lock", "metrics/evaluate.json", "metrics/train.json")
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experiments_overlapping_without_a_database(project: Project) -> None:
    experiments = 8
    seeds = range(experiments)
    project.edit("train", epochs=2)
    project.edit("tracking", log_model=False)
    project.dvc("repro", "download")
    project.run("git", "commit", "--quiet", "--all", "--message=base")
    for seed in seeds:
        project.dvc(
            "exp", "run", "--queue", "--name", f"parallel-{seed}", "-S", f"train.seed={seed}"
        )
    assert not (project.folder / "mlflow.db").exists()
    # Queued experiments have their own copy of the code, so a later change must not matter.
    plot = project.folder / "stages/plot.py"
    plot.write_text("raise SystemExit('the code of the main checkout ran')")
    # The command ends when the queue is empty.
    command = ("python", "-m", "cifarlab.cli", "queue", "--jobs", "4")
    output = project.run(*command, PYTHONPATH="src", seconds=800).stdout
    assert f"{experiments} success, 0 running, 0 queued, 0 failed" in output
    logs = "".join(project.dvc("queue", "logs", f"parallel-{seed}") for seed in seeds)
    assert "warning" not in logs
    assert "locked" not in logs
    runs = project.runs()  # fails if an experiment has two runs
    assert sorted(runs) == [f"parallel-{seed}" for seed in seeds]
    client = project.client()
    for run in runs.values():
        assert run.info.status == "FINISHED"
        assert sorted(p.step for p in client.get_metric_history(run.info.run_id, "train_loss")) == [
            1,
            2,
        ]
        assert {"test_accuracy", "per_class/9", "parameters"} <= run.data.metrics.keys()
        assert len(project.artifacts(run.info.run_id)) == 12
    # The same trainings one after the other, without DVC's run cache, give the same bytes.
    project.run("git", "checkout", "--quiet", "stages/plot.py")
    for seed in seeds:
        name, change = f"alone-{seed}", f"train.seed={seed}"
        project.dvc("exp", "run", "--temp", "--force", "--name", name, "-S", change)
        assert results(project, name) == results(project, f"parallel-{seed}")


def test_a_queue_with_a_failure_says_where_to_look(project: Project) -> None:
    project.dvc(
        "exp",
        "run",
        "--queue",
        "--name",
        "impossible",
        "-S",
        "model.kernel_size=31",
        "-S",
        "model.padding=valid",
    )
    done = project.run("python", "-m", "cifarlab.cli", "queue", check=False, PYTHONPATH="src")
    assert done.returncode == 1
    assert "error: failed: impossible; `dvc queue logs NAME` says why" in done.stdout
    assert "Traceback" not in done.stdout
    assert "error:" in project.dvc("queue", "logs", "impossible")


@pytest.mark.slow
def test_a_worker_that_hangs_is_named(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.dvc(
        "exp",
        "run",
        "--queue",
        "--name",
        "stopped",
        "-S",
        "train.seed=77",
        "-S",
        "train.epochs=10000",
    )
    monkeypatch.chdir(project.folder)
    # `watch` adds up the processor time of a tree of processes, which must not contain the fork
    # server: its children would be missing.
    for name, value in (project.env | {"REAL_PROGRAMS": "1"}).items():
        monkeypatch.setenv(name, value)
    stopper = os.fork()
    if not stopper:  # stop the training as soon as it runs, like a user who types `kill -STOP`
        training: list[psutil.Process] = []
        while not training:
            time.sleep(0.2)  # before it looks again
            training = [
                p
                for p in psutil.process_iter(["cmdline", "cwd"])
                if "stages.train" in (p.info["cmdline"] or [])
                and str(project.folder) in (p.info["cwd"] or "")
            ]
        for process in training:
            process.send_signal(signal.SIGSTOP)
        os._exit(0)
    with pytest.raises(UserError, match="the queue hangs: stopped; `dvc queue stop --kill`"):
        watch(1, patience=15)
    os.waitpid(stopper, 0)
    assert "warning: stopped hangs; `dvc queue kill stopped`" in capsys.readouterr().out
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if str(project.folder) in (process.info["cwd"] or "") and process.pid != os.getpid():
            process.kill()

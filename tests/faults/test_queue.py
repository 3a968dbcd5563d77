"""Queued experiments, several at a time, and with a failure."""

import pytest

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
    experiments = 4
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
    command = ("python", "-m", "cifarlab.cli", "queue", "--jobs", "2")
    plot = project.folder / "stages/plot.py"
    plot.write_text(f"{plot.read_text()}\nraise SystemExit('other code')")
    refused = project.run(*command, PYTHONPATH="src", check=False).stdout
    assert "error: stages/plot.py changed since parallel-" in refused
    assert "`dvc queue start` runs it as it was" in refused
    project.run("git", "checkout", "--quiet", "stages/plot.py")
    (project.folder / "photos.dvc").write_text("outs: []\n")  # newer images than were queued
    project.run("git", "add", "photos.dvc")
    refused = project.run(*command, PYTHONPATH="src", check=False).stdout
    assert "error: photos.dvc changed since parallel-" in refused
    project.run("git", "rm", "--quiet", "--force", "photos.dvc")
    # The command ends when the queue is empty.
    output = project.run(*command, PYTHONPATH="src", seconds=800).stdout
    assert f"{experiments} queued" in output
    assert "done, 0 left" in output
    assert "0 queued" in project.run(*command, PYTHONPATH="src").stdout
    logs = "".join(path.read_text() for path in (project.folder / ".dvc/tmp").glob("*.log"))
    assert "warning" not in logs
    assert "locked" not in logs
    runs = project.runs()  # fails if an experiment has two runs
    assert sorted(runs) == [f"parallel-{seed}" for seed in seeds]
    client = project.client()
    for run in runs.values():
        assert run.info.status == "FINISHED"
        assert sorted(p.step for p in client.get_metric_history(run.info.run_id, "loss/train")) == [
            1,
            2,
        ]
        assert {"accuracy/test", "per_class/9", "parameters"} <= run.data.metrics.keys()
        assert len(project.artifacts(run.info.run_id)) == 12
    # The same trainings one after the other, without DVC's run cache, give the same bytes.
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
    command = ("python", "-m", "cifarlab.cli", "queue")
    done = project.run(*command, check=False, PYTHONPATH="src")
    assert done.returncode == 1
    assert "error: impossible failed: error: " in done.stdout
    assert "impossible.log" in done.stdout
    assert "Traceback" not in done.stdout
    # It stays in the queue, for the time when its reason is gone.
    assert "1 queued" in project.run(*command, check=False, PYTHONPATH="src").stdout

"""`sync` restores MLflow from the files of DVC, and `verify` repeats results and compares them."""

import re
import shutil
from pathlib import Path

import pytest
from mlflow.entities import Run

from tests.support.forkserver import ForkServer
from tests.support.project import Project, check_out, copy, template


def cifarlab(project: Project, *arguments: str, code: int = 0, **env: str) -> str:
    """Run the command line, check its exit code, and return its output."""
    command = ("python", "-m", "cifarlab.cli", *arguments)
    done = project.run(*command, check=False, PYTHONPATH="src", **env)
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def content(project: Project, run: Run) -> dict[str, object]:
    """Return everything in a run, except its id and the time when it was logged."""
    client = project.client()
    epochs = {
        name: sorted(
            (p.step, p.value, p.timestamp) for p in client.get_metric_history(run.info.run_id, name)
        )
        for name in ("train_loss", "val_accuracy", "epoch_seconds")
    }
    tags = {
        k: v
        for k, v in run.data.tags.items()
        if not k.startswith(("mlflow.user", "mlflow.log-model"))
    }
    # `dvc repro` ran on the commit before the one that holds its results.
    tags = {
        k: v for k, v in tags.items() if not k.startswith("mlflow.source") and k != "git.commit"
    }
    metrics = {k: v for k, v in run.data.metrics.items() if not k.startswith("system/")}
    inputs = [i.dataset.digest for i in run.inputs.dataset_inputs]
    return {
        "epochs": epochs,
        "tags": tags,
        "metrics": metrics,
        "params": run.data.params,
        "inputs": inputs,
        "name": run.info.run_name,
        "artifacts": project.artifacts(run.info.run_id),
        "models": len(run.outputs.model_outputs),
    }


@pytest.fixture(scope="session")
def with_history(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Project:
    """A checkout with a commit and two experiments; tests use copies of it.

    Its DVC cache lies outside of it, as if several checkouts shared the cache.
    """

    def make(folder: Path) -> dict[str, object]:
        project = check_out(folder, fork_server)
        project.dvc("cache", "dir", "--local", str(folder.parent / "shared"))
        project.edit("tracking", system_metrics=False, log_model=False)
        project.dvc("repro")
        project.run("git", "add", "--all")
        project.run("git", "commit", "--quiet", "--message=baseline")
        project.dvc("exp", "run", "--temp", "--name", "other-seed", "-S", "train.seed=1")
        project.dvc(
            "exp",
            "run",
            "--temp",
            "--name",
            "with-mirror",
            "-S",
            "evaluate.mirror=true",
            "-S",
            "tracking.log_model=true",
        )
        return {}

    return template("with-history", make, tmp_path_factory, fork_server)[0]


@pytest.fixture
def used(with_history: Project, tmp_path: Path) -> Project:
    """A copy of `with_history` that a test may change."""
    return copy(with_history, tmp_path / "copy")


def test_a_store_that_was_lost_is_restored_from_files_with_every_timestamp(
    used: Project,
) -> None:
    before = {name: content(used, run) for name, run in used.runs().items()}
    output = cifarlab(used, "sync")
    assert output.count("was there") == 3, output
    used.lose_store()
    assert cifarlab(used, "sync").count("logged") == 3
    after = {name: content(used, run) for name, run in used.runs().items()}
    for name, parts in before.items():
        for part, value in parts.items():
            assert after[name][part] == value, (name, part)
    # A second sync changes nothing.
    once = (used.folder / "mlflow.db").read_bytes()
    assert cifarlab(used, "sync").count("was there") == 3
    assert (used.folder / "mlflow.db").read_bytes() == once
    assert not list((used.folder / ".dvc/tmp").glob("scratch-*"))


def test_an_experiment_that_dvc_restored_from_its_cache_gets_a_run(used: Project) -> None:
    assert "Running stage" not in used.dvc(
        "exp", "run", "--temp", "--name", "restored", "-S", "train.seed=1"
    )
    assert "restored" not in used.runs()
    output = cifarlab(used, "sync")
    assert re.search(r"restored\s+dvc exp apply restored\s+\w{32}\s+logged", output)
    restored, original = (content(used, used.runs()[name]) for name in ("restored", "other-seed"))
    for part in ("epochs", "metrics", "params", "artifacts", "inputs", "models"):
        assert restored[part] == original[part]


def test_the_run_leads_to_the_experiment_and_back(used: Project) -> None:
    output = cifarlab(used, "sync")
    run = used.runs()["other-seed"]
    [restored_by] = re.findall(rf"(dvc exp apply [\w-]+)\s+{run.info.run_id}", output)
    used.run(*restored_by.split())
    assert "seed: 1" in (used.folder / "params.yaml").read_text()


def test_tracking_that_was_off_is_logged_later_for_the_workspace(used: Project) -> None:
    used.edit("train", seed=2)
    assert used.dvc("repro", MLFLOW_TRACKING_URI="http://127.0.0.1:9").count("warning: MLflow") == 3
    output = cifarlab(used, "sync")
    assert re.search(r"workspace\s+\w{32}\s+logged", output)
    [experiment] = used.client().search_experiments(filter_string="name = 'cifarlab'")
    [run] = used.client().search_runs([experiment.experiment_id], "params.`train.seed` = '2'")
    assert run.info.status == "FINISHED"
    assert "test_accuracy" in run.data.metrics
    # params.yaml has changed, but the outputs are still those of the old parameters.
    used.edit("train", seed=3)
    assert re.search(r"workspace\s+\w{32}\s+was there", cifarlab(used, "sync"))
    used.lose_store()
    assert "changed since its pipeline ran" in cifarlab(used, "sync", code=1)


def test_what_cannot_be_logged_is_listed(used: Project) -> None:
    # A run whose experiment was removed, and an experiment whose outputs were.
    used.dvc("exp", "run", "--temp", "--name", "to-be-removed", "-S", "train.seed=4")
    used.dvc("exp", "remove", "to-be-removed")
    output = cifarlab(used, "sync")
    assert re.search(
        r"to-be-removed of \w+\s+\w{32}\s+finished, but no experiment or commit has this run",
        output,
    )
    used.lose_store()
    used.dvc("gc", "--workspace", "--force")
    output = cifarlab(used, "sync", code=1)
    assert re.search(
        r"other-seed\s+dvc exp apply other-seed\s+"
        r"not logged: its outputs are not all in DVC's cache",
        output,
    )
    assert re.search(r"commit \w+\s.*logged", output)


def test_a_lock_that_is_damaged_does_not_prevent_logging_the_rest(used: Project) -> None:
    lock = used.folder / "dvc.lock"
    whole = lock.read_text()
    lock.write_text(f"<<<<<<< HEAD\n{whole}=======\n")
    output = cifarlab(used, "sync", code=1)
    assert "Traceback" not in output
    assert re.search(r"workspace\s.*its dvc.lock is damaged", output)
    assert re.search(r"commit \w+\s.*was there", output)


def test_verify_repeats_a_commit_to_the_byte(used: Project) -> None:
    # New interpreters repeat what children of the fork server trained.
    runs = len(used.runs())
    status = used.run("git", "status", "--porcelain").stdout
    assert (
        cifarlab(used, "verify", "HEAD", REAL_PROGRAMS="1").splitlines()[-1]
        == "identical: 13 files of HEAD, the weights included"
    )
    assert (len(used.runs()), used.run("git", "status", "--porcelain").stdout) == (
        runs,
        status,
    )
    assert cifarlab(used, "verify", "nobody", code=1).startswith(
        "error: nobody is not an experiment or a commit"
    )


def test_verify_under_other_conditions_compares_the_accuracy(used: Project) -> None:
    """Without vector instructions, as on an old processor, sums have another order."""
    output = cifarlab(
        used, "verify", "HEAD", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41"
    ).splitlines()[-1]
    assert "files differ" in output
    assert "under other conditions (device " in output
    assert re.search(r"the first tensor that differs is [\w.]+, by up to [\d.e-]+", output)
    assert re.search(
        r"Test accuracy [\d.]+% then, [\d.]+% now, within ±[\d.]+% for 359 images", output
    )


def test_verify_under_the_same_conditions_names_what_differs(used: Project) -> None:
    """Somebody has edited the metrics of the commit by hand."""
    path = used.folder / "metrics/evaluate.json"
    path.write_text(re.sub(r'"accuracy": [\d.]+', '"accuracy": 0.99', path.read_text()))
    used.run("git", "commit", "--quiet", "--all", "--message=better")
    output = cifarlab(used, "verify", "HEAD", code=1).splitlines()[-1]
    assert re.search(
        r"not repeated on .*: 1 of 13 files differ, first metrics/evaluate.json", output
    )


def test_verify_refuses_a_commit_without_its_outputs(used: Project) -> None:
    shutil.rmtree(used.folder.parent / "shared/files")
    assert "not all in DVC's cache" in cifarlab(used, "verify", "HEAD", code=1)
    assert not list(Path(used.folder / ".dvc/tmp").glob("scratch-*"))

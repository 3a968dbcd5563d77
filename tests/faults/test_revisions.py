"""MLflow after a loss, and results tried again: the files of DVC bring back the one and judge the other."""

import re
import shutil
from pathlib import Path

import pytest
from mlflow.entities import Run

from tests.pipeline.conftest import Project


def cifarlab(project: Project, *arguments: str, code: int = 0, **env: str) -> str:
    done = project.run("python", "-m", "cifarlab", *arguments, check=False, PYTHONPATH="src", **env)
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def content(project: Project, run: Run) -> dict[str, object]:
    """Return all that a run says of its training; its id and when it was logged are its own."""
    client = project.client()
    epochs = {
        name: sorted((p.step, p.value, p.timestamp) for p in client.get_metric_history(run.info.run_id, name))
        for name in ("train_loss", "val_accuracy", "epoch_seconds")
    }
    tags = {k: v for k, v in run.data.tags.items() if not k.startswith(("mlflow.user", "mlflow.log-model"))}
    # `dvc repro` ran on the commit before the one that holds its results.
    tags = {k: v for k, v in tags.items() if not k.startswith("mlflow.source") and k != "git.commit"}
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


@pytest.fixture(scope="module")
def lived_in(project: Project) -> Project:
    """A checkout with a commit and two experiments, its cache elsewhere, as where several checkouts share one."""
    project.dvc("cache", "dir", "--local", str(project.folder.parent / "shared"))
    project.edit("tracking", system_metrics=False)
    project.dvc("repro")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message=baseline")
    project.dvc("exp", "run", "--temp", "--name", "other-seed", "-S", "train.seed=1")
    project.dvc("exp", "run", "--temp", "--name", "with-mirror", "-S", "evaluate.mirror=true")
    return project


def test_a_store_that_was_lost_comes_back_from_files_to_the_last_timestamp(lived_in: Project) -> None:
    before = {name: content(lived_in, run) for name, run in lived_in.runs().items()}
    told = cifarlab(lived_in, "sync")
    assert told.count("was there") == 3, told
    lived_in.lose_store()
    assert cifarlab(lived_in, "sync").count("logged") == 3
    after = {name: content(lived_in, run) for name, run in lived_in.runs().items()}
    for name, parts in before.items():
        for part, value in parts.items():
            assert after[name][part] == value, (name, part)
    # Running it twice changes nothing.
    once = (lived_in.folder / "mlflow.db").read_bytes()
    assert cifarlab(lived_in, "sync").count("was there") == 3
    assert (lived_in.folder / "mlflow.db").read_bytes() == once
    assert not list((lived_in.folder / ".dvc/tmp").glob("scratch-*"))


def test_an_experiment_that_dvc_restored_from_its_cache_gets_a_run(lived_in: Project) -> None:
    assert "Running stage" not in lived_in.dvc("exp", "run", "--temp", "--name", "restored", "-S", "train.seed=1")
    assert "restored" not in lived_in.runs()
    told = cifarlab(lived_in, "sync")
    assert re.search(r"restored\s+dvc exp apply restored\s+\w{32}\s+logged", told)
    restored, original = (content(lived_in, lived_in.runs()[name]) for name in ("restored", "other-seed"))
    for part in ("epochs", "metrics", "params", "artifacts", "inputs", "models"):
        assert restored[part] == original[part]


def test_the_run_leads_to_the_experiment_and_back(lived_in: Project) -> None:
    told = cifarlab(lived_in, "sync")
    run = lived_in.runs()["other-seed"]
    [restored_by] = re.findall(rf"(dvc exp apply [\w-]+)\s+{run.info.run_id}", told)
    lived_in.run(*restored_by.split())
    assert "seed: 1" in (lived_in.folder / "params.yaml").read_text()
    lived_in.run("git", "checkout", "--quiet", ".")
    lived_in.dvc("checkout", "--quiet")


def test_tracking_that_was_off_is_made_up_for_in_the_workspace(lived_in: Project) -> None:
    lived_in.edit("train", seed=2)
    assert lived_in.dvc("repro", MLFLOW_TRACKING_URI="http://127.0.0.1:9").count("warning: MLflow") == 3
    told = cifarlab(lived_in, "sync")
    assert re.search(r"workspace\s+\w{32}\s+logged", told)
    [experiment] = lived_in.client().search_experiments(filter_string="name = 'cifarlab'")
    [run] = lived_in.client().search_runs([experiment.experiment_id], "params.`train.seed` = '2'")
    assert run.info.status == "FINISHED"
    assert "test_accuracy" in run.data.metrics
    # Changed, but not run again: what the files say is not what params.yaml says.
    lived_in.edit("train", seed=3)
    assert re.search(r"workspace\s+\w{32}\s+was there", cifarlab(lived_in, "sync"))
    lived_in.lose_store()
    assert "changed since its pipeline ran" in cifarlab(lived_in, "sync", code=1)
    lived_in.run("git", "checkout", "--quiet", ".")
    lived_in.dvc("checkout", "--quiet")


def test_what_cannot_be_logged_is_listed(lived_in: Project) -> None:
    # A run whose experiment is gone, and an experiment whose outputs are.
    lived_in.dvc("exp", "run", "--temp", "--name", "to-be-removed", "-S", "train.seed=4")
    lived_in.dvc("exp", "remove", "to-be-removed")
    told = cifarlab(lived_in, "sync")
    assert re.search(r"to-be-removed of \w+\s+\w{32}\s+a run of no experiment or commit, finished", told)
    lived_in.lose_store()
    lived_in.dvc("gc", "--workspace", "--force")
    told = cifarlab(lived_in, "sync", code=1)
    assert re.search(r"other-seed\s+dvc exp apply other-seed\s+not logged: its outputs are not all in DVC's cache", told)
    assert re.search(r"commit \w+\s.*logged", told)


def test_a_lock_that_is_damaged_keeps_nothing_else_from_mlflow(lived_in: Project) -> None:
    lock = lived_in.folder / "dvc.lock"
    whole = lock.read_text()
    lock.write_text(f"<<<<<<< HEAD\n{whole}=======\n")
    told = cifarlab(lived_in, "sync", code=1)
    lock.write_text(whole)
    assert "Traceback" not in told
    assert re.search(r"workspace\s.*its dvc.lock is damaged", told)
    assert re.search(r"commit \w+\s.*was there", told)


def test_verify_repeats_a_commit_to_the_byte(lived_in: Project) -> None:
    runs = len(lived_in.runs())
    status = lived_in.run("git", "status", "--porcelain").stdout
    assert cifarlab(lived_in, "verify", "HEAD").splitlines()[-1] == "identical: 13 files of HEAD, the weights included"
    assert (len(lived_in.runs()), lived_in.run("git", "status", "--porcelain").stdout) == (runs, status)
    assert cifarlab(lived_in, "verify", "nobody", code=1).startswith("error: nobody is no experiment and no commit")


def test_verify_under_other_conditions_says_what_holds_there(lived_in: Project) -> None:
    """As on a processor without vector instructions: sums have another order."""
    told = cifarlab(lived_in, "verify", "HEAD", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41").splitlines()[-1]
    assert "files differ" in told
    assert "under other conditions (device " in told
    assert re.search(r"of the weights first the tensor [\w.]+, by up to [\d.e-]+", told)
    assert re.search(r"test accuracy [\d.]+% then, [\d.]+% now, within ±[\d.]+% for 359 images", told)


def test_verify_names_what_differs_where_nothing_should(lived_in: Project) -> None:
    """A commit whose metrics somebody has improved by hand."""
    path = lived_in.folder / "metrics/evaluate.json"
    path.write_text(re.sub(r'"accuracy": [\d.]+', '"accuracy": 0.99', path.read_text()))
    lived_in.run("git", "commit", "--quiet", "--all", "--message=better")
    told = cifarlab(lived_in, "verify", "HEAD", code=1).splitlines()[-1]
    assert re.search(r"not repeated on .*: 1 of 13 files differ, first metrics/evaluate.json", told)
    lived_in.run("git", "reset", "--quiet", "--hard", "HEAD~1")


def test_verify_needs_what_was_trained(lived_in: Project) -> None:
    shutil.rmtree(lived_in.folder.parent / "shared/files")
    assert "not all in DVC's cache" in cifarlab(lived_in, "verify", "HEAD", code=1)
    assert not list(Path(lived_in.folder / ".dvc/tmp").glob("scratch-*"))

"""`sync` restores MLflow from the files of DVC, and `verify` repeats results and compares them."""

import contextlib
import json
import re
import shutil
import signal
import sqlite3
from functools import partial
from pathlib import Path

import pytest
import yaml
from mlflow.entities import Run

from tests.support.project import Project


def cifarlab(project: Project, *arguments: str, code: int = 0, **env: str) -> str:
    """Run the command line, check its exit code, and return its output."""
    command = ("python", "-m", "cifarlab.cli", *arguments)
    done = project.run(*command, check=False, PYTHONPATH="src", **env)
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def database(project: Project) -> list[str]:
    """Return everything in the MLflow store."""
    with contextlib.closing(sqlite3.connect(project.folder / "mlflow.db")) as store:
        return list(store.iterdump())


def content(project: Project, run: Run) -> dict[str, object]:
    """Return everything in a run, except its id and the time when it was logged."""
    client = project.client()
    epochs = {
        name: sorted(
            (p.step, p.value, p.timestamp) for p in client.get_metric_history(run.info.run_id, name)
        )
        for name in ("loss/train", "accuracy/val", "epoch_seconds")
    }
    tags = {
        k: v
        for k, v in run.data.tags.items()
        if not k.startswith(("mlflow.user", "mlflow.log-model"))
    }
    # `dvc repro` ran on the commit before the one that holds its results. The description says how
    # to restore them. With which packages a commit ran is not known later.
    tags = {
        k: v
        for k, v in tags.items()
        if not k.startswith(("mlflow.source", "mlflow.note", "version."))
        and k not in ("git.commit", "cifarlab.folder")
    }
    metrics = {k: v for k, v in run.data.metrics.items() if not k.startswith("system/")}
    inputs = [i.dataset.digest for i in run.inputs.dataset_inputs]
    return {
        "epochs": epochs,
        "tags": tags,
        "metrics": metrics,
        "params": {k: v for k, v in run.data.params.items() if not k.startswith("tracking.")},
        "inputs": inputs,
        "name": run.info.run_name,
        "artifacts": project.artifacts(run.info.run_id),
        "models": len(run.outputs.model_outputs),
    }


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
            if (name, part) != ("", "models"):  # its committed parameters log no model
                assert after[name][part] == value, (name, part)
    # A second sync changes nothing.
    once = database(used)
    assert cifarlab(used, "sync").count("was there") == 3
    assert database(used) == once
    assert not list((used.folder / ".dvc/tmp").glob("scratch-*"))


@pytest.mark.slow
def test_an_experiment_that_dvc_restored_from_its_cache_gets_a_run(used: Project) -> None:
    assert "Running stage" not in used.dvc(
        "exp", "run", "--temp", "--name", "restored", "-S", "train.seed=1"
    )
    assert "restored" not in used.runs()
    output = cifarlab(used, "sync")
    assert re.search(r"restored\s+dvc exp apply \w{10}\s+\w{32}\s+logged", output)
    restored, original = (content(used, used.runs()[name]) for name in ("restored", "other-seed"))
    for part in ("epochs", "metrics", "params", "artifacts", "inputs", "models"):
        assert restored[part] == original[part]


@pytest.mark.slow
def test_the_run_leads_to_the_experiment_and_back(used: Project) -> None:
    output = cifarlab(used, "sync")
    run = used.runs()["other-seed"]
    [restored_by] = re.findall(rf"(dvc exp apply [\w-]+)\s+{run.info.run_id}", output)
    used.run(*restored_by.split())
    assert "seed: 1" in (used.folder / "params.yaml").read_text()


@pytest.mark.slow
def test_tracking_that_was_off_is_logged_later_for_the_workspace(used: Project) -> None:
    used.edit("train", seed=2)
    assert used.dvc("repro", MLFLOW_TRACKING_URI="http://127.0.0.1:9").count("warning: MLflow") == 3
    output = cifarlab(used, "sync")
    assert re.search(r"workspace\s+\w{32}\s+logged", output)
    [experiment] = used.client().search_experiments(filter_string="name = 'cifarlab'")
    [run] = used.client().search_runs([experiment.experiment_id], "params.`train.seed` = '2'")
    assert run.info.status == "FINISHED"
    assert "accuracy/test" in run.data.metrics
    # params.yaml has changed, but the outputs are still those of the old parameters.
    used.edit("train", seed=3)
    assert re.search(r"workspace\s+\w{32}\s+was there", cifarlab(used, "sync"))
    used.lose_store()
    assert "changed since its pipeline ran" in cifarlab(used, "sync", code=1)
    used.run("git", "commit", "--quiet", "--all", "--message=results, and what comes next")
    assert "its params.yaml is not what ran" in cifarlab(used, "sync", code=1)


@pytest.mark.slow
def test_commits_of_an_older_version_can_be_verified_and_do_not_fail_sync(used: Project) -> None:
    """Their parameters are not valid any more: a new one was added."""
    old = used.run("git", "rev-parse", "HEAD").stdout.strip()
    sections = used.folder / "src/cifarlab/params/sections.py"
    text = sections.read_text("utf-8")
    sections.write_text(text.replace("    epochs: Count\n", "    epochs: Count\n    new: int\n"))
    used.edit("train", new=1)
    used.dvc("repro")
    used.run("git", "commit", "--quiet", "--all", "--message=a new parameter")
    assert f"identical: 14 files of {old}" in cifarlab(used, "verify", old)
    output = cifarlab(used, "sync")
    # Evaluation and figures of the new commit were in DVC's cache.
    assert (output.count("was there"), output.count(" logged\n")) == (3, 1)
    assert "no experiment or commit has this run" not in output
    used.lose_store()
    output = cifarlab(used, "sync")
    assert output.count("of another version, and can be logged there") == 2
    # The results of the new commit are those of the old one.
    assert (output.count("was there"), output.count(" logged\n")) == (1, 1)


@pytest.mark.slow
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
        r"other-seed\s+dvc exp apply \w{10}\s+"
        r"not logged: it has outputs that are not in DVC's cache; `dvc exp pull REMOTE NAME`",
        output,
    )
    assert re.search(r"commit \w+\s.*logged", output)


def test_a_lock_that_is_damaged_does_not_prevent_logging_the_rest(used: Project) -> None:
    lock = used.folder / "dvc.lock"
    whole = lock.read_text()
    for text, reason in (
        (f"<<<<<<< HEAD\n{whole}=======\n", "dvc.lock holds a merge conflict: edit it, or take"),
        ("stages: 1", "its dvc.lock is damaged"),
    ):
        lock.write_text(text)
        output = cifarlab(used, "sync", code=1)
        assert re.search(rf"workspace\s.*{reason}", output)
        assert re.search(r"commit \w+\s.*was there", output)


def test_verify_repeats_a_commit_to_the_byte(used: Project) -> None:
    runs = len(used.runs())
    status = used.run("git", "status", "--porcelain").stdout
    assert (
        cifarlab(used, "verify", "HEAD").splitlines()[-1]
        == "identical: 14 files of HEAD, the weights included"
    )
    assert (len(used.runs()), used.run("git", "status", "--porcelain").stdout) == (
        runs,
        status,
    )
    assert cifarlab(used, "verify", "nobody", code=1).startswith(
        "error: nobody is not an experiment or a commit"
    )


@pytest.mark.slow
def test_verify_under_other_conditions_compares_the_accuracy(used: Project) -> None:
    """Without vector instructions, as on an old processor, sums have another order."""
    output = cifarlab(
        used, "verify", "HEAD", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41"
    ).splitlines()[-1]
    assert "files differ" in output
    assert "under other conditions (device " in output
    assert "ONEDNN_MAX_CPU_ISA=SSE41)" in output
    assert re.search(r"the first tensor that differs is [\w.]+, by up to [\d.e-]+", output)
    assert re.search(
        r"Test accuracy [\d.]+% then, [\d.]+% now, within ±[\d.]+% for 359 images", output
    )


@pytest.mark.slow
def test_verify_under_the_same_conditions_names_what_differs(used: Project) -> None:
    """Somebody has edited the metrics of the commit by hand."""
    path = used.folder / "metrics/evaluate.json"
    path.write_text(re.sub(r'"accuracy": [\d.]+', '"accuracy": 0.99', path.read_text()))
    used.run("git", "commit", "--quiet", "--all", "--message=better")
    output = cifarlab(used, "verify", "HEAD", code=1).splitlines()[-1]
    assert re.search(
        r"not repeated on .*: 1 of 14 files differ, first metrics/evaluate.json", output
    )


def test_verify_refuses_a_commit_without_its_outputs(used: Project) -> None:
    shutil.rmtree(used.folder.parent / "shared/files")
    output = cifarlab(used, "verify", "HEAD", code=1)
    assert output.startswith("error: HEAD has outputs that are not in DVC's cache; ")
    assert not list(Path(used.folder / ".dvc/tmp").glob("scratch-*"))


# Which run belongs to which commit


def table(project: Project, *arguments: str, code: int = 0) -> list[str]:
    """Return the lines of `cifarlab sync` after its head."""
    return cifarlab(project, "sync", *arguments, code=code).splitlines()[1:]


@pytest.mark.slow
def test_commits_that_share_a_training_have_their_own_runs(used: Project) -> None:
    used.edit("evaluate", calibration_bins=2)
    used.dvc("repro")
    used.run("git", "commit", "--quiet", "--all", "--message=2 bins")
    for lost in (False, True):
        if lost:
            used.lose_store()
        table(used)
        once = database(used)
        rows = [row for row in table(used) if row.lstrip().startswith("commit")]
        assert database(used) == once  # a second sync changes nothing
        assert len(rows) == 2
        for row in rows:
            commit, run_id = re.findall(r"commit (\w+) .* (\w{32}) ", row)[0]
            run = used.client().get_run(run_id)
            file = used.run("git", "show", f"{commit}:metrics/evaluate.json").stdout
            error = json.loads(file)["calibration_error"]
            assert run.data.metrics["test_calibration_error"] == error
            params = yaml.safe_load(used.run("git", "show", f"{commit}:params.yaml").stdout)
            bins = params["evaluate"]["calibration_bins"]
            assert run.data.params["evaluate.calibration_bins"] == str(bins)


@pytest.mark.slow
def test_experiments_of_one_name_on_two_commits_have_their_own_runs(used: Project) -> None:
    used.run("git", "commit", "--quiet", "--allow-empty", "--message=another")
    used.dvc("exp", "run", "--temp", "--name", "other-seed", "-S", "train.seed=1")
    table(used)
    runs = [run for run in used.all_runs() if run.data.tags["dvc.exp.name"] == "other-seed"]
    assert len({run.data.tags["dvc.exp.baseline"] for run in runs}) == len(runs) == 2
    assert all("was there" in row for row in table(used))


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "Running stage 'evaluate'",
        "test accuracy",  # the last line of evaluate
        "Running stage 'plot'",
        "mistakes.png",  # then DVC writes its lock
    ],
)
def test_an_unnamed_experiment_that_was_killed_late_and_repeated_has_one_run(
    used: Project, line: str
) -> None:
    before = {run.info.run_id for run in used.all_runs()}
    command = ("dvc", "exp", "run", "-S", "train.seed=8")
    with used.start(*command) as killed:
        assert killed.wait_for(line)
        killed.end(signal.SIGKILL)
    used.run(*command)
    table(used)
    [run] = [run for run in used.all_runs() if run.info.run_id not in before]
    assert run.info.status == "FINISHED"
    assert run.data.tags["dvc.exp.name"] in used.dvc("exp", "list", "--name-only").split()
    assert all("was there" in row for row in table(used))


@pytest.mark.slow
def test_a_run_without_a_process_is_ended_by_sync(used: Project) -> None:
    used.edit("train", epochs=200)
    with used.start("python", "-m", "stages.train", DVC_EXP_NAME="killed") as killed:
        assert killed.wait_for("epoch 1/200")
        used.wait_for_a_run()
        assert "running, but" in cifarlab(used, "sync")
        killed.end(signal.SIGKILL)
    assert used.runs()["killed"].info.status == "RUNNING"
    assert "killed, but" in cifarlab(used, "sync", "--check")
    assert used.runs()["killed"].info.status == "RUNNING"
    assert "killed, but" in cifarlab(used, "sync")
    assert used.runs()["killed"].info.status == "KILLED"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_stage_that_is_told_to_stop_ends_its_run(used: Project, number: signal.Signals) -> None:
    used.edit("train", epochs=200)
    with used.start("python", "-m", "stages.train", DVC_EXP_NAME="stopped") as stopped:
        assert stopped.wait_for("epoch 1/200")
        assert stopped.end(number) == 1
    assert used.runs()["stopped"].info.status == "KILLED"


@pytest.mark.slow
def test_an_experiment_in_the_workspace_has_one_run_after_the_store_was_lost(used: Project) -> None:
    used.dvc("exp", "run", "--name", "here", "-S", "evaluate.calibration_bins=3")
    assert used.runs().keys() == {"", "other-seed", "with-mirror", "here"}
    used.lose_store()
    table(used)
    assert used.runs().keys() == {"", "other-seed", "with-mirror", "here"}


@pytest.mark.slow
@pytest.mark.parametrize("everything", [True, False])
def test_artifacts_that_were_lost_are_logged_again(used: Project, everything: bool) -> None:
    runs = used.runs()
    whole = {name: content(used, run)["artifacts"] for name, run in runs.items()}
    folder = used.folder / "mlartifacts"
    [figure] = (folder / runs[""].info.run_id).rglob("confusion.png")
    [predictions] = (folder / runs["other-seed"].info.run_id).rglob("predictions.csv")
    [output] = runs["with-mirror"].outputs.model_outputs
    [model] = (folder / "models" / output.model_id).rglob("model.pt2")
    if everything:
        shutil.rmtree(folder)
    else:  # a figure, half a table, and a model, each of another run
        figure.unlink()
        predictions.write_bytes(predictions.read_bytes()[:100])
        shutil.rmtree(model.parents[1])
    assert sum("missing" in row for row in table(used, "--check", code=1)) == 3
    assert sum(row.endswith("logged") for row in table(used)) == 3
    assert whole == {name: content(used, run)["artifacts"] for name, run in used.runs().items()}
    assert figure.exists()
    assert model.exists()
    assert all("was there" in row for row in table(used, "--check"))


# Other kinds of checkouts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["subfolder", "detached worktree", "submodule"])
def test_every_kind_of_checkout_works(used: Project, kind: str, tmp_path: Path) -> None:
    git = partial(used.run, "git", "-c", "protocol.file.allow=always")
    other = tmp_path / "other"
    folder = other / "inner"
    if kind == "detached worktree":
        folder = other
        git("worktree", "add", "--quiet", "--detach", str(other))
    elif kind == "submodule":
        git("init", "--quiet", str(other))
        git("-C", str(other), "submodule", "--quiet", "add", str(used.folder), "inner")
        git("-C", str(other), "commit", "--quiet", "--message=outer")
    elif kind == "subfolder":
        git("init", "--quiet", str(other))
        archive = tmp_path / "archive.tar"
        git("archive", f"--output={archive}", "--prefix=inner/", "HEAD")
        git("-C", str(other), "init")
        shutil.unpack_archive(archive, other)
        git("-C", str(other), "add", "--all")
        git("-C", str(other), "commit", "--quiet", "--message=outer")
    project = Project(folder, used.fork_server)
    project.dvc("cache", "dir", "--local", str(used.folder.parent / "shared"))
    project.dvc("repro", "--force")
    project.run("git", "commit", "--quiet", "--all", "--allow-empty", "--message=there")
    project.dvc("exp", "run", "--temp", "--name", "try", "-S", "evaluate.calibration_bins=3")
    assert {"", "try"} <= project.runs().keys()
    cifarlab(project, "sync")
    output = cifarlab(project, "sync")
    assert re.search(r"commit \w+\s.*was there", output)
    assert re.search(r"try\s+dvc exp apply \w{10}\s+\w{32}\s+was there", output)
    assert cifarlab(project, "verify", "try").splitlines()[-1].startswith("identical: ")


@pytest.mark.slow
def test_a_shallow_clone_loses_no_experiment(used: Project, tmp_path: Path) -> None:
    """DVC cannot bring the commit of a temporary copy into it, and does not say so."""
    other = tmp_path / "other"
    used.run("git", "clone", "--quiet", "--depth=1", f"file://{used.folder}", str(other))
    project = Project(other, used.fork_server)
    project.dvc("cache", "dir", "--local", str(used.folder.parent / "shared"))
    change = ("-S", "evaluate.calibration_bins=3")
    output = project.dvc("exp", "run", "--temp", *change, check=False)
    assert "is a shallow clone, in which DVC loses this experiment" in output
    assert "Traceback" not in output
    project.dvc("exp", "run", "--name", "try", *change)
    table(project)
    assert project.runs()["try"].info.status == "FINISHED"
    assert all("was there" in row for row in table(project))


@pytest.mark.slow
def test_prune_removes_experiments_from_dvc_its_cache_and_mlflow(used: Project) -> None:
    (used.folder / "docs/studies").mkdir(parents=True)
    (used.folder / "docs/studies/one.csv").write_text("experiment,code\nother-seed,0\n")
    used.dvc("exp", "run", "--temp", "--name", "goes", "-S", "train.seed=6")
    goes = used.runs()["goes"].info.run_id
    # DVC's own folder: a cache that other checkouts may use would be left alone.
    cache, artifacts = used.folder / ".dvc/cache", used.folder / "mlartifacts" / goes
    shutil.copytree(used.folder.parent / "shared", cache, dirs_exist_ok=True)
    used.dvc("cache", "dir", "--local", str(cache))
    before = set(cache.rglob("*"))
    options = ("prune", "--best", "0", "--keep", "with-mirror")
    listed = cifarlab(used, *options)
    assert re.search(r"goes .*goes\n", listed)
    assert re.search(r"other-seed .*stays: in a study", listed)
    assert re.search(r"with-mirror .*stays: named", listed)
    assert "nothing was removed" in listed
    assert list(artifacts.rglob("confusion.png"))
    assert "removed: 1 experiments, 1 runs" in cifarlab(used, *options, "--remove")
    assert not list(artifacts.rglob("*.*"))
    assert used.runs().keys() == {"", "other-seed", "with-mirror"}
    assert set(used.dvc("exp", "list", "--name-only").split()) == {"other-seed", "with-mirror"}
    assert 0 < len([path for path in before if not path.exists()]) < len(before) / 2
    assert all("was there" in row for row in table(used))
    used.lose_store()
    assert all(
        row.endswith("logged") for row in table(used)
    )  # their outputs are still in the cache
    assert "there is no experiment typo" in cifarlab(used, "prune", "--keep", "typo", code=1)


@pytest.mark.slow
def test_experiments_that_are_renamed_removed_made_branches_or_pushed(
    used: Project, tmp_path: Path
) -> None:
    used.dvc("exp", "branch", "other-seed", "a-branch")
    assert any(re.search(r"commit \w+ .*was there", row) for row in table(used))
    used.dvc("exp", "rename", "other-seed", "renamed")
    rows = "\n".join(table(used))
    assert re.search(r"renamed\s+dvc exp apply \w{10}\s+\w{32}\s+logged", rows)
    assert all("was there" in row for row in table(used) if row.lstrip().startswith("renamed"))
    used.dvc("exp", "remove", "renamed")
    rows = "\n".join(table(used))
    assert "finished, but no experiment or commit has this run" not in re.sub(
        r".*(renamed|other-seed) of.*", "", rows
    )
    # To another checkout: experiment by Git, its files by a DVC remote.
    remote, other = tmp_path / "remote.git", tmp_path / "other"
    used.run("git", "init", "--quiet", "--bare", str(remote))
    used.run("git", "remote", "add", "origin", str(remote))
    used.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    used.run("git", "commit", "--quiet", "--all", "--message=remote")
    used.run("git", "push", "--quiet", "origin", "main")
    used.dvc("push", "--all-commits")
    used.dvc("exp", "push", "origin", "with-mirror")
    used.run("git", "clone", "--quiet", "--branch=main", str(remote), str(other))
    project = Project(other, used.fork_server)
    project.dvc("exp", "pull", "origin", "with-mirror")
    project.dvc("pull")
    rows = "\n".join(table(project))
    assert re.search(r"with-mirror\s+dvc exp apply \w{10}\s+\w{32}\s+logged", rows)
    before, after = (p.runs()["with-mirror"].data.metrics for p in (used, project))
    names = {name for name in before if not name.startswith(("system/", "epoch_seconds"))}
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert all("was there" in row for row in table(project))

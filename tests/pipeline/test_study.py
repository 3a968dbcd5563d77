"""A whole study that is killed in the middle, and a search, in a checkout with a real DVC."""

import os
import re
import signal
import subprocess

import pandas as pd
import pytest
import yaml

from tests.support.project import Project, move_into_a_repository

STUDY = ("python", "-m", "cifarlab.cli", "study", "demo")
LAST = "demo-another-label-smoothing-2"


def first_lines(project: Project, count: int) -> list[str]:
    """Start the study, return the first lines that it prints, and kill it."""
    with subprocess.Popen(
        STUDY,
        cwd=project.folder,
        env=project.env | {"PYTHONPATH": "src", "PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(count)]
        os.killpg(process.pid, signal.SIGKILL)
    return lines


def python(project: Project, code: str) -> str:
    return project.run("python", "-c", code, PYTHONPATH="src").stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_study_continues_and_finds_the_known_answer(project: Project) -> None:
    """In a subfolder of a repository, where paths of Git and of the project differ."""
    project.run("git", "checkout", "--quiet", "params.yaml")
    project = move_into_a_repository(project)
    lines = first_lines(project, 4)  # the question, the plan, two points
    assert lines[1] == "9 trainings, 0 done, 9 to run\n"
    assert lines[3] == "demo-four-epochs-1 done, 7 left\n"

    lines = project.run(*STUDY, seconds=800, PYTHONPATH="src").stdout.splitlines()
    assert lines[1] == "9 trainings, 2 done, 7 to run"
    assert len([line for line in lines if re.match(r"demo-\S+ done, \d left$", line)]) == 7
    page = (project.folder / "docs/studies/demo.md").read_text()
    # One variant has an effect, the other one has none.
    assert re.search(r"\| one epoch \|.*\*\*different\*\*", page)
    assert re.search(r"\| another label smoothing \|.*\| (undecided|equivalent, p = )", page)
    assert "worse: one epoch (-" in page
    assert re.search(r"(undecided|equivalent within 1 point): another label smoothing", page)
    table = pd.read_csv(project.folder / "docs/studies/demo.csv")
    assert len(table) == 9
    assert (project.folder / "docs/studies/demo.png").stat().st_size > 20_000

    # In MLflow the points are the children of one run, which has the files of the answer.
    client = project.client()
    [experiment] = client.search_experiments(filter_string="name = 'cifarlab'")
    [parent] = client.search_runs([experiment.experiment_id], "tags.`study.parent` = 'demo'")
    children = client.search_runs([experiment.experiment_id], "tags.study = 'demo'")
    assert {run.data.tags["dvc.exp.name"] for run in children} == set(table.experiment)
    assert len(children) == 9
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    files = {"demo.md", "demo.png", "demo.csv", "demo-epochs.csv"}
    assert project.artifacts(parent.info.run_id) == files
    for run in children:
        [row] = table[table.experiment == run.data.tags["dvc.exp.name"]].to_dict("records")
        assert run.data.metrics["accuracy/test"] == pytest.approx(row["accuracy"])
    assert set(table.experiment) <= set(project.dvc("exp", "list", "--name-only").split())

    # Running a point again takes it from DVC's run cache: nothing trains, and it replaces the
    # experiment.
    load = "from cifarlab.studies import points; point = points.load('demo')[1][-1]"
    run = "executors.run({point.experiment: point.changes}, 1, '', print)"
    python(project, f"{load}; from cifarlab.studies import executors; {run}")
    assert "epoch" not in (project.folder / f".dvc/tmp/{LAST}.log").read_text()
    assert project.dvc("exp", "list", "--name-only").split().count(LAST) == 1

    # An experiment that MLflow lacks gets a run, with the times and the machine of its training.
    project.lose_store()
    read = "[(row, _)] = points.finished([point])"
    shown = python(project, f"{load}; {read}; print(row['seconds'], row['machine'], sep=';')")
    seconds, machine = shown.strip().splitlines()[-1].split(";")
    last = table.set_index("experiment").loc[LAST]
    assert float(seconds) == pytest.approx(last.seconds, rel=1e-4)
    assert machine == last.machine

    # On another commit, and on a machine that has the tables only, nothing runs again.
    project.run("git", "add", "docs/studies")
    project.run("git", "commit", "--quiet", "--message", "the answer of the study")
    project.dvc("exp", "remove", "--all-commits")
    project.lose_store()
    again = project.run(*STUDY, seconds=100, PYTHONPATH="src").stdout
    assert "9 trainings, 9 done, 0 to run" in again
    assert (project.folder / "docs/studies/demo.md").read_text() == page
    # With other parameters it is another question.
    params = project.folder / "params.yaml"
    params.write_text(params.read_text().replace("  momentum: 0.85", "  momentum: 0.8"))
    assert first_lines(project, 2)[1] == "9 trainings, 0 done, 9 to run\n"


SEARCH = {
    "question": "Which network?",
    "base": {
        "data.name": "digits",
        "model.layers": 2,
        "train.flip": "none",
        "train.batch_size": 64,
        "tracking.log_model": False,
    },
    "space": {
        "model.widths": [[8, 16], [8, 24]],
        "train.lr": {"low": 0.1, "high": 0.4, "log": True},
    },
    "rungs": [1, 2],
    "seconds": 300,
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_continues_and_names_the_best_trial_within_its_time(project: Project) -> None:
    project.run("git", "checkout", "--quiet", "params.yaml")
    path = project.folder / "studies/search.yaml"
    command = ("python", "-m", "cifarlab.cli", "search", "search")
    for trials in (1, 2):
        path.write_text(yaml.safe_dump(SEARCH | {"trials": trials}))
        output = project.run(*command, seconds=250, PYTHONPATH="src").stdout
        assert f"{trials - 1} of {trials} trials done" in output
        assert f"search-{trials - 1}-1: " in output
        assert output.count("on validation") in (1, 2)
    page = (project.folder / "docs/studies/search.md").read_text()
    experiments = set(re.findall(r"^\| (search-\d-\d) \|", page, re.MULTILINE))
    assert {name.split("-")[1] for name in experiments} == {"0", "1"}
    assert "search-0-2" in experiments
    every_rung = set(project.dvc("exp", "list", "--name-only").split())
    assert experiments | {"search-0-1"} <= every_rung
    best = max(re.findall(r"^\| search-\d-2 \| 2 \| ([\d.]+)%", page, re.MULTILINE), key=float)
    assert f"{best}% on validation" in page
    assert "Images of digits." in page
    head = project.run("git", "rev-parse", "--short=7", "HEAD").stdout.strip()
    assert re.search(rf"^Commit {head}, machine: .* threads, ", page, re.MULTILINE)
    client = project.client()
    [experiment] = client.search_experiments(filter_string="name = 'cifarlab'")
    children = client.search_runs([experiment.experiment_id], "tags.study = 'search'")
    assert {run.data.tags["dvc.exp.name"] for run in children} == every_rung

    path.write_text(yaml.safe_dump(SEARCH | {"trials": 3, "seconds": 1e-9}))
    output = project.run(*command, seconds=250, PYTHONPATH="src", check=False).stdout
    assert "no trial finished within 1e-09 s" in output
    for content, message in (
        ("question: ?", "search.yaml is not valid YAML in line 1"),
        ("question: a?", "search.yaml is not a search"),
        ("variants: {}", "search.yaml is a study; `cifarlab study search` runs it"),
    ):
        path.write_text(content)
        assert message in project.run(*command, PYTHONPATH="src", check=False).stdout

"""A whole study, killed in the middle: `make study NAME=demo` in a checkout, with an answer that is known."""

import os
import re
import signal
import subprocess

import pandas as pd
import pytest
import yaml

from tests.pipeline.conftest import Project

COMMAND = ("python", "-m", "cifarlab", "study", "demo")


@pytest.mark.timeout(900)
def test_a_study_that_was_killed_goes_on_and_finds_what_is_there(project: Project) -> None:
    project.run("git", "checkout", "--quiet", "params.yaml")
    env = project.env | {"PYTHONPATH": "src"}
    with subprocess.Popen(COMMAND, cwd=project.folder, env=env, text=True, stdout=subprocess.PIPE, start_new_session=True) as killed:
        assert killed.stdout is not None
        told = [killed.stdout.readline() for _ in range(4)]  # the question, the plan, two points
        os.killpg(killed.pid, signal.SIGKILL)
    assert told[1] == "9 points, 0 done, 9 to run\n"
    assert told[3].startswith("demo-four-epochs-1 done, 7 left")

    told = project.run(*COMMAND, seconds=800, PYTHONPATH="src").stdout.splitlines()
    assert told[1].startswith("9 points, 2 done, 7 to run")
    assert len([line for line in told if " done, " in line and line.startswith("demo-")]) == 7
    page = (project.folder / "docs/studies/demo.md").read_text()
    # The effect that was planted, and the one that was not.
    assert re.search(r"\| one epoch \|.*\*\*yes\*\*", page)
    assert re.search(r"\| another label smoothing \|.*\| no, p = ", page)
    assert "worse: one epoch (-" in page
    assert "not to be told from noise: another label smoothing" in page
    table = pd.read_csv(project.folder / "docs/studies/demo.csv")
    assert len(table) == 9
    assert (project.folder / "docs/studies/demo.png").stat().st_size > 20_000

    # In MLflow the points are the children of one run, which holds the answer.
    client = project.client()
    [experiment] = client.search_experiments(filter_string="name = 'cifarlab'")
    [parent] = client.search_runs([experiment.experiment_id], "tags.`study.parent` = 'demo'")
    children = client.search_runs([experiment.experiment_id], "tags.study = 'demo'")
    assert {run.data.tags["dvc.exp.name"] for run in children} == set(table.experiment)
    assert len(children) == 9
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert project.artifacts(parent.info.run_id) == {"demo.md", "demo.png", "demo.csv", "demo-epochs.csv"}
    for run in children:
        [row] = table[table.experiment == run.data.tags["dvc.exp.name"]].to_dict("records")
        assert run.data.metrics["test_accuracy"] == pytest.approx(row["accuracy"])
    assert set(table.experiment) <= set(project.dvc("exp", "list", "--name-only").split())

    # A point whose row was lost is in DVC's run cache: the experiment is made anew, nothing trains.
    again = "from cifarlab import studies; studies.run_point(studies.load('demo')[1][-1], '--temp')"
    project.run("python", "-c", again, PYTHONPATH="src")
    said = (project.folder / ".dvc/tmp/demo-another-label-smoothing-2.log").read_text()
    assert "epoch" not in said
    assert project.dvc("exp", "list", "--name-only").split().count("demo-another-label-smoothing-2") == 1

    # So it may never have had a run of its own: it gets one, with the times and the machine of its training.
    project.lose_store()
    reads = "[(row, _)] = studies.read_points(studies.load('demo')[1][-1:]); print(row['seconds'], row['machine'], row['data'], sep=';')"
    seconds, *others = project.run("python", "-c", f"from cifarlab import studies; {reads}", PYTHONPATH="src").stdout.strip().split(";")
    last = table.set_index("experiment").loc["demo-another-label-smoothing-2"]
    assert float(seconds) == pytest.approx(last.seconds, rel=1e-4)
    assert others == [last.machine, "digits"]

    # Asked again, nothing runs, and the same is written: on another commit, and by another machine, which has the tables only.
    project.run("git", "add", "docs/studies")
    project.run("git", "commit", "--quiet", "--message", "what the study says")
    project.dvc("exp", "remove", "--all-commits")
    project.lose_store()
    again = project.run(*COMMAND, seconds=100, PYTHONPATH="src").stdout
    assert "9 points, 9 done, 0 to run" in again
    assert (project.folder / "docs/studies/demo.md").read_text() == page
    # Other parameters are another question.
    params = project.folder / "params.yaml"
    params.write_text(params.read_text().replace("  momentum: 0.85", "  momentum: 0.8"))
    with subprocess.Popen(COMMAND, cwd=project.folder, env=env, text=True, stdout=subprocess.PIPE, start_new_session=True) as killed:
        assert killed.stdout is not None
        assert [killed.stdout.readline() for _ in range(2)][1] == "9 points, 0 done, 9 to run\n"
        os.killpg(killed.pid, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_a_search_keeps_what_it_has_tried_and_names_the_best_within_its_time(project: Project) -> None:
    project.run("git", "checkout", "--quiet", "params.yaml")
    search = {
        "question": "Which network?",
        "base": {"data.name": "digits", "model.layers": 2, "train.flip": "none", "train.batch_size": 64, "tracking.log_model": False},
        "space": {"model.widths": [[8, 16], [8, 24]], "train.lr": {"low": 0.1, "high": 0.4, "log": True}},
        "rungs": [1, 2],
        "seconds": 300,
        "trials": 1,
    }
    path = project.folder / "studies/search.yaml"
    command = ("python", "-m", "cifarlab", "search", "search")
    for trials in (1, 2):
        path.write_text(yaml.safe_dump(search | {"trials": trials}))
        told = project.run(*command, seconds=250, PYTHONPATH="src").stdout
        assert f"{trials - 1} of {trials} trials done" in told
        assert f"search-{trials - 1}-1: " in told
        assert told.count("on validation") in (1, 2)
    page = (project.folder / "docs/studies/search.md").read_text()
    experiments = set(re.findall(r"^\| (search-\d-\d) \|", page, re.MULTILINE))
    assert {name.split("-")[1] for name in experiments} == {"0", "1"}
    assert "search-0-2" in experiments
    every_rung = set(project.dvc("exp", "list", "--name-only").split())
    assert experiments | {"search-0-1"} <= every_rung
    best = max(re.findall(r"^\| search-\d-2 \| 2 \| ([\d.]+)%", page, re.MULTILINE), key=float)
    assert f"{best}% on validation" in page
    client = project.client()
    [experiment] = client.search_experiments(filter_string="name = 'cifarlab'")
    children = client.search_runs([experiment.experiment_id], "tags.study = 'search'")
    assert {run.data.tags["dvc.exp.name"] for run in children} == every_rung

    path.write_text(yaml.safe_dump(search | {"trials": 3, "seconds": 1e-9}))
    said = project.run(*command, seconds=250, PYTHONPATH="src", check=False).stdout
    assert "no trial came to its end within 1e-09 s" in said
    for content, told in (("question: ?", "search.yaml is not valid YAML in line 1"), ("question: a?", "search.yaml is no search")):
        path.write_text(content)
        assert told in project.run(*command, PYTHONPATH="src", check=False).stdout

"""A whole study, killed in the middle: `make study NAME=demo` in a checkout, with an answer that is known."""

import os
import re
import signal
import subprocess

import pandas as pd
import pytest

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
    assert project.artifacts(parent.info.run_id) == {"demo.md", "demo.png", "demo.csv"}
    for run in children:
        [row] = table[table.experiment == run.data.tags["dvc.exp.name"]].to_dict("records")
        assert run.data.metrics["test_accuracy"] == pytest.approx(row["accuracy"])
    assert set(table.experiment) <= set(project.dvc("exp", "list", "--name-only").split())

    # Asked again, nothing runs, and the same is written.
    again = project.run(*COMMAND, seconds=100, PYTHONPATH="src").stdout
    assert "9 points, 9 done, 0 to run" in again
    assert (project.folder / "docs/studies/demo.md").read_text() == page

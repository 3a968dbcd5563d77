"""The commands that users type, with the real DVC in a temporary Git repository.

The first tests only read a checkout after `dvc repro`; tests that change it use a copy.
"""

import hashlib
import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from sklearn.metrics import accuracy_score

from tests.support.project import FIGURES, SHARED_ARTIFACTS, TABLES, Project, Template, stages_run


def test_repro_makes_everything(reproduced: Template) -> None:
    project, notes = reproduced
    assert stages_run(notes["output"]) == ["download", "train", "evaluate", "plot"]

    images = np.load(project.folder / "data/train_images.npy", mmap_mode="r")
    assert images.dtype == np.uint8
    assert images.shape[1:] == (32, 32, 3)
    predictions = pd.read_csv(project.folder / "plots/predictions.csv")
    metrics = json.loads((project.folder / "metrics/evaluate.json").read_text())
    assert metrics["accuracy"] == pytest.approx(
        accuracy_score(predictions["actual"], predictions["predicted"]), abs=1e-6
    )
    assert len(pd.read_csv(project.folder / "plots/history.csv")) == 3
    for figure in FIGURES:
        with Image.open(project.folder / figure.replace("figures", "plots")) as image:
            assert min(image.size) > 150
    # Git tracks only the lock and the metrics; DVC tracks the large files and the figures.
    assert sorted(notes["status"]) == ["dvc.lock", "metrics/evaluate.json", "metrics/train.json"]


def test_the_run_is_in_mlflow(reproduced: Template) -> None:
    project, _ = reproduced
    run = project.runs()[""]
    assert run.info.status == "FINISHED"
    params = yaml.safe_load(project.run("git", "show", "HEAD~1:params.yaml").stdout)
    flat = {
        f"{section}.{key}": "None" if value is None else value
        for section, values in params.items()
        for key, value in values.items()
    }
    assert {key: yaml.safe_load(value) for key, value in run.data.params.items()} == flat
    metrics = json.loads((project.folder / "metrics/evaluate.json").read_text())
    assert run.data.metrics["accuracy/test"] == metrics["accuracy"]
    assert {
        f"per_class/{digit}": accuracy
        for digit, accuracy in json.loads(
            (project.folder / "metrics/per_class.json").read_text()
        ).items()
    }.items() <= run.data.metrics.items()
    history = pd.read_csv(project.folder / "plots/history.csv")
    columns = ["loss/train", "accuracy/train", "loss/val", "accuracy/val", "learning_rate"]
    for name, column in zip(columns, history.columns[1:6], strict=True):
        points = sorted(
            project.client().get_metric_history(run.info.run_id, name),
            key=lambda point: point.step,
        )
        assert [p.step for p in points] == [1, 2, 3]
        assert [p.value for p in points] == pytest.approx(history[column].tolist(), abs=1e-6)
    assert project.artifacts(run.info.run_id) == SHARED_ARTIFACTS
    assert run.info.artifact_uri.startswith((project.folder / "mlartifacts").as_uri())

    tags = run.data.tags
    assert tags["git.commit"] == project.run("git", "rev-parse", "HEAD~1").stdout.strip()
    assert (
        tags["weights.sha256"]
        == hashlib.sha256((project.folder / "models/network.safetensors").read_bytes()).hexdigest()
    )
    assert tags["threads"] == "1"
    assert {
        "device",
        "version.torch",
        "version.mlflow",
        "version.python",
    } <= tags.keys()
    [dataset] = run.inputs.dataset_inputs
    digest = json.loads((project.folder / "data/dataset.json").read_text())["digest"]
    assert dataset.dataset.digest == digest[:32]

    table = json.loads(
        Path(
            project.client().download_artifacts(run.info.run_id, "confusion_matrix.json")
        ).read_text()
    )
    assert np.array(table["data"])[:, 1:].astype(int).sum() == len(
        pd.read_csv(project.folder / "plots/predictions.csv")
    )


def test_the_logged_model_predicts_what_evaluate_wrote(reproduced: Template) -> None:
    project, _ = reproduced
    run = project.runs()[""]
    [output] = run.outputs.model_outputs
    model = project.client().get_logged_model(output.model_id)
    files = {
        path.name
        for path in Path(model.artifact_location.removeprefix("file://")).rglob("*")
        if path.is_file()
    }
    assert "model.pt2" in files
    assert not [name for name in files if name.endswith((".pkl", ".pth"))]
    mlflow.set_tracking_uri(f"sqlite:///{project.folder / 'mlflow.db'}")
    network = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    table = network.predict(np.load(project.folder / "data/test_images.npy"))
    predictions = pd.read_csv(project.folder / "plots/predictions.csv", dtype=str)
    assert list(table["class"]) == list(predictions["predicted"])


def test_repro_again_runs_nothing(finished: Project) -> None:
    lock = (finished.folder / "dvc.lock").read_bytes()
    assert stages_run(finished.dvc("repro")) == []
    assert (finished.folder / "dvc.lock").read_bytes() == lock
    assert not finished.run("git", "status", "--porcelain").stdout


def test_a_changed_plot_runs_plot_only(finished: Project) -> None:
    finished.edit("plot", dpi=50)
    assert stages_run(finished.dvc("repro")) == ["plot"]
    # Both runs show what belongs to their parameters.
    runs = {run.data.params["plot.dpi"]: run for run in finished.all_runs()}
    assert runs.keys() == {"50", "60"}
    sizes = [finished.artifact_size(run, "figures/confusion.png") for run in runs.values()]
    assert (finished.folder / "plots/confusion.png").stat().st_size == min(sizes) < max(sizes)
    assert len(finished.client().get_metric_history(runs["50"].info.run_id, "loss/train")) == 3


def test_a_changed_evaluate_does_not_train(finished: Project) -> None:
    # Another number of bins may change the table that the figures depend on.
    assert stages_run(
        finished.dvc("exp", "run", "--name", "bins", "-S", "evaluate.calibration_bins=10")
    ) in (
        ["evaluate"],
        ["evaluate", "plot"],
    )
    # The train stage did not run in this experiment: its results are logged from its files.
    run = finished.runs()["bins"]
    assert len(finished.client().get_metric_history(run.info.run_id, "loss/train")) == 3
    assert finished.artifacts(run.info.run_id) >= TABLES


def test_a_changed_model_trains_once_and_downloads_nothing(finished: Project) -> None:
    assert stages_run(
        finished.dvc("exp", "run", "--name", "one-layer", "-S", "model.layers=1")
    ) == ["train", "evaluate", "plot"]
    runs = finished.runs()
    run = runs["one-layer"]
    assert run.info.run_name == "one-layer"
    assert run.data.params["model.layers"] == "1"
    assert (
        run.data.tags["dvc.exp.baseline"]
        == run.data.tags["git.commit"]
        == finished.run("git", "rev-parse", "HEAD").stdout.strip()
    )
    # The table of all experiments has the accuracy that MLflow has.
    table = finished.dvc("exp", "show", "--csv")
    [line] = [line for line in table.splitlines() if "one-layer" in line]
    assert str(run.data.metrics["accuracy/test"]) in line.split(",")
    # DVC computes the difference to the baseline.
    row = json.loads(finished.dvc("metrics", "diff", "HEAD", "one-layer", "--json"))[
        "metrics/evaluate.json"
    ]["accuracy"]
    assert row["old"] == runs[""].data.metrics["accuracy/test"]
    assert row["new"] == run.data.metrics["accuracy/test"]
    assert row["diff"] == pytest.approx(row["new"] - row["old"])
    # The way back from an experiment that README.md names.
    finished.run("git", "restore", "params.yaml", "dvc.lock", "metrics")
    finished.dvc("checkout", "--quiet")
    assert not finished.run("git", "status", "--porcelain").stdout
    finished.dvc("status", "--quiet")  # exits with 1 if an output is not that of the commit
    # The same experiment is not trained again.
    output = finished.dvc("exp", "run", "--temp", "--name", "again", "-S", "model.layers=1")
    assert stages_run(output) == []
    assert "Stage 'train' is cached" in output


@pytest.mark.slow
def test_a_temporary_experiment_reaches_the_same_store(finished: Project) -> None:
    finished.dvc("exp", "run", "--temp", "--name", "temp", "-S", "model.activation=relu")
    runs = finished.runs()
    run = runs["temp"]
    assert run.info.status == "FINISHED"
    assert run.data.params["model.activation"] == "relu"
    assert finished.artifacts(run.info.run_id) == SHARED_ARTIFACTS
    assert run.info.artifact_uri.startswith((finished.folder / "mlartifacts").as_uri())
    assert "temp" in finished.dvc("exp", "list", "--name-only").split()
    assert run.data.tags["weights.sha256"] != runs[""].data.tags["weights.sha256"]


@pytest.mark.slow
def test_forcing_the_same_training_logs_nothing_twice(finished: Project) -> None:
    before = finished.runs()[""]
    lock = (finished.folder / "dvc.lock").read_bytes()
    assert stages_run(finished.dvc("repro", "--force")) == ["download", "train", "evaluate", "plot"]
    assert (finished.folder / "dvc.lock").read_bytes() == lock
    after = finished.runs()[""]
    assert after.info.run_id == before.info.run_id
    for name in ("loss/train", "accuracy/test", "per_class/3"):
        points = finished.client().get_metric_history(after.info.run_id, name)
        assert len(points) == len({point.step for point in points})
    assert len(after.outputs.model_outputs) == 1


def test_plots_diff_shows_both_confusion_matrices_in_a_browser(finished: Project) -> None:
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if chromium is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    finished.run("python", "-m", "cifarlab.cli", "page", PYTHONPATH="src")  # `make setup` does this
    for name, size in (("coarse", 50), ("fine", 70)):
        finished.dvc("exp", "run", "--temp", "--name", name, "-S", f"plot.dpi={size}")
    finished.dvc("plots", "diff", "coarse", "fine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        outside: list[str] = []
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("file:", "data:", "blob:"))
                else outside.append(request.url)
            ),
        )
        page.goto((finished.folder / "dvc_plots/index.html").as_uri())
        page.wait_for_function(
            "document.querySelectorAll('.vega-embed canvas, .vega-embed svg').length >= 5"
        )
        text = page.content()
        for title in ("Confusion matrix", "Recall", "Loss", "Accuracy", "Accuracy of each class"):
            assert title in text
        loaded = page.eval_on_selector_all(
            "img", "images => images.map(i => [i.src, i.complete && i.naturalWidth > 0])"
        )
        browser.close()
    assert not outside, "the page must open offline"
    pictures = {Path(src).name for src, complete in loaded if complete}
    for experiment in ("coarse", "fine"):
        assert any(experiment in name and "confusion.png" in name for name in pictures), pictures
    assert len(pictures) == 12


@pytest.mark.slow
def test_make_results_copies_the_evidence(finished: Project) -> None:
    finished.run("python", "-m", "bench.keep", "small", PYTHONPATH="src")
    kept = finished.folder / "docs/results/small"
    for name in ("params.yaml", "dvc.lock", "metrics/evaluate.json", "plots/confusion.png"):
        assert (kept / Path(name).name).read_bytes() == (finished.folder / name).read_bytes()
    machine = json.loads((kept / "machine.json").read_text())
    assert machine["threads"] == "1"
    assert len(machine["epoch_seconds"]) == 3
    # The target folder is emptied first, so its name must not lead elsewhere.
    for name in (".", "..", "../metrics", str(finished.folder)):
        refused = finished.run("python", "-m", "bench.keep", name, check=False, PYTHONPATH="src")
        assert refused.returncode == 1
        assert "NAME" in refused.stdout
    assert (kept / "params.yaml").exists()
    finished.edit("train", seed=1)
    refused = finished.run("python", "-m", "bench.keep", "small", check=False, PYTHONPATH="src")
    assert refused.returncode == 1
    assert "dvc repro" in refused.stdout


@pytest.mark.slow
def test_the_page_about_confused_classes_says_where_it_comes_from(finished: Project) -> None:
    project, command = finished, ("python", "studies/confusion.py")
    commit = project.run("git", "rev-parse", "HEAD").stdout[:7]
    page = project.run(*command, PYTHONPATH="src").stdout.strip()
    assert page == "docs/studies/confusion.md"
    text = (project.folder / page).read_text("utf-8")
    assert f"One run, commit {commit}, machine: " in text
    assert "1 threads" in text
    project.edit("plot", dpi=40)
    project.dvc("repro", "--quiet")
    project.run(*command, PYTHONPATH="src")
    text = (project.folder / page).read_text("utf-8")
    assert f"One run, commit {commit} with changes of params.yaml, machine: " in text
    project.edit("train", epochs=4)
    refused = project.run(*command, check=False, PYTHONPATH="src")
    assert refused.returncode == 1
    assert refused.stdout.splitlines()[-1].startswith("error: the outputs are not those of params")

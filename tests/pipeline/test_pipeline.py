"""The four things that users type, through the real DVC in a temporary git repository.

The tests of this file share one checkout and build on each other, in order: a pipeline run costs half a minute.
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

from tests.pipeline.conftest import Project, stages_run

FIGURES = {f"figures/{name}.png" for name in ("confusion", "confusion_recall", "curves", "mistakes", "per_class", "training_images")}
TABLES = {f"tables/{name}.csv" for name in ("confusion", "history", "per_class", "predictions")}
SHARED_ARTIFACTS = FIGURES | TABLES | {"confusion_matrix.json"}


def test_repro_makes_everything(project: Project) -> None:
    assert stages_run(project.dvc("repro")) == ["download", "train", "evaluate", "plot"]

    images = np.load(project.folder / "data/train_images.npy", mmap_mode="r")
    assert images.dtype == np.uint8
    assert images.shape[1:] == (32, 32, 3)
    predictions = pd.read_csv(project.folder / "plots/predictions.csv")
    metrics = json.loads((project.folder / "metrics/evaluate.json").read_text())
    assert metrics["accuracy"] == pytest.approx(accuracy_score(predictions["actual"], predictions["predicted"]), abs=1e-6)
    assert len(pd.read_csv(project.folder / "plots/history.csv")) == 3
    for figure in FIGURES:
        with Image.open(project.folder / figure.replace("figures", "plots")) as image:
            assert min(image.size) > 150
    # Git sees nothing but the lock and the metrics: what is large or drawn is DVC's.
    status = project.run("git", "status", "--porcelain", "--untracked-files=all").stdout.split()[1::2]
    assert sorted(status) == ["dvc.lock", "metrics/evaluate.json", "metrics/train.json"]


def test_the_run_is_in_mlflow(project: Project) -> None:
    run = project.runs()[""]
    assert run.info.status == "FINISHED"
    params = yaml.safe_load((project.folder / "params.yaml").read_text())
    flat = {f"{section}.{key}": "None" if value is None else value for section, values in params.items() for key, value in values.items()}
    assert {key: yaml.safe_load(value) for key, value in run.data.params.items()} == flat
    metrics = json.loads((project.folder / "metrics/evaluate.json").read_text())
    assert run.data.metrics["test_accuracy"] == metrics["accuracy"]
    assert {f"accuracy/{digit}": metrics["accuracy_per_class"][digit] for digit in map(str, range(10))}.items() <= run.data.metrics.items()
    history = pd.read_csv(project.folder / "plots/history.csv")
    for column in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate"):
        points = sorted(project.client().get_metric_history(run.info.run_id, column), key=lambda point: point.step)
        assert [p.step for p in points] == [1, 2, 3]
        assert [p.value for p in points] == pytest.approx(history[column].tolist(), abs=1e-6)
    assert any(name.startswith("system/cpu") for name in run.data.metrics)
    assert project.artifacts(run.info.run_id) == SHARED_ARTIFACTS
    assert run.info.artifact_uri.startswith((project.folder / "mlartifacts").as_uri())

    tags = run.data.tags
    assert tags["git.commit"] == project.run("git", "rev-parse", "HEAD").stdout.strip()
    assert tags["weights.sha256"] == hashlib.sha256((project.folder / "models/network.safetensors").read_bytes()).hexdigest()
    assert tags["threads"] == "1"
    assert {"device", "dvc.lock", "version.torch", "version.mlflow", "version.python"} <= tags.keys()
    [dataset] = run.inputs.dataset_inputs
    digest = json.loads((project.folder / "data/dataset.json").read_text())["digest"]
    assert dataset.dataset.digest == digest[:32]

    table = json.loads(Path(project.client().download_artifacts(run.info.run_id, "confusion_matrix.json")).read_text())
    assert np.array(table["data"])[:, 1:].astype(int).sum() == len(pd.read_csv(project.folder / "plots/predictions.csv"))


def test_the_logged_model_predicts_what_evaluate_wrote(project: Project) -> None:
    run = project.runs()[""]
    [output] = run.outputs.model_outputs
    model = project.client().get_logged_model(output.model_id)
    files = {path.name for path in Path(model.artifact_location.removeprefix("file://")).rglob("*") if path.is_file()}
    assert "model.pt2" in files
    assert not [name for name in files if name.endswith((".pkl", ".pth"))]
    mlflow.set_tracking_uri(f"sqlite:///{project.folder / 'mlflow.db'}")
    network = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    images = np.load(project.folder / "data/test_images.npy").transpose(0, 3, 1, 2)
    logits = network.predict(np.ascontiguousarray(images))
    predictions = pd.read_csv(project.folder / "plots/predictions.csv")
    assert logits.argmax(1).tolist() == predictions["predicted"].tolist()


def test_repro_again_runs_nothing(project: Project) -> None:
    lock = (project.folder / "dvc.lock").read_bytes()
    assert stages_run(project.dvc("repro")) == []
    assert (project.folder / "dvc.lock").read_bytes() == lock
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message=base")


def test_a_changed_plot_runs_plot_only(project: Project) -> None:
    project.edit("plot", dpi=50)
    assert stages_run(project.dvc("repro")) == ["plot"]
    assert list(project.runs()) == [""]  # the same run, with newer figures
    # MLflow never changes a parameter: the new value is a tag.
    assert project.runs()[""].data.tags["changed.plot.dpi"] == "50"
    project.run("git", "checkout", "--quiet", "params.yaml")
    project.dvc("checkout", "--quiet")


def test_a_changed_evaluate_does_not_train(project: Project) -> None:
    # Another number of bins may change the figure that the pictures' titles come with.
    assert stages_run(project.dvc("exp", "run", "--name", "bins", "-S", "evaluate.calibration_bins=10")) in (
        ["evaluate"],
        ["evaluate", "plot"],
    )
    # No stage before evaluate ran in this experiment: its run has what they wrote, from their files.
    run = project.runs()["bins"]
    assert len(project.client().get_metric_history(run.info.run_id, "train_loss")) == 3
    assert project.artifacts(run.info.run_id) >= TABLES
    project.run("git", "checkout", "--quiet", "params.yaml", "dvc.lock", "metrics")
    project.dvc("checkout", "--quiet")


def test_a_changed_model_trains_and_downloads_nothing(project: Project) -> None:
    assert stages_run(project.dvc("exp", "run", "--name", "one-layer", "-S", "model.layers=1")) == ["train", "evaluate", "plot"]
    run = project.runs()["one-layer"]
    assert run.info.run_name == "one-layer"
    assert run.data.params["model.layers"] == "1"
    assert run.data.tags["dvc.exp.baseline"] == run.data.tags["git.commit"] == project.run("git", "rev-parse", "HEAD").stdout.strip()
    # The table that `make compare` and the demo print.
    table = project.run("python", "-m", "cifarlab", "compare", PYTHONPATH="src").stdout
    assert "one-layer" in table
    assert f"{run.data.metrics['test_accuracy']:.2%}" in table
    project.run("git", "checkout", "--quiet", "params.yaml", "dvc.lock", "metrics")
    project.dvc("checkout", "--quiet")


def test_what_was_trained_before_is_not_trained_again(project: Project) -> None:
    output = project.dvc("exp", "run", "--temp", "--name", "again", "-S", "model.layers=1")
    assert stages_run(output) == []
    assert "Stage 'train' is cached" in output


def test_metrics_diff_is_the_difference(project: Project) -> None:
    row = json.loads(project.dvc("metrics", "diff", "HEAD", "one-layer", "--json"))["metrics/evaluate.json"]["accuracy"]
    runs = project.runs()
    assert row["old"] == runs[""].data.metrics["test_accuracy"]
    assert row["new"] == runs["one-layer"].data.metrics["test_accuracy"]
    assert row["diff"] == pytest.approx(row["new"] - row["old"])


def test_temp_and_queued_experiments_reach_the_same_store(project: Project) -> None:
    project.dvc("exp", "run", "--temp", "--name", "temp", "-S", "model.activation=relu")
    project.dvc("exp", "run", "--queue", "--name", "queued-a", "-S", "train.lr=0.02")
    project.dvc("exp", "run", "--queue", "--name", "queued-b", "-S", "model.norm=none")
    # The snapshots are taken: what the main checkout's code does from here on is not their business.
    plot = project.folder / "stages/plot.py"
    original = plot.read_text()
    plot.write_text("raise SystemExit('the code of the main checkout ran')\n")
    try:
        project.dvc("exp", "run", "--run-all", "--jobs", "1")
    finally:
        plot.write_text(original)
    runs = project.runs()
    for name, (key, value) in {
        "temp": ("model.activation", "relu"),
        "queued-a": ("train.lr", "0.02"),
        "queued-b": ("model.norm", "none"),
    }.items():
        run = runs[name]
        assert run.info.status == "FINISHED"
        assert run.data.params[key] == value
        assert project.artifacts(run.info.run_id) == SHARED_ARTIFACTS
        assert len(run.outputs.model_outputs) == 1
        assert run.info.artifact_uri.startswith((project.folder / "mlartifacts").as_uri())
        assert name in project.dvc("exp", "list", "--name-only").split()
    assert len({runs[name].data.tags["weights.sha256"] for name in ("", "temp", "queued-a", "queued-b")}) == 4


def test_forcing_the_same_training_doubles_nothing(project: Project) -> None:
    before = project.runs()[""]
    lock = (project.folder / "dvc.lock").read_bytes()
    assert stages_run(project.dvc("repro", "--force")) == ["download", "train", "evaluate", "plot"]
    assert (project.folder / "dvc.lock").read_bytes() == lock
    after = project.runs()[""]
    assert after.info.run_id == before.info.run_id
    for name in ("train_loss", "test_accuracy", "accuracy/3"):
        assert len(project.client().get_metric_history(after.info.run_id, name)) == len(
            {p.step for p in project.client().get_metric_history(after.info.run_id, name)}
        )
    assert len(after.outputs.model_outputs) == 1


def test_plots_diff_shows_both_confusion_matrices_in_a_browser(project: Project) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    project.run("python", "-m", "cifarlab", "page", PYTHONPATH="src")  # `make setup` does this
    project.dvc("plots", "diff", "one-layer", "temp")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        outside: list[str] = []
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else outside.append(request.url))
        page.goto((project.folder / "dvc_plots/index.html").as_uri())
        page.wait_for_function("document.querySelectorAll('.vega-embed canvas, .vega-embed svg').length >= 5")
        text = page.content()
        for title in ("Confusion matrix", "Recall", "Loss", "Accuracy", "Accuracy of each class"):
            assert title in text
        loaded = page.eval_on_selector_all("img", "images => images.map(i => [i.src, i.complete && i.naturalWidth > 0])")
        browser.close()
    assert not outside, "the page must open offline"
    pictures = {Path(src).name for src, complete in loaded if complete}
    for experiment in ("one-layer", "temp"):
        assert any(experiment in name and "confusion.png" in name for name in pictures), pictures
    assert len(pictures) == 12


def test_results_keeps_the_evidence(project: Project) -> None:
    project.run("python", "-m", "cifarlab", "results", "small", PYTHONPATH="src")
    kept = project.folder / "docs/results/small"
    for name in ("params.yaml", "dvc.lock", "metrics/evaluate.json", "plots/confusion.png"):
        assert (kept / Path(name).name).read_bytes() == (project.folder / name).read_bytes()
    machine = json.loads((kept / "machine.json").read_text())
    assert machine["threads"] == "1"
    assert len(machine["epoch_seconds"]) == 3
    for name in (".", "..", "../metrics", str(project.folder)):  # the folder is emptied before it is filled
        refused = project.run("python", "-m", "cifarlab", "results", name, check=False, PYTHONPATH="src")
        assert refused.returncode == 1
        assert "NAME" in refused.stdout
    assert (kept / "params.yaml").exists()
    project.edit("train", seed=1)
    refused = project.run("python", "-m", "cifarlab", "results", "small", check=False, PYTHONPATH="src")
    assert refused.returncode == 1
    assert "dvc repro" in refused.stdout

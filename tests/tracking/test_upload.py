"""What a run gets from the files of the stages."""

import contextlib
import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.utils import validation

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.nn import weights
from cifarlab.nn.network import predict
from cifarlab.params.sections import Params
from cifarlab.tracking.run import StageRun, track
from cifarlab.tracking.upload import Execution, accuracy_of, model_name
from tests.tracking.conftest import (
    CONDITIONS,
    EVALUATION,
    HISTORY,
    Make,
    client_of,
    points,
    runs_in,
    write_outputs,
    write_timings,
)

EPOCHS = {"1": [1_000_000, 2.5], "2": [1_004_000, 4.0]}


def log(stage: str, params: Params) -> None:
    with track(stage, params) as run:
        pass
    assert not run.warned  # the warning, which pytest shows, names the cause


def test_a_training_gives_metrics_parameters_conditions_and_the_data_set(
    checkout: Path, make_params: Make
) -> None:
    sources = ["https://example.org/cifar.tar.gz"]
    changes = {"data.sources": sources, "tracking.system_metrics": False}
    params = make_params(changes)
    with track("train", params, CONDITIONS) as run:
        run.log_epochs()
    [stored] = runs_in(checkout)
    flat = {name: str(value) for name, value in params.flat().items()}
    assert stored.data.params == flat
    assert flat["data.sources"] == str(sources)
    # An empty cell, as without held-out images, gives no metric.
    epochs = {"loss/train", "accuracy/train", "learning_rate", "dead_units/1"}
    assert stored.data.metrics.keys() == epochs | {"parameters", "images"}
    assert CONDITIONS.items() <= stored.data.tags.items()
    [entry] = stored.inputs.dataset_inputs
    digest = json.loads((checkout / "data/dataset.json").read_text())["digest"]
    assert entry.dataset.digest == digest[:32]
    assert sources[0] in entry.dataset.source


def test_epochs_have_the_times_of_the_timings_file(checkout: Path, params: Params) -> None:
    write_timings(checkout, pipeline.training_key(params), EPOCHS)
    log("train", params)
    assert points(checkout, "loss/train") == [(1, 1_000_000, 0.5), (2, 1_004_000, 0.4)]
    assert points(checkout, "epoch_seconds") == [(1, 1_000_000, 2.5), (2, 1_004_000, 4.0)]
    [run] = runs_in(checkout)
    assert CONDITIONS.items() <= run.data.tags.items()


def test_a_run_logged_later_has_the_duration_of_its_training(
    checkout: Path, params: Params
) -> None:
    write_timings(checkout, pipeline.training_key(params), EPOCHS)
    log("evaluate", params)
    [run] = runs_in(checkout)
    assert run.info.start_time == 1_000_000 - 2500
    assert run.info.end_time >= 1_004_000


def test_every_epoch_of_a_long_training_is_logged(checkout: Path, params: Params) -> None:
    rows = [f"{epoch},{1 / epoch}" for epoch in range(1, 46)]
    (checkout / "plots/history.csv").write_text("\n".join(["epoch,train_loss", *rows]))
    log("train", params)
    values = [(step, value) for step, _, value in points(checkout, "loss/train")]
    assert values == [(epoch, pytest.approx(1 / epoch)) for epoch in range(1, 46)]


def test_logging_again_adds_nothing(checkout: Path, make_params: Make) -> None:
    params = make_params({"tracking.system_metrics": False})
    for _ in range(2):
        for stage in ("train", "evaluate"):
            with track(stage, params) as run:
                if stage == "train":
                    run.log_epochs()
    [run] = runs_in(checkout)
    for name in run.data.metrics:
        expected = (
            2 if name in ("loss/train", "accuracy/train", "learning_rate", "dead_units/1") else 1
        )
        assert len(points(checkout, name)) == expected, name
    assert len(run.inputs.dataset_inputs) == 1
    assert len(run.outputs.model_outputs) == 1


def test_the_epochs_of_a_newer_training_are_logged(checkout: Path, params: Params) -> None:
    log("train", params)
    (checkout / "plots/history.csv").write_text(HISTORY.replace("1,0.5", "1,0.6"))
    log("train", params)
    assert [value for _, _, value in points(checkout, "loss/train")] == [0.5, 0.6, 0.4]


def test_a_changed_evaluation_replaces_the_value(checkout: Path, params: Params) -> None:
    log("evaluate", params)
    changed = EVALUATION | {"accuracy": 0.5}
    (checkout / "metrics/evaluate.json").write_text(json.dumps(changed))
    log("evaluate", params)
    [run] = runs_in(checkout)
    assert run.data.metrics["accuracy/test"] == 0.5


def test_an_evaluation_gives_metrics_and_the_table_of_the_confusion_matrix(
    checkout: Path, params: Params
) -> None:
    log("evaluate", params)
    [run] = runs_in(checkout)
    expected = {"accuracy/test": 0.75, "loss/test": 0.5, "per_class/cat": 0.5}
    expected[accuracy_of("dog (small)")] = 1.0
    assert expected.items() <= run.data.metrics.items()
    name = "confusion_matrix.json"
    path = client_of(checkout).download_artifacts(run.info.run_id, name, str(checkout))
    assert json.loads(Path(path).read_text())["data"] == [["cat", 1, 1], ["dog (small)", 0, 2]]
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": path, "type": "table"} for path in (name, "per_class.json")]
    tables = {file.path for file in client_of(checkout).list_artifacts(run.info.run_id, "tables")}
    assert tables == {f"tables/{name}.csv" for name in ("confusion", "history", "per_class")}


def test_the_description_names_accuracy_best_and_worst_class_and_how_to_restore(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "small")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "a" * 40)  # applying this would not restore it
    log("evaluate", params)
    [run] = runs_in(checkout)
    note = run.data.tags["mlflow.note.content"]
    for part in (params.model.describe(), "75.00%", "cat, 50.0%", "dog (small), 100.0%"):
        assert part in note
    assert "dvc exp apply small" in note
    # Another evaluation brings it up to date, but not what a person has written.
    for accuracy, expected in ((0.5, "50.00%"), (0.25, "mine")):
        if expected == "mine":
            client_of(checkout).set_tag(run.info.run_id, "mlflow.note.content", "mine")
        changed = json.dumps(EVALUATION | {"accuracy": accuracy})
        (checkout / "metrics/evaluate.json").write_text(changed)
        log("evaluate", params)
        [run] = runs_in(checkout)
        assert expected in run.data.tags["mlflow.note.content"]


def test_every_class_has_its_own_metric_whatever_its_name() -> None:
    labels = ["cat", "C+", "C#", "C_", "a/b", "..", "/", "a//b", "é 猫", "\n", "x" * 300, "x" * 301]
    names = [accuracy_of(label) for label in labels]
    assert len(set(names)) == len(labels)
    for name in names:
        validation._validate_metric_name(name)
    assert names[0] == "per_class/cat"


def test_more_metrics_than_fit_into_a_request_are_logged(checkout: Path, params: Params) -> None:
    labels = [f"class {number}" for number in range(1203)]
    rows = "".join(f"{label},0.5\n" for label in labels)
    (checkout / "plots/per_class.csv").write_text(f"class,accuracy\n{rows}")
    log("evaluate", params)
    [run] = runs_in(checkout)
    assert {f"per_class/{label}" for label in labels} <= run.data.metrics.keys()


def test_the_logged_model_predicts_what_the_network_predicts(
    checkout: Path, make_params: Make
) -> None:
    log("evaluate", make_params({"tracking.system_metrics": False}))
    [run] = runs_in(checkout)
    [output] = run.outputs.model_outputs
    model = client_of(checkout).get_logged_model(output.model_id)
    assert {(m.key, m.value) for m in model.metrics} >= {
        ("accuracy/test", 0.75),
        ("loss/test", 0.5),
    }
    assert model.name == model_name(run.info.run_name)
    assert model.tags["mlflow.note.content"] == run.data.tags["mlflow.note.content"]
    [data] = run.inputs.dataset_inputs
    used = {(m.dataset_name, m.dataset_digest) for m in model.metrics}
    assert used == {(data.dataset.name, data.dataset.digest)}
    folder = Path(model.artifact_location.removeprefix("file://"))
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pth")]
    images = np.load(checkout / "data/test_images.npy")
    network = weights.load(checkout / "models/network.safetensors")
    logits = predict(network, torch.from_numpy(images), 100)
    uri = f"models:/{output.model_id}"
    table = mlflow.pyfunc.load_model(uri).predict(images)
    assert list(table["class"]) == [network.classes[i] for i in logits.argmax(1)]
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(mlflow.pytorch.load_model(uri)(channels_first), logits)
    described = mlflow.models.get_model_info(uri).metadata
    data = json.loads((checkout / "data/dataset.json").read_text("utf-8"))
    assert described["dataset_digest"] == data["digest"]
    assert described["training_key"] == run.data.tags["cifarlab.key"]
    assert run.data.tags["cifarlab.test"] == data["test_digest"]


def test_outputs_in_another_folder_are_logged_from_there(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a commit in its scratch copy, with the timings of the main checkout."""
    write_timings(checkout, key := pipeline.training_key(params), EPOCHS)
    copy = checkout / "copy"
    write_outputs(copy, params)
    for name in ("dvc.yaml", "src", "stages"):
        (copy / name).symlink_to(checkout / name)
    for name in ("plots", "metrics", "models"):
        for path in (checkout / name).iterdir():
            path.unlink()
    run = StageRun("evaluate", Execution(params, key, "name", "b" * 40, copy))
    run.close("FINISHED")
    [stored] = runs_in(checkout)
    assert stored.data.tags["dvc.exp.baseline"] == "b" * 40
    assert "version.torch" not in stored.data.tags  # nobody knows with which it ran
    assert stored.data.metrics["accuracy/test"] == 0.75
    assert points(checkout, "loss/train")[0] == (1, 1_000_000, 0.5)
    assert Path.cwd() == checkout
    assert not (copy / "mlflow.db").exists()


def test_weights_are_not_exported_by_other_code(checkout: Path, make_params: Make) -> None:
    """It might compute something else than what was tested."""
    params = make_params({"tracking.system_metrics": False})
    write_timings(checkout, key := pipeline.training_key(params), EPOCHS)
    copy = checkout / "copy"
    write_outputs(copy, params)
    shutil.copytree(checkout / "src", copy / "src")
    for name in ("dvc.yaml", "stages"):
        (copy / name).symlink_to(checkout / name)
    layers = copy / "src/cifarlab/nn/layers.py"
    for text, fails in (("# a comment", False), ("OTHER = 1", True)):
        layers.write_text(f"{layers.read_text('utf-8')}\n{text}\n", "utf-8")
        run = StageRun("evaluate", Execution(params, key, text, "b" * 40, copy))
        refused = pytest.raises(UserError, match="not logged: it has other code for the network")
        with refused if fails else contextlib.nullcontext():
            run.close("FINISHED")
    runs = {run.info.run_name: run for run in runs_in(checkout)}
    models = {name: len(run.outputs.model_outputs) for name, run in runs.items()}
    assert models == {"# a comment": 1, "OTHER = 1": 0}
    assert runs["OTHER = 1"].data.metrics["accuracy/test"] == 0.75

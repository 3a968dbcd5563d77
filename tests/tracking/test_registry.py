"""The champion changes only for a network that is better on the same images."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.entities import LoggedModelOutput
from scipy.stats import binom
from statsmodels.stats.contingency_tables import mcnemar

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.params.load import load_params
from cifarlab.tracking import prune, registry, sync
from cifarlab.tracking.client import KEY, connect, models_of
from cifarlab.tracking.upload import TEST_DIGEST
from tests.conftest import REPO
from tests.tracking.conftest import client_of

Add = Callable[..., str]
NAME = "cifarlab"


@pytest.fixture
def add(checkout: Path) -> Add:
    """Return a function that adds the run of an experiment: add("name", right=[True, …])."""
    (checkout / "params.yaml").write_text((REPO / "params.yaml").read_text("utf-8"), "utf-8")
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=x"]):
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *author, *command], check=True)
    client = client_of(checkout)
    experiment = client.create_experiment(NAME, (checkout / "mlartifacts").as_uri())
    assert load_params().tracking.experiment == NAME

    def add(name: str, right: list[bool], digest: str = "same", model: bool = True) -> str:
        run = client.create_run(experiment, run_name=name, tags={"dvc.exp.name": name, KEY: "key"})
        run_id: str = run.info.run_id
        client.set_tag(run_id, TEST_DIGEST, digest)
        client.log_metric(run_id, "accuracy/test", float(np.mean(right)))
        rows = [f"NA,{'NA' if hit else 'null'},0.5" for hit in right]
        text = "\n".join(["actual,predicted,confidence", *rows])
        client.log_text(run_id, text, "tables/predictions.csv")
        if model:
            logged = client.create_logged_model(experiment, "model", run_id)
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
        return run_id

    return add


def champion_of(folder: Path) -> str:
    return str(client_of(folder).get_model_version_by_alias(NAME, "champion").run_id)


def test_only_a_better_network_becomes_the_champion(checkout: Path, add: Add) -> None:
    first = add("first", [True] * 60 + [False] * 40)
    assert "is the first champion" in registry.promote("first", force=False)
    assert "is the champion already" in registry.promote(first, force=False)
    # Ten more right, none lost: p = 2 / 2¹⁰.
    better = add("better", [True] * 70 + [False] * 30)
    sentence = registry.promote(better, force=False)
    p = 2 * binom.cdf(0, 10, 0.5)
    assert "of 100 test images, 10 only the new one gets right and 0 only the champion" in sentence
    assert f"p = {p:.2g}" in sentence
    assert champion_of(checkout) == better
    # Five more right and one lost may be chance.
    right = [False] + [True] * 74 + [False] * 25
    slightly = add("slightly", right)
    expected = mcnemar([[69, 1], [5, 25]], exact=True).pvalue
    sentence = registry.promote("slightly", force=False)
    assert "does not become the champion" in sentence
    assert f"p = {expected:.2g}" in sentence
    assert champion_of(checkout) == better
    assert "is the champion now, by --force" in registry.promote("slightly", force=True)
    assert champion_of(checkout) == slightly
    versions = client_of(checkout).search_model_versions(f"name = '{NAME}'")
    assert sorted(int(version.version) for version in versions) == [1, 2, 3]
    text = registry.champion()
    assert f"test accuracy 74.00%, run {slightly}" in text
    assert f"models:/{NAME}@champion" in text


def test_a_worse_network_does_not_become_the_champion(checkout: Path, add: Add) -> None:
    first = add("first", [True] * 60 + [False] * 40)
    registry.promote("first", force=False)
    add("worse", [True] * 40 + [False] * 60)
    assert "0 only the new one gets right and 20 only" in registry.promote("worse", force=False)
    assert champion_of(checkout) == first


def test_a_champion_whose_run_was_deleted_can_be_replaced(checkout: Path, add: Add) -> None:
    first = add("first", [True, False])
    registry.promote("first", force=False)
    client = client_of(checkout)
    client.delete_run(first)
    client._tracking_client.store._hard_delete_run(first)
    second = add("second", [True] * 10)
    assert "it cannot be compared with the champion" in registry.promote("second", force=False)
    assert "is the champion now, by --force" in registry.promote("second", force=True)
    assert champion_of(checkout) == second


def test_of_a_repeated_training_the_model_of_the_present_weights_is_registered(
    checkout: Path, add: Add
) -> None:
    run_id, client = add("again", [True], model=False), client_of(checkout)
    client.set_tag(run_id, "weights.sha256", "5")
    models = {}
    for weights in map(str, range(10)):  # MLflow does not say which one is the newest
        experiment = client.get_run(run_id).info.experiment_id
        tags = {"weights.sha256": weights}
        models[weights] = client.create_logged_model(experiment, "model", run_id, tags).model_id
        client.log_outputs(run_id, [LoggedModelOutput(models[weights], 0)])
    registry.promote("again", force=False)
    source = client.get_model_version_by_alias(NAME, "champion").source
    assert source.endswith(models["5"])


def test_a_registered_model_without_versions_gets_one(checkout: Path, add: Add) -> None:
    client_of(checkout).create_registered_model(NAME)
    add("first", [True])
    assert "is the first champion" in registry.promote("first", force=False)


def test_what_is_registered_is_not_pruned(
    checkout: Path, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = add("first", [True])
    client_of(checkout).set_tag(run, "logged.train", "its files")
    assert prune._registered() == []
    registry.promote("first", force=False)
    [registered] = prune._registered()
    assert registered.info.run_id == run
    renamed = {"dvc.exp.name": "best", "logged.train": "its files"}
    monkeypatch.setattr(sync, "tags_of", lambda _: renamed)
    assert sync.shows(registered, pipeline.WORKSPACE)
    monkeypatch.setattr(sync, "tags_of", lambda _: {"logged.train": "other files"})
    assert not sync.shows(registered, pipeline.WORKSPACE)


def test_a_run_that_was_trained_again_no_longer_speaks_for_the_champion(
    checkout: Path, add: Add
) -> None:
    client, run = client_of(checkout), add("first", [True] * 60 + [False] * 40)
    registry.promote("first", force=False)
    client.set_tag(run, "weights.sha256", "of another machine")
    assert "its run shows a later training" in registry.champion()
    add("worse", [True] * 100)
    sentence = registry.promote("worse", force=False)
    assert "does not become the champion: the run of the champion shows a later" in sentence
    assert "is the champion now, by --force" in registry.promote("worse", force=True)


def test_of_several_runs_of_a_name_the_newest_that_finished_is_registered(
    checkout: Path, add: Add
) -> None:
    client = client_of(checkout)
    finished = [add("first", [True]) for _ in range(2)]
    for run in finished:
        client.set_terminated(run, "FINISHED")
    client.set_terminated(add("first", [True], model=False), "KILLED")
    registry.promote("first", force=False)
    assert champion_of(checkout) == finished[1]


def test_the_experiment_of_this_checkout_comes_before_others_of_its_name(
    checkout: Path, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = add("first", [True]), add("first", [True])
    here = pipeline.Revision("first", "e" * 40, pipeline.git_commit())
    there = pipeline.Revision("first", "f" * 40, "b" * 40)
    monkeypatch.setattr(pipeline, "experiments", lambda: [there, here])
    client = client_of(checkout)
    for run in client.search_runs(["1"]):
        client.set_terminated(run.info.run_id, "FINISHED")
    monkeypatch.setattr(
        registry, "shows", lambda run, revision: (run.info.run_id == mine) == (revision == here)
    )
    registry.promote("first", force=False)
    assert champion_of(checkout) == mine


def test_promote_without_a_name_is_refused(add: Add) -> None:
    add("", [True])  # `dvc repro` gives a run no name
    with pytest.raises(UserError, match="name an experiment, or the id of a run"):
        registry.promote("", force=False)


def test_a_deleted_model_is_not_the_model_of_a_run(checkout: Path, add: Add) -> None:
    client, run = client_of(checkout), add("first", [True])
    [model] = models_of(client, client.get_run(run))
    client.delete_logged_model(model.model_id)
    with pytest.raises(UserError, match=r"has no model; set tracking\.log_model: true"):
        registry.promote("first", force=False)
    again = client.create_logged_model(model.experiment_id, "model", run)
    assert registry._model_of(client, client.get_run(run)) == again.model_id


def test_a_champion_whose_predictions_are_lost_can_be_replaced(checkout: Path, add: Add) -> None:
    first = add("first", [True])
    registry.promote("first", force=False)
    shutil.rmtree(checkout / "mlartifacts" / first)
    add("second", [True])
    sentence = registry.promote("second", force=False)
    assert "it cannot be compared with the champion (" in sentence
    assert "by --force" in registry.promote("second", force=True)


def test_the_name_of_an_experiment_may_hold_a_slash(
    checkout: Path, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(checkout)
    experiment = client.create_experiment("team/pets", (checkout / "mlartifacts").as_uri())
    text = Path("params.yaml").read_text("utf-8")
    Path("params.yaml").write_text(text.replace("experiment: cifarlab", "experiment: team/pets"))
    run = client.create_run(
        experiment, run_name="first", tags={"dvc.exp.name": "first", KEY: "key"}
    )
    client.create_logged_model(experiment, "model", run.info.run_id)
    assert "version 1 of team-pets, first, is the first" in registry.promote("first", force=False)
    assert "models:/team-pets@champion" in registry.champion()


def test_a_moved_champion_is_found(
    checkout: Path, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(add("first", [True]), force=False)
    moved = checkout.with_name("moved")
    checkout.rename(moved)
    monkeypatch.chdir(moved)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow has set it in this process
    client = connect()
    assert client.get_model_version_download_uri(NAME, "1").startswith(moved.as_uri())


def test_other_test_images_cannot_be_compared(checkout: Path, add: Add) -> None:
    first = add("first", [True, False])
    registry.promote("first", force=False)
    add("other", [True] * 100, digest="other")
    sentence = registry.promote("other", force=False)
    assert sentence.endswith("the two were not tested on the same images")
    assert champion_of(checkout) == first


def test_a_commit_without_a_lock_does_not_hide_the_champion(checkout: Path, add: Add) -> None:
    add("first", [True] * 10)
    registry.promote("first", force=False)
    author = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org")
    for content in ("stages: {}", "damaged", None):
        lock = checkout / "dvc.lock"
        lock.write_text(content) if content else lock.unlink()
        subprocess.run(["git", "add", "dvc.lock"], check=True)
        subprocess.run([*author, "commit", "--quiet", "--message=x"], check=True)
    assert "first, test accuracy 100.00%" in registry.champion()


@pytest.mark.usefixtures("add")
def test_a_server_that_is_down_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for action in (registry.champion, lambda: registry.promote("first", force=False)):
        with pytest.raises(UserError, match=r"MLflow cannot (give champion:|be read) "):
            action()


@pytest.mark.usefixtures("checkout")
def test_what_cannot_be_promoted_is_said(add: Add) -> None:
    add("bare", [True], model=False)
    with pytest.raises(UserError, match="has no model; set tracking"):
        registry.promote("bare", force=False)
    with pytest.raises(UserError, match="MLflow has no run or experiment"):
        registry.promote("typo", force=False)
    with pytest.raises(UserError, match="has no champion"):
        registry.champion()
    with pytest.raises(UserError, match=r"MLflow cannot give 0{32}"):
        registry.promote("0" * 32, force=False)
    with pytest.raises(UserError, match="MLflow cannot give models:/cifarlab@champion"):
        registry.download_network("models:/cifarlab@champion", Path())
    mlflow.set_tracking_uri(None)

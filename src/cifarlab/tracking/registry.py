"""Logged models: finding one, and the champion among the registered versions."""

import re
import tempfile
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from cifarlab import files, pipeline
from cifarlab.errors import UserError, first_line, in_a_sentence
from cifarlab.params.load import load_params
from cifarlab.tracking.client import all_runs, connect, present_models
from cifarlab.tracking.sync import shows
from cifarlab.tracking.upload import NOTE, TEST_DIGEST, model_name

CHAMPION = "champion"
SIGNIFICANCE = 0.05  # two-sided; above it, the difference may be chance


def download_network(uri: str, folder: Path) -> Path:
    """Download network.safetensors of a logged or registered model.

    Parameters
    ----------
    uri : the id of a run, or models:/NAME@ALIAS, models:/NAME/VERSION, models:/MODEL_ID

    Raises
    ------
    UserError
        There is no such model, or the run has none.
    """
    import mlflow

    with in_a_sentence(f"MLflow cannot give {uri}: %s"):
        client = connect()
        if "/" not in uri:
            uri = f"models:/{_model_of(client, client.get_run(uri))}"
        model = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
        return model / "artifacts" / files.WEIGHTS.name


def promote(name: str, *, force: bool) -> str:
    """Register the model of a run or experiment; make it the champion if it is better.

    Better means: it gets more of the same test images right, and McNemar's exact test on the
    images that only one of the two gets right is below SIGNIFICANCE (McNemar 1947).

    Raises
    ------
    UserError
        There is no such run, or it has no model.
    """
    with in_a_sentence(f"MLflow cannot give {name}: %s"):
        client, registered = connect(), model_name(load_params().tracking.experiment)
        run = _find_run(client, name)
        model = _model_of(client, run)
        champion = _champion(client, registered)
        known = client.search_model_versions(f'name = "{registered}"')
        version = next((v for v in known if v.source.endswith(model)), None)
        if not version:
            if not client.search_registered_models(f'name = "{registered}"'):
                client.create_registered_model(registered)
            source, note = f"models:/{model}", run.data.tags.get(NOTE)
            origin = {"run_id": run.info.run_id, "model_id": model}
            version = client.create_model_version(registered, source, description=note, **origin)
        label = f"version {version.version} of {registered}, {run.info.run_name}"
        if champion and champion.version == version.version:
            return f"{label}, is the champion already"
        better, reason = _compare(client, champion, run) if champion else (True, "")
        if not better and not force:
            return f"{label}, does not become the champion: {reason}"
        client.set_registered_model_alias(registered, CHAMPION, version.version)
        if not champion:
            return f"{label}, is the first champion"
        forced = "" if better else ", by --force"
        return f"{label}, is the champion now{forced}: {reason}"


def champion() -> str:
    """Describe the champion and say how DVC restores it. UserError: there is none."""
    with in_a_sentence(f"MLflow cannot give {CHAMPION}: %s"):
        client, registered = connect(), model_name(load_params().tracking.experiment)
        if (version := _champion(client, registered)) is None:
            raise UserError(f"{registered} has no champion; `cifarlab promote RUN` makes one")
        run = client.get_run(version.run_id)
        tested = f"test accuracy {run.data.metrics.get('accuracy/test', float('nan')):.2%}"
        if not _shows_model(client, run, version):
            tested = "its run shows a later training"
        revisions = chain(pipeline.experiments(), pipeline.commits())
        found = (revision.restore for revision in revisions if shows(run, revision))
        return (
            f"{registered} version {version.version}: {run.info.run_name}, "
            f"{tested}, run {version.run_id}\n"
            f"use it:     cifarlab predict --model models:/{registered}@{CHAMPION} IMAGE\n"
            f"restore it: {next(found, 'it is in no experiment or commit any more')}"
        )


def _champion(client: Any, registered: str) -> Any:
    """Return the version that is the champion; None if there is none."""
    found = client.search_registered_models(f'name = "{registered}"')
    version = found[0].aliases.get(CHAMPION) if found else None
    return version and client.get_model_version(registered, version)


def _find_run(client: Any, name: str) -> Any:
    """Return the run with this id, or that of a DVC experiment.

    Of several runs of this name, the one that shows the experiment of this checkout comes first,
    then the newest that has finished.
    """
    if not name:
        raise UserError("name an experiment, or the id of a run")
    if re.fullmatch(r"[0-9a-f]{32}", name):
        return client.get_run(name)
    runs = all_runs(name)  # the newest run comes first
    runs.sort(key=lambda run: run.info.status != "FINISHED")
    with suppress(UserError):  # there is no such experiment here
        own = pipeline.find(name)
        runs.sort(key=lambda run: not shows(run, own))
    for run in runs:
        return run
    raise UserError(f"MLflow has no run or experiment {name}; `cifarlab sync` logs what it misses")


def _model_of(client: Any, run: Any) -> str:
    """Return the id of the model with the weights of a run. UserError: it has none."""
    for model in present_models(client, run):
        return str(model.model_id)
    way_out = "set tracking.log_model: true and run `dvc repro -f evaluate`"
    raise UserError(f"the run {run.info.run_name} ({run.info.run_id}) has no model; {way_out}")


def _shows_model(client: Any, run: Any, version: Any) -> bool:
    """Tell whether a run still shows the training of a registered model: it may be repeated."""
    shown = [model.model_id for model in present_models(client, run)]
    return version.source.rpartition("/")[2] in shown


def _compare(client: Any, champion: Any, new: Any) -> tuple[bool, str]:
    """Tell whether a run is better than that of the champion, a registered version, and why."""
    right = []
    try:
        old = client.get_run(champion.run_id)
        if not _shows_model(client, old, champion):
            return False, "the run of the champion shows a later training"
        digests = [run.data.tags.get(TEST_DIGEST) for run in (old, new)]
        if not all(digests) or digests[0] != digests[1]:
            return False, "the two were not tested on the same images"
        with tempfile.TemporaryDirectory() as folder:
            for run in (old, new):
                path = client.download_artifacts(run.info.run_id, "tables/predictions.csv", folder)
                table = pd.read_csv(path, dtype=str, keep_default_na=False)
                right.append(table.actual == table.predicted)
    except Exception as error:  # MLflow, requests and the disk raise their own
        return False, f"it cannot be compared with the champion ({first_line(error)})"
    lost, won, p = mcnemar(*right)
    counts = f"of {len(right[0]):,} test images, {won} only the new one gets right and {lost} only"
    text = f"{counts} the champion (McNemar's exact test: p = {p:.2g})"
    return won > lost and p < SIGNIFICANCE, text


def mcnemar(one: Any, other: Any) -> tuple[int, int, float]:
    """Return what McNemar's exact test says about two networks on the same images.

    Parameters
    ----------
    one, other : boolean (N,), whether each network gets each image right

    Returns
    -------
    how many images only the first and only the second one gets right, and the two-sided p
    """
    lost, won = int((one & ~other).sum()), int((~one & other).sum())
    return lost, won, float(binomtest(won, won + lost).pvalue) if won + lost else 1.0

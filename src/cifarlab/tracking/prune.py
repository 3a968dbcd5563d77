"""Removing experiments that nobody needs any more: from DVC, from its cache, and from MLflow."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from cifarlab import files, pipeline
from cifarlab.errors import UserError, in_a_sentence, without_secrets
from cifarlab.params.load import data_set
from cifarlab.pipeline import Revision
from cifarlab.tracking import client as tracking
from cifarlab.tracking.sync import origin_of, shows


def prune(keep: Sequence[str], best: int, *, remove: bool) -> None:
    """Print which experiments stay and which go; with `remove`, remove the latter.

    Those stay that are named, the `best` ones, those in the tables of studies, and those of which
    a model is registered. The outputs of every commit and of the workspace stay in DVC's cache.

    Parameters
    ----------
    keep : names of experiments
    best : how many of each data set stay because of their accuracy on validation images, or else on
        test images; parameters of another version count as one data set

    Raises
    ------
    UserError
        A name in `keep` is unknown, or MLflow or DVC cannot remove something.
    """
    found = pipeline.experiments()
    if unknown := set(keep) - {revision.name for revision in found}:
        advice = "`dvc exp list --all-commits` lists the experiments"
        raise UserError(f"there is no experiment {', '.join(sorted(unknown))}; {advice}")
    scores = {revision: _accuracy(revision) for revision in found}
    ranked = sorted(found, key=lambda revision: scores[revision], reverse=True)
    studied, registered, rows, gone = _in_studies(), _registered(), list[Any](), list[Revision]()
    places = Counter[str]()
    for revision in ranked:
        params = pipeline.params_of(revision)
        data = data_set(params.flat()) if params else "unknown"
        places[data] += 1
        reasons = {"named": revision.name in keep, f"among the best {best}": places[data] <= best}
        reasons["in a study"] = revision.name in studied
        # The run may show a later training, and the experiment may have another name by now.
        origin = origin_of(revision).items()
        models = (origin <= run.data.tags.items() or shows(run, revision) for run in registered)
        reasons["its model is registered"] = any(models)
        reason = ", ".join(text for text, applies in reasons.items() if applies)
        gone += [] if reason else [revision]
        state = f"stays: {reason}" if reason else "goes"
        rows.append((revision.name, revision.baseline[:10], data, scores[revision], state))
    table = pd.DataFrame(rows, columns=["experiment", "of commit", "data", "accuracy", ""])
    print(table.to_string(index=False) if rows else "no experiment")
    if gone and remove:
        _remove(gone)
    elif gone:
        print("nothing was removed; `cifarlab prune --remove` with the same options removes them")


def _accuracy(revision: Revision) -> float:
    for path, name in ((files.TRAIN_METRICS, "val_accuracy"), (files.EVALUATION, "accuracy")):
        problem = f"{path} of {revision.label} is damaged (%s); `dvc exp remove` removes it"
        with in_a_sentence(problem, ValueError, TypeError):
            content = json.loads(pipeline.read_text(path, revision) or "{}")
            if name in content:
                return float(content[name])
    return 0.0


def _in_studies() -> set[str]:
    """Return the experiments that the table of a study names. UserError: a table is damaged."""
    names: set[str] = set()
    for path in files.ANSWERS.glob("*.csv"):
        with in_a_sentence(f"{path} is damaged (%s); repair it first", ValueError, KeyError):
            names.update(pd.read_csv(path, dtype={"experiment": str})["experiment"])
    return names


def _registered() -> list[Any]:
    """Return the runs of which MLflow has registered a model."""
    with in_a_sentence("MLflow cannot be read (%s)"):
        ids = {version.run_id for version in tracking.connect().search_model_versions()}
    return [run for run in tracking.all_runs() if run.info.run_id in ids]


def _remove(gone: list[Revision]) -> None:
    """Remove experiments. The runs go first: a run can be logged again as long as DVC has it.

    UserError: an experiment is running. DVC does not know what it has put into the cache so far.
    """
    if pipeline.in_use(files.scratch()):
        raise UserError("an experiment is running, and would lose its outputs; try again later")
    # Experiments of other checkouts may have the same name.
    wanted = [origin_of(revision).items() for revision in gone]
    runs = [run for run in tracking.all_runs() if any(o <= run.data.tags.items() for o in wanted)]
    with in_a_sentence("MLflow cannot delete a run (%s); nothing was removed from DVC"):
        client = tracking.connect()
        models = [model.model_id for run in runs for model in tracking.models_of(client, run)]
        for model in models:
            client.delete_logged_model(model)
        for run in runs:
            client.delete_run(run.info.run_id)
    if runs and tracking.database():  # a server keeps what it deletes until its owner cleans up
        import mlflow

        command = [sys.executable, "-m", "mlflow", "gc", "--run-ids"]
        command += [",".join(run.info.run_id for run in runs)]
        command += ["--logged-model-ids", ",".join(models)] if models else []
        command += ["--backend-store-uri", mlflow.get_tracking_uri()]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            *_, reason = ["no reason", *without_secrets(done.stderr.decode()).splitlines()]
            raise UserError(f"MLflow cannot delete artifacts ({reason}); `mlflow gc` tries again")
    pipeline.remove_experiments(gone)
    print(f"removed: {len(gone)} experiments, {len(runs)} runs and what only they used")

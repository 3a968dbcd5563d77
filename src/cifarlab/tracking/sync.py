"""Logging to MLflow, from the files, what it lacks of experiments, commits and the workspace."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from cifarlab import files, pipeline
from cifarlab.errors import UserError, first_line
from cifarlab.params.load import load_params
from cifarlab.pipeline import WORKSPACE, Revision
from cifarlab.tracking.client import all_runs
from cifarlab.tracking.run import StageRun
from cifarlab.tracking.upload import Execution


def sync() -> None:
    """Log what is missing, and print a table of revisions and runs.

    It has a row for each experiment, commit and the workspace, with the command that restores it,
    its runs and what was done, and a row for each run that belongs to none of them.

    Raises
    ------
    UserError
        MLflow cannot be read, or the table shows something that could not be logged.
    """
    runs, rows, seen = all_runs(), [], set()
    for revision in [*pipeline.experiments(), *pipeline.commits(), WORKSPACE]:
        lock = pipeline.lock(revision)
        if not lock:  # nothing has run there
            continue
        try:
            digest = pipeline.lock_digest(lock)
            if (revision.name, digest) in seen:
                continue
            seen.add((revision.name, digest))
            found = _complete(runs, digest, revision.name)
            status = "was there" if found else "logged"
            found = found or [_log(revision)]
        except UserError as error:
            found, status = [], f"not logged: {error}"
        rows.append((revision.label, revision.restore, " ".join(found), status))
    failed = any(status.startswith("not logged") for *_, status in rows)
    listed = {run_id for _, _, found, _ in rows for run_id in found.split()}
    for run in [run for run in runs if run.info.run_id not in listed]:
        tags, ended = run.data.tags, run.info.status.lower()
        label = f"{tags['dvc.exp.name'] or 'workspace'} of {tags.get('git.commit', '')[:10]}"
        status = f"{ended}, but no experiment or commit has this run"
        rows.append((label, "", run.info.run_id, status))
    table = pd.DataFrame(rows, columns=["what", "restored by", "run", "MLflow"])
    print(table.to_string(index=False) if rows else "no experiment, no dvc.lock, no run yet")
    if failed:
        raise UserError("MLflow lacks something; the table says what and why")


def run_of(revision: Revision) -> str:
    """Return the id of the MLflow run of an experiment or commit; log it first if there is none.

    There is none, for example, if DVC restored all stages from its cache.

    Raises
    ------
    UserError
        MLflow cannot be read or written, or DVC's cache lacks files.
    """
    digest = pipeline.lock_digest(pipeline.lock(revision))
    found = _complete(all_runs(), digest, revision.name)
    return found[0] if found else _log(revision)


def _complete(runs: Iterable[Any], digest: str, name: str) -> list[str]:
    """Return the finished runs that have all outputs of a dvc.lock with this digest.

    For an experiment these must have its name. For a commit any name will do, because a commit may
    have been made from an experiment.
    """
    wanted = {"dvc.lock": digest} | ({"dvc.exp.name": name} if name else {})
    finished = [run for run in runs if run.info.status == "FINISHED"]
    return [run.info.run_id for run in finished if wanted.items() <= run.data.tags.items()]


def _log(revision: Revision) -> str:
    """Log an experiment, a commit or the workspace and return the id of its run."""
    if revision == WORKSPACE and not pipeline.workspace_is_current():
        raise UserError("changed since its pipeline ran; `dvc repro` runs and logs it")
    commit = revision.commit
    with pipeline.scratch_copy(commit) if commit else nullcontext(Path()) as folder:
        for stage in pipeline.STAGES:
            if not pipeline.outputs(stage, folder):
                raise UserError(f"its {stage} stage has no outputs; run the pipeline again")
        params = load_params(folder / files.PARAMS)
        key = pipeline.training_key(params, folder)
        run = StageRun("plot", Execution(params, key, revision.name, revision.baseline, folder))
        try:
            upload = run.open()
            run.close(upload, "FINISHED")
        except Exception as error:  # MLflow, SQLAlchemy, requests and the disk raise their own
            raise UserError(f"MLflow failed ({first_line(error)[:200]})") from error
        return upload.run_id

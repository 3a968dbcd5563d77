"""Logging to MLflow, from the files, what it lacks of experiments, commits and the workspace."""

from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from cifarlab import files, pipeline
from cifarlab.errors import UserError, in_a_sentence
from cifarlab.params.load import load_params
from cifarlab.pipeline import WORKSPACE, Revision
from cifarlab.tracking import client as tracking
from cifarlab.tracking.run import StageRun, end_killed, is_alive
from cifarlab.tracking.upload import ARTIFACTS, PARAMS, Execution, params_digest

Tags = dict[str, str]


def sync(*, check: bool = False) -> None:
    """Log what is missing, and print a table of revisions and runs.

    It has a row for each experiment, commit and the workspace, with the command that restores it,
    its run and what was done, and a row for each run that belongs to none of them. With `check`
    nothing is logged or changed.

    Raises
    ------
    UserError
        MLflow cannot be read, or the table shows something that could not be logged or, with
        `check`, that is missing.
    """
    mirror, rows, unnamed = Mirror(), [], list[Tags]()
    for revision in [*pipeline.experiments(), *pipeline.commits(), WORKSPACE]:
        run_id = ""
        try:
            if not pipeline.read_text(files.DVC_LOCK, revision):  # nothing has run there
                continue
            wanted = tags_of(revision)
            if not any(tag.startswith("logged.") for tag in wanted):  # only download has run
                continue
            known = revision == WORKSPACE or PARAMS in wanted
            if known and not revision.name and any(wanted.items() <= t.items() for t in unnamed):
                continue
            unnamed += [] if revision.name else [wanted]
            with in_a_sentence("MLflow failed (%s)"):
                run_id, status = mirror.complete(revision, wanted, check=check)
        except UserError as error:
            status = f"not logged: {error}"
        rows.append((revision.label, revision.restore, run_id, status))
    failed = any(status.startswith(("not logged", "missing")) for *_, status in rows)
    rows += mirror.others({run_id for _, _, run_id, _ in rows}, check=check)
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
    return Mirror(revision.name).complete(revision, tags_of(revision), check=False)[0]


class Mirror:
    """The runs that MLflow has of this project, compared with what the files say."""

    def __init__(self, name: str = "") -> None:
        self.runs = tracking.all_runs(name)
        self.client = tracking.connect()

    def complete(self, revision: Revision, wanted: Tags, *, check: bool) -> tuple[str, str]:
        """Log a revision if no run shows it. Return the id of its run and what was done."""
        same = [run for run in self.runs if wanted.items() <= run.data.tags.items()]
        for run in same:
            if run.info.status == "RUNNING" and is_alive(run.info.run_id):
                return run.info.run_id, "is running"
            if run.info.status == "FINISHED" and self._has_artifacts(run, revision):
                return run.info.run_id, "was there"
        if revision.commit and not pipeline.params_of(revision):
            return "", "has the parameters of another version, and can be logged there"
        if check:
            return (same[0].info.run_id if same else ""), "missing, at least in part"
        new = self._log(revision, same[0] if same else None)
        self.runs = [*(run for run in self.runs if run.info.run_id != new.info.run_id), new]
        return new.info.run_id, "logged"

    def others(self, listed: set[str], *, check: bool) -> list[tuple[str, str, str, str]]:
        """Describe the runs that are not `listed`. Mark those as KILLED whose process has ended."""
        found = []
        for run in [run for run in self.runs if run.info.run_id not in listed]:
            tags, status = run.data.tags, run.info.status
            if status == "RUNNING" and not is_alive(run.info.run_id):
                status = "KILLED"
                if not check:
                    end_killed(self.client, [run])
            name, commit = tags.get("dvc.exp.name") or "workspace", tags.get("git.commit", "")
            state = f"{status.lower()}, but no experiment or commit has this run"
            found.append((f"{name} of {commit[:10]}", "", run.info.run_id, state))
        return found

    def _has_artifacts(self, run: Any, revision: Revision) -> bool:
        """Tell whether MLflow has the artifacts of a run, in the sizes that dvc.lock names."""
        params, ran = pipeline.params_of(revision), pipeline.locked(revision)
        outputs = chain.from_iterable(ran[s].size.items() for s in ran if s in pipeline.STAGES)
        wanted = {Path(out).name: size for out, size in outputs if Path(out).suffix in ARTIFACTS}
        ask, folders = self.client.list_artifacts, ("", *ARTIFACTS.values())
        listed = chain.from_iterable(ask(run.info.run_id, folder) for folder in folders)
        found = {Path(file.path).name: file.file_size for file in listed}
        if not wanted.items() <= found.items() or not found.get("confusion_matrix.json"):
            return False
        models = (model.model_id for model in tracking.present_models(self.client, run))
        logged = map(self.client.list_logged_model_artifacts, models)
        return not (params and params.tracking.log_model) or any(logged)

    def _log(self, revision: Revision, known: Any) -> Any:
        """Log an experiment, a commit or the workspace and return its run.

        `known` is the run that shows it already, but not whole: it gets everything again.
        """
        if revision == WORKSPACE and not pipeline.workspace_is_current():
            raise UserError("changed since its pipeline ran; `dvc repro` runs and logs it")
        commit, origin = revision.commit, (revision.name, revision.baseline)
        with pipeline.scratch_copy(commit) if commit else nullcontext(Path()) as folder:
            if lost := [stage for stage in pipeline.STAGES if not pipeline.outputs(stage, folder)]:
                raise UserError(f"its {lost[0]} stage has no outputs; run the pipeline again")
            if commit and not pipeline.ran_as_asked(pipeline.STAGES, folder):
                raise UserError("its params.yaml is not what ran; `dvc repro`, then commit both")
            params = load_params(folder / files.PARAMS)
            key = pipeline.training_key(params, folder)
            if known:  # a commit may be shown by the run of an experiment
                for name in [name for name in known.data.tags if name.startswith("logged.")]:
                    self.client.delete_tag(known.info.run_id, name)
                known, tags = self.client.get_run(known.info.run_id), known.data.tags
                origin = (tags.get("dvc.exp.name", ""), tags.get("dvc.exp.baseline", ""))
            run = StageRun("plot", Execution(params, key, *origin, folder), run=known)
            return self.client.get_run(run.close("FINISHED"))


def tags_of(revision: Revision) -> Tags:
    """Return the tags of a run that shows a revision: its tables, figures and parameters.

    The run of an experiment also has its name and its baseline. For a commit or the workspace any
    run will do, because a commit may have been made from an experiment.
    """
    locked = pipeline.locked(revision)
    tags = {f"logged.{name}": locked[name].digest for name in pipeline.STAGES if name in locked}
    return tags | origin_of(revision)


def origin_of(revision: Revision) -> Tags:
    """Return those of `tags_of` that tell where a run came from, also of one that is not whole."""
    tags: Tags = {}
    if revision.name:
        tags |= {"dvc.exp.name": revision.name, "dvc.exp.baseline": revision.baseline}
    # The parameters of the workspace may have changed since its pipeline ran.
    if revision != WORKSPACE and (params := pipeline.params_of(revision)):
        tags[PARAMS] = params_digest(params)
    return tags


def shows(run: Any, revision: Revision) -> bool:
    """Tell whether a run shows what a revision holds, whatever its experiment is called by now.

    It does not if the dvc.lock of the revision is damaged or was deleted.
    """
    with suppress(UserError):
        tags = {k: v for k, v in tags_of(revision).items() if not k.startswith("dvc.exp.")}
        return bool(tags.items() <= run.data.tags.items())
    return False

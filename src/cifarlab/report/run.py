"""Reading what the page shows of one run. What is missing becomes a sentence on the page."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml
from safetensors import SafetensorError

from cifarlab import files, pipeline
from cifarlab.errors import UserError, first_line
from cifarlab.params.load import Loader, load_params
from cifarlab.pipeline import Revision
from cifarlab.report import pictures
from cifarlab.report.statistics import right
from cifarlab.runtime import timings
from cifarlab.tracking.sync import tags_of

MISTAKES = 24  # the most that are shown
CONDITIONS = ("device", "threads", "precision", "torch", "environment")
# What damaged files, DVC, Git and the disk raise.
ERRORS = (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError)
T = TypeVar("T")
Values = dict[str, Any]
Pictures = list[tuple[str, list[str]]]
"""Test images as addresses, each with the lines of its caption."""


@dataclass
class Run:
    """What is known about a revision. `missing` says why a part is None."""

    revision: Revision
    metrics: Values
    params: Values
    """Those that it ran with, by full key."""
    facts: dict[str, str]
    """Where it comes from, for the page."""
    tests: set[str] = field(default_factory=set)
    """Digests, each of which stands for the test images."""
    classes: list[str] = field(default_factory=list)
    changed: bool = False
    """Whether parameters, code or data are others now than those that ran."""
    history: pd.DataFrame | None = None
    predictions: pd.DataFrame | None = None
    filters: Values | None = None
    mistakes: Pictures | None = None
    tracked: Any = None
    """The run in MLflow."""
    missing: dict[str, str] = field(default_factory=dict)

    def try_to(self, part: str, action: Callable[[], T]) -> T | None:
        """Return the result of an action, or None and note why the part is missing."""
        try:
            return action()
        except (*ERRORS, yaml.YAMLError, SafetensorError) as error:
            self.missing[part] = first_line(error)
            return None

    def pictures(
        self, rows: pd.DataFrame, most: int, caption: Callable[[Any], list[str]]
    ) -> Pictures:
        """Return the test images of some predictions; those of the highest confidence first."""
        rows = rows.sort_values("confidence", ascending=False, kind="stable").head(most)
        path = files.DATA / "test_images.npy"
        with pipeline.tree(self.revision) as open_file, open_file(path) as file:
            shown = map(pictures.png, pictures.rows(file, rows.index.tolist()))
            return list(zip(shown, map(caption, rows.itertuples()), strict=True))


def load(revision: Revision, tracked: Sequence[Any]) -> Run:
    """Read a revision. `tracked` are the runs in MLflow. UserError: it has no results."""
    try:
        texts = [pipeline.read_text(p, revision) for p in (files.EVALUATION, files.TRAIN_METRICS)]
        evaluation, training = map(json.loads, texts)
        evaluation.pop("accuracy_per_class", None)  # older versions kept it there, too
        metrics = evaluation | training
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        advice = "run `dvc repro`, then commit dvc.lock and metrics/"
        raise UserError(f"{revision.label} has no results in metrics/; {advice}") from error
    facts = {"experiment": revision.name, "commit": revision.commit}
    facts |= {"baseline": revision.baseline} if revision.name else {}
    run = Run(revision, metrics, parameters(revision), facts)
    run.try_to("lock", lambda: _read_lock(run))
    with pipeline.tree(revision) as open_file:

        def opened(path: Path) -> BytesIO:
            with open_file(path) as file:
                return BytesIO(file.read())

        def table(path: Path, columns: dict[str, Any]) -> pd.DataFrame:
            # A damaged table is refused. A class may be called 7 or NA.
            file, names = opened(path), list(columns)
            return pd.read_csv(file, usecols=names, dtype=columns, keep_default_na=False)

        run.history = run.try_to(
            "history", lambda: pd.read_csv(opened(files.HISTORY), dtype=float).set_index("epoch")
        )
        columns = {"actual": str, "predicted": str, "confidence": float}
        run.predictions = run.try_to("predictions", lambda: table(files.PREDICTIONS, columns))
        each = run.try_to("classes", lambda: table(files.PER_CLASS, {"class": str}))
        if each is not None:
            run.classes = [*each["class"]]
        elif run.predictions is not None:
            run.classes = sorted({*run.predictions.actual, *run.predictions.predicted})
        run.filters = run.try_to("filters", lambda: pictures.filters(opened(files.WEIGHTS).read()))
        data = run.try_to("data", lambda: opened(files.DATA / "dataset.json").read())
    if run.predictions is not None:
        run.mistakes = run.try_to("mistakes", lambda: _mistakes(run))
    wanted = run.try_to("MLflow", lambda: tags_of(revision))
    same = (found for found in tracked if wanted and wanted.items() <= found.data.tags.items())
    run.tracked = next(same, None)
    run.try_to("origin", lambda: _read_origin(run, data))
    return run


def parameters(revision: Revision) -> Values:
    """Return the parameters in params.yaml by full key, also those of older versions."""
    try:
        text = pipeline.read_text(files.PARAMS, revision)
        return dict(flat(yaml.load(text, Loader) or {}))  # noqa: S506, it is a safe loader
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError) as error:
        advice = "`cifarlab check` says what is wrong"
        raise UserError(f"params.yaml of {revision.label} is damaged; {advice}") from error


def flat(tree: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values under their full key."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d{1,3}", value):
            value = float(value)  # noqa: PLW2901 - 1e-5 is text for PyYAML and a number for DVC
        yield from flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]


def _read_lock(run: Run) -> None:
    """Take from dvc.lock the parameters that ran, and the MD5 of the data."""
    pipeline.locked(run.revision)  # says what is wrong with a damaged one
    lock = yaml.safe_load(pipeline.read_text(files.DVC_LOCK, run.revision))
    for stage in lock["stages"].values():
        locked = dict(flat(stage.get("params", {}).get(str(files.PARAMS), {})))
        run.changed |= any(run.params.get(key) != value for key, value in locked.items())
        run.params |= locked
        run.tests |= {out["md5"] for out in stage["outs"] if out["path"] == str(files.DATA)}
    if commit := run.revision.commit:
        ran = pipeline.git("rev-list", "-1", commit, "--", str(files.DVC_LOCK)).strip()
        run.changed |= ran != commit and _code(ran) != _code(commit)
    else:
        run.changed |= not pipeline.workspace_is_current()


def _code(commit: str) -> str:
    """Return the digest of the code of a commit."""
    with pipeline.tracked_files(commit) as folder:
        return pipeline.stage_code(folder, pipeline.STAGES)


def _read_origin(run: Run, data: bytes | None) -> None:
    """Find out where a run comes from; `data` is its data/dataset.json."""
    commit, facts = run.revision.commit, run.facts
    if commit:
        show = ("show", "-s", "--no-show-signature", "--format=%cI", commit)
        facts["date of the commit"] = pipeline.git(*show).strip()
    if run.tracked:
        info, tags = run.tracked.info, run.tracked.data.tags
        facts["MLflow run"] = f"{info.run_name} ({info.run_id})"
        facts |= {name: tags[name] for name in CONDITIONS if name in tags}
    if data:
        known = json.loads(data)
        counts = "{name}, {train:,} training and {test:,} test images"
        facts |= {"data": counts.format(**known), "digest of the data": known["digest"]}
        run.tests |= {known["test_digest"]} if "test_digest" in known else set()
    if run.changed or "lock" in run.missing:
        return
    with pipeline.tracked_files(commit) if commit else nullcontext(Path()) as folder:
        facts["digest of the code"] = pipeline.stage_code(folder, pipeline.STAGES)
        if data and commit:
            (folder / files.DATA).mkdir()
            (folder / files.DATA / "dataset.json").write_bytes(data)
        key = pipeline.training_key(load_params(folder / files.PARAMS), folder)
        facts |= {"training key": key} | timings.read(key).conditions


def _mistakes(run: Run) -> Pictures:
    """Return the wrong predictions of which the network was most confident."""
    assert run.predictions is not None
    wrong = run.predictions[~right(run.predictions)]
    said = "→ {0.predicted} ({0.confidence:.0%})"
    return run.pictures(wrong, MISTAKES, lambda row: [row.actual, said.format(row)])

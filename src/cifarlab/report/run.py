"""Reading what the page shows of one run. What is missing becomes a sentence on the page."""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from cifarlab import files, pipeline
from cifarlab.errors import DAMAGED, UserError, first_line, in_a_sentence
from cifarlab.params.load import load_params, parse_yaml
from cifarlab.params.sections import flat
from cifarlab.pipeline import Revision
from cifarlab.report.statistics import right
from cifarlab.runtime import timings
from cifarlab.tracking.sync import tags_of

MISTAKES = 24  # the most that are shown
LARGEST = 48  # pixels; larger images are made smaller, so that the page stays small
FILTERS = 96  # the most that are shown
CONDITIONS = ("device", "threads", "precision", "torch", "environment")
# What damaged files, DVC, Git and the disk raise.
ERRORS = (UserError, OSError, SyntaxError, yaml.YAMLError, SafetensorError, *DAMAGED)
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
    test_digest: str = ""
    """Stands for the test images; empty if it is not known."""
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
        except ERRORS as error:
            self.missing[part] = first_line(error)
            return None

    def pictures(
        self, rows: pd.DataFrame, most: int, caption: Callable[[Any], list[str]]
    ) -> Pictures:
        """Return the test images of some predictions; those of the highest confidence first."""
        rows = rows.sort_values("confidence", ascending=False, kind="stable").head(most)
        path = files.DATA / "test_images.npy"
        with pipeline.tree(self.revision) as open_file, open_file(path) as file:
            shown = map(png, read_images(file, rows.index.tolist()))
            return list(zip(shown, map(caption, rows.itertuples()), strict=True))


def load(revision: Revision, tracked: Sequence[Any]) -> Run:
    """Read a revision. `tracked` are the runs in MLflow. UserError: it has no results."""
    advice = "run `dvc repro`, then commit dvc.lock and metrics/"
    with in_a_sentence(f"{revision.label} has no results in metrics/; {advice}", *DAMAGED):
        texts = [pipeline.read_text(p, revision) for p in (files.EVALUATION, files.TRAIN_METRICS)]
        metrics = json.loads(texts[0]) | json.loads(texts[1])
    facts = {"experiment": revision.name, "commit": revision.commit}
    facts |= {"baseline": revision.baseline} if revision.name else {}
    run = Run(revision, metrics, parameters(revision), facts)
    run.try_to("lock", lambda: _read_lock(run))
    with pipeline.tree(revision) as open_file:

        def opened(path: Path) -> BytesIO:
            with open_file(path) as file:
                return BytesIO(file.read())

        def history() -> pd.DataFrame:
            return pd.read_csv(opened(files.HISTORY), dtype=float).set_index("epoch")

        def predictions() -> pd.DataFrame:
            # A damaged table is refused. A class may be called 7 or NA.
            file = opened(files.PREDICTIONS)
            types: dict[str, Any] = {"actual": str, "predicted": str, "confidence": float}
            return pd.read_csv(file, usecols=[*types], dtype=types, keep_default_na=False)

        run.history = run.try_to("history", history)
        run.predictions = run.try_to("predictions", predictions)
        run.filters = run.try_to("filters", lambda: draw_filters(opened(files.WEIGHTS).read()))
        data = run.try_to("data", lambda: json.load(opened(files.DATA / "dataset.json"))) or {}
    run.test_digest = data.get("test_digest", "")
    if (table := run.predictions) is not None:
        run.classes = data.get("classes") or sorted({*table.actual, *table.predicted})
        run.mistakes = run.try_to("mistakes", lambda: _mistakes(run, table))
    wanted = run.try_to("MLflow", lambda: tags_of(revision))
    same = (found for found in tracked if wanted and wanted.items() <= found.data.tags.items())
    run.tracked = next(same, None)
    run.try_to("origin", lambda: _read_origin(run, data))
    return run


def parameters(revision: Revision) -> Values:
    """Return the parameters in params.yaml by full key, also those of older versions."""
    problem = f"params.yaml of {revision.label} is damaged; `cifarlab check` says what is wrong"
    with in_a_sentence(problem, yaml.YAMLError, RecursionError, *DAMAGED):
        text = pipeline.read_text(files.PARAMS, revision)
        return dict(flat(parse_yaml(text) or {}))


def _read_lock(run: Run) -> None:
    """Take from dvc.lock the parameters that ran."""
    pipeline.locked(run.revision)  # says what is wrong with a damaged one
    lock = parse_yaml(pipeline.read_text(files.DVC_LOCK, run.revision))
    for stage in lock["stages"].values():
        locked = dict(flat(stage.get("params", {}).get(str(files.PARAMS), {})))
        run.changed |= any(run.params.get(key) != value for key, value in locked.items())
        run.params |= locked
    if commit := run.revision.commit:
        ran = pipeline.git("rev-list", "-1", commit, "--", str(files.DVC_LOCK)).strip()
        run.changed |= ran != commit and _code(ran) != _code(commit)
    else:
        run.changed |= not pipeline.workspace_is_current()


def _code(commit: str) -> str:
    """Return the digest of the code of a commit."""
    with pipeline.tracked_files(commit) as folder:
        return pipeline.stage_code(folder, pipeline.STAGES)


def _read_origin(run: Run, data: Values) -> None:
    """Find out where a run comes from; `data` is its data/dataset.json, or empty."""
    commit, facts = run.revision.commit, run.facts
    if commit:
        show = ("show", "-s", "--no-show-signature", "--format=%cI", commit)
        facts["date of the commit"] = pipeline.git(*show).strip()
    if run.tracked:
        info, tags = run.tracked.info, run.tracked.data.tags
        facts["MLflow run"] = f"{info.run_name} ({info.run_id})"
        facts |= {name: tags[name] for name in CONDITIONS if name in tags}
    if data:
        counts = "{name}, {train:,} training and {test:,} test images"
        facts |= {"data": counts.format(**data), "digest of the data": data["digest"]}
    if run.changed or "lock" in run.missing:
        return
    with pipeline.tracked_files(commit) if commit else nullcontext(Path()) as folder:
        facts["digest of the code"] = pipeline.stage_code(folder, pipeline.STAGES)
        params = load_params(folder / files.PARAMS)
        key = pipeline.training_key(params, folder, data.get("digest", ""))
        facts |= {"training key": key} | timings.read(key).conditions


def _mistakes(run: Run, predictions: pd.DataFrame) -> Pictures:
    """Return the wrong predictions of which the network was most confident."""
    wrong = predictions[~right(predictions)]
    said = "→ {0.predicted} ({0.confidence:.0%})"
    return run.pictures(wrong, MISTAKES, lambda row: [row.actual, said.format(row)])


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """Return pixels, uint8 (height, width, 3), as the address of a picture."""
    image, file = Image.fromarray(pixels), BytesIO()
    image.thumbnail((LARGEST, LARGEST))
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def read_images(file: BinaryIO, numbers: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield some images of an .npy file of uint8, of which only these are read."""
    np.lib.format.read_magic(file)
    shape, *_ = np.lib.format.read_array_header_1_0(file)
    start, size = file.tell(), int(np.prod(shape[1:]))
    for number in numbers:
        file.seek(start + number * size)
        yield np.frombuffer(file.read(size), np.uint8).reshape(shape[1:])


def draw_filters(weights: bytes) -> dict[str, Any]:
    """Draw the filters of the first layer of a network.safetensors, each as a picture.

    Zero is grey. Each filter is scaled by its largest weight.
    """
    tensors = load_tensors(weights)
    whitening = "stem.0.weight" in tensors
    every = tensors["stem.0.weight" if whitening else "stages.0.first.0.weight"]
    shown = every[:FILTERS].transpose(0, 2, 3, 1)
    largest = np.abs(shown).max((1, 2, 3), keepdims=True).clip(1e-12)
    colors = np.rint(127.5 + 127.5 * shown / largest).astype(np.uint8)
    sizes = {"size": every.shape[-1], "count": len(every), "whitening": whitening}
    return {"sources": [png(color) for color in colors]} | sizes

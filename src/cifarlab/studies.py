"""Studies: a question asked as DVC experiments over variants and seeds, and answered with intervals."""

import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy import stats

from cifarlab import UserError, first_line, queue, tracking
from cifarlab.files import atomic
from cifarlab.params import changed, load_params
from cifarlab.revisions import cache, revisions

Floats = npt.NDArray[np.float64]
ANSWERS = Path("docs/studies")


class Study(BaseModel):
    """studies/NAME.yaml."""

    model_config = ConfigDict(extra="forbid")
    question: str
    base: dict[str, Any] = {}
    """Changes to params.yaml that all points share."""
    variants: dict[str, dict[str, Any]] = {}
    """Changes by name; all others are compared with the first."""
    grid: dict[str, list[Any]] = {}
    """Instead of variants: values of parameters, every combination of them a variant."""
    seeds: Annotated[list[int], Field(min_length=2)]
    answer_by: Literal["test", "validation"] = "test"
    """The accuracy that answers. What a study chooses (an architecture, a learning rate) it chooses on validation."""
    findings: str = ""
    """What the figures say, written by who has seen them."""

    @model_validator(mode="after")
    def _spread(self) -> "Study":
        for values in itertools.product(*self.grid.values()) if self.grid else ():
            changes = dict(zip(self.grid, values, strict=True))
            self.variants[", ".join(f"{key.split('.')[-1]} {value}" for key, value in changes.items())] = changes
        if len(self.variants) < 2 or len({slug(name) for name in self.variants}) < len(self.variants):
            raise ValueError("a study compares at least two variants, or a grid, of different names")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice")
        return self


class Point(NamedTuple):
    """A variant with a seed: a DVC experiment."""

    variant: str
    seed: int
    experiment: str
    changes: dict[str, Any]


class Effect(NamedTuple):
    """What a variant does beside the first one."""

    variant: str
    accuracy: float
    """Mean over the seeds, in percent."""
    interval: float
    """Half of its 95 % interval."""
    difference: float
    """Mean over the seeds, in points."""
    half: float
    """Half of its 95 % interval."""
    p: float
    """Of the paired t test, corrected for all comparisons of the study (Holm 1979)."""
    real: bool
    """More than noise: p below 5 %."""


def slug(text: str) -> str:
    """Return what a text becomes in the name of an experiment."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def load(name: str) -> tuple[Study, list[Point]]:
    """Read studies/NAME.yaml and try its points against params.yaml.

    Raises
    ------
    UserError
        The file is missing or wrong, or a point is no valid set of parameters.
    """
    path = Path("studies") / f"{name}.yaml"
    variant = ""
    try:
        study = Study.model_validate(yaml.safe_load(path.read_text("utf-8")))
        points = []
        for (variant, changes), seed in itertools.product(study.variants.items(), study.seeds):
            point = Point(variant, seed, f"{slug(name)}-{slug(variant)}-{seed}", {**study.base, **changes, "train.seed": seed})
            changed(point.changes)
            points.append(point)
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise UserError(f"{path} cannot be read: {error.strerror}; studies there: {known}") from error
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, fault['loc']))} {fault['msg']}" for fault in error.errors())
        raise UserError(f"{path}: {variant} {told}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {first_line(error)}") from error
    return study, points


def run(name: str, jobs: int) -> Path:
    """Run what DVC does not have yet of studies/NAME.yaml, and write and return the answer, docs/studies/NAME.md.

    Every point is an experiment of the current commit. Stopped and started again, a study goes on where it was.
    """
    study, points = load(name)
    commits, runs = _commits(), _runs(points)
    missing = [point for point in points if point.experiment not in commits]
    known = [seconds for run in runs.values() if (seconds := _seconds(run))]
    about = f", about {np.median(known) * len(missing) / 60:.0f} min" if known and missing else ""
    print(f"{study.question}\n{len(points)} points, {len(points) - len(missing)} done, {len(missing)} to run{about}", flush=True)
    started = time.monotonic()
    for done, point in enumerate(missing, 1):
        options = [option for key, value in point.changes.items() for option in ("-S", f"{key}={json.dumps(value)}")]
        command = ["dvc", "exp", "run", "--quiet", "--queue" if jobs > 1 else "--temp", "--name", point.experiment, *options]
        log = Path(".dvc/tmp") / f"{point.experiment}.log"
        with log.open("w") as file:
            if subprocess.run(command, stdout=file, stderr=file, check=False).returncode:
                raise UserError(f"{point.experiment} failed: {(log.read_text().strip().splitlines() or ['?'])[-1]} ({log})")
        left = (time.monotonic() - started) / done * (len(missing) - done)
        print(f"{point.experiment} {'queued' if jobs > 1 else f'done, {len(missing) - done} left, {left / 60:.0f} min'}", flush=True)
    if jobs > 1 and missing:
        queue.watch(jobs)
    _write(name, study, points)
    _tell_mlflow(name, study, points)
    return ANSWERS / f"{name}.md"


def compare(base: Floats, other: Floats) -> tuple[float, float, float]:
    """Return mean difference, half its 95 % interval and p of the paired t test of two variants over the same seeds, (seeds,) each."""
    difference = other - base
    if np.ptp(difference) == 0:  # as where a change does not reach the network at all
        return float(difference[0]), 0.0, float(difference[0] == 0)
    mean, error, student = difference.mean(), difference.std(ddof=1) / len(difference) ** 0.5, stats.t(len(difference) - 1)
    return float(mean), float(student.ppf(0.975) * error), float(2 * student.sf(abs(mean) / error))


def effects(results: pd.DataFrame, names: list[str]) -> list[Effect]:
    """Compare the variants of a study with the first of `names`.

    Parameters
    ----------
    results : columns variant, seed and accuracy (a share), a row a point
    """
    from statsmodels.stats.multitest import multipletests

    table = results.pivot(index="seed", columns="variant", values="accuracy") * 100
    accuracy = {name: table[name].to_numpy() for name in names}
    quantile = stats.t.ppf(0.975, len(table) - 1)
    compared = [compare(accuracy[names[0]], accuracy[name]) for name in names[1:]]
    real, corrected, *_ = multipletests([p for *_, p in compared], 0.05, "holm")
    beside = {names[0]: (0.0, 0.0, 1.0, False)}
    for name, (difference, half, _), p, more in zip(names[1:], compared, corrected, real, strict=True):
        beside[name] = (difference, half, float(p), bool(more))
    return [Effect(name, float(v.mean()), float(quantile * stats.sem(v)), *beside[name]) for name, v in accuracy.items()]


def _write(name: str, study: Study, points: list[Point]) -> None:
    """Write docs/studies/NAME.md, NAME.png and NAME.csv from the experiments' own files."""
    commits, runs = _commits(), _runs(points)
    records, curves, classes, files = [], [], [], cache() / "files" / "md5"
    for point in points:
        commit = commits[point.experiment]
        train, evaluation = (json.loads(_show(commit, f"metrics/{stage}.json")) for stage in ("train", "evaluate"))
        accuracy = evaluation["accuracy"] if study.answer_by == "test" else train.get("val_accuracy")
        if accuracy is None:
            raise UserError(f"studies/{name}.yaml answers by validation, but data.validation holds nothing out")
        identity = {"variant": point.variant, "seed": point.seed, "experiment": point.experiment}
        seconds = runs[point.experiment].data.metrics.get("epoch_seconds") if point.experiment in runs else None
        records.append(
            {**identity, "accuracy": accuracy, "parameters": train["parameters"], "seconds": seconds, "experiment": point.experiment}
        )
        classes += [{**identity, "class": label, "accuracy": share} for label, share in evaluation["accuracy_per_class"].items()]
        # DVC's cache has the history under the hash that the lock says.
        outs = {out["path"]: out.get("md5") for out in yaml.safe_load(_show(commit, "dvc.lock"))["stages"]["train"]["outs"]}
        md5 = outs["plots/history.csv"]
        curves.append(pd.read_csv(files / md5[:2] / md5[2:]).assign(variant=point.variant, seed=point.seed))
    results = pd.DataFrame(records)
    rows = effects(results, list(study.variants))
    with atomic(ANSWERS / f"{name}.csv") as path:
        results.to_csv(path, index=False, float_format="%.6f")
    _draw(ANSWERS / f"{name}.png", study, rows, pd.concat(curves), pd.DataFrame(classes))
    size = results.groupby("variant")[["parameters", "seconds"]].mean()
    body = []
    for row in rows:
        effect = f"{row.difference:+.2f} | {row.difference - row.half:+.2f} … {row.difference + row.half:+.2f} | "
        effect += f"{'**yes**' if row.real else 'no'}, p = {row.p:.2g}"
        cells = f"{row.accuracy:.2f} ± {row.interval:.2f} | {' | | ' if row is rows[0] else effect}"
        body.append(f"| {row.variant} | {cells} | {size.parameters[row.variant]:,.0f} | {size.seconds[row.variant]:.1f} |")
    tags = [run.data.tags for run in runs.values()]
    machines = {f"{t['device']}, {t['threads']} threads, {t['precision']}, PyTorch {t['torch']}" for t in tags if "torch" in t}
    meta = Path("data/dataset.json")
    data = json.loads(meta.read_text("utf-8"))["name"] if meta.exists() else "see params.yaml"
    page = [
        f"# {study.question}\n\n![the effect, learning curves, and each class]({name}.png)\n",
        f"{_sentence(rows)} {study.findings.strip()}\n".strip() + "\n",
        f"| variant | {study.answer_by} accuracy % | difference | 95 % interval | more than noise | parameters | s an epoch |",
        "|---|---|---|---|---|---|---|",
        *body,
        f"\n{len(study.seeds)} seeds ({', '.join(map(str, study.seeds))}). ± and intervals: 95 %, Student's t, differences paired by seed;",
        f"p corrected for {len(rows) - 1} comparisons (Holm); s an epoch: the last one. Shared by all variants:",
        f"{', '.join(f'`{key}={json.dumps(value)}`' for key, value in study.base.items()) or 'nothing'}; all else as in params.yaml.",
        f"Data: {data}. Machine: {' and '.join(sorted(machines)) or 'unknown'}.\n",
        f"    make study NAME={name}\n\nasks studies/{name}.yaml again; {name}.csv has every point: a DVC experiment, a run in MLflow.",
    ]
    with atomic(ANSWERS / f"{name}.md") as path:
        path.write_text("\n".join(page) + "\n", "utf-8")


def _sentence(rows: list[Effect]) -> str:
    """Say in words which variants differ from the first by more than noise."""
    first, *others = rows
    others.sort(key=lambda row: -abs(row.difference))
    told = []
    for word, listed in (
        ("better", [f"{row.variant} ({row.difference:+.2f} points)" for row in others if row.real and row.difference > 0]),
        ("worse", [f"{row.variant} ({row.difference:+.2f} points)" for row in others if row.real and row.difference < 0]),
        ("not to be told from noise", [row.variant for row in others if not row.real]),
    ):
        told += [f"{word}: {'; '.join(listed)}"] if listed else []
    return f"Beside *{first.variant}* ({first.accuracy:.2f} %) are {', '.join(told)}."


def _draw(path: Path, study: Study, rows: list[Effect], curves: pd.DataFrame, classes: pd.DataFrame) -> None:
    """Draw the effect with its intervals, the learning curves with bands, and the effect on each class."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", rc={"figure.constrained_layout.use": True, "text.parse_math": False})
    names = [row.variant for row in rows]
    colours = dict(zip(names, sns.color_palette("husl", len(names)), strict=True))
    figure, (effect, learning, each) = plt.subplots(1, 3, figsize=(16, max(4.5, 1.6 + 0.32 * len(names))))
    for place, row in enumerate(rows):
        colour = colours[row.variant] if place else "black"
        fill, half = colour if row.real or not place else "white", row.half if place else row.interval
        effect.errorbar(row.difference, place, xerr=half, fmt="o", color=colour, mfc=fill, capsize=3)
    effect.axvline(0, color="0.4", lw=1)
    effect.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    effect.set(title="Effect, 95 % interval (hollow: noise)", xlabel=f"{study.answer_by} accuracy, points beside {names[0]}")
    split = "val" if "val_accuracy" in curves and curves.val_accuracy.notna().any() else "train"
    lines = {"hue": "variant", "hue_order": names, "palette": colours, "errorbar": ("ci", 95), "n_boot": 200, "seed": 0}
    sns.lineplot(curves, x="epoch", y=f"{split}_accuracy", ax=learning, legend=len(names) <= 12, **lines)
    learning.set(title="Learning curves, mean and 95 % band", ylabel={"val": "validation", "train": "training"}[split] + " accuracy")
    means = classes.groupby(["variant", "class"], sort=False).accuracy.mean().unstack("class").loc[names] * 100
    sns.heatmap(means.iloc[1:] - means.iloc[0], cmap="vlag", center=0, annot=True, fmt=".1f", annot_kws={"size": 7}, cbar=False, ax=each)
    each.set(title=f"Test accuracy of each class, points beside {names[0]}", xlabel="", ylabel="")
    figure.suptitle(study.question)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _commits() -> dict[str, str]:
    """Return the commits of the experiments that started from the current one, by name."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {revision.name: revision.commit for revision in revisions() if revision.name and revision.baseline == head}


def _show(commit: str, file: str) -> str:
    return subprocess.run(["git", "show", f"{commit}:{file}"], capture_output=True, text=True, check=True).stdout


def _runs(points: list[Point]) -> dict[str, Any]:
    """Return MLflow's runs of the points by experiment; none, after a warning, where MLflow cannot be read."""
    names = {point.experiment for point in points}
    try:
        return {run.data.tags["dvc.exp.name"]: run for run in tracking.all_runs() if run.data.tags.get("dvc.exp.name") in names}
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return {}


def _seconds(run: Any) -> float | None:
    return (run.info.end_time - run.info.start_time) / 1000 if run and run.info.end_time else None


def _tell_mlflow(name: str, study: Study, points: list[Point]) -> None:
    """Make the points the children of one run of MLflow, which holds the answer."""
    try:
        client = tracking.connect()
        experiment = tracking.experiment_id(client, load_params().tracking.experiment)
        found = client.search_runs([experiment], f"tags.`study.parent` = '{name}'", max_results=1)
        tags = {"study.parent": name, "mlflow.note.content": study.question}
        parent = (found[0] if found else client.create_run(experiment, run_name=f"study {name}", tags=tags)).info.run_id
        for run in _runs(points).values():
            for tag, value in {"mlflow.parentRunId": parent, "study": name}.items():
                client.set_tag(run.info.run_id, tag, value)
        for ending in ("md", "png", "csv"):
            client.log_artifact(parent, str(ANSWERS / f"{name}.{ending}"))
        client.set_terminated(parent)
    except Exception as error:  # MLflow, requests, SQLAlchemy and the disk each raise their own
        print(f"warning: MLflow does not show the study ({first_line(error)[:200]}); {ANSWERS} has it", file=sys.stderr)

"""Studies: a question asked as DVC experiments over variants and seeds, and answered with intervals."""

import functools
import hashlib
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
from cifarlab.params import Params, changed, load_params
from cifarlab.revisions import Revision, cache, revisions, run_of

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
    measures: list[str] = []
    """Other figures of metrics/evaluate.json for the table, such as calibration_error."""
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
    """Run what is missing of studies/NAME.yaml, and write and return the answer, docs/studies/NAME.md.

    Every point is a DVC experiment, and a row of docs/studies/NAME.csv as soon as it is done. A row counts, wherever it was
    made, as long as parameters and code are those it was made with: stopped and started again, also by another machine, a
    study goes on where it was.
    """
    study, points = load(name)
    _record(name, study, points)  # what ran, but was not noted before a kill
    results, _ = _tables(name, points)
    missing = [point for point in points if point.experiment not in set(results.experiment)]
    about = f", about {results.wall.median() * len(missing) / 60:.0f} min" if len(results) and missing else ""
    print(f"{study.question}\n{len(points)} points, {len(points) - len(missing)} done, {len(missing)} to run{about}", flush=True)
    started = time.monotonic()
    queued = queue.waiting() if jobs > 1 else set()
    for done, point in enumerate((point for point in missing if point.experiment not in queued), 1):
        run_point(point, "--queue" if jobs > 1 else "--temp")
        if jobs == 1:
            _record(name, study, points)
        left = (time.monotonic() - started) / done * (len(missing) - done)
        print(f"{point.experiment} {'queued' if jobs > 1 else f'done, {len(missing) - done} left, {left / 60:.0f} min'}", flush=True)
    if jobs > 1 and missing:
        queue.watch(jobs, on_change=lambda: _record(name, study, points))
    _write(name, study, points)
    gather(name, study.question, list(_tables(name, points)[0].get("run", ())))
    return ANSWERS / f"{name}.md"


def run_point(point: Point, where: Literal["--queue", "--temp"]) -> None:
    """Run or queue a point.

    Raises
    ------
    UserError
        It failed; what it said last.
    """
    log = Path(".dvc/tmp") / f"{point.experiment}.log"
    options = [option for key, value in point.changes.items() for option in ("-S", f"{key}={json.dumps(value)}")]
    command = ["dvc", "exp", "run", "--quiet", "--force", where, "--name", point.experiment, *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        if subprocess.run(command, stdout=file, stderr=file, check=False).returncode:
            raise UserError(f"{point.experiment} failed: {(log.read_text().strip().splitlines() or ['?'])[-1]} ({log})")


def read_points(points: list[Point]) -> Iterator[tuple[Point, dict[str, Any], pd.DataFrame]]:
    """Yield those of the points that have run as experiments, with all their figures, and their epochs a row each."""
    experiments = revisions()
    for point in points:
        key = key_of(point)
        revision = next((r for r in experiments if r.name == point.experiment and _ran_as(r) == key), None)
        if not revision:
            continue
        train, evaluation = (_show(revision.commit, f"metrics/{stage}.json") for stage in ("train", "evaluate"))
        per_class = evaluation.pop("accuracy_per_class")
        row: dict[str, Any] = {"experiment": point.experiment, "variant": point.variant, "seed": point.seed, "key": key}
        row |= train | {f"test_{name}": value for name, value in evaluation.items()}
        row |= {f"accuracy/{label}": share for label, share in per_class.items()} | _timing(revision)
        # DVC's cache has the history under the hash that the lock says.
        outs = _show(revision.commit, "dvc.lock")["stages"]["train"]["outs"]
        md5 = next(out["md5"] for out in outs if out["path"] == "plots/history.csv")
        history = pd.read_csv(cache() / "files" / "md5" / md5[:2] / md5[2:])
        yield point, row, history.assign(experiment=point.experiment, variant=point.variant, seed=point.seed, key=key)


def _key(params: Params, read: Callable[[str], str]) -> str:
    """Hash what decides the figures of a point, on any machine and before its data are there: parameters, and the code as `read`."""
    stages = yaml.safe_load(read("dvc.yaml"))["stages"]
    code = sorted({dep for stage in ("download", "train", "evaluate") for dep in stages[stage]["deps"] if dep.endswith(".py")})
    deciding = {k: v for k, v in params.flat().items() if not k.startswith(("plot.", "tracking.")) and k != "data.sources"}
    content = json.dumps([deciding, [read(file) for file in code]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def key_of(point: Point) -> str:
    """Return the key that a point has with the parameters and the code of the workspace."""
    return _key(changed(point.changes), lambda file: Path(file).read_text("utf-8"))


def _ran_as(revision: Revision) -> str | None:
    """Return the key that an experiment ran with; None for one of another version."""
    try:
        return _key(Params.model_validate(_show(revision.commit, "params.yaml")), functools.partial(_content, revision.commit))
    except (ValidationError, LookupError, TypeError, yaml.YAMLError, subprocess.CalledProcessError):
        return None


def _tables(name: str, points: list[Point]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what is known of the points, a row each, and of their epochs; what was made otherwise is left out."""
    keys = {point.experiment: key_of(point) for point in points}
    tables = []
    for path in (ANSWERS / f"{name}.csv", ANSWERS / f"{name}-epochs.csv"):
        try:
            table = pd.read_csv(path) if path.exists() else pd.DataFrame()
        except ValueError as error:  # as a merge leaves it
            raise UserError(f"{path} is damaged ({first_line(error)}); `git checkout {path}` brings it back") from error
        table = table if {"experiment", "key"} <= set(table) else pd.DataFrame({"experiment": [], "key": []})
        tables.append(table[table.key == table.experiment.map(keys)])
    return tables[0], tables[1]


def _record(name: str, study: Study, points: list[Point]) -> None:
    """Add those of the points that have finished to the tables of the study."""
    results, epochs = _tables(name, points)
    for point, row, history in list(read_points([p for p in points if p.experiment not in set(results.experiment)])):
        columns = ["test_accuracy" if study.answer_by == "test" else "val_accuracy", *(f"test_{m}" for m in study.measures)]
        if missing := [column for column in columns if column not in row]:
            raise UserError(f"studies/{name}.yaml: {point.experiment} has no {missing[0]}; is it switched on (data.validation, evaluate)?")
        results = pd.concat([results, pd.DataFrame([row | {"accuracy": row[columns[0]]}])])
        epochs = pd.concat([epochs, history])
    for path, table in () if results.empty else ((ANSWERS / f"{name}-epochs.csv", epochs), (ANSWERS / f"{name}.csv", results)):
        with atomic(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")


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
    """Write docs/studies/NAME.md and its figures from the tables of the study."""
    results, epochs = _tables(name, points)
    rows = effects(results, list(study.variants))
    _draw(ANSWERS / f"{name}.png", study, rows, results, epochs)
    pictures = [f"![the effect, learning curves, and each class]({name}.png)"]
    if inside := [column for column in epochs.columns if "/" in column]:
        _draw_layers(ANSWERS / f"{name}-layers.png", study, epochs, inside)
        pictures.append(f"![layer by layer: {', '.join(dict.fromkeys(column.split('/')[0] for column in inside))}]({name}-layers.png)")
    trained = epochs.groupby("experiment").size().reindex(results.experiment).to_numpy()
    of_variant = results.assign(speed=results.images * trained / results.seconds).groupby("variant")
    mean, deviation = (
        of_variant.mean(numeric_only=True),
        of_variant[[f"test_{m}" for m in study.measures]].sem() * stats.t.ppf(0.975, len(study.seeds) - 1),
    )
    body = []
    for row in rows:
        beside = f"{row.difference:+.2f} | {row.difference - row.half:+.2f} … {row.difference + row.half:+.2f} | "
        beside += f"{'**yes**' if row.real else 'no'}, p = {row.p:.2g}"
        measured = [f"{mean[m][row.variant]:.4g} ± {deviation[m][row.variant]:.2g} | " for m in deviation]
        cells = f"{row.accuracy:.2f} ± {row.interval:.2f} | {' | | ' if row is rows[0] else beside} | {''.join(measured)}"
        size = mean.loc[row.variant]
        body.append(f"| {row.variant} | {cells}{size.parameters:,.0f} | {size.seconds:.1f} | {size.speed:,.0f} |")
    wide = "".join(f" {measure.replace('_', ' ')} |" for measure in deviation)
    page = [
        f"# {study.question}\n",
        "\n\n".join(pictures) + "\n",
        f"{_sentence(rows)} {study.findings.strip()}\n".strip() + "\n",
        f"| variant | {study.answer_by} accuracy % | difference | 95 % interval | more than noise |{wide} "
        "parameters | training s | images/s |",
        "|---" * (8 + len(study.measures)) + "|",
        *body,
        f"\n{len(study.seeds)} seeds ({', '.join(map(str, study.seeds))}). ± and intervals: 95 %, Student's t, differences paired by seed;",
        f"p corrected for {len(rows) - 1} comparisons (Holm). {results.images.max():,} training images. Shared by all variants:",
        f"{', '.join(f'`{key}={json.dumps(value)}`' for key, value in study.base.items()) or 'nothing'}; all else as in params.yaml.",
        f"Machine: {' and '.join(sorted(set(results.machine.dropna()))) or 'unknown'}.\n",
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


def _draw(path: Path, study: Study, rows: list[Effect], results: pd.DataFrame, epochs: pd.DataFrame) -> None:
    """Draw the effect with its intervals, the learning curves with bands, and the effect on each class."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", rc={"figure.constrained_layout.use": True, "text.parse_math": False})
    names = [row.variant for row in rows]
    colours = dict(zip(names, sns.color_palette("husl", len(names)), strict=True))
    figure, (effect, learning, each) = plt.subplots(1, 3, figsize=(17, max(4.5, 1.6 + 0.32 * len(names))))
    axis, *others = study.grid or {"": []}
    if len(study.grid.get(axis, [])) > 2 and all(isinstance(value, int | float) for value in study.grid[axis]):
        lines = {n: ", ".join(f"{key.split('.')[-1]} {study.variants[n][key]}" for key in others) for n in names}
        along = pd.DataFrame(
            [(study.variants[r.variant][axis], r.accuracy, r.interval, lines[r.variant]) for r in rows], columns=list("xyel")
        )
        for line, points in along.sort_values("x").groupby("l", sort=False):
            effect.errorbar(points.x, points.y, yerr=points.e, marker="o", capsize=3, label=str(line) or None)
        effect.set(title="Mean and 95 % interval", xlabel=axis, ylabel=f"{study.answer_by} accuracy, %", xticks=sorted(study.grid[axis]))
        if others:
            effect.legend()
    else:
        for place, row in enumerate(rows):
            colour = colours[row.variant] if place else "black"
            fill, half = colour if row.real or not place else "white", row.half if place else row.interval
            effect.errorbar(row.difference, place, xerr=half, fmt="o", color=colour, mfc=fill, capsize=3)
        effect.axvline(0, color="0.4", lw=1)
        effect.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        effect.set(title="Effect, 95 % interval (hollow: noise)", xlabel=f"{study.answer_by} accuracy, points beside {names[0]}")
    split = "val" if "val_accuracy" in epochs and epochs.val_accuracy.notna().any() else "train"
    bands = {"hue": "variant", "hue_order": names, "palette": colours, "errorbar": ("ci", 95), "n_boot": 200, "seed": 0}
    sns.lineplot(epochs, x="epoch", y=f"{split}_accuracy", ax=learning, legend=len(names) <= 12, **bands)
    if learning.get_legend():
        sns.move_legend(learning, "upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, fontsize=8, title=None, frameon=False)
    learning.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    learning.set(title="Learning curves, mean and 95 % band", ylabel={"val": "validation", "train": "training"}[split] + " accuracy")
    means = results.groupby("variant")[[c for c in results.columns if c.startswith("accuracy/")]].mean().loc[names] * 100
    means.columns = means.columns.str.removeprefix("accuracy/")
    sns.heatmap(means.iloc[1:] - means.iloc[0], cmap="vlag", center=0, annot=True, fmt=".1f", annot_kws={"size": 7}, cbar=False, ax=each)
    each.set(title="Test accuracy of each class, difference in points", xlabel="", ylabel="")
    figure.suptitle(study.question)
    _save(figure, path)


def _draw_layers(path: Path, study: Study, epochs: pd.DataFrame, columns: list[str]) -> None:
    """Draw what `train.diagnostics` saw in each layer: a row a quantity, a column a variant, means over the seeds."""
    import seaborn as sns

    long = epochs.melt(["variant", "seed", "epoch"], columns).dropna()
    long[["quantity", "layer"]] = long.variable.str.split("/", expand=True)
    long["layer"] = long.layer.astype(int)
    grid = sns.relplot(
        long, x="epoch", y="value", hue="layer", col="variant", col_order=list(study.variants), row="quantity", kind="line",
        palette="viridis", marker="o", errorbar=None, height=2, aspect=1.1, facet_kws={"sharey": "row", "margin_titles": True},
    )  # fmt: skip
    grid.set_titles(col_template="{col_name}", row_template="")
    for (quantity, _), axes in grid.axes_dict.items():
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if quantity == "gradient_norm":
            axes.set_yscale("symlog", linthresh=1e-6)
    for axes, quantity in zip(grid.axes[:, 0], grid.row_names, strict=True):
        axes.set_ylabel(quantity.replace("_", " "))
    _save(grid.figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _content(commit: str, file: str) -> str:
    return subprocess.run(["git", "show", f"{commit}:{file}"], capture_output=True, text=True, check=True).stdout


def _show(commit: str, file: str) -> Any:
    """Return the content of a YAML or JSON file in a commit."""
    return yaml.safe_load(_content(commit, file))


def _timing(revision: Revision) -> dict[str, Any]:
    """Return id, training time, time of the whole run in s, and machine, of the run in MLflow; nothing, after a warning, without MLflow."""
    try:
        run_id = run_of(revision)
        client = tracking.connect()
        run = client.get_run(run_id)
        seconds = sum(point.value for point in client.get_metric_history(run_id, "epoch_seconds"))
    except Exception as error:  # MLflow, requests, SQLAlchemy and the disk each raise their own
        print(f"warning: {revision.name} has no training time: {first_line(error)[:200]}", file=sys.stderr)
        return {"run": None, "seconds": None, "wall": None, "machine": None}
    tags, wall = run.data.tags, (run.info.end_time - run.info.start_time) / 1000
    machine = f"{tags.get('device')}, {tags.get('threads')} threads, {tags.get('precision')}, PyTorch {tags.get('torch')}"
    return {"run": run_id, "seconds": seconds or None, "wall": wall, "machine": machine}


def gather(name: str, question: str, runs: list[str]) -> None:
    """Make runs of MLflow the children of one run, which holds the answer."""
    try:
        client = tracking.connect()
        experiment = tracking.experiment_id(client, load_params().tracking.experiment)
        found = client.search_runs([experiment], f"tags.`study.parent` = '{name}'", max_results=1)
        tags = {"study.parent": name, "mlflow.note.content": question}
        parent = (found[0] if found else client.create_run(experiment, run_name=f"study {name}", tags=tags)).info.run_id
        here = {run.info.run_id for run in tracking.all_runs()}  # those of points from another machine are not
        for run, (tag, value) in itertools.product(here.intersection(runs), {"mlflow.parentRunId": parent, "study": name}.items()):
            client.set_tag(run, tag, value)
        for file in [ANSWERS / f"{name}.md", *ANSWERS.glob(f"{name}*.png"), *ANSWERS.glob(f"{name}*.csv")]:
            client.log_artifact(parent, str(file))
        client.set_terminated(parent)
    except Exception as error:  # MLflow, requests, SQLAlchemy and the disk each raise their own
        print(f"warning: MLflow does not show the study ({first_line(error)[:200]}); {ANSWERS} has it", file=sys.stderr)

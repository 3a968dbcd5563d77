"""Studies: a question asked as DVC experiments over variants and seeds, and answered with intervals."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy import stats
from statsmodels.stats.multitest import multipletests

from cifarlab import UserError, figures, first_line, queue, tracking
from cifarlab.files import atomic
from cifarlab.params import Params, changed, load_params, read_yaml
from cifarlab.revisions import Revision, cache, revisions, run_of

ANSWERS = Path("docs/studies")


class Question(BaseModel):
    """studies/NAME.yaml, of a study or of a search."""

    model_config = ConfigDict(extra="forbid")
    question: str
    base: dict[str, Any] = {}
    """Changes to params.yaml that all points share."""
    findings: str = ""
    """What the figures say, written by who has seen them."""

    @classmethod
    def read(cls, name: str) -> Self:
        """Read studies/NAME.yaml; UserError where it is missing or wrong."""
        path = Path("studies") / f"{name}.yaml"
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        try:
            return cls.model_validate(read_yaml(path, f"studies there: {known}"))
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, fault['loc']))} {fault['msg']}".strip() for fault in error.errors())
            raise UserError(f"{path} is no {cls.__name__.lower()}: {told}") from error

    @property
    def shared(self) -> str:
        """The base in words."""
        return ", ".join(f"`{key}={json.dumps(value)}`" for key, value in self.base.items()) or "nothing"


class Study(Question):
    """Variants, or a grid of them, by seeds."""

    variants: dict[str, dict[str, Any]] = {}
    """Changes by name; all others are compared with the first."""
    grid: dict[str, list[Any]] = {}
    """Instead of variants: values of parameters, every combination of them a variant."""
    seeds: Annotated[list[int], Field(min_length=2)]
    answer_by: Literal["test", "validation"] = "test"
    """The accuracy that answers. What a study chooses (an architecture, a learning rate) it chooses on validation."""
    measures: list[str] = []
    """Other figures of metrics/evaluate.json for the table, such as calibration_error."""

    @model_validator(mode="after")
    def _spread(self) -> Self:
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
    key: str
    """What its figures depend on: `key_of` its parameters."""


def slug(text: str) -> str:
    """Return what a text becomes in the name of an experiment."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def load(name: str) -> tuple[Study, list[Point]]:
    """Read studies/NAME.yaml and try its points against params.yaml; UserError where one is no valid set of parameters."""
    study, points = Study.read(name), []
    for (variant, own), seed in itertools.product(study.variants.items(), study.seeds):
        changes = {**study.base, **own, "train.seed": seed}
        try:
            points.append(Point(variant, seed, f"{slug(name)}-{slug(variant)}-{seed}", changes, key_of(changed(changes))))
        except UserError as error:
            raise UserError(f"studies/{name}.yaml: {variant}: {'; '.join(str(error).splitlines())}") from error
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
    _record(name, study, points)
    results, epochs = _tables(name, points)
    return publish(name, study.question, _page(name, study, results, epochs), list(results.run))


def run_point(point: Point, where: Literal["--queue", "--temp"]) -> None:
    """Run or queue a point; UserError with its last words where it fails."""
    log = Path(".dvc/tmp") / f"{point.experiment}.log"
    log.parent.mkdir(exist_ok=True)  # DVC has not run in a new checkout
    options = [option for key, value in point.changes.items() for option in ("-S", f"{key}={json.dumps(value)}")]
    # DVC's own --force would replace an experiment of that name, and run every stage again whatever its cache has.
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["git", "update-ref", "-d", f"refs/exps/{head[:2]}/{head[2:]}/{point.experiment}"], check=True)
    command = ["dvc", "exp", "run", "--quiet", where, "--name", point.experiment, *options]
    with log.open("w") as file:
        if subprocess.run(command, stdout=file, stderr=file, check=False).returncode:
            raise UserError(f"{point.experiment} failed: {(log.read_text().strip().splitlines() or ['?'])[-1]} ({log})")


def read_points(points: list[Point]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield, of those of the points that have run as experiments, all figures, and the epochs a row each."""
    experiments = revisions()
    for point in points:
        revision = next((r for r in experiments if r.name == point.experiment and _ran_as(r.commit) == point.key), None)
        if not revision:
            continue
        about: dict[str, Any] = {"experiment": point.experiment, "key": point.key, "variant": point.variant, "seed": point.seed}
        train, evaluation, lock = (
            yaml.safe_load(_content(file, revision.commit)) for file in ("metrics/train.json", "metrics/evaluate.json", "dvc.lock")
        )
        per_class = {f"accuracy/{label}": share for label, share in evaluation.pop("accuracy_per_class").items()}
        row = about | train | {f"test_{name}": value for name, value in evaluation.items()} | per_class | _timing(revision)
        # DVC's cache has the history under the hash that the lock says.
        md5 = next(out["md5"] for out in lock["stages"]["train"]["outs"] if out["path"] == "plots/history.csv")
        yield row, pd.read_csv(cache() / "files" / "md5" / md5[:2] / md5[2:]).assign(**about)


def _content(file: str, commit: str = "") -> str:
    """Return the text of a file in a commit, or in the workspace."""
    if not commit:
        return Path(file).read_text("utf-8")
    return subprocess.run(["git", "show", f"{commit}:{file}"], capture_output=True, text=True, check=True).stdout


def key_of(params: Params, commit: str = "") -> str:
    """Hash what decides the figures of a point, on any machine and before its data are there: parameters, and the code of a commit."""
    stages = yaml.safe_load(_content("dvc.yaml", commit))["stages"]
    code = sorted({dep for stage in ("download", "train", "evaluate") for dep in stages[stage]["deps"] if dep.endswith(".py")})
    deciding = {k: v for k, v in params.flat().items() if not k.startswith(("plot.", "tracking.")) and k != "data.sources"}
    content = json.dumps([deciding, [_content(file, commit) for file in code]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _ran_as(commit: str) -> str | None:
    """Return the key that an experiment ran with; None for one of another version."""
    try:
        return key_of(Params.model_validate(yaml.safe_load(_content("params.yaml", commit))), commit)
    except (ValidationError, LookupError, TypeError, yaml.YAMLError, subprocess.CalledProcessError):
        return None


def _tables(name: str, points: list[Point]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what is known of the points, a row each, and of their epochs; what was made otherwise is left out."""
    tables = []
    for path in (ANSWERS / f"{name}.csv", ANSWERS / f"{name}-epochs.csv"):
        try:
            table = pd.read_csv(path) if path.exists() else pd.DataFrame()
        except ValueError as error:  # as a merge leaves it
            raise UserError(f"{path} is damaged ({first_line(error)}); `git checkout {path}` brings it back") from error
        table = table if {"experiment", "key"} <= set(table) else pd.DataFrame({"experiment": [], "key": []})
        tables.append(table[table.key == table.experiment.map({point.experiment: point.key for point in points})])
    return tables[0], tables[1]


def _record(name: str, study: Study, points: list[Point]) -> None:
    """Add those of the points that have finished to the tables of the study."""
    results, epochs = _tables(name, points)
    answers = ["test_accuracy" if study.answer_by == "test" else "val_accuracy", *(f"test_{m}" for m in study.measures)]
    for row, history in list(read_points([p for p in points if p.experiment not in set(results.experiment)])):
        if missing := [column for column in answers if column not in row]:
            told = f"{row['experiment']} has no {missing[0]}; is it switched on (data.validation, evaluate)?"
            raise UserError(f"studies/{name}.yaml: {told}")
        results = pd.concat([results, pd.DataFrame([row | {"accuracy": row[answers[0]]}])])
        epochs = pd.concat([epochs, history])
    for path, table in () if results.empty else ((ANSWERS / f"{name}-epochs.csv", epochs), (ANSWERS / f"{name}.csv", results)):
        with atomic(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")


def effects(results: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Compare the variants of a study with the first of `names`.

    Parameters
    ----------
    results : columns variant, seed and accuracy (a share), a row a point

    Returns
    -------
    A row a variant, in percent: its mean accuracy over the seeds and half of the 95 % interval of that; its mean difference,
    paired by seed, and half of the interval of that; p of the paired t test, corrected for all comparisons (Holm 1979);
    whether that is real, p below 5 %.
    """
    table = results.pivot(index="seed", columns="variant", values="accuracy")[names] * 100
    difference = table.sub(table[names[0]], axis=0)
    student = stats.t(len(table) - 1)
    # 0 / 0 where a change does not reach the network at all.
    p = 2 * student.sf((difference.mean() / difference.sem()).abs().fillna(0))
    p[1:] = multipletests(p[1:], method="holm")[1]
    intervals = {"interval": student.ppf(0.975) * table.sem(), "half": student.ppf(0.975) * difference.sem()}
    return pd.DataFrame({"accuracy": table.mean(), "difference": difference.mean(), **intervals, "p": p, "real": p < 0.05})


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    head_line, *lines = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return [head_line, "|---" * len(head) + "|", *lines]


def _page(name: str, study: Study, results: pd.DataFrame, epochs: pd.DataFrame) -> list[str]:
    """Draw the figures of docs/studies/NAME.md and return its lines."""
    found = effects(results, list(study.variants))
    _draw(ANSWERS / f"{name}.png", study, found, results, epochs)
    pictures = [f"![the effect, learning curves, and each class]({name}.png)\n"]
    if inside := [column for column in epochs.columns if "/" in column]:
        _draw_layers(ANSWERS / f"{name}-layers.png", study, epochs, inside)
        pictures.append(f"![layer by layer: {', '.join(dict.fromkeys(c.split('/')[0] for c in inside))}]({name}-layers.png)\n")
    measured = [f"test_{measure}" for measure in study.measures]
    trained = results.images * results.experiment.map(epochs.groupby("experiment").size())
    of_variant = results.assign(speed=trained / results.seconds).groupby("variant")
    error = of_variant[measured].sem() * stats.t.ppf(0.975, len(study.seeds) - 1)
    rows: list[list[str]] = []
    for row in found.join(of_variant[["parameters", "seconds", "speed", *measured]].mean()).reset_index().to_dict("records"):
        beside = _cells(row["difference"], row["half"], row["p"]) if rows else [""] * 3
        measures = [f"{row[measure]:.4g} ± {error[measure][row['variant']]:.2g}" for measure in measured]
        cost = [f"{row['parameters']:,.0f}", f"{row['seconds']:.1f}", f"{row['speed']:,.0f}"]
        rows.append([row["variant"], f"{row['accuracy']:.2f} ± {row['interval']:.2f}", *beside, *measures, *cost])
    named = [measure.replace("_", " ") for measure in measured]
    data = " and ".join(sorted(set(results.get("data", pd.Series()).dropna()))) or "unknown data"
    compared = ["difference", "95 % interval", "more than noise"]
    head = ["variant", f"{study.answer_by} accuracy %", *compared, *named]
    others: list[str] = []
    counts = str(len(rows) - 1)
    if pairs := _one_at_a_time(study, results):
        others = ["\nOne parameter of the grid at a time, beside its first value:\n", *table(["variant", "beside", *compared], pairs)]
        counts += f" and {len(pairs)}"
    return [
        f"# {study.question}\n",
        *pictures,
        f"{study.findings} {_sentence(found)}".strip() + "\n",
        *table([*head, "parameters", "training s", "images/s"], rows),
        *others,
        f"\n{len(study.seeds)} seeds ({', '.join(map(str, study.seeds))}). ± and intervals: 95 %, Student's t, differences paired by seed;",
        f"p corrected for the {counts} comparisons of a table (Holm). {results.images.max():,} training images of {data}.",
        "Shared by all variants:",
        f"{study.shared}; all else as in params.yaml.",
        f"Machine: {' and '.join(sorted(set(results.machine.dropna()))) or 'unknown'}.\n",
        f"    make study NAME={name}\n\nasks studies/{name}.yaml again; {name}.csv has every point: a DVC experiment, a run in MLflow.",
    ]


def _cells(difference: float, half: float, p: float) -> list[str]:
    """Say a difference, its interval, and whether it is more than noise."""
    return [f"{difference:+.2f}", f"{difference - half:+.2f} … {difference + half:+.2f}", f"{'**yes**' if p < 0.05 else 'no'}, p = {p:.2g}"]


def _one_at_a_time(study: Study, results: pd.DataFrame) -> list[list[str]]:
    """Compare each variant of a grid with that which has one parameter at its first value, but for those beside the first variant."""
    pairs, rows = [], []
    for key, (name, changes) in itertools.product(study.grid, study.variants.items()):
        first = next(n for n, c in study.variants.items() if c == changes | {key: study.grid[key][0]})
        if first not in (name, next(iter(study.variants))):
            pairs.append((name, first))
            rows.append(effects(results, [first, name]).iloc[1])
    corrected = multipletests([row.p for row in rows], method="holm")[1] if rows else []
    return [[*pair, *_cells(row.difference, row.half, p)] for pair, row, p in zip(pairs, rows, corrected, strict=True)]


def _sentence(found: pd.DataFrame) -> str:
    """Say in words which variants differ from the first by more than noise."""
    others = found.iloc[1:].sort_values("difference", key=abs, ascending=False, kind="stable")
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not to be told from noise": []}
    for name, difference, real in zip(others.index, others.difference, others.real, strict=True):
        told = f"{name} ({difference:+.2f} points)" if real else name
        groups[("better" if difference > 0 else "worse") if real else "not to be told from noise"].append(told)
    listed = [f"{word}: {'; '.join(names)}" for word, names in groups.items() if 0 < len(names) <= 5]
    listed += [f"{word}: {len(names)} variants, such as {names[0]}" for word, names in groups.items() if len(names) > 5]
    return f"Compared with *{found.index[0]}* ({found.accuracy.iloc[0]:.2f} %), {' – '.join(listed)}."


def _interval(values: pd.Series) -> Any:
    """Return the 95 % interval of a mean: low, high."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
    return values.mean() - half, values.mean() + half


def _draw(path: Path, study: Study, found: pd.DataFrame, results: pd.DataFrame, epochs: pd.DataFrame) -> None:
    """Draw the effect with its intervals, the learning curves with bands, and the effect on each class."""
    names = list(found.index)
    figure, (effect, learning, each) = plt.subplots(1, 3, figsize=(17, max(4.5, 1.6 + 0.32 * len(names))))
    axis, *others = study.grid or [""]
    values = study.grid.get(axis, [])
    colours: dict[str, Any]
    if len(values) > 2 and all(isinstance(value, int | float) for value in values):
        settings = pd.DataFrame.from_dict(study.variants, orient="index")
        line = ", ".join(others) or None  # one for each setting of the other parameters
        if line:
            settings[line] = settings[others].astype(str).agg(", ".join, axis=1)
        results, epochs = (table.join(settings, on="variant") for table in (results, epochs))
        bars = {"err_style": "bars", "err_kws": {"capsize": 3}, "errorbar": _interval, "marker": "o"}
        sns.lineplot(results.assign(accuracy=100 * results.accuracy), x=axis, y="accuracy", hue=line, style=line, ax=effect, **bars)
        effect.set(title="Mean and 95 % interval", ylabel=f"{study.answer_by} accuracy, %", xticks=sorted(values))
        hint, colours = "", {"hue": axis, "style": line, "palette": "flare", "legend": "full"}
    else:
        palette = ["black", *sns.color_palette("husl", len(names) - 1)]
        for place, (row, colour) in enumerate(zip(found.itertuples(), palette, strict=True)):
            half, fill = (row.half, colour if row.real else "white") if place else (row.interval, colour)
            effect.errorbar(row.difference, place, xerr=half, fmt="o", color=colour, mfc=fill, capsize=3)
        effect.axvline(0, color="0.4", lw=1)
        effect.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        effect.set(title="Effect, 95 % interval (hollow: noise)", xlabel=f"{study.answer_by} accuracy, points beside {names[0]}")
        hint, colours = " (colours as on the left)", {"hue": "variant", "hue_order": names, "palette": palette, "legend": False}
    split, label = ("val", "validation") if epochs.get("val_accuracy", pd.Series()).notna().any() else ("train", "training")
    bands = {"errorbar": _interval, "err_kws": {"alpha": min(0.1, 0.7 / len(names))}}  # many of them hide each other
    epochs = epochs.assign(accuracy=100 * epochs[f"{split}_accuracy"])
    sns.lineplot(epochs, x="epoch", y="accuracy", ax=learning, **bands, **colours)
    if learning.get_legend():
        sns.move_legend(learning, "center left", bbox_to_anchor=(1, 0.5), fontsize=9, frameon=False)
    learning.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    learning.set(title="Learning curves, mean and 95 % band", ylabel=f"{label} accuracy, %", xlabel=f"epoch{hint}")
    means = results.groupby("variant")[[c for c in results.columns if c.startswith("accuracy/")]].mean().loc[names] * 100
    means.columns = means.columns.str.removeprefix("accuracy/")
    sns.heatmap(means.iloc[1:] - means.iloc[0], cmap="vlag", center=0, annot=True, fmt=".1f", annot_kws={"size": 7}, cbar=False, ax=each)
    each.set(title="Effect on each class", xlabel=f"points beside {names[0]}", ylabel="")
    each.tick_params(axis="y", labelrotation=0)
    figure.suptitle(study.question)
    figures.save(figure, path, dpi=100)


def _draw_layers(path: Path, study: Study, epochs: pd.DataFrame, columns: list[str]) -> None:
    """Draw what `train.diagnostics` saw in each layer: a row a quantity, a column a variant, means over the seeds."""
    means = epochs.groupby(["variant", "epoch"])[columns].mean()
    means.columns = means.columns.str.split("/", expand=True)
    quantities = list(means.columns.unique(0))
    size = (2.2 * len(study.variants) + 1, 2 * len(quantities))
    figure, grid = plt.subplots(len(quantities), len(study.variants), figsize=size, sharex=True, sharey="row", squeeze=False)
    for (row, quantity), (column, variant) in itertools.product(enumerate(quantities), enumerate(study.variants)):
        axes = means.loc[variant][quantity].plot(ax=grid[row, column], colormap="viridis", marker=".", legend=False)
        axes.set(ylabel=quantity.replace("_", " "))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if quantity == "gradient_norm":  # down to zero
            axes.set_yscale("symlog", linthresh=1e-6)
            axes.yaxis.get_major_locator().set_params(numticks=4)
            axes.yaxis.set_major_formatter("{x:g}")
        if not row:
            axes.set_title(textwrap.fill(variant, 24), fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), title="layer", loc="outside right center")
    figures.save(figure, path, dpi=100)


def _timing(revision: Revision) -> dict[str, Any]:
    """Return id, training time, time of the whole run in s, machine and data, of the run in MLflow; nothing, but a warning, without it."""
    try:
        client, run_id = tracking.connect(), run_of(revision)
        run, epochs = client.get_run(run_id), client.get_metric_history(run_id, "epoch_seconds")
    except Exception as error:  # MLflow, requests, SQLAlchemy and the disk each raise their own
        print(f"warning: {revision.name} has no training time: {first_line(error)[:200]}", file=sys.stderr)
        return dict.fromkeys(("run", "seconds", "wall", "machine", "data"))
    tags, wall = run.data.tags, (run.info.end_time - run.info.start_time) / 1000
    machine = f"{tags.get('device')}, {tags.get('threads')} threads, {tags.get('precision')}, PyTorch {tags.get('torch')}"
    data = run.inputs.dataset_inputs[0].dataset.name
    return {"run": run_id, "seconds": sum(epoch.value for epoch in epochs) or None, "wall": wall, "machine": machine, "data": data}


def publish(name: str, question: str, page: list[str], runs: list[str]) -> Path:
    """Write and return docs/studies/NAME.md, and make `runs` of MLflow the children of one run, which holds the answer."""
    answer = ANSWERS / f"{name}.md"
    with atomic(answer) as path:
        path.write_text("\n".join(page) + "\n", "utf-8")
    try:
        client = tracking.connect()
        experiment = tracking.experiment_id(client, load_params().tracking.experiment)
        found = client.search_runs([experiment], f"tags.`study.parent` = '{name}'", max_results=1)
        tags = {"study.parent": name, "mlflow.note.content": question}
        parent = (found[0] if found else client.create_run(experiment, run_name=f"study {name}", tags=tags)).info.run_id
        here = {run.info.run_id for run in tracking.all_runs()}  # those of points from another machine are not
        for run, (tag, value) in itertools.product(here.intersection(runs), {"mlflow.parentRunId": parent, "study": name}.items()):
            client.set_tag(run, tag, value)
        for file in [answer, *ANSWERS.glob(f"{name}*.png"), *ANSWERS.glob(f"{name}*.csv")]:
            client.log_artifact(parent, str(file))
        client.set_terminated(parent)
    except Exception as error:  # MLflow, requests, SQLAlchemy and the disk each raise their own
        print(f"warning: MLflow does not show the study ({first_line(error)[:200]}); {ANSWERS} has it", file=sys.stderr)
    return answer

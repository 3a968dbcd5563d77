"""The page docs/studies/NAME.md, its statistics and its pictures."""

import itertools
import re
from pathlib import Path
from typing import Any

from pandas import DataFrame
from scipy import stats
from statsmodels.stats.multitest import multipletests

from cifarlab.errors import UserError
from cifarlab.figures.study import draw_layers, draw_study
from cifarlab.files import ANSWERS, atomic
from cifarlab.studies.points import Point, Tables
from cifarlab.studies.question import Study

SIGNIFICANCE = 0.05
COMPARISON = ["difference", "95 % interval", "significant (5 %)"]
NOTICE = "> These figures were made by other code or parameters"


def write_page(name: str, study: Study, points: list[Point], tables: Tables) -> Path:
    """Write docs/studies/NAME.md, draw its pictures and return its path.

    Parameters
    ----------
    tables : what `points.chosen` returns; if rows do not count, the page says so at the top

    Raises
    ------
    UserError
        The tables lack a point.
    """
    results, epochs = tables
    have = set(results.experiment) & set(epochs.experiment)
    if missing := [point.experiment for point in points if point.experiment not in have]:
        lacking = f"{name}.csv and {name}-epochs.csv lack {len(missing)} points ({missing[0]}, …)"
        advice = "runs them; if it just did, `git status` shows code that is not in Git"
        raise UserError(f"{ANSWERS}/{lacking}; `make study NAME={name}` {advice}")
    comparison = effects(results, list(study.variants))
    grid = DataFrame.from_dict(study.variants, orient="index")[list(study.grid)]
    title, label = study.question, f"{study.answer_by} accuracy"
    data = _and(results.data)
    folder = folder_of(name, data)
    draw_study(folder / f"{name}.png", title, label, comparison, tables=tables, grid=grid)
    pictures = [f"![effects, learning curves and classes]({name}.png)"]
    layers = epochs.set_index(["variant", "epoch"]).filter(like="/").dropna(axis=1, how="all")
    if len(layers.columns):
        draw_layers(folder / f"{name}-layers.png", layers, list(study.variants))
        pictures.append(f"![layer by layer]({name}-layers.png)")
    text = _text(name, study, comparison, tables)
    path = write_answer(folder / f"{name}.md", [f"# {study.question}", *pictures, *text])
    update_notice(name, results, folder)
    return path


def folder_of(name: str, data: str) -> Path:
    """Return the folder for the page NAME about some data: docs/studies, or a folder in it.

    The page that docs/studies has may be about other data. Then it stays.
    """
    page, named = ANSWERS / f"{name}.md", rf"(?<![\w-]){re.escape(data)}(?![\w-])"
    other = page.exists() and not re.search(named, page.read_text("utf-8"))
    return ANSWERS / re.sub(r"\W+", "-", data) if other else ANSWERS


def write_answer(path: Path, paragraphs: list[str]) -> Path:
    """Write the page of a study or search and return its path."""
    with atomic(path) as temporary:
        temporary.write_text("\n\n".join(paragraphs) + "\n", "utf-8")
    return path


def update_notice(name: str, results: DataFrame, folder: Path = ANSWERS) -> None:
    """Let the notice below the title of FOLDER/NAME.md, if there is such a page, be right.

    The notice says that some of the results do not count. There is none if all of them count.
    """
    path, commits = folder / f"{name}.md", made_by(results[~results.counts])
    if not path.exists():
        return
    text = re.sub(f"^{re.escape(NOTICE)}.*\n\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
    if commits:
        notice = f"{NOTICE} (commit {commits}) and have not been confirmed for the present ones"
        text = text.replace("\n\n", f"\n\n{notice}; `make study NAME={name}` asks again.\n\n", 1)
    path.write_text(text, "utf-8")


def made_by(results: DataFrame) -> str:
    """Return the commits that made the results, seven digits each, or "unknown"."""
    return ", ".join(sorted(set(results.commit.fillna("unknown").str[:7])))


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    head_line, *lines = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([head_line, "|---" * len(head) + "|", *lines])


def effects(results: DataFrame, names: list[str]) -> DataFrame:
    """Compare variants with the first of `names`.

    Parameters
    ----------
    results : columns variant, seed and accuracy (a share), one row per point

    Returns
    -------
    One row per variant, in percent:

    - accuracy, accuracy_margin: mean over the seeds, half of its 95 % interval (Student's t)
    - difference, difference_margin: mean difference, paired by seed, half of its 95 % interval
    - p: of the paired t test, corrected for all comparisons (Holm 1979)
    - significant: p is below 5 %
    """
    table = results.pivot(index="seed", columns="variant", values="accuracy")[names] * 100
    difference = table.sub(table[names[0]], axis=0)
    quantile = stats.t.ppf(0.975, len(table) - 1)
    # A change that does not reach the network at all gives 0 / 0.
    statistic = (difference.mean() / difference.sem()).abs().fillna(0)
    p = 2 * stats.t.sf(statistic, len(table) - 1)
    p[1:] = multipletests(p[1:], method="holm")[1]
    columns = {"accuracy": table.mean(), "accuracy_margin": quantile * table.sem()}
    columns |= {"difference": difference.mean(), "difference_margin": quantile * difference.sem()}
    return DataFrame(columns).assign(p=p, significant=p < SIGNIFICANCE)


def one_parameter_at_a_time(study: Study, results: DataFrame) -> DataFrame:
    """Compare each variant of a grid with the one that has the first value of one parameter.

    Comparisons with the first variant are left out, because `effects` has them.

    Returns
    -------
    Columns variant, reference and those of `effects`, one row per comparison. p is corrected for
    all of them. Empty if the study has no grid.
    """
    found = []
    for key, (name, changes) in itertools.product(study.grid, study.variants.items()):
        wanted = changes | {key: study.grid[key][0]}
        reference = next(n for n, other in study.variants.items() if other == wanted)
        if reference not in (name, next(iter(study.variants))):
            effect = effects(results, [reference, name]).loc[name]
            found.append({"variant": name, "reference": reference, **effect})
    if not found:
        return DataFrame()
    p = multipletests([comparison["p"] for comparison in found], method="holm")[1]
    return DataFrame(found).assign(p=p, significant=p < SIGNIFICANCE)


def _text(name: str, study: Study, comparison: DataFrame, tables: Tables) -> list[str]:
    """Return the paragraphs of the page below the pictures."""
    results = tables.results
    alone = one_parameter_at_a_time(study, results)
    others = []
    if len(alone):
        rows = [[row.variant, row.reference, *_compared(row)] for _, row in alone.iterrows()]
        table = markdown_table(["variant", "compared with", *COMPARISON], rows)
        others = ["The effect of one parameter alone, compared with its first value:", table]
    data, machines = _and(results.data), sorted(set(results.machine.fillna("unknown")))
    mixed = "The points ran on different machines, whose sums differ by rounding: "
    return [
        f"{study.findings} {_summary(comparison)}".strip(),
        _main_table(study, comparison, tables),
        *others,
        f"{len(study.seeds)} seeds ({', '.join(map(str, study.seeds))}), "
        f"{results.images.max():,} training images of {data}.\n"
        "± and intervals are 95 % intervals by Student's t. Differences are paired by seed.\n"
        "p is corrected for all comparisons of a table by Holm's method.\n"
        f"{study.shared}\n{mixed if machines[1:] else 'Machine: '}{'; '.join(machines)}.",
        f"    make study NAME={name}",
        f"asks studies/{name}.yaml again. {name}.csv lists every point with its DVC experiment and "
        "its MLflow run.",
    ]


def _and(names: Any) -> str:
    return " and ".join(sorted(set(names.fillna("unknown"))))


def _main_table(study: Study, comparison: DataFrame, tables: Tables) -> str:
    """Return the table with a row for each variant."""
    results, epochs = tables
    trained = results.images * results.experiment.map(epochs.groupby("experiment").size())
    groups = results.assign(speed=trained / results.seconds).groupby("variant")
    means, margins = groups.mean(numeric_only=True), groups.sem(numeric_only=True)
    margins *= stats.t.ppf(0.975, len(study.seeds) - 1)
    rows: list[list[str]] = []
    for name in study.variants:
        effect, mean, margin = comparison.loc[name], means.loc[name], margins.loc[name]
        cells = [f"{effect.accuracy:.2f} ± {effect.accuracy_margin:.2f}"]
        cells += _compared(effect) if rows else [""] * len(COMPARISON)
        measured = [f"test_{measure}" for measure in study.measures]
        cells += [f"{mean[column]:.4g} ± {margin[column]:.2g}" for column in measured]
        cost = [f"{mean.parameters:,.0f}", f"{mean.seconds:.1f}", f"{mean.speed:,.0f}"]
        rows.append([name, *cells, *cost])
    measures = [measure.replace("_", " ") for measure in study.measures]
    head = ["variant", f"{study.answer_by} accuracy %", *COMPARISON, *measures]
    return markdown_table([*head, "parameters", "training s", "images/s"], rows)


def _compared(effect: Any) -> list[str]:
    """Return the cells that show a difference, its interval and its significance."""
    low, high = (effect.difference + side * effect.difference_margin for side in (-1, 1))
    verdict = f"{'**yes**' if effect.significant else 'no'}, p = {effect.p:.2g}"
    return [f"{effect.difference:+.2f}", f"{low:+.2f} … {high:+.2f}", verdict]


def _summary(comparison: DataFrame) -> str:
    """Return a sentence that says which variants differ significantly from the first."""
    others = comparison[1:].sort_values("difference", key=abs, ascending=False, kind="stable")
    shown = others.index + others.difference.map(" ({:+.2f} points)".format)
    groups = {
        "better": list(shown[others.significant & (others.difference > 0)]),
        "worse": list(shown[others.significant & (others.difference < 0)]),
        "no significant difference": list(others.index[~others.significant]),
    }
    parts = [f"{word}: {'; '.join(names)}" for word, names in groups.items() if names]
    first = f"*{comparison.index[0]}* ({comparison.accuracy.iloc[0]:.2f} %)"
    return f"Compared with {first}, {' – '.join(parts)}."

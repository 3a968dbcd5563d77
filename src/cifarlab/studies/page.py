"""The page docs/studies/NAME.md, its statistics and its pictures."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame
from scipy import stats

from cifarlab.errors import UserError
from cifarlab.figures.study import draw_layers, draw_study
from cifarlab.files import ANSWERS, atomic
from cifarlab.studies.points import Point, Tables, needed
from cifarlab.studies.question import Study
from cifarlab.studies.statistics import DIFFERENT, EQUIVALENT, UNDECIDED, effects, one_at_a_time

COMPARISON = ["difference", "95 % interval", "answer"]
FEW = 5
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
    asked = needed(study, points, results)
    if missing := [point.experiment for point in asked if point.experiment not in have]:
        lacking = f"{name}.csv and {name}-epochs.csv lack {len(missing)} points ({missing[0]}, …)"
        advice = "runs them; if it just did, `git status` shows code that is not in Git"
        raise UserError(f"{ANSWERS}/{lacking}; `make study NAME={name}` {advice}")
    comparison, alone = effects(study, results), one_at_a_time(study, results)
    answer = f"{_filled(study.findings, comparison, alone, results)} {_summary(study, comparison)}"
    grid = DataFrame.from_dict(study.variants, orient="index")[list(study.grid)]
    title, label = study.question, f"{study.answer_by} accuracy"
    folder = folder_of(name, joined(results.data, " and "))
    picture, margin = folder / f"{name}.png", study.margin
    draw_study(picture, title, label, comparison, tables=tables, grid=grid, margin=margin)
    pictures = [f"![effects, learning curves and classes]({name}.png)"]
    layers = epochs.set_index(["variant", "epoch"]).filter(like="/").dropna(axis=1, how="all")
    if len(layers.columns):
        draw_layers(folder / f"{name}-layers.png", layers, list(study.variants))
        pictures.append(f"![layer by layer]({name}-layers.png)")
    head = [f"# {study.question}", *_notice(name, results), answer.strip(), *pictures]
    text = [*_tables(study, comparison, alone, tables), *_open(study, comparison, alone)]
    return write_answer(folder / f"{name}.md", [*head, *text, *_how(name, study, results)])


def folder_of(name: str, data: str) -> Path:
    """Return the folder for the page NAME about some data: docs/studies, or a folder in it.

    The page that docs/studies has may be about other data. Then it stays.
    """
    # A page of a study or a search says "images of DATA.", that of confusion begins with "DATA, ".
    page, named = ANSWERS / f"{name}.md", "(?m)mages of {0}\\.|^{0}, ".format(re.escape(data))
    other = page.exists() and not re.search(named, page.read_text("utf-8"))
    return ANSWERS / re.sub(r"\W+", "-", data) if other else ANSWERS


def write_answer(path: Path, paragraphs: list[str]) -> Path:
    """Write the page of a study or search and return its path."""
    with atomic(path) as temporary:
        temporary.write_text("\n\n".join(paragraphs) + "\n", "utf-8")
    return path


def update_notice(name: str, results: DataFrame) -> None:
    """Let the notice below the title of the page about these results, if there is one, be right."""
    path = folder_of(name, joined(results.data, " and ")) / f"{name}.md"
    if path.exists() and len(results):
        title, *others = path.read_text("utf-8").removesuffix("\n").split("\n\n")
        text = [paragraph for paragraph in others if not paragraph.startswith(NOTICE)]
        write_answer(path, [title, *_notice(name, results), *text])


def _notice(name: str, results: DataFrame) -> list[str]:
    """Return the paragraph that says that some of the results do not count; none if all do."""
    commits = made_by(results[~results.counts])
    notice = f"{NOTICE} (commit {commits}) and have not been confirmed for the present ones"
    return [f"{notice}; `make study NAME={name}` asks again."] if commits else []


def made_by(results: DataFrame) -> str:
    """Return the commits that made the results, seven digits each, or "unknown"."""
    return ", ".join(sorted(set(results.commit.fillna("unknown").str[:7])))


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in (head, *rows))
    head_line, *lines = (f"| {' | '.join(cells)} |" for cells in escaped)
    return "\n".join([head_line, "|---" * len(head) + "|", *lines])


def _filled(findings: str, comparison: DataFrame, alone: DataFrame, results: DataFrame) -> str:
    """Put the numbers of the tables into a person's findings.

    {difference[VARIANT]}, {difference[VARIANT / REFERENCE]}, {accuracy[VARIANT]} in percent, and
    {MEASURE[VARIANT]}, the mean of any other column of the results.

    Raises
    ------
    UserError
        The tables have no such number.
    """
    numbers = results.groupby("variant").mean(numeric_only=True).map("{:.3g}".format)
    columns = {str(column).removeprefix("test_"): numbers[column] for column in numbers}
    margins = comparison.accuracy_margin.map(" ± {:.1f}".format)
    columns["accuracy"] = comparison.accuracy.map("{:.1f}".format) + margins
    pairs = zip(alone.variant, alone.reference, strict=True)
    named = alone.set_axis([f"{variant} / {reference}" for variant, reference in pairs])
    both = pd.concat([table[["difference", "difference_margin"]] for table in (comparison, named)])
    margins = both.difference_margin.map(" ± {:.1f}".format)
    columns["difference"] = both.difference.map("{:+.1f}".format) + margins
    for field in re.findall("{(.*?)}", findings):
        if not re.fullmatch(r"\w+\[[^\]]+\]", field):
            raise UserError(f"findings: {{{field}}} is not a number of the tables")
    try:
        return findings.format_map(columns)
    except (KeyError, ValueError) as error:
        raise UserError(f"findings: {{{error}}} is not a number of the tables") from error


def _tables(study: Study, comparison: DataFrame, alone: DataFrame, tables: Tables) -> list[str]:
    """Return the tables, with a warning if there are few seeds."""
    fewest = tables.results.groupby("variant").size().min()
    warning = f"> Only {fewest} seeds. With so few, only large differences can be told from chance."
    paragraphs = [warning] if fewest < FEW else []
    paragraphs.append(_main_table(study, comparison, tables))
    if len(alone):
        rows = [[row.variant, row.reference, *_compared(row)] for _, row in alone.iterrows()]
        table = markdown_table(["variant", "compared with", *COMPARISON], rows)
        paragraphs += ["The effect of one parameter alone, compared with its first value:", table]
    return paragraphs


def _open(study: Study, comparison: DataFrame, alone: DataFrame) -> list[str]:
    """Return what could not be found out: undecided comparisons, and the power of the study."""
    pairs = pd.concat([comparison[1:].reset_index(), alone])
    undecided = pairs[pairs.verdict == UNDECIDED]
    left = [f"{row.variant} compared with {row.reference}" for row in undecided.itertuples()]
    low, high = (f"{value:.1f}" for value in (pairs.detectable.min(), pairs.detectable.max()))
    smallest = low if low == high else f"between {low} and {high}"
    return [
        "## What could not be found out",
        f"Undecided: {'; '.join(left)}." if left else "Every comparison is decided.",
        f"A true difference of {smallest} points would have been found with a probability of "
        f"80 %. Smaller ones may exist. Differences below {study.within} count as equivalent.",
    ]


def _how(name: str, study: Study, results: DataFrame) -> list[str]:
    """Return how the study was made, and how to repeat it."""
    several = "s, whose sums differ by rounding" if results.machine.nunique() > 1 else ""
    own = "Each seed drew its own validation images.\n" if study.splits == "own" else ""
    looks = ""
    if len(study.looks) > 1:
        after = ", ".join(map(str, study.looks))
        looks = (
            f"After {after} seeds, only variants with undecided comparisons got more. The error "
            "rate was divided among these looks (Lan and DeMets 1983), and the intervals hold "
            "whenever the study stops.\n"
        )
    return [
        "## How it was measured",
        f"{results.seed.nunique()} seeds ({', '.join(map(str, sorted(set(results.seed))))}), "
        f"{results.images.max():,} training images of {joined(results.data, ' and ')}.\n"
        "± and intervals are 95 % intervals by Student's t. Differences are paired by seed.\n"
        "*Different*: paired t test. *Equivalent*: two one-sided t tests. p is corrected for all "
        "comparisons of a table by Holm's method; 5 % is the limit.\n"
        f"{own}{looks}{study.shared}\nMachine{several}: {joined(results.machine, '; ')}.",
        f"    make study NAME={name}",
        f"asks studies/{name}.yaml again. {name}.csv lists every point with its DVC experiment and "
        "its MLflow run.",
    ]


def joined(names: Any, separator: str) -> str:
    """Return the different names in a column of the results, in alphabetical order."""
    return separator.join(sorted(set(names.astype(object).fillna("unknown"))))


def _main_table(study: Study, comparison: DataFrame, tables: Tables) -> str:
    """Return the table with a row for each variant."""
    results, epochs = tables
    trained = results.images * results.experiment.map(epochs.groupby("experiment").size())
    groups = results.assign(speed=trained / results.seconds).groupby("variant")
    means, margins = groups.mean(numeric_only=True), groups.sem(numeric_only=True)
    margins = margins.mul(stats.t.ppf(0.975, groups.size() - 1), axis=0)
    rows: list[list[str]] = []
    for name in study.variants:
        effect, mean, margin = comparison.loc[name], means.loc[name], margins.loc[name]
        cells = [f"{effect.accuracy:.2f} ± {effect.accuracy_margin:.2f}"]
        cells += _compared(effect) if rows else [""] * len(COMPARISON)
        measured = [f"test_{measure}" for measure in study.measures]
        cells += [f"{mean[column]:.4g} ± {margin[column]:.2g}" for column in measured]
        cost = [f"{mean.parameters:,.0f}", f"{mean.seconds:.1f}", f"{mean.speed:,.0f}"]
        rows.append([name, *cells, *cost, str(len(groups.get_group(name)))])
    measures = [measure.replace("_", " ") for measure in study.measures]
    head = ["variant", f"{study.answer_by} accuracy %", *COMPARISON, *measures]
    return markdown_table([*head, "parameters", "training s", "images/s", "seeds"], rows)


def _compared(effect: Any) -> list[str]:
    """Return the cells that show a difference, its interval and the answer."""
    low, high = (effect.difference + side * effect.difference_margin for side in (-1, 1))
    p = f", p = {effect.p_equivalent if effect.verdict == EQUIVALENT else effect.p:.2g}"
    answer = {DIFFERENT: f"**different**{p}", EQUIVALENT: f"equivalent{p}", UNDECIDED: UNDECIDED}
    return [f"{effect.difference:+.2f}", f"{low:+.2f} … {high:+.2f}", answer[effect.verdict]]


def _summary(study: Study, comparison: DataFrame) -> str:
    """Return a sentence with the answer for each variant, compared with the first."""
    others = comparison[1:].sort_values("difference", key=abs, ascending=False, kind="stable")
    shown, answer = others.index + others.difference.map(" ({:+.2f} points)".format), others.verdict
    groups = {
        "better": list(shown[(answer == DIFFERENT) & (others.difference > 0)]),
        "worse": list(shown[(answer == DIFFERENT) & (others.difference < 0)]),
        f"equivalent within {study.within}": list(others.index[answer == EQUIVALENT]),
        "undecided": list(others.index[answer == UNDECIDED]),
    }
    parts = [f"{word}: {'; '.join(names)}" for word, names in groups.items() if names]
    first = f"*{comparison.index[0]}* ({comparison.accuracy.iloc[0]:.2f} %)"
    return f"Compared with {first}, {' – '.join(parts)}."

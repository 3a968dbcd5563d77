"""The page docs/studies/NAME.md, its statistics and its pictures."""

import re
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from pandas import DataFrame

from cifarlab.errors import UserError, in_a_sentence
from cifarlab.files import ANSWERS, write
from cifarlab.studies import statistics
from cifarlab.studies.pictures import draw_layers, draw_study
from cifarlab.studies.points import Point, Tables, needed
from cifarlab.studies.question import Study
from cifarlab.studies.statistics import DIFFERENT, EQUIVALENT, UNDECIDED, interval_margin

NOTICE = "> Not confirmed:"


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
        lacking = f"{name}.csv and {name}-epochs.csv lack {len(missing)} trainings ({missing[0]} …)"
        advice = "runs them; if it just did, `git status` shows code that is not in Git"
        raise UserError(f"{ANSWERS}/{lacking}; `make study NAME={name}` {advice}")
    comparison = statistics.effects(study, results)
    alone = statistics.one_at_a_time(study, results)
    answer = f"{_filled(study.findings, comparison, alone, results)} {_summary(study, comparison)}"
    page = page_of(name, joined(results.data, " and "))
    draw_study(page.with_name(f"{name}.png"), study, comparison, tables)
    layers = epochs.set_index(["variant", "epoch"]).filter(like="/").dropna(axis=1, how="all")
    if len(layers.columns):
        draw_layers(page.with_name(f"{name}-layers.png"), layers, list(study.variants))
    text = rendered(
        "study.jinja",
        name=name,
        study=study,
        results=results,
        pairs=pd.concat([comparison[1:].reset_index(), alone]),
        notice=_notice(name, results),
        answer=answer.strip(),
        layers=len(layers.columns),
        rows=_rows(study, comparison, tables),
        alone=[[row.variant, row.reference, *_compared(row)] for _, row in alone.iterrows()],
    )
    write(page, text)
    return page


def rendered(template: str, **values: Any) -> str:
    """Return the text of a page: a template of this folder with some values."""
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(  # noqa: S701, the pages are Markdown
        loader=here, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["joined"] = joined
    return environment.get_template(template).render(values)


def page_of(name: str, data: str) -> Path:
    """Return the path of the page NAME about some data: in docs/studies, or in a folder there.

    The page that docs/studies has may be about other data. Then it stays.
    """
    # A page of a study or a search says "images of DATA.", that of confusion begins with "DATA, ".
    page, named = ANSWERS / f"{name}.md", "(?m)mages of {0}\\.|^{0}, ".format(re.escape(data))
    other = page.exists() and not re.search(named, page.read_text("utf-8"))
    return ANSWERS / re.sub(r"\W+", "-", data) / page.name if other else page


def update_notice(name: str, results: DataFrame) -> None:
    """Let the notice below the title of the page about these results, if there is one, be right."""
    path = page_of(name, joined(results.data, " and "))
    if path.exists() and len(results):
        title, *others = path.read_text("utf-8").split("\n\n")
        text = [paragraph for paragraph in others if not paragraph.startswith(NOTICE)]
        write(path, "\n\n".join([title, *_notice(name, results), *text]))


def _notice(name: str, results: DataFrame) -> list[str]:
    """Return the paragraph that says that some of the results do not count; none if all do."""
    other = results[~results.counts]
    made = f"{len(other)} of {len(results)} rows were made by other code or parameters"
    again = f"(commit {joined(other.commit.str[:7])}). `make study NAME={name}` trains them again."
    return [f"{NOTICE} {made} {again}"] if len(other) else []


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
    columns = dict(numbers.rename(columns=lambda column: column.removeprefix("test_")))
    margins = comparison.accuracy_margin.map(" ± {:.1f}".format)
    columns["accuracy"] = comparison.accuracy.map("{:.1f}".format) + margins
    named = alone.set_axis([f"{row.variant} / {row.reference}" for row in alone.itertuples()])
    both = pd.concat([table[["difference", "difference_margin"]] for table in (comparison, named)])
    margins = both.difference_margin.map(" ± {:.1f}".format)
    columns["difference"] = both.difference.map("{:+.1f}".format) + margins
    texts = {
        f"{column}[{row}]": text for column in columns for row, text in columns[column].items()
    }
    with in_a_sentence("findings: {%s} is not a number of the tables", KeyError):
        return re.sub("{(.*?)}", lambda field: texts[field[1]], findings)


def joined(names: Any, separator: str = ", ") -> str:
    """Return the different names in a column of the results, in alphabetical order."""
    return separator.join(sorted(set(names.astype(object).fillna("unknown"))))


def _rows(study: Study, comparison: DataFrame, tables: Tables) -> list[list[str]]:
    """Return the cells of the table with a row for each variant."""
    results, epochs = tables
    trained = results.images * results.experiment.map(epochs.groupby("experiment").size())
    groups = results.assign(speed=trained / results.seconds).groupby("variant")
    rows: list[list[str]] = []
    for name in study.variants:
        effect, own = comparison.loc[name], groups.get_group(name)
        cells = [f"{effect.accuracy:.2f} ± {effect.accuracy_margin:.2f}"]
        cells += _compared(effect) if rows else [""] * 3
        measured = (own[f"test_{measure}"] for measure in study.measures)
        cells += [f"{values.mean():.4g} ± {interval_margin(values):.2g}" for values in measured]
        cost = own[["parameters", "seconds", "speed"]].mean()
        cells += [f"{cost.parameters:,.0f}", f"{cost.seconds:.1f}", f"{cost.speed:,.0f}"]
        rows.append([name, *cells, str(len(own))])
    return rows


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

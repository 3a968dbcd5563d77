"""The points of a study, and its tables docs/studies/NAME.csv and NAME-epochs.csv.

A row of the tables names the digest of the code that made it and the key of its parameters. It
counts for a point if both fit. It also counts if its code is connected with the present code by
entries of docs/studies/same-bytes.json, each of which says: these two codes were compared, and gave
the same bytes.
"""

import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pandas import DataFrame
from pydantic import BaseModel, TypeAdapter, ValidationError

from cifarlab import files, pipeline
from cifarlab.digest import json_digest
from cifarlab.errors import UserError, in_a_sentence
from cifarlab.params.load import changed, data_set
from cifarlab.pipeline import Revision
from cifarlab.studies.question import Parameters, Study, faults, slug
from cifarlab.studies.statistics import seeds_needed
from cifarlab.tracking.studies import timing_of

ORIGIN = ["experiment", "code", "key", "data"]  # what identifies a row
# A digest, a variant and a folder of images may consist of digits only.
TEXT = dict.fromkeys([*ORIGIN, "commit", "run", "variant", "machine"], str)
# Pictures, tracking and the number of images tested at a time decide no result. The data are
# compared by the name of the data set, because the same images can come from several places. A dot
# at the end ends a whole key.
DATA_SET = ("data.name.", "data.folder.", "data.sources.", "data.sha256.")
IRRELEVANT = ("plot.", "tracking.", "evaluate.batch_size.", *DATA_SET)


class Link(BaseModel):
    """An entry of docs/studies/same-bytes.json: two codes that give the same bytes."""

    base_code: str
    """Digest of the older code."""
    code: str
    """Digest of the newer code."""
    new_parameters: Parameters = {}
    """Parameters that only the newer code has, with the values under which both were compared."""
    old_parameters: Parameters = {}
    """Parameters that only the older code has, likewise."""
    without: Parameters = {}
    """Parameters that were left out: the link says nothing about points with one of them."""


class Point(NamedTuple):
    """A variant with a seed, which runs as a DVC experiment."""

    variant: str
    seed: int
    experiment: str
    """Name of the DVC experiment."""
    changes: Parameters
    """Changes to params.yaml."""
    parameters: Parameters
    """All parameters."""


class Tables(NamedTuple):
    """The results of experiments, one row each, and their epochs, one row each."""

    results: DataFrame
    epochs: DataFrame


def load(name: str) -> tuple[Study, list[Point]]:
    """Read studies/NAME.yaml and check all its points against params.yaml.

    Raises
    ------
    UserError
        The file is wrong, or a variant's parameters are not valid.
    """
    study, points = Study.read(name), []
    for (variant, own), seed in itertools.product(study.variants.items(), study.seeds):
        changes = {**study.base, **own, "train.seed": seed}
        changes |= {"data.validation_seed": seed} if study.splits == "own" else {}
        try:
            parameters = changed(changes).flat()
            if study.splits == "own" and not parameters["data.validation"]:
                raise UserError("splits: own needs data.validation above 0")
            held_out = parameters["data.validation"] or parameters["data.name"] == "folder"
            if study.answer_by == "validation" and not held_out:
                raise UserError("answer_by: validation needs data.validation above 0")
            if wrong := sorted({*study.measures} - _measures(parameters)):
                raise UserError(f"no measure {wrong[0]} with these parameters (docs/outputs.md)")
        except UserError as error:
            reason = "; ".join(str(error).splitlines())
            raise UserError(f"{files.QUESTIONS}/{name}.yaml: {variant}: {reason}") from error
        experiment = f"{slug(name)}-{slug(variant)}-{seed}"
        points.append(Point(variant, seed, experiment, changes, parameters))
    return study, points


def _measures(parameters: Parameters) -> set[str]:
    """Return the names that metrics/evaluate.json has with these parameters."""
    names = {"accuracy", "balanced_accuracy", "top5_accuracy", "macro_f1", "macro_auroc"}
    names |= {"loss", "calibration_error"}
    names |= {f"accuracy_views_{n}" for n in (2, 6) if n <= parameters["evaluate.views"]}
    return names | {f"accuracy_shifted_{n + 1}" for n in range(parameters["evaluate.shifts"])}


def needed(study: Study, points: list[Point], results: DataFrame) -> list[Point]:
    """Return the points that the study needs, as far as the results can tell."""
    seeds = seeds_needed(study, results)
    return [point for point in points if study.seeds.index(point.seed) < seeds[point.variant]]


def read_links(path: Path = files.EQUAL_CODE) -> list[Link]:
    """Return the entries of same-bytes.json; none if there is no such file.

    Raises
    ------
    UserError
        The file is damaged.
    """
    problem = f"{path} is damaged (%s); `git checkout {path}` repairs it"
    with in_a_sentence(problem, ValidationError, words=faults):
        return TypeAdapter(list[Link]).validate_json(path.read_bytes() if path.exists() else "[]")


def key_of(parameters: Parameters) -> str:
    """Return 16 hexadecimal digits that depend on the parameters which decide the results.

    1 and 1.0 are equal.
    """
    deciding = {k: v for k, v in parameters.items() if not f"{k}.".startswith(IRRELEVANT)}
    return json_digest(json.loads(json.dumps(deciding), parse_int=float))[:16]


def valid_origins(parameters: Parameters, code: str, links: list[Link]) -> set[tuple[str, str]]:
    """Return the pairs (code, key) whose results are valid for these parameters and this code.

    Starting from the present code, links are followed in both directions and over several steps.
    On the way, the parameters that the other code does not have are left out of the key; they must
    have the values under which the two codes were compared. Those that only the other code has are
    added with the values that were compared.
    """
    found: set[tuple[str, str]] = set()
    to_visit = [(code, parameters)]
    while to_visit:
        here, values = to_visit.pop()
        if (origin := (here, key_of(values))) in found:
            continue
        found.add(origin)
        for link in links:
            if any(values.get(key) == value for key, value in link.without.items()):
                continue
            sides = (link.code, link.new_parameters), (link.base_code, link.old_parameters)
            for (one, lost), (other, gained) in itertools.permutations(sides):
                if one == here and lost.items() <= values.items():
                    shared = {key: value for key, value in values.items() if key not in lost}
                    to_visit.append((other, shared | gained))
    return found


def choose_rows(
    rows: DataFrame, points: Mapping[str, Parameters], code: str, links: list[Link]
) -> DataFrame:
    """Choose the rows that answer a study.

    Parameters
    ----------
    rows : columns experiment, code and key; later rows are newer
    points : the parameters of each point by the name of its experiment
    code : digest of the present code

    Returns
    -------
    Of each point the newest row that counts or, if none does, the newest row. The column `counts`
    tells them apart.
    """
    valid = {name: valid_origins(parameters, code, links) for name, parameters in points.items()}
    rows = rows[rows.experiment.isin(points)]
    made = rows[["experiment", "code", "key"]].to_numpy()
    counts = [(code, key) in valid[name] for name, code, key in made]
    rows = rows.assign(counts=pd.Series(counts, rows.index, dtype=bool))
    newest = rows.sort_values("counts", kind="stable").drop_duplicates("experiment", keep="last")
    return newest.sort_values("experiment", key=lambda names: names.map(list(points).index))


def read_tables(name: str) -> Tables:
    """Return the tables of a study with the rows of all codes; empty if there are none.

    Raises
    ------
    UserError
        A table is damaged.
    """
    tables = []
    for path, identity in zip(paths(name), (ORIGIN, [*ORIGIN, "epoch"]), strict=True):
        table = DataFrame(columns=[*identity, "commit", "machine"])
        problem = f"{path} is damaged or lacks columns (%s); `git checkout {path}` repairs it"
        with in_a_sentence(problem, ValueError, KeyError):  # such as the marks of a merge conflict
            if path.exists():  # a variant may be called None
                table = pd.read_csv(path, dtype=TEXT, keep_default_na=False, na_values=[""])
            tables.append(table.drop_duplicates(identity, keep="last"))
    return Tables(*tables)


def by_data(name: str, points: list[Point]) -> dict[str, Tables]:
    """Return the tables for each data set: of each point the newest row, if possible a valid one.

    The data that the points are about come first, as "", then others by name, the newest first.
    """
    parameters = {point.experiment: point.parameters for point in points}
    labels = {point.experiment: point.variant for point in points}  # tables may have older ones
    rows, epochs = (t.assign(variant=t.experiment.map(labels)) for t in read_tables(name))
    present = rows.experiment.map({name: data_set(values) for name, values in parameters.items()})
    data = rows.data.where(rows.data != present, "")
    code, links, found = pipeline.stage_code(), read_links(), dict[str, Tables]()
    for one in dict.fromkeys(["", *data[::-1]]):
        results = choose_rows(rows[data == one], parameters, code, links)
        found[one] = Tables(results, epochs.merge(results[[*ORIGIN, "counts"]], on=ORIGIN))
    return found


def chosen(name: str, points: list[Point]) -> Tables:
    """Return the rows that count for the points and their data, at most one for each point."""
    return Tables(*(table[table.counts] for table in by_data(name, points)[""]))


def record(name: str, study: Study, points: list[Point]) -> Tables:
    """Add the points that have finished to the tables, and return all rows that count.

    Raises
    ------
    UserError
        An experiment has no value for the answer or for a measure of the study.
    """
    recorded = set(chosen(name, points).results.experiment)
    new = list(finished([point for point in points if point.experiment not in recorded]))
    answer = "test_accuracy" if study.answer_by == "test" else "val_accuracy"
    for row, _ in new:
        for column in (answer, *(f"test_{measure}" for measure in study.measures)):
            if column not in row:
                where = f"{files.QUESTIONS}/{name}.yaml: {row['experiment']}"
                way_out = "set data.validation; top5_accuracy needs more than five classes"
                raise UserError(f"{where} has no {column}; {way_out}")
        row["accuracy"] = row[answer]
    if new:
        rows, histories = zip(*new, strict=True)
        added = (DataFrame(rows), pd.concat(histories))
        tables = zip(paths(name), read_tables(name), added, strict=True)
        # The epochs come first: without them a row of the results would be useless.
        for path, known, more in [*tables][::-1]:
            # An empty table would turn whole numbers into floats.
            table = pd.concat([known, more]) if len(known) else more
            files.write(path, table.to_csv(index=False, float_format="%.6g"))
    return chosen(name, points)


def finished(points: list[Point]) -> Iterator[tuple[dict[str, Any], DataFrame]]:
    """Yield the results of each point that has run as an experiment, and its epochs, one row each.

    An experiment counts if it has the point's parameters and data set, and the present code.
    """
    code, experiments = pipeline.stage_code(), pipeline.experiments()
    for point in points:
        key, data = wanted = key_of(point.parameters), data_set(point.parameters)
        named = (revision for revision in experiments if revision.name == point.experiment)
        revision = next((found for found in named if _ran_with(found) == wanted), None)
        if not revision:
            continue
        of_classes = files.EVALUATION.with_name("per_class.json")
        written = (files.TRAIN_METRICS, files.EVALUATION, of_classes, files.HISTORY)
        try:
            content = [pipeline.read(path, revision.commit) for path in written]
        except UserError:  # DVC's cache has lost them, so the experiment runs again
            continue
        train, evaluation, classes, history = content
        identity: dict[str, Any] = {"experiment": point.experiment, "commit": revision.baseline}
        identity |= {"code": code, "key": key, "variant": point.variant, "seed": point.seed}
        identity |= {"data": data}
        row = identity | json.loads(train)
        row["images"] = row.pop("training_images")  # the name of the column in older tables
        row |= {f"test_{name}": value for name, value in json.loads(evaluation).items()}
        row |= {f"accuracy/{label}": share for label, share in json.loads(classes).items()}
        row |= timing_of(revision)
        yield row, pd.read_csv(io.BytesIO(history)).assign(**identity)


def _ran_with(revision: Revision) -> tuple[str, str]:
    """Return key and data set of a revision; empty if it has other code or other sections."""
    differs = pipeline.git("diff", "--name-only", revision.commit, "--", *pipeline.dependencies())
    params = None if differs else pipeline.params_of(revision)
    return (key_of(params.flat()), data_set(params.flat())) if params else ("", "")


def paths(name: str) -> tuple[Path, Path]:
    """Return the files of a study's tables, in the order of `Tables`."""
    return files.ANSWERS / f"{name}.csv", files.ANSWERS / f"{name}-epochs.csv"

"""What the accuracies of a study say: different, equivalent or undecided, and with what power.

Variants are compared by the differences of their accuracies, paired by seed, with Student's t: from
3 to 10 seeds, bootstrap intervals would be too narrow. Holm's method (1979) corrects for the number
of comparisons. Accuracies are multiples of one image, so few images can give equal differences by
chance: a deviation of less than half an image does not count.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame
from scipy import optimize, stats

from cifarlab.report.statistics import holm
from cifarlab.studies.question import Study

SIGNIFICANCE, POWER = 0.05, 0.8
DIFFERENT, EQUIVALENT, UNDECIDED = "different", "equivalent", "undecided"
MOST_IMAGES = 100_000  # of a test set; with more, half an image is far below chance
MEASURED = ["seeds", "difference", "difference_margin", "detectable", "p", "p_equivalent"]
Pairs = Sequence[tuple[str, str]]
Numbers = np.ndarray[Any, np.dtype[np.float64]]


def compare(accuracies: DataFrame, pairs: Pairs, looks: list[int], margin: float) -> DataFrame:
    """Compare variants in pairs, at each look those that are undecided.

    The error rate of 5 % is divided among the looks (`spent`), which add up. So at most 5 % of
    studies call anything different that is not, and at most 5 % call anything equivalent that
    is not.

    Parameters
    ----------
    accuracies : percent, one row per seed and one column per variant; NaN: not trained (yet)
    pairs : each a variant and its reference
    looks : numbers of seeds after which the study may stop; a single one if it has fixed seeds
    margin : in points; smaller differences count as equivalent

    Returns
    -------
    One row per pair, with the values of its last look, NaN before the first:

    - variant, reference
    - needed: number of seeds that its next look needs, or its last one if there is none
    - seeds: number of seeds of its last look
    - difference, difference_margin: mean in points, half of its 95 % interval (which is wider if
      there are several looks, so that it holds whenever the study stops)
    - p, p_equivalent: of the paired t test and of two one-sided t tests (Schuirmann 1987), both
      corrected so that 5 % is their limit
    - detectable: the difference in points that would have been found with a probability of 80 %
    - verdict: DIFFERENT, or else EQUIVALENT, or else UNDECIDED
    """
    answers = np.full((len(pairs), len(MEASURED)), np.nan)
    verdict, needed = np.full(len(pairs), UNDECIDED, object), np.zeros(len(pairs), int)
    differences = np.array([accuracies[a] - accuracies[b] for a, b in pairs])
    differences = differences.reshape(len(pairs), len(accuracies))  # there may be no pairs
    half = _half_an_image(accuracies)
    for before, seeds in itertools.pairwise([0, *looks]):
        undecided = verdict == UNDECIDED
        needed[undecided] = seeds
        chosen = differences[undecided, :seeds]
        if not chosen.size or np.isnan(chosen).any():
            break
        level = spent(seeds / looks[-1]) - spent(before / looks[-1])
        answers[undecided] = _look(chosen, verdict, level, margin, half)
        claims = [row < SIGNIFICANCE for row in answers[undecided, -2:].T]
        verdict[undecided] = np.select(claims, [DIFFERENT, EQUIVALENT], UNDECIDED)
    compared, measured = DataFrame(pairs, columns=["variant", "reference"]), DataFrame(answers)
    return compared.assign(verdict=verdict, needed=needed).join(measured.set_axis(MEASURED, axis=1))


def spent(share: float) -> float:
    """Return how much of the 5 % error rate may be spent when a share of the seeds has run.

    α·ln(1 + (e - 1)·share), which is close to Pocock's boundaries (Lan & DeMets 1983).
    """
    return SIGNIFICANCE * float(np.log(1 + (np.e - 1) * share))


@functools.cache
def detectable_effect(seeds: int, level: float) -> float:
    """Return the smallest effect that a two-sided t test at `level` finds with a power of 80 %.

    Its unit is the standard deviation of the differences between seeds. The noncentral t of SciPy
    and the TTestPower of statsmodels fail for few seeds and low levels, so this averages over
    quantiles of the estimated deviation.
    """
    limit, quantiles = stats.t.ppf(1 - level / 2, seeds - 1), (np.arange(1000) + 0.5) / 1000
    deviations = np.sqrt(stats.chi2.ppf(quantiles, seeds - 1) / (seeds - 1))

    def surplus(mean: float) -> float:
        return float(stats.norm.cdf(mean - limit * deviations).mean()) - POWER

    root = optimize.brentq(surplus, 0, 10 + 10 * limit)
    return float(root / seeds**0.5)


def effects(study: Study, results: DataFrame) -> DataFrame:
    """Compare each variant with the first.

    Parameters
    ----------
    results : columns variant, seed and accuracy (a share), one row per point

    Returns
    -------
    What `compare` returns, indexed by variant; the first has difference 0. In percent, accuracy and
    accuracy_margin: mean over all its seeds, half of its 95 % interval.
    """
    table = _accuracies(study, results)
    first, *others = study.variants
    pairs = [(name, first) for name in others]
    found = compare(table, pairs, study.looks, study.margin).set_index("variant")
    found = found.reindex([*study.variants])
    found.loc[first, ["difference", "difference_margin", "p"]] = 0, 0, 1
    return found.assign(accuracy=table.mean(), accuracy_margin=interval_margin(table))


def interval_margin(values: Any) -> Any:
    """Return half of the 95 % interval of the mean, by Student's t, of a table for each column."""
    return stats.t.ppf(0.975, values.count() - 1) * values.sem()


def one_at_a_time(study: Study, results: DataFrame) -> DataFrame:
    """Compare each variant of a grid with the one that has the first value of one parameter.

    Comparisons with the first variant are left out, because `effects` has them. Without a grid, the
    result is empty.
    """
    pairs = []
    for key, (name, changes) in itertools.product(study.grid, study.variants.items()):
        wanted = changes | {key: study.grid[key][0]}
        reference = next(n for n, other in study.variants.items() if other == wanted)
        if reference not in (name, next(iter(study.variants))):
            pairs.append((name, reference))
    return compare(_accuracies(study, results), pairs, study.looks, study.margin)


def seeds_needed(study: Study, results: DataFrame) -> dict[Any, float]:
    """Return how many seeds each variant needs, as far as the results can tell."""
    pairs = pd.concat([effects(study, results)[1:].reset_index(), one_at_a_time(study, results)])
    return pairs.melt("needed", ["variant", "reference"]).groupby("value")["needed"].max().to_dict()


def _accuracies(study: Study, results: DataFrame) -> DataFrame:
    known = results.reindex(columns=["seed", "variant", "accuracy"])  # of no results, too
    table = 100 * known.pivot(index="seed", columns="variant", values="accuracy")
    return table.reindex(index=study.seeds, columns=[*study.variants])


def _half_an_image(accuracies: DataFrame) -> float:
    """Return what half an image is worth in points: the accuracies are multiples of an image.

    Takes the smallest number of images of which all of them are shares, at the six decimals that
    the tables have.
    """
    images = np.arange(1, MOST_IMAGES + 1)
    for share in np.unique(accuracies.stack().dropna()) / 100:
        fits = np.abs(share * images - np.rint(share * images)) <= 5.1e-7 * images
        images = images[fits] if fits.any() else images[-1:]
    return float(50 / images[0])


def _look(
    differences: Numbers, verdict: Any, level: float, margin: float, smallest: float
) -> Numbers:
    """Test the undecided pairs at one look, at an error rate of `level`.

    Returns one row per undecided pair, with the columns of MEASURED.

    Parameters
    ----------
    differences : one row per undecided pair, one column per seed
    verdict : of all pairs
    smallest : deviation between seeds that counts
    """
    seeds = differences.shape[1]
    mean = differences.mean(axis=1)
    deviation = np.maximum(differences.std(axis=1, ddof=1), smallest)
    error = deviation / seeds**0.5

    def corrected(claim: str, statistic: Numbers, sides: int) -> Numbers:
        p = (verdict != claim).astype(float)  # those that were decided before count as 0 or 1
        p[verdict == UNDECIDED] = sides * stats.t.sf(statistic, seeds - 1)
        adjusted: Numbers = holm(p)[verdict == UNDECIDED]
        return np.minimum(adjusted * SIGNIFICANCE / level, 1)

    different, equivalent = np.abs(mean) / error, (margin - np.abs(mean)) / error
    margins = stats.t.ppf(1 - level / 2, seeds - 1) * error
    detectable = detectable_effect(seeds, level / len(verdict)) * deviation
    claims = corrected(DIFFERENT, different, 2), corrected(EQUIVALENT, equivalent, 1)
    return np.column_stack((np.full(len(mean), seeds), mean, margins, detectable, *claims))

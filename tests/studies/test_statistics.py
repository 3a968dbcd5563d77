"""The statistics of studies: by hand, against other libraries, and in simulated studies."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from cifarlab.studies import statistics
from cifarlab.studies.question import Study


def results(**accuracies: list[float]) -> pd.DataFrame:
    rows = [
        (variant, seed, value)
        for variant, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["variant", "seed", "accuracy"])


def asked(names: list[str], seeds: Any, **settings: Any) -> Study:
    variants = {name: {"train.epochs": place} for place, name in enumerate(names)}
    content = {"question": "?", "variants": variants, "seeds": seeds}
    return Study.model_validate(content | settings)


def effects(frame: pd.DataFrame, **settings: Any) -> pd.DataFrame:
    names, seeds = list(dict.fromkeys(frame.variant)), sorted(set(frame.seed))
    return statistics.effects(asked(names, seeds, **settings), frame)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_95_percent_intervals_contain_the_true_difference_95_times_in_a_hundred(n: int) -> None:
    rng, truth, trials = np.random.default_rng(0), 0.7, 4000
    luck = rng.normal(0.8, 0.05, n)  # of a seed, the same for all variants: pairing removes it
    others = {f"v{i}": list(luck + truth / 100 + rng.normal(0, 0.005, n)) for i in range(trials)}
    found = effects(results(base=list(luck), **others))[1:]
    contained = ((found.difference - truth).abs() <= found.difference_margin).mean()
    # Three standard errors of a share of 0.95 in this number of trials.
    assert contained == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / trials) ** 0.5)


def test_effects_by_hand() -> None:
    base, up, other = [0.80, 0.82, 0.84], [0.83, 0.8501, 0.8699], [0.84, 0.80, 0.83]
    found = effects(results(base=base, up=up, other=other))
    assert list(found.index) == ["base", "up", "other"]
    first, better, noise = found.itertuples()
    assert (first.accuracy, first.difference) == (pytest.approx(82), 0)
    # The quantile of Student's t with 2 degrees of freedom, and a standard deviation of 2.
    assert first.accuracy_margin == pytest.approx(4.302652729911275 * 2 / 3**0.5)
    assert better.difference == pytest.approx(3)
    # Holm: the smaller of the two p is doubled, the other one stays.
    assert better.p == pytest.approx(2 * stats.ttest_rel(up, base).pvalue)
    assert noise.p == pytest.approx(stats.ttest_rel(other, base).pvalue)
    assert (better.verdict, noise.verdict) == ("different", "undecided")


def test_no_difference_at_all_is_equivalent_and_a_difference_without_spread_is_one() -> None:
    base, up = [0.8001, 0.81, 0.82], [0.8101, 0.82, 0.83]
    same, higher = effects(results(base=base, same=base, up=up))[1:].itertuples()
    assert (same.difference, same.p, same.verdict) == (0, 1, "equivalent")
    assert (higher.difference, higher.verdict) == (pytest.approx(1), "different")
    # Half of one in 10,000 images is the smallest deviation.
    assert higher.p == pytest.approx(2 * 2 * stats.t.sf(1 / (0.005 / 3**0.5), 2))


@pytest.mark.parametrize(
    ("images", "comparisons", "seeds"),
    [(50, 9, 2), (359, 9, 3)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((50, 1, 2), (50, 9, 3))],
)
def test_few_images_do_not_make_chance_a_difference(
    images: int, comparisons: int, seeds: int
) -> None:
    """All networks are equally good, and guess some of the images."""
    rng, trials = np.random.default_rng(5), 300
    # Of 50 images, five are more than a point, which cannot be told to be less.
    guessed, claims = (5, ["different", "equivalent"]) if images == 50 else (4, ["different"])
    names = [f"v{i}" for i in range(comparisons + 1)]
    pairs = [(name, "v0") for name in names[1:]]
    wrong = 0
    for _ in range(trials):
        right = images - guessed + rng.binomial(guessed, 0.5, (seeds, len(names)))
        table = pd.DataFrame(100 * np.round(right / images, 6), columns=names)  # as in the files
        wrong += statistics.compare(table, pairs, [seeds], 1).verdict.isin(claims).any()
    assert wrong / trials < 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_equivalence_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0.8, 0.01, 8)
    other = base + rng.normal(0.002, 0.004, 8)
    [_, found] = effects(results(base=list(base), other=list(other)), margin=0.9).itertuples()
    p, *_ = ttost_paired(100 * other, 100 * base, -0.9, 0.9)
    assert found.p_equivalent == pytest.approx(p)
    [_, found] = effects(results(base=list(base), other=list(other)), margin=0.01).itertuples()
    assert found.p_equivalent > 0.4


@pytest.mark.parametrize(("n", "level"), [(3, 0.05), (5, 0.05 / 8), (10, 0.05)])
def test_the_detectable_difference_is_found_in_80_percent_of_studies(n: int, level: float) -> None:
    rng, trials = np.random.default_rng(4), 20_000
    effect = statistics.detectable_effect(n, level)
    p = stats.ttest_1samp(rng.normal(effect, 1, (trials, n)), 0, axis=1).pvalue
    assert (p < level).mean() == pytest.approx(0.8, abs=3 * (0.8 * 0.2 / trials) ** 0.5)


@pytest.mark.parametrize(("n", "deviations"), [(5, 1.7), (10, 1.0)])
def test_the_detectable_differences_in_the_documents(n: int, deviations: float) -> None:
    assert round(statistics.detectable_effect(n, 0.05), 1) == deviations
    page = Path(__file__).resolve().parents[2] / "docs/questions.md"
    assert str(deviations) in page.read_text("utf-8")


TRIALS, LIMIT = 300, 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5
SLOW = [pytest.param(looks, marks=pytest.mark.slow) for looks in ([5], [10])]
LOOKS = pytest.mark.parametrize("looks", [[3], *SLOW, [5, 10, 15]])


def simulated(looks: list[int], differences: list[float], rng: Any) -> pd.DataFrame:
    """Ask a study whose variants truly differ by so many points. A seed scatters by 0.6 points."""
    base = rng.normal(80, 2, looks[-1])
    noise = rng.normal(0, 0.6, (len(differences), len(base)))
    rows = [base, *(base + np.asarray(differences)[:, None] + noise)]
    accuracies = pd.DataFrame(np.transpose(rows))
    pairs: Any = [(place + 1, 0) for place in range(len(differences))]
    return statistics.compare(accuracies, pairs, looks, margin=1)


@LOOKS
def test_at_most_5_percent_of_studies_call_equal_variants_different(looks: list[int]) -> None:
    rng = np.random.default_rng(1)
    wrong = [(simulated(looks, [0] * 6, rng).verdict == "different").any() for _ in range(TRIALS)]
    assert np.mean(wrong) <= LIMIT


@LOOKS
def test_at_most_5_percent_of_studies_call_different_variants_equivalent(looks: list[int]) -> None:
    rng = np.random.default_rng(2)
    # The worst case: differences as large as the margin.
    answers = [simulated(looks, [1, -1, 1], rng).verdict for _ in range(TRIALS)]
    assert np.mean([(verdict == "equivalent").any() for verdict in answers]) <= LIMIT


def test_more_seeds_decide_more_and_stopping_early_saves_some() -> None:
    truth, shares, used = [2.0, 0.0, 0.0], dict[str, float](), dict[str, float]()
    for name, looks in {"3": [3], "10": [10], "stop": [5, 10, 15]}.items():
        rng = np.random.default_rng(3)
        answers = [simulated(looks, truth, rng) for _ in range(100)]
        right = [list(a.verdict) == ["different", "equivalent", "equivalent"] for a in answers]
        shares[name] = float(np.mean(right))
        used[name] = float(np.mean([a.seeds.sum() for a in answers]))
    assert shares["3"] < 0.5 < 0.9 < shares["10"]
    assert shares["stop"] > 0.9
    assert used["stop"] < 3 * 10


def test_a_study_asks_more_seeds_of_undecided_variants_and_of_what_they_are_compared_with() -> None:
    study = asked(["base", "up", "same", "noisy"], "3..6", stop="decided", margin=0.5)
    assert (study.looks, study.seeds) == ([3, 6], [0, 1, 2, 3, 4, 5])
    assert statistics.seeds_needed(study, results()) == dict.fromkeys(study.variants, 3)
    base = [0.80, 0.81, 0.82]
    up, same = [x + 0.05 + i * 1e-5 for i, x in enumerate(base)], [x + 1e-5 for x in base]
    first = results(base=base, up=up, same=[*same[:2], same[2] + 1e-5], noisy=[0.7, 0.9, 0.8])
    expected = {"base": 6, "up": 3, "same": 3, "noisy": 6}
    assert statistics.seeds_needed(study, first) == expected
    # A study that was killed between: the seeds of one variant only.
    more = pd.concat([first, pd.DataFrame({"variant": "base", "seed": [3, 4, 5], "accuracy": 0.8})])
    assert statistics.seeds_needed(study, more) == expected
    found = statistics.effects(study, more)
    assert list(found.verdict[1:]) == ["different", "equivalent", "undecided"]
    assert list(found.seeds[1:]) == [3, 3, 3]


def test_the_levels_of_all_looks_add_up_to_5_percent() -> None:
    assert statistics.spent(1) == pytest.approx(0.05)
    # Lan and DeMets: 0.05 · ln(1 + (e - 1) / 3)
    assert statistics.spent(1 / 3) == pytest.approx(0.0226, abs=1e-4)


def test_a_grid_is_compared_one_parameter_at_a_time() -> None:
    grid = {"model.layers": [1, 2], "model.norm": ["batch", "none"]}
    frame = results(
        **{"layers 1, norm batch": [0.5, 0.6, 0.7], "layers 1, norm none": [0.5, 0.6, 0.7]},
        **{"layers 2, norm batch": [0.8, 0.8, 0.8], "layers 2, norm none": [0.59, 0.7, 0.81]},
    )
    study = Study(question="?", grid=grid, seeds=[0, 1, 2])
    found = statistics.one_at_a_time(study, frame)
    # Comparisons with the first variant are in the main table and are not repeated.
    assert found[["variant", "reference"]].to_numpy().tolist() == [
        ["layers 2, norm none", "layers 1, norm none"],
        ["layers 2, norm none", "layers 2, norm batch"],
    ]
    # Differences of 9, 10 and 11 points: t = 10 / (1 / √3); of -21, -10 and 1: t = -10 / (11 / √3).
    first, second = (2 * stats.t.sf(10 * 3**0.5 / spread, 2) for spread in (1, 11))
    assert list(found.difference) == pytest.approx([10, -10])
    margin = 4.302652729911275 / 3**0.5
    assert list(found.difference_margin) == pytest.approx([margin, 11 * margin])
    assert list(found.p) == pytest.approx([2 * first, second])  # Holm doubles the smaller p
    assert list(found.verdict) == ["different", "undecided"]

    without_grid = asked(["a", "b"], [0, 1, 2])
    frame = results(a=[0.5, 0.6, 0.7], b=[0.5, 0.6, 0.7])
    assert statistics.one_at_a_time(without_grid, frame).empty

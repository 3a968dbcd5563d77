"""The statistics of a study beside simulations and hand-made cases; what a study file may say."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from cifarlab import UserError, studies
from tests.conftest import REPO


def results(**accuracies: list[float]) -> pd.DataFrame:
    rows = [(variant, seed, value) for variant, values in accuracies.items() for seed, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["variant", "seed", "accuracy"])


def copy_code(folder: Path) -> None:
    for name in ["params.yaml", "dvc.yaml", *(str(path.relative_to(REPO)) for path in REPO.glob("s*/**/*.py"))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, folder / name)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_of_a_difference_holds_the_truth_95_times_in_a_hundred(n: int) -> None:
    rng, truth, trials = np.random.default_rng(0), 0.7, 4000
    luck = rng.normal(0.8, 0.05, n)  # of a seed, the same for all variants: pairing takes it out
    names = ["base", *(f"v{i}" for i in range(trials))]
    frame = results(base=list(luck), **{name: list(luck + truth / 100 + rng.normal(0, 0.005, n)) for name in names[1:]})
    found = studies.effects(frame, names)[1:]
    held = ((found.difference - truth).abs() <= found.half).mean()
    # Three standard errors of a share of 0.95 in so many trials.
    assert held == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / trials) ** 0.5)


def test_where_nothing_differs_a_study_of_many_variants_is_wrong_in_five_of_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels asks for it in every call: a tenth of a second of nothing
    rng, trials, names = np.random.default_rng(1), 600, [f"v{i}" for i in range(8)]
    wrong = 0
    for _ in range(trials):
        frame = results(**{name: list(rng.normal(0.8, 0.01, 4)) for name in names})
        wrong += studies.effects(frame, names).real.any()
    assert wrong / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_effects_by_hand() -> None:
    base, up, other = [0.80, 0.82, 0.84], [0.83, 0.8501, 0.8699], [0.84, 0.80, 0.83]
    found = studies.effects(results(base=base, up=up, other=other), ["base", "up", "other"])
    assert list(found.index) == ["base", "up", "other"]
    first, better, noise = found.itertuples()
    assert (first.accuracy, first.difference, first.real) == (pytest.approx(82), 0, False)
    assert first.interval == pytest.approx(4.302652729911275 * 2 / 3**0.5)  # the quantile of Student's t of 2 degrees, deviation 2
    assert better.difference == pytest.approx(3)
    # Holm: the smallest of two p is doubled, the other stays.
    assert better.p == pytest.approx(2 * stats.ttest_rel(up, base).pvalue)
    assert noise.p == pytest.approx(stats.ttest_rel(other, base).pvalue)
    assert (better.real, noise.real) == (True, False)


def test_a_change_that_reaches_nothing_is_no_effect_and_one_without_spread_is() -> None:
    base = [0.25, 0.5, 0.75]
    found = studies.effects(results(base=base, same=base, up=[0.375, 0.625, 0.875]), ["base", "same", "up"])
    assert found[["difference", "half", "p", "real"]].to_numpy().tolist() == [[0, 0, 1, False], [0, 0, 1, False], [12.5, 0, 0, True]]


@pytest.mark.parametrize("path", sorted({*(REPO / "studies").glob("*.yaml")} - {REPO / "studies/search.yaml"}), ids=lambda path: path.stem)
def test_every_study_can_be_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    study, points = studies.load(path.stem)
    assert study.question.endswith("?")
    assert len({point.experiment for point in points}) == len(points) == len(study.variants) * len(study.seeds)


def test_a_grid_is_every_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_code(tmp_path)
    grid = {"model.layers": [3, 6], "model.norm": ["batch", "none"]}
    (tmp_path / "studies/g.yaml").write_text(yaml.safe_dump({"question": "?", "grid": grid, "seeds": [4, 5]}))
    monkeypatch.chdir(tmp_path)
    study, points = studies.load("g")
    assert list(study.variants) == ["layers 3, norm batch", "layers 3, norm none", "layers 6, norm batch", "layers 6, norm none"]
    changes = {"model.layers": 6, "model.norm": "none", "train.seed": 5}
    assert points[-1][:4] == ("layers 6, norm none", 5, "g-layers-6-norm-none-5", changes)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("question: [", "is not valid YAML"),
        ("question: a?", "seeds Field required"),
        ("{question: a, seeds: [0, 1]}", "at least two variants"),
        ("{question: a, seeds: [0, 0], variants: {a: {}, b: {}}}", "a seed stands twice"),
        ("{question: a, seeds: [0, 1], variants: {a b: {}, a-b: {}}}", "of different names"),
        (
            "{question: a, seeds: [0, 1], variants: {a: {}, deep: {model.layer: 9}}}",
            "deep: unknown key model.layer = 9",
        ),
        (
            "{question: a, seeds: [0, 1], variants: {a: {}, deep: {model.layers: many}}}",
            "deep: model.layers = 'many' is refused",
        ),
        ("{question: a, seeds: [0, 1], sedes: 3, variants: {a: {}, b: {}}}", "sedes Extra inputs"),
        ("[1, 2]", "Input should be a valid dictionary"),
    ],
)
def test_a_wrong_study_is_refused_in_one_sentence(content: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_code(tmp_path)
    (tmp_path / "studies/s.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        studies.load("s")
    assert told in str(refused.value)
    assert str(refused.value).startswith("studies/s.yaml")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="studies there: s"):
        studies.load("nobody")


def test_a_table_is_believed_only_for_the_parameters_and_the_code_it_was_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_code(tmp_path)
    shutil.copy(REPO / "studies/demo.yaml", tmp_path / "studies")
    monkeypatch.chdir(tmp_path)
    _, points = studies.load("demo")
    rows = [{"experiment": p.experiment, "key": p.key, "accuracy": 0.5} for p in points[:4]]
    table = tmp_path / "docs/studies/demo.csv"
    table.parent.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(table, index=False)

    def known() -> int:
        return len(studies._tables("demo", studies.load("demo")[1])[0])

    assert known() == 4
    parameters, code = tmp_path / "params.yaml", tmp_path / "src/cifarlab/models.py"
    whole = parameters.read_text()
    parameters.write_text(whole.replace("dpi: 120", "dpi: 60").replace("https://", "https://mirror."))  # which decide no figure
    assert known() == 4
    parameters.write_text(whole.replace("momentum: 0.85", "momentum: 0.8"))
    assert known() == 0
    parameters.write_text(whole)
    code.write_text(code.read_text() + "\n")
    assert known() == 0
    table.write_text("variant,seed\na,1\n")  # of an older version
    assert known() == 0
    table.write_text('a,b\n<<<<<<< "HEAD\n1,2,3\n')
    with pytest.raises(UserError, match=r"demo.csv is damaged \(.*`git checkout docs/studies/demo.csv` brings it back"):
        known()


def test_a_grid_is_compared_one_parameter_at_a_time() -> None:
    study = studies.Study(question="?", grid={"model.layers": [1, 2], "model.norm": ["batch", "none"]}, seeds=[0, 1, 2])
    frame = results(
        **{"layers 1, norm batch": [0.5, 0.6, 0.7], "layers 1, norm none": [0.5, 0.6, 0.7]},
        **{"layers 2, norm batch": [0.8, 0.8, 0.8], "layers 2, norm none": [0.59, 0.7, 0.81]},
    )
    rows = studies._one_at_a_time(study, frame)
    # What is beside the first variant is not said again.
    assert [row[:2] for row in rows] == [
        ["layers 2, norm none", "layers 1, norm none"],
        ["layers 2, norm none", "layers 2, norm batch"],
    ]
    # Differences of 9, 10 and 11 points: t = 10 / (1 / √3); of -21, -10 and 1: t = -10 / (11 / √3). Holm: twice the smaller p.
    p = [2 * stats.t.sf(10 * 3**0.5 / spread, 2) for spread in (1, 11)]
    assert rows[0][2:] == ["+10.00", "+7.52 … +12.48", f"**yes**, p = {2 * p[0]:.2g}"]
    assert rows[1][2] == "-10.00"
    assert rows[1][4] == f"no, p = {p[1]:.2g}"
    assert studies._one_at_a_time(studies.Study(question="?", variants={"a": {}, "b": {"train.lr": 1}}, seeds=[0, 1]), frame) == []

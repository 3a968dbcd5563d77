"""Studies: their statistics against simulations, their files, tables and pages."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.studies import page, points, study
from cifarlab.studies.question import slug

REPO = Path(__file__).resolve().parents[2]
QUESTIONS = sorted({*(REPO / "studies").glob("*.yaml")} - {REPO / "studies/search.yaml"})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code and the parameters, as the working folder."""
    code = [p.relative_to(REPO) for top in ("src", "stages") for p in (REPO / top).rglob("*.py")]
    for name in ["params.yaml", "dvc.yaml", *code]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / "studies").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_every_study_of_the_project_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    asked, found = points.load(path.stem)
    assert asked.question.endswith("?")
    experiments = {point.experiment for point in found}
    assert len(experiments) == len(found) == len(asked.variants) * len(asked.seeds)


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_every_number_of_a_finding_comes_from_the_table(path: Path) -> None:
    findings = yaml.safe_load(path.read_text("utf-8")).get("findings", "")
    assert not re.search(r"\d", re.sub(r"{\w+\[[^]]+\]}", "", findings))


@pytest.mark.usefixtures("without_pictures")
def test_numbers_of_findings_are_those_of_the_table(
    demo: list[pipeline.Revision], checkout: Path
) -> None:
    path = checkout / "studies/demo.yaml"
    text = "One: {accuracy[one]} %, {difference[one]} points, loss {loss[one]}."
    path.write_text(yaml.safe_dump(DEMO | {"findings": text}))
    run_all(demo)
    # Seeds 0, 1, 2: 80, 81, 82 % and three points more.
    # Their difference counts with half of one in 100 images: 4.3027 · 0.5 / √3.
    text = "One: 84.0 ± 2.5 %, +3.0 ± 1.2 points, loss 0.5."
    assert text in study.rewrite_page("demo").read_text("utf-8")
    for wrong in ("accuracy[two]", "accuracy", "accuracy.two", "accuracy[one][0][0]", ""):
        path.write_text(yaml.safe_dump(DEMO | {"findings": f"So: {{{wrong}}}"}))
        with pytest.raises(UserError, match=r"findings: .* is not a number of the tables"):
            study.rewrite_page("demo")


@pytest.mark.usefixtures("without_pictures")
def test_a_study_that_stops_early_warns_of_the_seeds_that_it_has(
    demo: list[pipeline.Revision], checkout: Path
) -> None:
    content = DEMO | {"seeds": "3..6", "stop": "decided", "splits": "own"}
    (checkout / "studies/demo.yaml").write_text(yaml.safe_dump(content))
    asked, found = points.load("demo")
    assert all(point.changes["data.validation_seed"] == point.seed for point in found)
    first = points.needed(asked, found, points.record("demo", asked, found).results)
    demo += [run(point, accuracy=0.8 + place / 100) for place, point in enumerate(first)]
    tables = points.record("demo", asked, found)
    assert points.needed(asked, found, tables.results) == first
    text = study.rewrite_page("demo").read_text("utf-8")
    assert "> Only 3 seeds." in text
    assert "Each seed drew its own validation images." in text
    assert "Only variants with undecided comparisons get more than the first 3." in text
    assert re.search(r"\| one \|.*\| 3 \|$", text, re.MULTILINE)


def test_a_grid_is_every_combination(checkout: Path) -> None:
    grid = {"model.layers": [3, 6], "model.norm": ["batch", "none"]}
    content = {"question": "?", "grid": grid, "seeds": [4, 5]}
    (checkout / "studies/g.yaml").write_text(yaml.safe_dump(content))
    asked, found = points.load("g")
    assert list(asked.variants) == [
        *("layers 3, norm batch", "layers 3, norm none"),
        *("layers 6, norm batch", "layers 6, norm none"),
    ]
    changes = {"model.layers": 6, "model.norm": "none", "train.seed": 5}
    assert found[-1][:4] == ("layers 6, norm none", 5, "g-layers-6-norm-none-5", changes)
    assert changes.items() <= found[-1].parameters.items()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question: [", "is not valid YAML"),
        ("question: a?", "seeds Field required"),
        ("{question: a, seeds: [0, 1]}", "at least two variants"),
        (
            "{question: a, seeds: [0, 1], variants: {a: {}, b: {}}, grid: {train.lr: [1, 2]}}",
            "variants or a grid, not both",
        ),
        (
            "{question: a, seeds: [0, 1], grid: {train.seed: [5, 6]}}",
            "train.seed comes from seeds; leave it out",
        ),
        ("{question: a, seeds: [0, 1], variants: {a: {}, b: {}}, margin: .inf}", "finite number"),
        ("{question: a, seeds: 5..15, variants: {a: {}, b: {}}}", "together with stop: decided"),
        (
            "{question: a, seeds: 5..5, stop: decided, variants: {a: {}, b: {}}}",
            "seeds are a list, or like 5..15",
        ),
        (
            "{question: a, seeds: [0, 1, 2], looks: [3, 2], variants: {a: {}, b: {}}}",
            "looks are growing numbers",
        ),
        ("{question: a, seeds: [0, 0], variants: {a: {}, b: {}}}", "a seed is listed twice"),
        ("{question: a, seeds: [0, 1], variants: {a b: {}, a-b: {}}}", "with different names"),
        (
            "{question: a, seeds: [0, 1], variants: {a: {}, deep: {model.layer: 9}}}",
            "deep: unknown key model.layer = 9",
        ),
        (
            "{question: a, seeds: [0, 1], variants: {a: {}, deep: {model.layers: many}}}",
            "deep: model.layers = 'many' is refused",
        ),
        ("{question: a, seeds: [0, 1], sedes: 3, variants: {a: {}, b: {}}}", "sedes Extra inputs"),
        (
            "{question: a, seeds: [0, 1], splits: own, base: {data.validation: 0},"
            " variants: {a: {}, b: {model.layers: 3}}}",
            "a: splits: own needs data.validation above 0",
        ),
        (
            "{question: a, seeds: [0, 1], answer_by: validation,"
            " base: {data.name: digits, data.validation: 0},"
            " variants: {a: {}, b: {model.layers: 3}}}",
            "a: answer_by: validation needs data.validation above 0",
        ),
        (
            "{question: a, seeds: [0, 1], variants: {a: {}, b: {}}, measures: [acuracy]}",
            "a: no measure acuracy with these parameters (docs/outputs.md)",
        ),
        (
            "{question: a, seeds: [0, 1], measures: [accuracy_shifted_2],"
            " variants: {a: {evaluate.shifts: 3}, b: {evaluate.shifts: 1}}}",
            "b: no measure accuracy_shifted_2 with these parameters",
        ),
        ("[1, 2]", "Input should be a valid dictionary"),
    ],
)
def test_a_wrong_study_is_refused_in_one_sentence(
    content: str, message: str, checkout: Path
) -> None:
    (checkout / "studies/s.yaml").write_text(content)
    with pytest.raises(UserError) as refused:
        points.load("s")
    assert message in str(refused.value)
    assert str(refused.value).startswith("studies/s.yaml")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nobody", "", "../params", "/etc/passwd", ".", "a\nb"])
def test_an_unknown_name_lists_the_studies_and_stays_inside_their_folder(
    name: str, checkout: Path
) -> None:
    for known in ("a", "b"):
        (checkout / f"studies/{known}.yaml").write_text("question: ?")
    with pytest.raises(UserError, match=r"NAME can be: a, b$"):
        points.load(name)


DEMO = {
    "question": "Which?",
    "base": {"data.name": "digits", "tracking.log_model": False},
    "variants": {"four": {}, "one": {"train.epochs": 1}},
    "seeds": [0, 1, 2],
    "measures": ["loss"],
}


@pytest.fixture
def demo(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> list[pipeline.Revision]:
    """A study in a Git repository, and its experiments: an empty list at first."""
    (checkout / "studies/demo.yaml").write_text(yaml.safe_dump(DEMO))
    experiments: list[pipeline.Revision] = []
    timing = {"run": "r", "seconds": 2.0, "wall": 3.0, "machine": "a CPU"}

    def read(path: Path, commit: str) -> bytes:
        return pipeline.git("show", f"{commit}:{path}").encode()

    monkeypatch.setattr(pipeline, "experiments", lambda: experiments)
    monkeypatch.setattr(pipeline, "read", read)
    monkeypatch.setattr(points, "timing_of", lambda revision: timing)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    subprocess.run(["git", "init", "--quiet"], check=True)
    return experiments


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without pictures, which take seconds."""
    monkeypatch.setattr(page, "draw_study", lambda *_, **__: None)


def run(point: points.Point, **metrics: float) -> pipeline.Revision:
    """Commit what an experiment would, and return it as DVC lists it."""
    parameters: dict[str, Any] = {}
    for name, value in point.parameters.items():
        section, key = name.split(".")
        parameters.setdefault(section, {})[key] = value
    epochs = pd.DataFrame({"epoch": [1, 2], "train_accuracy": [0.4, 0.5]})
    files = {
        "params.yaml": yaml.safe_dump(parameters),
        "metrics/train.json": json.dumps({"parameters": 1234567, "training_images": 900}),
        "metrics/evaluate.json": json.dumps(metrics | {"loss": 0.5}),
        "plots/history.csv": epochs.to_csv(index=False),
        "metrics/per_class.json": json.dumps({"0": 0.6, "1": 0.7}),
    }
    before = Path("params.yaml").read_text()
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", point.experiment], check=True)
    Path("params.yaml").write_text(before)
    return pipeline.Revision(point.experiment, pipeline.git_commit(), "b" * 40)


def change_network() -> None:
    path = Path("src/cifarlab/nn/network.py")
    path.write_text(path.read_text() + "\nx = 1\n")


def run_all(experiments: list[pipeline.Revision]) -> points.Tables:
    asked, found = points.load("demo")
    for place, point in enumerate(found):
        experiments.append(run(point, accuracy=0.8 + place / 100))
    return points.record("demo", asked, found)


def counted() -> tuple[int, int]:
    """Return how many points have a row that counts, and how many only one that does not."""
    every = points.by_data("demo", points.load("demo")[1]).values()
    counts = next(tables.results for tables in every if len(tables.results)).counts
    return int(counts.sum()), int((~counts).sum())


def test_a_study_about_a_folder_counts_its_rows_whatever_the_images_are_called(
    demo: list[pipeline.Revision], checkout: Path
) -> None:
    """The folder may be a link, and a downloaded archive gets a name of its own."""
    base = {"data.name": "folder", "data.folder": "/home/me/current.pets", "train.epochs": 2}
    (checkout / "studies/demo.yaml").write_text(yaml.safe_dump(DEMO | {"base": base}))
    assert set(run_all(demo).results.data) == {"current.pets"}
    assert counted() == (6, 0)


def test_finished_experiments_become_rows_that_name_their_origin(
    demo: list[pipeline.Revision], checkout: Path
) -> None:
    asked, found = points.load("demo")
    assert points.record("demo", asked, found).results.empty
    assert not (checkout / "docs/studies/demo.csv").exists()
    demo.append(run(found[0], accuracy=0.8))
    demo.append(run(found[1]._replace(parameters=found[0].parameters), accuracy=0.1))
    tables = points.record("demo", asked, found)
    # The second experiment has the name of a point but other parameters, and does not count.
    [row] = tables.results.to_dict("records")
    assert (row["experiment"], row["commit"]) == ("demo-four-0", "b" * 40)
    assert row["code"] == pipeline.stage_code(checkout)
    assert (row["accuracy"], row["parameters"], row["accuracy/1"]) == (0.8, 1234567, 0.7)
    assert list(tables.epochs.epoch) == [1, 2]
    demo[1:] = [run(found[1], accuracy=0.85)]
    assert len(points.record("demo", asked, found).results) == 2
    demo.clear()
    assert len(points.record("demo", asked, found).results) == 2
    assert len(pd.read_csv(checkout / "docs/studies/demo-epochs.csv")) == 4


def test_an_experiment_whose_outputs_are_lost_runs_again(
    demo: list[pipeline.Revision], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found = points.load("demo")
    demo += [run(point, accuracy=0.8) for point in found[:2]]
    lost, read = demo[0].commit, pipeline.read

    def fail(path: Path, commit: str) -> bytes:
        if commit == lost and path.parts[0] == "plots":
            raise UserError(f"{path} cannot be read: it is not in the cache")
        return read(path, commit)

    monkeypatch.setattr(pipeline, "read", fail)
    assert list(points.record("demo", asked, found).results.experiment) == ["demo-four-1"]


def test_an_experiment_without_the_answer_is_named(demo: list[pipeline.Revision]) -> None:
    asked, found = points.load("demo")
    demo.append(run(found[0]))
    with pytest.raises(UserError, match=r"demo.yaml: demo-four-0 has no test_accuracy"):
        points.record("demo", asked, found)


def test_rows_count_only_for_the_code_and_the_parameters_that_made_them(
    demo: list[pipeline.Revision], checkout: Path
) -> None:
    run_all(demo)
    old_code = pipeline.stage_code(checkout)
    demo.clear()
    assert counted() == (6, 0)
    params = checkout / "params.yaml"
    whole = params.read_text()
    # Parameters that decide no result.
    params.write_text(whole.replace("dpi: 120", "dpi: 60").replace("https://", "https://mirror."))
    assert counted() == (6, 0)
    params.write_text(whole.replace("momentum: 0.85", "momentum: 0.8"))
    assert counted() == (0, 6)
    params.write_text(whole)
    network = checkout / "src/cifarlab/nn/network.py"
    network.write_text(network.read_text() + "\n# a comment\n")
    assert counted() == (6, 0)
    change_network()
    assert counted() == (0, 6)

    link = {"base": "c" * 40, "base_code": old_code, "code": pipeline.stage_code(checkout)}
    same_bytes = checkout / "docs/studies/same-bytes.json"
    same_bytes.write_text(json.dumps([link | {"new_parameters": {}}]))
    assert counted() == (6, 0)
    same_bytes.write_text("[")
    with pytest.raises(UserError, match=r"same-bytes.json is damaged"):
        counted()


def test_rows_of_other_data_are_shown_but_are_not_the_answer_of_a_run(
    demo: list[pipeline.Revision], checkout: Path
) -> None:
    run_all(demo)
    path, (_, found) = checkout / "docs/studies/demo.csv", points.load("demo")
    path.write_text(path.read_text().replace("digits", "cifar10"))
    assert counted() == (6, 0)
    assert points.chosen("demo", found).results.empty
    # The same images from a folder of this name count.
    renamed = {"data.name": "folder", "data.sources": ["/images/cifar10.tar.gz"]}
    moved = [point._replace(parameters=point.parameters | renamed) for point in found]
    assert len(points.chosen("demo", moved).results) == 6


@pytest.mark.usefixtures("without_pictures")
def test_experiments_on_other_images_are_no_results_of_the_present_ones(
    demo: list[pipeline.Revision], checkout: Path
) -> None:
    path = checkout / "studies/demo.yaml"
    run_all(demo)
    first = study.rewrite_page("demo")
    for folder in ("/mnt/photos.v1", "/mnt/photos.v2", "/mnt/images"):
        base = DEMO["base"] | {"data.name": "folder", "data.folder": folder}
        path.write_text(yaml.safe_dump(DEMO | {"base": base}))
        assert points.record("demo", *points.load("demo")).results.empty
        run_all(demo)
        written = study.rewrite_page("demo")
        assert f"images of {Path(folder).name}." in written.read_text()
        assert written.parent == first.parent / re.sub(r"\W", "-", Path(folder).name)
    study.report()  # a line and a notice for each
    change_network()
    study.report()
    for folder in (".", "photos-v1", "photos-v2", "images"):
        marked = (first.parent / folder / "demo.md").read_text()
        assert "(commit bbbbbbb)" in marked


def test_a_page_is_about_one_data_set(demo: list[pipeline.Revision], checkout: Path) -> None:
    run_all(demo)
    demo.clear()
    table = checkout / "docs/studies/demo.csv"
    table.write_text(table.read_text().replace("digits", "cifar10"))
    asked, found = points.load("demo")
    demo.append(run(found[0], accuracy=0.9))
    points.record("demo", asked, found)
    with pytest.raises(UserError, match=r"lack 5 trainings"):
        study.rewrite_page("demo")


@pytest.mark.usefixtures("without_pictures")
def test_labels_are_those_of_the_question(demo: list[pipeline.Revision], checkout: Path) -> None:
    for variants in (
        {"four": {}, "1": {"train.epochs": 1}},
        {"FOUR": {}, "1": {"train.epochs": 1}},
    ):
        content = DEMO | {"variants": variants}
        (checkout / "studies/demo.yaml").write_text(yaml.safe_dump(content))
        run_all(demo)
        text = study.rewrite_page("demo").read_text()
        assert all(f"\n| {name} |" in text for name in variants)


def test_a_study_that_is_not_valid_here_does_not_hide_the_others(
    demo: list[pipeline.Revision], checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all(demo)
    (checkout / "studies/a.yaml").write_text("5")
    (checkout / "studies/b.yaml").write_text(yaml.safe_dump(DEMO | {"base": {"train.lrr": 1}}))
    study.report()
    _, a, b, last = capsys.readouterr().out.splitlines()
    assert "studies/a.yaml is not a study" in a
    assert "studies/b.yaml: four: unknown key train.lrr" in b
    assert "6 of 6" in last


def test_an_experiment_of_other_code_is_not_recorded(demo: list[pipeline.Revision]) -> None:
    asked, found = points.load("demo")
    demo.append(run(found[0], accuracy=0.8))
    change_network()
    assert points.record("demo", asked, found).results.empty


def test_rows_of_other_code_stay_in_the_table(
    demo: list[pipeline.Revision], checkout: Path
) -> None:
    run_all(demo)
    change_network()
    tables = run_all(demo)
    assert len(tables.results) == 6
    assert set(tables.results.code) == {pipeline.stage_code(checkout)}
    assert len(tables.epochs) == 12
    table = pd.read_csv(checkout / "docs/studies/demo.csv")
    assert len(table) == 12
    assert table.code.nunique() == 2
    assert table.parameters.unique().tolist() == [1234567]


@pytest.mark.parametrize(
    "content",
    [
        'a,b\n<<<<<<< "HEAD\n1,2,3\n',  # the marks of a merge conflict
        "variant,seed,experiment,accuracy\nfour,1,demo-four-1,0.5\n",  # of an earlier version
    ],
)
def test_a_damaged_table_is_named(content: str, checkout: Path) -> None:
    (checkout / "studies/demo.yaml").write_text(yaml.safe_dump(DEMO))
    table = checkout / "docs/studies/demo.csv"
    table.parent.mkdir(parents=True)
    table.write_text(content)
    repair = (
        r"demo.csv is damaged or lacks columns \(.*`git checkout docs/studies/demo.csv` repairs"
    )
    with pytest.raises(UserError, match=repair):
        counted()


def test_rows_of_an_earlier_version_are_kept_but_need_epochs(checkout: Path) -> None:
    (checkout / "studies/demo.yaml").write_text(yaml.safe_dump(DEMO))
    table = checkout / "docs/studies/demo.csv"
    table.parent.mkdir(parents=True)
    columns = "variant,seed,experiment,accuracy,commit,code,key,data,machine"
    table.write_text(f"{columns}\nfour,1,demo-four-1,0.5,,,,digits,\n")
    assert counted() == (0, 1)
    study.report()
    with pytest.raises(UserError, match=r"lack 6 trainings \(demo-four-0"):
        study.rewrite_page("demo")


def test_a_digest_of_digits_only_is_not_read_as_a_number(checkout: Path) -> None:
    (checkout / "docs/studies").mkdir(parents=True)
    content = "experiment,commit,code,key,data\na,1e10,0012,12e45,2024\n"
    (checkout / "docs/studies/demo.csv").write_text(content)
    [row] = points.read_tables("demo").results.to_dict("records")
    origin = {"experiment": "a", "commit": "1e10", "code": "0012", "key": "12e45"}
    assert row == origin | {"data": "2024"}


def test_a_page_is_rewritten_from_the_tables_and_says_whether_its_rows_count(
    demo: list[pipeline.Revision],
    checkout: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match=r"lack 6 trainings"):
        study.rewrite_page("demo")
    run_all(demo)
    path = study.rewrite_page("demo")
    believed = path.read_text()
    assert believed.startswith("# Which?\n\nCompared with *four* (81.00 %), better")
    assert "> Not confirmed" not in believed
    assert "better: one (+3.00 points).\n\n![effects" in believed
    assert "> Only 3 seeds." in believed
    assert "Every comparison is decided." in believed
    # 900 images, 2 epochs, 2 seconds; all three differences are 3 points, and as the accuracies
    # are those of 100 images, their deviation counts as 0.5 points: t = 3 / (0.5 / √3).
    row = r"\| one \| 84.00 ± 2.48 \| \+3.00 \| \+1.76 … \+4.24 \| \*\*different\*\*, p = 0.0091 "
    assert re.search(row + r"\| 0.5 ± 0 \| 1,234,567 \| 2.0 \| 900 \| 3 \|", believed)
    assert path.with_suffix(".png").stat().st_size > 20_000
    monkeypatch.setattr(page, "draw_study", lambda *_, **__: None)
    assert "\nMachine: a CPU.\n" in believed
    table, _ = points.paths("demo")
    table.write_text((one_machine := table.read_text()).replace("a CPU", "a GPU", 1))
    mixed = "\nMachines, whose sums differ by rounding: a CPU; a GPU.\n"
    assert mixed in study.rewrite_page("demo").read_text()
    table.write_text(one_machine)
    study.rewrite_page("demo")
    study.report()
    row = ["demo", "6", "6", "of", "6", "3", "bbbbbbb", "digits", "a", "CPU"]
    assert capsys.readouterr().out.splitlines()[1].split() == row

    old_code = pipeline.stage_code(checkout)
    change_network()
    study.report()
    row[2] = "0"
    assert capsys.readouterr().out.splitlines()[1].split() == row
    marked = path.read_text()
    assert marked.splitlines()[2].startswith("> Not confirmed: 6 of 6 rows")
    assert "(commit bbbbbbb)" in marked
    assert "`make study NAME=demo` trains them again" in marked
    assert marked.replace(marked.splitlines()[2] + "\n\n", "") == believed
    study.rewrite_page("demo")
    study.report()
    assert path.read_text() == marked

    link = {"base_code": old_code, "code": pipeline.stage_code(checkout)}
    (checkout / "docs/studies/same-bytes.json").write_text(json.dumps([link]))
    study.report()
    assert path.read_text() == believed


def test_a_notice_is_put_below_the_title_replaced_and_removed(checkout: Path) -> None:
    commits = ["abc1234ffff", "abc1234ffff", None]
    table = pd.DataFrame({"commit": commits, "counts": False, "data": "digits"})
    path = checkout / "docs/studies/depth.md"
    page.update_notice("depth", table)
    assert not path.exists()
    path.parent.mkdir(parents=True)
    text = "# A title\n\nSome images of digits.\n\n> a quote\n"
    path.write_text(text)
    for _ in range(2):
        page.update_notice("depth", table)
        title, notice, rest = path.read_text().split("\n\n", 2)
        assert (title, rest) == ("# A title", "Some images of digits.\n\n> a quote\n")
        assert notice.startswith("> Not confirmed: 3 of 3 rows were made by other code")
        assert "(commit abc1234, unknown)" in notice
        assert "\n" not in notice
    page.update_notice("depth", table[:1])
    notice = notice.replace("3 of 3", "1 of 1").replace(", unknown", "")
    assert path.read_text() == text.replace("Some", f"{notice}\n\nSome")
    page.update_notice("depth", table.assign(counts=[True, False, True]))
    assert "1 of 3 rows were made by other code or parameters (commit abc1234)" in path.read_text()
    page.update_notice("depth", table.assign(counts=True))
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["ReLU", "激活", "0..1", "..", "a b"])
def test_the_name_of_an_experiment_is_one_for_git(text: str) -> None:
    name = f"{slug(text)}-0"
    assert not name.startswith("-")
    reference = ["git", "check-ref-format", f"refs/exps/ab/cd/{name}"]
    assert subprocess.run(reference, check=False).returncode == 0
    assert slug("激活") != slug("激"), "two studies are two"

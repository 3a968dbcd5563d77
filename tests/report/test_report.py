"""The page of a run and of a comparison: its numbers, its pictures, and that it opens offline."""

import base64
import io
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.numpy import save
from scipy.stats import binom
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from statsmodels.stats.multitest import multipletests

from cifarlab.errors import UserError
from cifarlab.evaluation.metrics import expected_calibration_error
from cifarlab.pipeline import WORKSPACE, Revision
from cifarlab.report import page, statistics
from cifarlab.report.run import Run, draw_filters, parameters, png, read_images
from tests.support.project import Project

CLASSES = ["cat", "dog", "NA", "7"]
ODD = [
    "<script>alert('x')</script>",
    "\"><img src=x onerror='y'>",
    "貓 & 狗",
    "n" * 60,
    "{{ 7 * 7 }}",
]
MOST = 5_000_000  # bytes of a page


def guesses(classes: Sequence[str], n: int = 400, seed: int = 0) -> pd.DataFrame:
    """Predictions of which about half are right; the first ones are the same for every seed."""
    actual = np.random.default_rng(7).integers(len(classes), size=n)
    rng = np.random.default_rng(seed)
    predicted = np.where(rng.random(n) < 0.5, actual, rng.integers(len(classes), size=n))
    names = np.asarray(classes)
    confidence = rng.uniform(1 / len(classes), 1, n).round(6)
    return pd.DataFrame(
        {"actual": names[actual], "predicted": names[predicted], "confidence": confidence}
    )


def made_up(classes: Sequence[str], seed: int = 0, **more: Any) -> Run:
    """A run with everything but a checkout."""
    history = {"epoch": [1, 2, 3], "train_loss": [3.0, 2.0, 1.5], "train_accuracy": [0.1, 0.2, 0.4]}
    history |= {"val_loss": [math.nan] * 3, "val_accuracy": [math.nan] * 3}
    tile = png(np.full((8, 8, 3), 90, np.uint8))
    given = {
        "revision": Revision(f"{classes[0]}-{seed}"[:60], "0123456789" * 4, "9" * 40),
        "metrics": {"accuracy": 0.5, "calibration_error": 0.25, "parameters": 12345},
        "classes": list(classes),
        "params": {"train.seed": seed, "train.lr": 0.1, "data.folder": classes[0]},
        "facts": {"commit": "0123456789" * 4},
        "test_digest": "same",
        "history": pd.DataFrame(history).set_index("epoch"),
        "predictions": guesses(classes, seed=seed),
        "filters": draw_filters(save({"stem.0.weight": np.ones((24, 3, 2, 2), np.float32)})),
        "mistakes": [(tile, [name, f"→ {name} 90%"]) for name in list(classes)[:24]],
    }
    return Run(**given | more)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Numbers


def test_the_intervals_are_those_of_wilson() -> None:
    hits, n, z = np.array([0, 1, 30, 36, 5]), np.array([36, 2, 36, 36, 1000]), 1.959963984540054
    share = hits / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    table = statistics.accuracy(hits, n)
    assert table.low.to_numpy() == pytest.approx(middle - half, abs=1e-12)
    assert table.high.to_numpy() == pytest.approx(middle + half, abs=1e-12)


def test_confusion_and_classes_are_those_of_scikit_learn() -> None:
    table = guesses([*CLASSES, "never predicted"])
    table.loc[table.predicted == "never predicted", "predicted"] = "cat"
    table = table[table.actual != "7"].reset_index(drop=True)  # a class without images
    names = [*CLASSES, "never predicted"]
    counts = statistics.confusion(table, names)
    assert (
        counts.to_numpy() == confusion_matrix(table.actual, table.predicted, labels=names)
    ).all()
    found = statistics.per_class(counts)
    precision, recall, f1, images = precision_recall_fscore_support(
        table.actual, table.predicted, labels=names, zero_division=0
    )
    assert found.precision.to_numpy() == pytest.approx(precision)
    assert found.f1.to_numpy() == pytest.approx(f1)
    assert (found.images == images).all()
    assert found.accuracy.dropna().to_numpy() == pytest.approx(np.delete(recall, 3))
    assert math.isnan(found.loc["7", "accuracy"])
    [first, *_] = statistics.confused(table, 3)
    assert first[2] == (counts.to_numpy() - np.diag(np.diag(counts))).max()
    assert counts.loc[first[0], first[1]] == first[2]


def test_calibration_is_that_of_scikit_learn_and_of_the_evaluate_stage() -> None:
    table, bins = guesses(CLASSES, 2000), 15
    right = (table.actual == table.predicted).to_numpy()
    found = statistics.calibration(table, bins)
    share, mean = calibration_curve(right, table.confidence, n_bins=bins)
    assert found.accuracy.to_numpy() == pytest.approx(share)
    assert found.confidence.to_numpy() == pytest.approx(mean)
    # Two classes with these confidences; the first one is predicted.
    confidence = table.confidence.to_numpy().clip(0.5)
    error = expected_calibration_error(
        np.c_[confidence, 1 - confidence], (~right).astype(int), bins
    )
    found = statistics.calibration(table.assign(confidence=confidence), bins)
    gaps = (found.confidence - found.accuracy).abs() * found.images
    assert gaps.sum() / len(table) == pytest.approx(error)
    # The upper end belongs to an interval.
    edges = statistics.calibration(table.head(3).assign(confidence=[0.2, 0.21, 1.0]), 5)
    assert list(edges.index) == pytest.approx([0.2, 0.4, 1.0])


@pytest.mark.parametrize("n", [1, 2, 7])
def test_correction_by_holm_is_that_of_statsmodels(n: int) -> None:
    rng = np.random.default_rng(n)
    for p in (rng.random(n), rng.integers(0, 3, n) / 20, np.zeros(n), np.ones(n)):
        expected = multipletests(p, method="holm")[1]
        np.testing.assert_allclose(statistics.holm(list(p)), expected, rtol=1e-12)
    assert list(statistics.holm([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])


def test_a_comparison_by_hand() -> None:
    truth = ["a"] * 20 + ["b"] * 10
    # Of a: 6 images only the first gets right, 1 only the second. Of b: 0 and 8.
    first = ["a"] * 16 + ["b"] * 4 + ["b"] * 1 + ["a"] * 9
    second = ["a"] * 10 + ["b"] * 6 + ["a"] + ["b"] * 3 + ["b"] * 9 + ["a"]
    one, other = (pd.DataFrame({"actual": truth, "predicted": p}) for p in (first, second))
    every, each = statistics.compare(one, other, ["a", "b"])
    assert (every["images"], every["only_first"], every["only_second"]) == (30, 6, 9)
    assert every["p"] == pytest.approx(2 * binom.cdf(6, 15, 0.5))
    assert every["first"] == pytest.approx(17 / 30)
    assert each.only_first.tolist() == [6, 0]
    assert each.only_second.tolist() == [1, 8]
    # (1 + 7) / 2⁷ · 2, and 2 / 2⁸, of which Holm doubles the smaller.
    assert each.p.tolist() == pytest.approx([2 * 8 / 2**7, 2 * 2 / 2**8])
    same, _ = statistics.compare(one, one, ["a", "b"])
    assert same["p"] == 1


def test_numbers_with_an_exponent_are_numbers(outside: Path) -> None:
    """DVC takes all of these for numbers and writes 1e-05."""
    text = "train: {lr: 1e-5, name: 1e, decay: 1.0e-5}\nplot.dpi: 1e-05"
    (outside / "params.yaml").write_text(text)
    assert parameters(WORKSPACE) == {
        "train.lr": 1e-5,
        "train.name": "1e",
        "train.decay": 1e-5,
        "plot.dpi": 1e-5,
    }


@pytest.mark.parametrize(
    "text",
    [
        b"name: \xff",
        b"<<<<<<< HEAD\ntrain: {}\n",
        b"train\n",
        b"[" * 5000,
        b"a: &a0 {x: 1}\n"
        + b"".join(
            b"b%d: &a%d {%s}\n" % (i, i, b", ".join(b"k%d: *a%d" % (k, i - 1) for k in range(9)))
            for i in range(1, 12)
        ),
    ],
    ids=["not UTF-8", "a merge", "no mapping", "deep", "aliases of billions of values"],
)
def test_damaged_parameters_are_refused_in_a_sentence(outside: Path, text: bytes) -> None:
    (outside / "params.yaml").write_bytes(text)
    damaged = r"params\.yaml of workspace is damaged; `cifarlab check`"
    merge = r"params\.yaml holds a merge conflict: edit it, or take one side"
    with pytest.raises(UserError, match=merge if b"<<<" in text else damaged):
        parameters(WORKSPACE)


# Pictures


def decoded(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))


def test_only_the_images_that_are_asked_for_are_read(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    with (tmp_path / "images.npy").open("rb") as file:
        found = list(read_images(file, [49, 0, 7]))
    assert all((a == images[i]).all() for a, i in zip(found, [49, 0, 7], strict=True))
    assert (np.asarray(decoded(png(found[0]))) == images[49]).all()
    large = decoded(png(np.zeros((512, 256, 3), np.uint8)))
    assert large.size == (24, 48)


def test_filters_are_drawn_with_zero_as_grey() -> None:
    weights = np.zeros((13, 3, 2, 2), np.float32)
    weights[1, 0, 0, 1] = 0.5  # red
    weights[12, 2, 1, 0] = -3  # the opposite of blue
    found = draw_filters(save({"stages.0.first.0.weight": weights}))
    assert (found["size"], found["count"], found["whitening"]) == (2, 13, False)
    tiles = [np.asarray(decoded(source)).tolist() for source in found["sources"]]
    grey = [128, 128, 128]
    assert tiles[0] == [[grey, grey], [grey, grey]]
    assert tiles[1] == [[grey, [255, 128, 128]], [grey, grey]]
    assert tiles[12] == [[grey, grey], [[128, 128, 0], grey]]
    many = draw_filters(save({"stem.0.weight": np.ones((200, 3, 2, 2), np.float32)}))
    assert (len(many["sources"]), many["count"], many["whitening"]) == (96, 200, True)


# The page


class Parsed(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.usefixtures("outside")
def test_names_may_hold_any_character() -> None:
    runs = [made_up(ODD), made_up(ODD, 1)]
    parsed = Parsed(page.render(runs))
    assert {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object"} == set()
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    for name in [*ODD, *(run.revision.name for run in runs)]:
        assert name in parsed.text
    # Nothing is loaded from anywhere.
    assert all(
        (attrs[name] or "").startswith("data:image/png;base64,")
        for _, attrs in parsed.tags
        for name in ("src", "href")
        if name in attrs
    )
    # Labels: each picture, each drawing and each table says what it is.
    assert all("alt" in attrs for tag, attrs in parsed.tags if tag == "img")
    assert all("aria-label" in a or "aria-hidden" in a for tag, a in parsed.tags if tag == "svg")
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("table") == tags.count("caption")
    assert all("scope" in attrs for tag, attrs in parsed.tags if tag == "th")


@pytest.mark.usefixtures("outside")
def test_the_page_shows_the_numbers() -> None:
    run = made_up(CLASSES)
    assert run.predictions is not None
    text = " ".join(Parsed(page.render([run])).text.split())
    hits = int((run.predictions.actual == run.predictions.predicted).sum())
    assert f"{hits / 400:.2%} of 400 test images classified correctly" in text
    counts = confusion_matrix(run.predictions.actual, run.predictions.predicted, labels=CLASSES)
    cells = re.findall(r"<td(?: style[^>]*)?>(\d*)", matrix_of(page.render([run])))
    assert [int(cell or 0) for cell in cells][1:] == counts.flatten().tolist()
    assert "the mean distance from the diagonal, is 25.00%" in text
    assert "make verify REV=cat-0" in text
    assert "This first layer is not trained" in text
    assert "is not recorded here" in text


def matrix_of(text: str) -> str:
    found = re.search(r'<table class="matrix.*?</table>', text, re.S)
    assert found
    return found[0]


@pytest.mark.usefixtures("outside")
def test_other_test_images_are_not_compared() -> None:
    first, unlike = made_up(CLASSES), made_up(CLASSES, 1, test_digest="other")
    unknown, fewer = (
        made_up(CLASSES, test_digest=""),
        made_up(CLASSES, predictions=guesses(CLASSES, 9)),
    )
    for one, other in ((first, unlike), (first, unknown), (unknown, unknown), (first, fewer)):
        assert "were not tested on the same images" in page.compare(one, other)["refusal"]
    text = Parsed(page.render([first, unlike])).text
    assert "were not tested on the same images" in text
    assert "McNemar" not in text


@pytest.mark.usefixtures("outside")
def test_the_curves_say_which_loss_they_show() -> None:
    plain = {"train.loss": "cross_entropy", "train.label_smoothing": 0}
    other = {"train.loss": "quadratic", "train.label_smoothing": 0.2, "train.cutmix": 0.5}
    runs = [made_up(CLASSES, 0, params=plain), made_up(CLASSES, 1, params=other)]
    for run in runs:
        assert run.history is not None
        run.history["val_loss"] = 1.0
    text = page.render(runs)
    mixed = "training, images mixed by CutMix"
    for label in ("validation", "training"):
        assert f"</svg> cat-0: {label}</li>" in text
    for label in ("validation, quadratic", f"{mixed}, quadratic, label smoothing 0.2", mixed):
        assert f"</svg> cat-1: {label}</li>" in text  # the last one is that of the accuracy


@pytest.mark.usefixtures("outside")
def test_what_is_missing_is_said_in_a_sentence() -> None:
    parts = ("history", "predictions", "filters")
    missing = {part: f"no {part} there" for part in (*parts, "data")}
    run = made_up(CLASSES, missing=missing, **dict.fromkeys(parts))
    text = Parsed(page.render([run])).text
    assert all(f"{sentence}." in text for sentence in missing.values())
    assert "predictions of one of the two are missing" in page.render([made_up(CLASSES), run])
    run = made_up(
        CLASSES, missing={"mistakes": "no images there"}, mistakes=None, revision=WORKSPACE
    )
    assert "No images: no images there." in Parsed(page.render([run])).text


@pytest.mark.usefixtures("outside")
def test_a_quoted_number_and_metrics_that_were_lost_spoil_no_page() -> None:
    run = made_up(CLASSES)
    run.params["evaluate.calibration_bins"] = "15"  # the pipeline takes it
    run.metrics.pop("calibration_error", None)
    assert "the mean distance from the diagonal, is not known" in Parsed(page.render([run])).text


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a network."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    chromium = chromium or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


def check(browser: Any, path: Path) -> None:
    """Open a page as a desktop, a dark desktop and a phone, and look for faults."""
    assert path.stat().st_size < MOST
    context = browser.new_context(offline=True)
    tab, faults, requests, backgrounds = context.new_page(), [], [], set()
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    drawn = tab.eval_on_selector_all("img", "all => all.map(i => i.naturalWidth)")
    assert drawn
    assert min(drawn) > 0
    for width, scheme in ((1200, "light"), (1200, "dark"), (360, "light")):
        tab.emulate_media(color_scheme=scheme)
        tab.set_viewport_size({"width": width, "height": 800})
        # Wide tables scroll in their own frame.
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        backgrounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    assert not faults
    assert {url for url in requests if not url.startswith("data:")} == {path.as_uri()}
    context.close()


@pytest.mark.slow
@pytest.mark.usefixtures("outside")
def test_the_largest_page_is_below_5_mb_and_fits(
    browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the most runs and classes, full matrices, long names, and noise as images."""
    classes = [*ODD, *(f"class {i} {'long name ' * (i % 6)}" for i in range(115))]
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), np.uint8)
    tiles = [(png(pixels), [classes[3], classes[10]]) for pixels in noise]
    monkeypatch.setattr(Run, "pictures", lambda _self, rows, most, _caption: tiles[:most])
    runs = [
        made_up(classes, seed, predictions=guesses(classes, 50_000, seed), mistakes=tiles)
        for seed in range(page.MOST)
    ]
    text = page.render(runs)
    assert matrix_of(text).count("<td") == 120**2 + 1
    path = Path("report.html")
    path.write_text(text, "utf-8")
    check(browser, path.resolve())
    # So many that the matrix is left out.
    assert "too many for a matrix" in page.render([made_up([str(i) for i in range(121)])])


def test_a_comparison_opens_offline(used: Project, browser: Any) -> None:
    before = used.run("git", "status", "--porcelain").stdout
    path, logged = report(used, "HEAD", "other-seed", "--output", "two.html").splitlines()
    assert path == "two.html"
    check(browser, used.folder / path)
    text = Parsed((used.folder / "two.html").read_text("utf-8")).text
    commit = used.run("git", "rev-parse", "HEAD").stdout.strip()
    data = json.loads((used.folder / "data/dataset.json").read_text("utf-8"))
    found = used.runs()
    run = found["other-seed"]
    for known in (
        commit,
        data["digest"],
        data["name"],
        run.info.run_id,
        run.data.tags["precision"],
    ):
        assert known in text
    assert "McNemar's exact test: p =" in text
    assert re.search(r"train\.seed\s*0\s*0\s*1\s", text)
    # The page is an artifact of the first run, here the one of the commit.
    run_id = found[""].info.run_id
    [name] = [name for name in used.artifacts(run_id) if name.startswith("report/")]
    assert logged == f"logged to MLflow as {name} of run {run_id}"
    artifact = used.client().download_artifacts(run_id, name)
    assert Path(artifact).read_bytes() == (used.folder / "two.html").read_bytes()
    (used.folder / "two.html").unlink()
    assert used.run("git", "status", "--porcelain").stdout == before
    # It says nothing of this machine.
    assert str(used.folder) not in text


def report(project: Project, *arguments: str, code: int = 0, **env: str) -> str:
    """Run `cifarlab report`, check its exit code, and return its output."""
    command = ("python", "-m", "cifarlab.cli", "report", *arguments)
    done = project.run(*command, check=False, PYTHONPATH="src", **env)
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    assert "Warning" not in done.stdout
    return done.stdout


def test_a_damaged_lock_is_said(used: Project) -> None:
    lock = used.folder / "dvc.lock"
    merged = f"<<<<<<< HEAD\n{lock.read_text('utf-8')}=======\n"
    reason = "its dvc.lock is damaged or missing; `git checkout dvc.lock`"
    for damaged, sentence in (
        (merged, "dvc.lock holds a merge conflict: edit it, or take one side"),
        ("stages: {download: hello}", reason),
        ("", reason),
    ):
        lock.write_text(damaged, "utf-8")
        report(used)
        text = Parsed((used.folder / "report.html").read_text("utf-8")).text
        assert f"dvc.lock: {sentence}" in text
        assert "digest of the code" not in text


def test_code_that_was_committed_and_never_ran_is_said(used: Project) -> None:
    code, page = used.folder / "src/cifarlab/training/loop.py", used.folder / "report.html"
    for added, changed in (("# a comment", False), ("ADDED = 1", True)):
        code.write_text(f"{code.read_text('utf-8')}\n{added}\n", "utf-8")
        used.run("git", "commit", "--quiet", "--all", "--message=more code")
        report(used, "HEAD")
        text = Parsed(page.read_text("utf-8")).text
        assert ("code or data have changed since this ran" in text) == changed
        assert ("digest of the code" in text) != changed


@pytest.mark.slow
def test_what_cannot_be_read_is_said(used: Project) -> None:
    [line] = report(used, "nobody", code=1).splitlines()
    assert line.startswith("error: nobody is not an experiment or a commit")
    [line] = report(used, "HEAD~1", code=1).splitlines()  # before anything ran
    assert "has no results in metrics/" in line
    [line] = report(used, *"abcdef", code=1).splitlines()
    assert "at most 5" in line
    assert not (used.folder / "report.html").exists()
    # MLflow is down: the page is written all the same.
    lines = report(used, "other-seed", MLFLOW_TRACKING_URI="http://127.0.0.1:9").splitlines()
    assert [lines[0], lines[1][:21]] == ["report.html", "not logged to MLflow:"]
    assert len(lines) == 2
    # The files of an experiment are not in the cache.
    (used.folder.parent / "shared").rename(used.folder.parent / "away")
    lines = report(used, "other-seed").splitlines()
    assert lines[0] == "report.html"
    text = Parsed((used.folder / "report.html").read_text("utf-8")).text
    for name in ("plots/predictions.csv", "plots/history.csv", "models/network.safetensors"):
        assert f"{name} of other-seed is neither in Git nor in DVC's cache or remote." in text


@pytest.mark.slow
def test_in_a_clone_without_a_cache_everything_says_what_is_missing(used: Project) -> None:
    """A clone that has never read the outputs: DVC raises other errors there."""
    used.run("git", "clone", "--quiet", ".", "../clone")
    clone = Project(used.folder.parent / "clone", used.fork_server)
    for command in ("predict --model HEAD README.md", "export --model HEAD --onnx a.onnx"):
        whole = ("python", "-m", "cifarlab.cli", *command.split())
        done = clone.run(*whole, check=False, PYTHONPATH="src")
        [line] = done.stdout.splitlines()
        assert "error: models/network.safetensors of commit" in line
        assert "is neither in Git nor in DVC's cache or remote" in line
    assert report(clone, "HEAD").splitlines()[0] == "report.html"
    text = Parsed((clone.folder / "report.html").read_text("utf-8")).text
    assert "plots/predictions.csv of commit" in text


@pytest.mark.slow
def test_the_run_in_the_workspace_opens_offline(used: Project, browser: Any) -> None:
    path, logged = report(used).splitlines()
    [run] = [run for run in used.all_runs() if run.data.tags["dvc.exp.name"] == ""]
    assert logged == f"logged to MLflow as report/report.html of run {run.info.run_id}"
    check(browser, used.folder / path)
    text = Parsed((used.folder / path).read_text("utf-8")).text
    assert "git add . && git commit" in text
    assert "have changed since this ran" not in text
    # It shows what ran, although the parameters are others by now.
    used.edit("train", seed=5)
    report(used)
    text = Parsed((used.folder / path).read_text("utf-8")).text
    assert "have changed since this ran" in text
    assert re.search(r"train\.seed0\D", text)
    # A damaged table is said.
    table = used.folder / "plots/predictions.csv"
    table.write_bytes(table.read_bytes() + b"5,9,x\n")
    report(used)
    assert "could not convert" in (used.folder / path).read_text("utf-8")

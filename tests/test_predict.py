"""`cifarlab predict` and `cifarlab export`, on a network in a file."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageOps

from cifarlab import pipeline
from cifarlab.cli import main
from cifarlab.data.images import formats
from cifarlab.nn import weights
from cifarlab.nn.network import Network
from tests.support.archives import raw_png
from tests.support.networks import small_params

REPO = Path(__file__).resolve().parent.parent
CLASSES = ["NA", "cat, dog", "Käfer"]
Predict = Callable[..., Result]


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Network:
    torch.manual_seed(0)
    network = Network(small_params(), 32, CLASSES).eval()
    weights.save(network, tmp_path / "models/network.safetensors")
    monkeypatch.chdir(tmp_path)
    return network


@pytest.fixture
def predict(network: Network) -> Predict:
    def predict(*arguments: str, **options: object) -> Result:
        return CliRunner().invoke(main, ["predict", *arguments], **options)  # type: ignore[arg-type]

    return predict


def image(seed: int, size: tuple[int, int] = (48, 36)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))


def expected(network: Network, picture: Image.Image) -> list[float]:
    square = np.asarray(ImageOps.fit(picture.convert("RGB"), (32, 32)))
    with torch.no_grad():
        logits = network(torch.from_numpy(square.copy())[None].permute(0, 3, 1, 2))
    return [float(p) for p in logits.softmax(1)[0]]


def test_any_image_is_classified_like_in_evaluation(predict: Predict, network: Network) -> None:
    for i, (name, mode) in enumerate([("a.png", "RGBA"), ("b.tif", "L"), ("c.webp", "RGB")]):
        image(i).convert(mode).save(name, **({"lossless": True} if "webp" in name else {}))
    done = predict("a.png", "b.tif", "c.webp", "--json", "--top", "3")
    assert done.exit_code == 0
    for found, name in zip(json.loads(done.stdout), ["a.png", "b.tif", "c.webp"], strict=True):
        assert found["image"] == name
        with Image.open(name) as picture:
            probabilities = expected(network, picture)
        given = {row["class"]: row["probability"] for row in found["top"]}
        assert [given[label] for label in CLASSES] == pytest.approx(probabilities, abs=2e-6)
        assert found["class"] == CLASSES[int(np.argmax(probabilities))]
        ordered = [row["probability"] for row in found["top"]]
        assert ordered == sorted(ordered, reverse=True)


def test_float32_is_no_tf32(predict: Predict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    image(0).save("a.png")
    assert predict("a.png").exit_code == 0
    assert not torch.backends.cudnn.allow_tf32


def test_folders_patterns_and_standard_input(predict: Predict) -> None:
    for name in ("in/[1]/a.png", "in/b.jpg", "in/c.txt", "x1.png", "x2.png", "é è.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        image(0).save(name, "PNG")
    done = predict("in", "x*.png", "é è.png")
    assert done.stderr == "skipped files that are not images (1): in/c.txt\n"
    names = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert names == ["in/[1]/a.png", "in/b.jpg", "x1.png", "x2.png", "é è.png"]
    inside = [line.split("  ")[0] for line in predict("in/[1]").stdout.splitlines()]
    assert inside == ["in/[1]/a.png"]
    Path("home").mkdir()
    image(0).save("home/c.png")
    at_home = predict("~", env={"HOME": str(Path("home").resolve())}).stdout
    assert at_home.partition("  ")[0].endswith("/home/c.png")
    assert "~nobody-here" in predict("~nobody-here/c.png").output
    for name in ("~c.png", "-c.png"):
        image(0).save(name)
        assert predict("--", f"./{name}").stdout.startswith(f"{name}  ")
    done = predict("-", input=Path("x1.png").read_bytes())
    assert done.stdout.startswith("-  ")


def test_a_pattern_starts_in_a_folder_of_any_name(
    predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("in [1]").mkdir()
    image(0).save("in [1]/a.png")
    monkeypatch.setattr("cifarlab.cli.HERE", Path("in [1]"))
    for name in ("*.png", "."):  # shown as they were typed
        assert predict(name).stdout.startswith("a.png  ")
    assert "in [1]/a.png  " in predict(str(Path("in [[]1]/*.png").resolve())).stdout


def test_a_link_to_a_folder_around_it_repeats_no_image(predict: Predict) -> None:
    Path("in").mkdir()
    image(0).save("in/z.png")
    for name, target in (("in/again", "../in"), ("in/y.png", "z.png")):
        Path(name).symlink_to(target)
    for name in ("in", "in/**/*.png"):
        lines = predict(name).stdout.splitlines()
        assert [line.partition("  ")[0] for line in lines] == ["in/y.png", "in/z.png"]


def test_csv_has_a_head_and_quotes_names(predict: Predict) -> None:
    image(0).save("a, b.png")
    rows = list(csv.reader(io.StringIO(predict("a, b.png", "--csv", "--top", "2").stdout)))
    assert rows[0] == ["image", "class", "probability", "class_2", "probability_2"]
    assert rows[1][0] == "a, b.png"
    assert {rows[1][1], rows[1][3]} <= {*CLASSES}
    assert len(rows) == 2


@pytest.mark.parametrize("name", ["a\nb.png", "a\rb.png"])
def test_csv_quotes_line_breaks(predict: Predict, name: str) -> None:
    image(0).save(name)
    text = predict(name, "--csv").stdout_bytes.decode("utf-8")
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))] == ["image", name]


def test_json_has_long_paths_as_they_are(predict: Predict) -> None:
    folder = Path("a" * 200, "b" * 200)
    folder.mkdir(parents=True)
    for name in ("1.png", "2.png"):
        image(0).save(folder / name)
    rows = json.loads(predict(str(folder), "--json").stdout)
    assert [row["image"] for row in rows] == [f"{folder}/1.png", f"{folder}/2.png"]


def test_a_broken_image_is_named_and_the_others_are_classified(predict: Predict) -> None:
    image(0).save("good.png")
    Path("bad.png").write_bytes(Path("good.png").read_bytes()[:-500])
    done = predict("bad.png", "good.png", "missing.png")
    assert done.exit_code == 1
    first, second = done.output.splitlines()
    assert first.startswith("good.png  ")
    assert second.startswith("error: 2 of 3 images cannot be read: missing.png: there is no such ")
    assert "; bad.png: " in second


def test_a_format_that_needs_another_package_names_it(
    predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {suffix: name for suffix, name in formats().items() if suffix != ".heic"}
    monkeypatch.setattr("cifarlab.data.readers.formats", lambda: known)
    Path("a.HEIC").write_bytes(b"....ftypheic")
    said = "a.HEIC: it is no image that Pillow can open; pillow-heif opens .heic\n"
    assert predict("a.HEIC").output.endswith(said)


MEASURE = """
import sys
from pathlib import Path
from cifarlab.predict import load, predict

def peak():  # getrusage would begin with the memory of the parent process
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) >> 10

network, broken = load(""), []
list(predict(network, ["small.png"], 1, broken))
before = peak()
found = list(predict(network, sys.argv[1:], 1, broken))
print(len(found), *broken, peak() - before, sep="\\n")
"""


@pytest.mark.slow
def test_many_large_images_take_no_more_memory_than_one(network: Network) -> None:
    """Nothing is printed, also no warning of Pillow."""
    image(0).save("small.png")
    Path("huge.png").write_bytes(raw_png(11_000, 10_000, rows=1))
    large = raw_png(7000, 7000, colour=6)
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        Path(name).write_bytes(large)
    command = [sys.executable, "-W", "always", "-c", MEASURE, "huge.png", *names]
    env = os.environ | {"PYTHONPATH": str(REPO / "src")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert not done.stderr
    count, sentence, grown = done.stdout.splitlines()
    assert count == "4"
    size = "Image size (110000000 pixels) exceeds limit of 50000000 pixels"
    assert sentence.startswith(f"huge.png: {size}")
    assert int(grown) < 600


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing.png"], "nothing.png: there is no such image, and no folder of images"),
        (["*.gif"], "*.gif: there is no such image"),
        ([""], "an empty name: there is no such image"),
        (["a.png", "--model", "text.txt"], "text.txt holds no network of this version"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(
    predict: Predict, arguments: list[str], sentence: str
) -> None:
    image(0).save("a.png")
    Path("text.txt").write_text("x")
    done = predict(*arguments)
    assert done.exit_code == 1
    assert done.output.startswith(f"error: {sentence}")
    assert done.output.count("\n") == 1


def test_a_network_of_another_version_is_named(
    predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    image(0).save("a.png")
    content = Path("models/network.safetensors").read_bytes()
    assert b"norm_scale" in content
    older = content.replace(b"norm_scale", b"norm_other")
    monkeypatch.setattr(pipeline, "find", lambda name: pipeline.Revision(name, "0" * 40, ""))
    monkeypatch.setattr(pipeline, "read", lambda path, commit: older)
    done = predict("a.png", "--model", "HEAD~50")
    sentence = "HEAD~50 holds no network of this version; use it in the checkout of its commit"
    assert (done.exit_code, done.output) == (1, f"error: {sentence}\n")


@pytest.mark.parametrize("same", [True, False])
def test_weights_of_a_commit_with_other_code_are_warned_of(
    predict: Predict, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    image(0).save("a.png")
    weights_of = Path("models/network.safetensors").read_bytes()
    monkeypatch.setattr(pipeline, "find", lambda name: pipeline.Revision(name, "0" * 40, ""))
    monkeypatch.setattr(pipeline, "read", lambda path, commit: weights_of)
    for folder, text in (("", ""), ("then", "# a comment" if same else "OTHER = 1")):
        path = Path(folder, "src/cifarlab/nn/a.py")
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.setattr(pipeline, "tracked_files", lambda commit: nullcontext(Path("then")))
    done = predict("a.png", "--model", "old")
    assert done.exit_code == 0
    assert ("warning: old has other code for the network" in done.stderr) != same


def test_without_a_network_predict_says_so(predict: Predict) -> None:
    image(0).save("a.png")
    Path("models/network.safetensors").unlink()
    done = predict("a.png")
    assert done.exit_code == 1
    assert "models/network.safetensors is missing; `dvc repro` trains a network" in done.output


@pytest.mark.slow
def test_export_writes_both_formats(network: Network) -> None:
    done = CliRunner().invoke(main, ["export", "--onnx", "a.onnx", "--torch", "b.pt2"])
    assert done.exit_code == 0, done.output
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(torch.export.load("b.pt2").module()(images), network(images))
    assert Path("a.onnx").stat().st_size > 1000
    assert "name a file" in CliRunner().invoke(main, ["export"]).output

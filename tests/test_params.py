import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifarlab import UserError
from cifarlab.architecture import ModelParams
from cifarlab.params import Params, load_params
from tests.conftest import NOTEBOOK, REPO, VARIANTS

Make = Callable[..., Params]


def in_subprocess(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(REPO / "src")}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, text=True, capture_output=True, check=False, timeout=60)


def test_committed_parameters_are_valid_and_kept_as_they_are() -> None:
    content = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
    assert load_params(REPO / "params.yaml").flat() == {f"{s}.{key}": value for s, keys in content.items() for key, value in keys.items()}


@pytest.mark.parametrize(
    "changes",
    [
        *VARIANTS.values(),
        {"data.name": "digits", "data.sources": [], "data.sha256": None},
        {"data.name": "folder", "data.sources": ["photos.zip"], "data.sha256": None, "data.image_size": 64},
        {"data.sources": ["file:///data/cifar.tar.gz"], "data.sha256": None},
        {"model.residual": True, "model.layers": 4},
        {"model.norm": "group", "model.widths": [8, 16]},
        {"model.norm": "group", "model.widths": [8, 8, 8, 8, 16, 16], "model.pool": "stride"},
        {"model.norm": "group", "model.widths": [8, 8, 8, 16, 16], "model.layers": 4, "model.pool_at": "start"},
        {"model.stem": "none", "model.pool_at": "end", "model.norm_momentum": 1, "model.logit_scale": 1},
        {"model.kernel_size": 4, "model.padding": "valid", "model.layers": 3},
        {"model.dropout": [0, 0.1, 0.999], "model.layers": 1},
        {"model.layers": 32, "model.kernel_size": 15, "model.head": [1] * 8},
        {"model.stem": "none", "model.widths": [8] * 5, "model.layers": 5},
        {"model.global_pool": "none"},
        {"model.norm_scale": True, "train.optimizer": "adamw"},
        {"train.flip": "random", "train.precision": "bfloat16", "train.norm_bias_lr": 0.5, "evaluate.mirror": True},
        {"train.translate": 31, "train.cutmix": 1, "train.seed": 2**31 - 1, "train.threads": 1024},
    ],
)
def test_accepts(make_params: Make, changes: dict[str, Any]) -> None:
    flat = make_params(changes).flat()
    assert {key: flat[key] for key in changes} == changes


def test_scientific_notation_without_a_point_is_a_number(make_params: Make) -> None:
    # YAML 1.1, which PyYAML reads, takes 1e-3 for text; DVC's YAML 1.2 takes it for a number.
    assert make_params({"train.lr": "1e-3"}).train.lr == 0.001


STEM = {"model.stem": "whiten", "model.pool_at": "start"}
NO_STEM = {"model.stem": "none", "model.pool_at": "end"}
REFUSED = [
    # One key: its name, its value, what is allowed.
    ({"model.layer": 3}, ["model.layer = 3", "did you mean model.layers?"]),
    ({"model.lr": 0.1}, ["model.lr = 0.1", "did you mean train.lr?"]),
    ({"modle.layers": 3}, ["modle", "did you mean model?", "data, model, train, evaluate, plot, tracking"]),
    ({"train.5": 1}, ["train.5 = 1", "lr, momentum"]),
    ({"train.lr": "fast"}, ["train.lr = 'fast'", "a number above 0"]),
    ({"train.lr": float("nan")}, ["train.lr = nan", "a number above 0"]),
    ({"train.epochs": 2.5}, ["train.epochs = 2.5", "a whole number at least 1"]),
    ({"train.flip": "maybe"}, ["train.flip = 'maybe'", "one of none, random, alternating"]),
    ({"train.flip": True}, ["train.flip = True", "one of none, random, alternating"]),
    ({"train.optimizer": "lion"}, ["train.optimizer = 'lion'", "one of sgd, muon, adam, adamw"]),
    ({"train.schedule": "cosine"}, ["train.schedule = 'cosine'", "one of linear, one_cycle, constant"]),
    ({"train.precision": 16}, ["train.precision = 16", "one of auto, float32, bfloat16"]),
    ({"train.norm_bias_lr": 0}, ["train.norm_bias_lr = 0", "a number above 0"]),
    ({"evaluate.mirror": "maybe"}, ["evaluate.mirror = 'maybe'", "true or false"]),
    ({"model.stem": "white"}, ["model.stem = 'white'", "one of none, whiten"]),
    ({"model.pool_at": "middle"}, ["model.pool_at = 'middle'", "one of end, start"]),
    ({"model.norm_momentum": 0}, ["model.norm_momentum = 0", "a number above 0 and at most 1"]),
    ({"model.logit_scale": -1}, ["model.logit_scale = -1", "a number above 0"]),
    ({"train.threads": "many"}, ["train.threads = 'many'", "at least 1 and at most 1024 or auto"]),
    ({"train.batch_size": None}, ["train.batch_size = None", "a whole number at least 2"]),
    ({"model.layers": 99}, ["model.layers = 99", "at least 1 and at most 32"]),
    ({"model.dropout": 1}, ["model.dropout = 1 ", "at least 0 and below 1 or a list"]),
    ({"model.dropout": [0, 1.5, 0]}, ["model.dropout = [0, 1.5, 0]", "at least 0 and below 1 or a list"]),
    ({"model.pool": "mean"}, ["model.pool = 'mean'", "one of max, avg, stride, none"]),
    ({"data.sha256": "6d958b"}, ["data.sha256 = '6d958b'", "64 lowercase hexadecimal digits or null"]),
    ({"model.layers": True}, ["model.layers = True", "at least 1 and at most 32"]),
    ({"model.widths": [8, True]}, ["model.widths = [8, True]", "each item a whole number"]),
    ({"model.dropout": False}, ["model.dropout = False", "a number at least 0"]),
    ({"train.threads": True}, ["train.threads = True", "a whole number at least 1"]),
    ({"train.epochs": 10**400}, ["train.epochs = 1000", "at most 1000000"]),
    # Keys that do not go together.
    ({"data.image_size": 64}, ["data.image_size = 64", "cifar10 images are 32×32"]),
    ({"data.sha256": None}, ["data.sha256 = null", "https://www.cs.toronto.edu", "needs the SHA-256"]),
    ({"data.sources": []}, ["data.sources is empty", "cifar10 needs a URL or a path"]),
    ({"model.kernel_size": 4}, ["model.kernel_size = 4", "padding same needs an odd kernel size"]),
    ({"model.dropout": [0, 0.1], "model.widths": [8, 8, 9]}, ["model.dropout = [0.0, 0.1]", "one share or 3", "model.widths = [8, 8, 9]"]),
    ({"model.norm": "group", "model.widths": [32, 60, 128]}, ["model.widths = [32, 60, 128]", "group", "60 is not a multiple of 8"]),
    # Of one pixel in one channel a group's normalisation leaves nothing.
    ({"model.norm": "group", "model.widths": [8] * 6, "model.pool": "stride"}, ["model.widths = [8, 8", "group", "layer 5", "1×1"]),
    # 31 → 15 → 7 → 3 → 1, pooled before it is normalised.
    (STEM | {"model.norm": "group", "model.widths": [8] * 4, "model.layers": 4}, ["model.widths = [8, 8", "group", "layer 4", "1×1"]),
    (STEM | {"data.name": "folder", "data.image_size": 1, "train.translate": 0}, ["model.stem = whiten", "2×2 pixels or more, not 1×1"]),
    ({"model.residual": True, "model.padding": "valid"}, ["model.residual = true", "needs model.padding: same"]),
    ({"model.residual": True, "model.layers": 3}, ["model.residual = true", "use model.layers of 4 or more"]),
    # 32 → 30 → 15 → 13 → 6 → 4 → 2: nothing is left for a fourth 3×3 kernel.
    (NOTEBOOK | {"model.layers": 4, "model.widths": [8] * 4, "model.dropout": 0}, ["model.layers = 4", "layer 4", "2×2", "3×3 kernel"]),
    # 32 → 16 → 8 → 4 → 2 → 1: nothing is left for a sixth pooling.
    (NO_STEM | {"model.layers": 6, "model.widths": [8] * 6}, ["model.layers = 6", "the max-pooling after layer 6", "1×1 to nothing"]),
    # The stem costs a pixel, and with it a pooling: 31 → 15 → 7 → 3 → 1.
    (STEM | {"model.layers": 5, "model.widths": [8] * 5}, ["model.layers = 5", "the max-pooling after layer 5", "1×1 to nothing"]),
    # 7 → 3 → 1
    ({"train.translate": 32}, ["train.translate = 32", "below data.image_size = 32"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "fragments"), REFUSED, ids=lambda v: ",".join(v) if isinstance(v, dict) else "")
def test_refuses_in_one_sentence(make_params: Make, changes: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_params(changes)
    message = str(caught.value)
    assert "params.yaml: " in message
    assert "\n" not in message
    assert [f for f in fragments if f not in message] == [], message


@pytest.mark.parametrize(
    "changes",
    [
        {"data.sources": ["https://me:hunter2@example.org/a.tar.gz"]},
        {"data.sources": ["a.zip", "https://me:hun@ter2@example.org/a.tar.gz"], "data.name": "digits"},
        {"data.sources": "https://me:hunter2@example.org/a.tar.gz"},
        {"data.sources": ["https://me:hunter2@example.org/" + "a" * 500, 5]},
        {"data.name": "https://me:hunter2@example.org/a.tar.gz"},
        {"data.https://me:hunter2@localhost/": 1},
    ],
)
def test_password_is_refused_and_not_told(make_params: Make, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        make_params(changes)
    assert "data." in str(caught.value)
    assert "ter2" not in str(caught.value)
    if isinstance(changes.get("data.sources"), list) and 5 not in changes["data.sources"]:
        assert "data.sources holds" in str(caught.value)
        assert "~/.netrc" in str(caught.value)


def test_missing_key_is_named_with_what_it_must_be(make_params: Make, content: dict[str, Any]) -> None:
    del content["train"]["lr"]
    with pytest.raises(UserError, match=r"params\.yaml: train\.lr is missing; it must be a number above 0 and at most 1000000\.0$"):
        make_params()


def test_missing_section_is_named_with_its_keys(make_params: Make, content: dict[str, Any]) -> None:
    del content["evaluate"]
    with pytest.raises(
        UserError, match=r"evaluate is missing; it must be a section with the keys batch_size, calibration_bins, mirror, shifts$"
    ):
        make_params()


def test_every_fault_is_told_at_once(make_params: Make) -> None:
    with pytest.raises(UserError) as caught:
        make_params({"model.layer": 3, "train.lr": "fast", "model.dropout": "high"})
    lines = str(caught.value).splitlines()
    assert sorted(line.split(": ")[1].split(" = ")[0] for line in lines) == ["model.dropout", "train.lr", "unknown key model.layer"]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("model:\n  layers: 6\n layer: 3\n", "is not valid YAML in line 3"),
        ("model: {layers: 2024-99-01}\n", "is not valid YAML"),
        ("model: \x07\n", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        ("- 1\n", "must hold the sections data, model, train"),
        ("", "must hold the sections data, model, train"),
        (None, "cannot be read: No such file"),
    ],
)
def test_unreadable_file_is_refused_in_one_sentence(tmp_path: Path, text: str | bytes | None, fragment: str) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as caught:
        load_params(path)
    assert fragment in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", [None, "model"])
def test_key_that_is_no_text_is_refused(make_params: Make, content: dict[Any, Any], section: str | None) -> None:
    (content[section] if section else content)[5] = 3
    with pytest.raises(UserError, match=r"^\S+params\.yaml: .*\b5\b"):
        make_params()


@pytest.mark.parametrize(
    ("layers", "stages"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [1, 1, 2]), (5, [1, 2, 2]), (6, [2, 2, 2]), (9, [3, 3, 3])]
)
def test_layers_are_spread_over_the_stages(content: dict[str, Any], layers: int, stages: list[int]) -> None:
    assert ModelParams(**content["model"] | {"layers": layers}).stages == stages


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cifarlab.params import load_params; assert load_params().model.layers > 0; "
        "print(sorted({'torch', 'mlflow', 'dvc', 'pandas'} & set(sys.modules)))"
    )
    done = in_subprocess(["-c", code], REPO)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_check_refuses_a_bad_file_quickly_and_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((REPO / "params.yaml").read_text("utf-8").replace("layers: 6", "layers: 99"), "utf-8")
    started = time.perf_counter()
    done = in_subprocess(["-m", "cifarlab", "check"], tmp_path)
    assert time.perf_counter() - started < 3
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "error: params.yaml: model.layers = 99 is refused; it must be a whole number at least 1 and at most 32"
    ]
    assert done.stdout == ""


def test_check_accepts_the_committed_file() -> None:
    done = in_subprocess(["-m", "cifarlab", "check"], REPO)
    assert (done.returncode, done.stderr) == (0, "")


# Variants


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_of_a_variant_are_what_dvc_makes_its_parameters_of(make_params: Make, tmp_path: Path, variant: str) -> None:
    from dvc.utils.hydra import apply_overrides

    done = in_subprocess(["-m", "cifarlab", "options", variant], REPO)
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.split()  # as the shell does that `make` hands them to: no quotes
    assert set(words[::2]) == {"-S"}
    shutil.copy(REPO / "params.yaml", tmp_path / "changed.yaml")
    apply_overrides(tmp_path / "changed.yaml", words[1::2])
    assert load_params(tmp_path / "changed.yaml") == make_params(VARIANTS[variant])
    assert len(words) == 2 * len(VARIANTS[variant])


def test_options_of_the_notebook_in_full_and_in_order() -> None:
    words = in_subprocess(["-m", "cifarlab", "options", "notebook"], REPO).stdout.split()
    assert [word.split("=")[0] for word in words[1::2]] == list(NOTEBOOK)
    assert {"model.widths=[64,128,256]", "model.dropout=[0,0.1,0]", "model.stem=none", "train.lr=0.001"} < set(words)


def test_the_notebook_trains_plainly(make_params: Make) -> None:
    train = make_params(NOTEBOOK).train
    assert (train.optimizer, train.lr, train.batch_size, train.epochs, train.schedule) == ("adam", 0.001, 32, 8, "constant")
    assert (train.weight_decay, train.norm_bias_lr, train.label_smoothing, train.loss) == (0, 1, 0, "cross_entropy")
    assert (train.flip, train.translate) == ("none", 0)


def test_an_unknown_variant_is_refused_in_one_sentence() -> None:
    done = in_subprocess(["-m", "cifarlab", "options", "note"], REPO)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"error: variants.yaml has no note; it has {', '.join(VARIANTS)}"]


def test_every_variant_is_a_target_of_make() -> None:
    targets = re.findall(r"^([a-z ]+): setup.*\n\t.*cifarlab options .*dvc exp run", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert [target.split() for target in targets] == [list(VARIANTS)]

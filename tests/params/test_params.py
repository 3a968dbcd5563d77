"""params.yaml is validated as a whole, and every mistake is reported in one sentence."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import parse_yaml as parse_dvc

from cifarlab import pipeline
from cifarlab.errors import UserError
from cifarlab.params.geometry import ModelParams
from cifarlab.params.load import changed, load_params, parse_yaml, read_yaml
from cifarlab.params.sections import Params
from tests.conftest import NOTEBOOK, REPO, VARIANTS

Make = Callable[..., Params]


def in_subprocess(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(REPO / "src")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=env,
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )


WORDS = """010 0o17 0x1F -0x1F 0b11 1_000 0_1 08 00 -0 +1 1e3 1e-5 12e03 1.5E-3 1. .5 +.5 0.0 1_0.5
.inf -.inf .NaN ~ Null null no yes on off y true True TRUE false 1:30 190:20:30.15 _1 0o8 0x 0o _"""


@pytest.mark.parametrize("word", WORDS.split())
def test_a_word_without_quotes_means_what_it_means_to_dvc(tmp_path: Path, word: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"a: {word}\nb: [{word}]")
    expected = parse_dvc(path.read_text(), path)
    for found in (read_yaml(path, ""), parse_yaml(path.read_text())):
        assert repr(found) == repr(expected)  # 1, 1.0 and True are equal, nan and nan are not


def test_committed_parameters_are_valid_and_loaded_unchanged() -> None:
    content = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
    assert load_params(REPO / "params.yaml").flat() == {
        f"{s}.{key}": value for s, keys in content.items() for key, value in keys.items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        *VARIANTS.values(),
        {"data.name": "digits", "data.sources": [], "data.sha256": None},
        {
            "data.name": "folder",
            "data.sources": ["photos.zip"],
            "data.sha256": None,
            "data.image_size": 64,
        },
        {"data.sources": ["file:///data/cifar.tar.gz"], "data.sha256": None},
        {"model.residual": True, "model.layers": 4},
        {"model.norm": "group", "model.widths": [8, 16]},
        {"model.norm": "group", "model.widths": [8, 8, 8, 8, 16, 16], "model.pool": "stride"},
        {
            "model.norm": "group",
            "model.widths": [8, 8, 8, 16, 16],
            "model.layers": 4,
            "model.pool_at": "start",
        },
        {
            "model.stem": "none",
            "model.pool_at": "end",
            "model.norm_momentum": 1,
            "model.logit_scale": 1,
        },
        {"model.kernel_size": 4, "model.padding": "valid", "model.layers": 3},
        {"model.dropout": [0, 0.1, 0.999], "model.layers": 1},
        {"model.layers": 32, "model.kernel_size": 15, "model.head": [1] * 8},
        {"model.stem": "none", "model.widths": [8] * 5, "model.layers": 5},
        {"model.global_pool": "none"},
        {"model.norm_scale": True, "train.optimizer": "adamw"},
        {
            "train.flip": "random",
            "train.precision": "bfloat16",
            "train.norm_bias_lr": 0.5,
            "evaluate.views": 6,
        },
        {"train.translate": 31, "train.cutmix": 1, "train.seed": 2**31 - 1, "train.threads": 1024},
    ],
)
def test_valid_changes_are_accepted(make_params: Make, changes: dict[str, Any]) -> None:
    flat = make_params(changes).flat()
    assert {key: flat[key] for key in changes} == changes


def test_off_is_a_word_with_and_without_quotes(tmp_path: Path) -> None:
    text = (REPO / "params.yaml").read_text("utf-8")
    for off in ("off", "'off'"):
        (tmp_path / "params.yaml").write_text(text.replace("graph: auto", f"graph: {off}"), "utf-8")
        assert load_params(tmp_path / "params.yaml").train.graph == "off"


def test_scientific_notation_without_a_point_is_a_number(make_params: Make) -> None:
    # 1e-3 is text in YAML 1.1, which PyYAML reads, and a number in YAML 1.2, which DVC reads.
    assert make_params({"train.lr": "1e-3"}).train.lr == 0.001


STEM = {"model.stem": "whiten", "model.pool_at": "start"}
NO_STEM = {"model.stem": "none", "model.pool_at": "end"}
REFUSED = [
    # Mistakes in one key: the message has its name, its value, and what is allowed.
    ({"model.layer": 3}, ["model.layer = 3", "did you mean model.layers?"]),
    ({"model.lr": 0.1}, ["model.lr = 0.1", "did you mean train.lr?"]),
    ({"modle.layers": 3}, ["unknown key modle", "did you mean model?"]),
    ({"train.5": 1}, ["train.5 = 1", "did you mean train."]),
    ({"train.lr": "fast"}, ["train.lr = 'fast'", "input should be a valid number"]),
    ({"train.lr": float("nan")}, ["train.lr = nan", "input should be a finite number"]),
    ({"train.epochs": 2.5}, ["train.epochs = 2.5", "input should be a valid integer"]),
    (
        {"train.flip": "maybe"},
        ["train.flip = 'maybe'", "input should be 'none', 'random' or 'alternating'"],
    ),
    (
        {"train.flip": True},
        ["train.flip = True", "input should be 'none', 'random' or 'alternating'"],
    ),
    (
        {"train.optimizer": "lion"},
        ["train.optimizer = 'lion'", "input should be 'sgd', 'muon', 'adam' or 'adamw'"],
    ),
    (
        {"train.schedule": "cosine"},
        ["train.schedule = 'cosine'", "input should be 'linear', 'one_cycle' or 'constant'"],
    ),
    (
        {"train.precision": 16},
        ["train.precision = 16", "input should be 'auto', 'float32' or 'bfloat16'"],
    ),
    ({"train.norm_bias_lr": 0}, ["train.norm_bias_lr = 0", "greater than 0"]),
    (
        {"evaluate.views": 3},
        ["evaluate.views = 3", "input should be 1, 2 or 6"],
    ),
    ({"model.stem": "white"}, ["model.stem = 'white'", "input should be 'none' or 'whiten'"]),
    ({"model.pool_at": "middle"}, ["model.pool_at = 'middle'", "input should be 'end' or 'start'"]),
    ({"model.norm_momentum": 0}, ["model.norm_momentum = 0", "greater than 0"]),
    ({"model.logit_scale": -1}, ["model.logit_scale = -1", "greater than 0"]),
    ({"train.threads": "many"}, ["train.threads = 'many'", "a valid integer or 'auto'"]),
    ({"train.batch_size": None}, ["train.batch_size = None", "input should be a valid integer"]),
    ({"model.layers": 99}, ["model.layers = 99", "less than or equal to 32"]),
    ({"model.dropout": 1}, ["model.dropout = 1 ", "less than 1 or a valid list"]),
    (
        {"model.dropout": [0, 1.5, 0]},
        ["model.dropout = [0, 1.5, 0]", "a valid number or less than 1"],
    ),
    (
        {"model.pool": "mean"},
        ["model.pool = 'mean'", "input should be 'max', 'avg', 'stride' or 'none'"],
    ),
    ({"data.sha256": "6d958b"}, ["data.sha256 = '6d958b'", "[0-9a-f]{64}"]),
    ({"model.layers": True}, ["model.layers = True", "a valid integer"]),
    ({"model.widths": [8, True]}, ["model.widths = [8, True]", "a valid integer"]),
    ({"model.dropout": False}, ["model.dropout = False", "a valid number"]),
    ({"train.threads": True}, ["train.threads = True", "a valid integer or 'auto'"]),
    ({"train.epochs": "3"}, ["train.epochs = '3'", "a valid integer"]),
    ({"train.epochs": 10**400}, ["train.epochs = 1000", "less than or equal to 1000000"]),
    # Keys that do not fit together: the message has one of them and what it needs.
    ({"data.image_size": 64}, ["data.image_size = 64", "cifar10 images are 32×32"]),
    (
        {"data.sha256": None},
        ["data.sha256 = null", "https://www.cs.toronto.edu", "needs the SHA-256"],
    ),
    ({"data.sources": []}, ["data.sources is empty", "cifar10 needs a URL or a path"]),
    ({"model.kernel_size": 4}, ["model.kernel_size = 4", "padding same needs an odd one"]),
    (
        {"model.dropout": [0, 0.1], "model.widths": [8, 8, 9]},
        ["model.dropout = [0.0, 0.1]", "one share or 3", "model.widths = [8, 8, 9]"],
    ),
    (
        {"model.norm": "group", "model.widths": [32, 60, 128]},
        ["model.widths = [32, 60, 128]", "group", "multiples of 8, not 60"],
    ),
    # Normalising a single value always gives zero.
    (
        STEM
        | {"model.norm": "group", "model.widths": [8] * 6, "model.pool": "stride"}
        | {"model.layers": 6},
        ["model.widths = [8, 8", "group", "layer 5", "1×1"],
    ),
    # 31 → 15 → 7 → 3 → 1 pixels, because images are pooled before the normalisation.
    (
        STEM | {"model.norm": "group", "model.widths": [8] * 4, "model.layers": 4},
        ["model.widths = [8, 8", "group", "layer 4", "1×1"],
    ),
    (
        STEM | {"data.name": "folder", "data.image_size": 1, "train.translate": 0},
        ["model.stem = whiten", "2×2 pixels, not 1×1"],
    ),
    (
        {"model.residual": True, "model.padding": "valid"},
        ["model.residual = true", "needs model.padding: same"],
    ),
    (
        {"model.residual": True, "model.layers": 3},
        ["model.residual = true", "use model.layers of 4 or more"],
    ),
    # 32 → 30 → 15 → 13 → 6 → 4 → 2 pixels: too few for a fourth 3×3 kernel.
    (
        NOTEBOOK | {"model.layers": 4, "model.widths": [8] * 4, "model.dropout": 0},
        ["model.layers = 4", "layer 4", "2×2", "3×3 kernel"],
    ),
    # 32 → 16 → 8 → 4 → 2 → 1 pixels: too few for a sixth pooling.
    (
        NO_STEM | {"model.layers": 6, "model.widths": [8] * 6},
        ["model.layers = 6", "the max-pooling after layer 6", "1×1 to nothing"],
    ),
    # The stem takes one pixel, so only four poolings fit: 31 → 15 → 7 → 3 → 1.
    (
        STEM | {"model.layers": 5, "model.widths": [8] * 5},
        ["model.layers = 5", "the max-pooling after layer 5", "1×1 to nothing"],
    ),
    ({"train.translate": 32}, ["train.translate = 32", "below data.image_size = 32"]),
]


@pytest.mark.parametrize(
    ("changes", "fragments"), REFUSED, ids=lambda v: ",".join(v) if isinstance(v, dict) else ""
)
def test_a_mistake_is_refused_in_one_sentence(
    make_params: Make, changes: dict[str, Any], fragments: list[str]
) -> None:
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
        {
            "data.sources": ["a.zip", "https://me:hun@ter2@example.org/a.tar.gz"],
            "data.name": "digits",
        },
        {"data.sources": "https://me:hunter2@example.org/a.tar.gz"},
        {"data.sources": ["https://me:hunter2@example.org/" + "a" * 500, 5]},
        {"data.name": "https://me:hunter2@example.org/a.tar.gz"},
        {"data.https://me:hunter2@localhost/": 1},
    ],
)
def test_password_is_refused_and_never_shown(make_params: Make, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        make_params(changes)
    assert "data." in str(caught.value)
    assert "ter2" not in str(caught.value)
    if isinstance(changes.get("data.sources"), list) and 5 not in changes["data.sources"]:
        assert "data.sources holds" in str(caught.value)
        assert "~/.netrc" in str(caught.value)


@pytest.mark.parametrize("key", ["train.lr", "model.dropout", "evaluate"])
def test_missing_key_or_section_is_named(
    make_params: Make, content: dict[str, Any], key: str
) -> None:
    section, _, name = key.partition(".")
    if name:
        del content[section][name]
    else:
        del content[section]
    with pytest.raises(UserError) as caught:
        make_params()
    assert str(caught.value).endswith(
        f"params.yaml: {key} is missing; add it, because no parameter has a default value"
    )


@pytest.mark.parametrize("value", [None, 5, "high", [1]])
def test_section_that_is_not_a_section_is_refused(
    make_params: Make, content: dict[str, Any], value: Any
) -> None:
    content["model"] = value
    with pytest.raises(UserError, match=r"params\.yaml: model = .* should be a valid dictionary$"):
        make_params()


def test_a_long_value_is_shortened_in_the_message(make_params: Make) -> None:
    with pytest.raises(UserError) as caught:
        make_params({"model.pool": "x" * 5000})
    assert "model.pool = 'xxx" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_changes_are_validated_like_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    assert changed({"model.layers": 3}).model.layers == 3
    with pytest.raises(UserError, match=r"^model\.layers = 99 is refused: input should be less"):
        changed({"model.layers": 99})
    with pytest.raises(UserError, match=r"^unknown key modle = .* did you mean model\?$"):
        changed({"modle.layers": 3})


def test_all_mistakes_are_reported_at_once(make_params: Make) -> None:
    with pytest.raises(UserError) as caught:
        make_params({"model.layer": 3, "train.lr": "fast", "model.dropout": "high"})
    lines = str(caught.value).splitlines()
    assert sorted(line.split(": ")[1].split(" = ")[0] for line in lines) == [
        "model.dropout",
        "train.lr",
        "unknown key model.layer",
    ]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("model:\n  layers: 6\n layer: 3\n", "is not valid YAML in line 3"),
        ("model: \x07\n", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        ("- 1\n", "must hold the sections data, model, train"),
        ("", "must hold the sections data, model, train"),
        (None, "cannot be read: No such file"),
    ],
)
def test_unreadable_file_is_refused_in_one_sentence(
    tmp_path: Path, text: str | bytes | None, fragment: str
) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as caught:
        load_params(path)
    assert fragment in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", [None, "model"])
def test_key_that_is_not_text_is_refused(
    make_params: Make, content: dict[Any, Any], section: str | None
) -> None:
    (content[section] if section else content)[5] = 3
    with pytest.raises(UserError, match=r"^\S+params\.yaml: .*\b5\b"):
        make_params()


@pytest.mark.parametrize(
    ("layers", "stages"),
    [
        (1, [1]),
        (2, [1, 1]),
        (3, [1, 1, 1]),
        (4, [1, 1, 2]),
        (5, [1, 2, 2]),
        (6, [2, 2, 2]),
        (9, [3, 3, 3]),
    ],
)
def test_layers_are_distributed_over_the_stages(
    content: dict[str, Any], layers: int, stages: list[int]
) -> None:
    assert ModelParams(**content["model"] | {"layers": layers}).stages == stages


def test_loading_parameters_imports_no_large_package() -> None:
    code = (
        "import sys; from cifarlab.params.load import load_params; load_params(); "
        "print(sorted({'torch', 'mlflow', 'dvc', 'pandas'} & set(sys.modules)))"
    )
    done = in_subprocess(["-c", code], REPO)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_check_command_refuses_a_wrong_value_in_one_sentence(tmp_path: Path) -> None:
    text = (REPO / "params.yaml").read_text("utf-8")
    (tmp_path / "params.yaml").write_text(re.sub(r"layers: \d+", "layers: 99", text), "utf-8")
    done = in_subprocess(["-m", "cifarlab.cli", "check"], tmp_path)
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "error: params.yaml: model.layers = 99 is refused: input should be less than or equal to 32"
    ]
    assert done.stdout == ""


def test_the_check_command_accepts_the_committed_file() -> None:
    done = in_subprocess(["-m", "cifarlab.cli", "check"], REPO)
    assert (done.returncode, done.stderr) == (0, "")


# Variants


@pytest.mark.parametrize("variant", VARIANTS)
def test_dvc_makes_the_same_parameters_from_the_options_of_a_variant(
    make_params: Make, tmp_path: Path, variant: str
) -> None:
    from dvc.utils.hydra import apply_overrides

    options = pipeline.set_options(VARIANTS[variant])
    assert set(options[::2]) == {"-S"}
    assert [option.split("=")[0] for option in options[1::2]] == list(VARIANTS[variant])
    shutil.copy(REPO / "params.yaml", tmp_path / "changed.yaml")
    apply_overrides(tmp_path / "changed.yaml", options[1::2])
    assert load_params(tmp_path / "changed.yaml") == make_params(VARIANTS[variant])


def test_options_are_written_without_spaces() -> None:
    options = pipeline.set_options(NOTEBOOK)
    expected = {"model.widths=[64,128,256]", "model.dropout=[0,0.1,0]", "train.lr=0.001"}
    assert expected < set(options)


def test_the_notebook_variant_has_the_settings_of_the_notebook(make_params: Make) -> None:
    train = make_params(NOTEBOOK).train
    assert (train.optimizer, train.lr, train.batch_size) == ("adam", 0.001, 32)
    assert (train.epochs, train.schedule) == (8, "constant")
    assert (train.weight_decay, train.norm_bias_lr, train.label_smoothing) == (0, 1, 0)
    assert (train.loss, train.flip, train.translate) == ("cross_entropy", "none", 0)


def test_every_variant_is_a_target_of_make() -> None:
    makefile = (REPO / "Makefile").read_text("utf-8")
    rule = r"^([a-z -]+): setup.*\n\tcifarlab variant \$@$"
    (targets,) = re.findall(rule, makefile, re.MULTILINE)
    assert targets.split() == list(VARIANTS)

"""Any content of params.yaml either trains or is refused in one sentence that names the key."""

import copy
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifarlab.cli import main
from cifarlab.data.dataset import Dataset
from cifarlab.errors import UserError
from cifarlab.evaluation.metrics import evaluate
from cifarlab.nn import weights
from cifarlab.nn.network import Network, predict
from cifarlab.params.geometry import ModelParams, Section
from cifarlab.params.load import KEYS, SECTIONS, load_params, read_yaml
from cifarlab.params.sections import Params, TrainParams
from cifarlab.training.batches import Images
from cifarlab.training.loop import fit, prepare
from tests.conftest import REPO
from tests.support.draws import DRAWS, examples

COMMITTED = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
# A training step with these parameters takes milliseconds.
SMALL = {
    "data": {"name": "folder", "sources": ["a.zip"], "sha256": None, "image_size": 8},
    "model": {"layers": 2, "widths": [8, 16]},
    "train": {
        "epochs": 1,
        "batch_size": 2,
        "translate": 2,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    },
}
NUMBERS = [*range(-2, 10), 64, 10**6, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**400]
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [
            "",
            " ",
            "\0",
            "\n",
            "\x1b[31m",
            "-",
            "~",
            "null",
            "1e-3",
            "1e400",
            "nan",
            "٣",
            "0x10",
            "1_0",
            "é" * 300,
        ]
    )
    | st.dates()
    | st.binary(max_size=3)
)
NAMES = st.text(max_size=12) | st.sampled_from(
    ["a.b", "model.layers", "train.", ".", "\n", "\x1b[31m", "é" * 300]
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=9)
        | st.dictionaries(NAMES | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=9,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn") / "params.yaml"


def small() -> dict[Any, Any]:
    content = copy.deepcopy(COMMITTED)
    for section, values in SMALL.items():
        content[section] |= values
    return content


def loaded(path: Path, content: Any) -> Params | list[str]:
    """Write and load parameters; return them, or the mistakes as short readable lines."""
    path.write_text(yaml.dump(content, Dumper=yaml.CSafeDumper, allow_unicode=True), "utf-8")
    try:
        return load_params(path)
    except UserError as error:
        faults = str(error).split("\n")
        for fault in faults:
            assert fault.startswith(f"{path}")
            assert fault.isprintable(), fault
            assert len(fault) < len(str(path)) + 700, fault
        return faults


class OneEpochIsEnough(Exception):
    """Ends a training after its first epoch."""


def stop(*_: Any) -> None:
    """End the training."""
    raise OneEpochIsEnough


def train_a_step(params: Params, folder: Path) -> str:
    """Train a network for an epoch of a few images, save it, load it again, and evaluate it."""
    torch.manual_seed(0)
    size, classes = params.data.image_size, ["a", "b", "c"]
    images = Images(
        torch.randint(256, (5, size, size, 3), dtype=torch.uint8), torch.tensor([0, 1, 2, 0, 1])
    )
    network = Network(params.model, size, classes)
    network.measure(images.images)
    try:
        fit(network, params.train, images, images if params.data.validation else None, stop)
    except OneEpochIsEnough:
        pass
    except UserError as error:
        if "diverged" in str(error) and "train.lr" in str(error):
            return "diverged"
        raise
    weights.save(network, folder / "network.safetensors")
    again = weights.load(folder / "network.safetensors")
    logits = predict(again, images.images, params.evaluate.batch_size)
    assert all(
        torch.equal(again.state_dict()[name], tensor)
        for name, tensor in network.state_dict().items()
    )
    assert again.params == params.model
    probabilities = logits.double().softmax(1).numpy()
    try:
        metrics, _ = evaluate(
            probabilities, images.labels.numpy(), classes, params.evaluate.calibration_bins
        )
    except UserError as error:
        if "overflows" in str(error) and "model.init_gain" in str(error):
            return "diverged"
        raise
    assert np.isfinite([metrics["loss"], metrics["calibration_error"]]).all()
    return "trained"


@examples(40, 500)
def test_any_value_of_a_key_trains_or_is_refused_with_the_name_of_the_key(
    path: Path, examples: int
) -> None:
    @given(st.sampled_from(KEYS), JUNK)
    @settings(DRAWS, max_examples=examples)
    def check(key: str, value: Any) -> None:
        section, name = key.split(".")
        content = small()
        content[section][name] = value
        params = loaded(path, content)
        if isinstance(params, Params):
            train_a_step(params, path.parent)
        else:
            assert len(params) == 1
            assert key in params[0], params

    check()


def plausible(name: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Draw values that the schema of a key allows, with small sizes so that a step is fast."""
    if "anyOf" in schema:
        return st.one_of([plausible(name, alternative) for alternative in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from([value for value in schema["enum"] if value != "cuda"])
    if "const" in schema:
        return st.just(schema["const"])
    if schema["type"] == "boolean":
        return st.booleans()
    if schema["type"] == "array":
        longest = 3 if name == "head" else schema.get("maxItems", 4)
        return st.lists(
            plausible(name, schema["items"]), min_size=schema.get("minItems", 0), max_size=longest
        )
    if schema["type"] == "integer":
        most = {
            "layers": 6,
            "kernel_size": 5,
            "epochs": 10**6,
            "batch_size": 9,
            "seed": 2**31 - 1,
            "translate": 9,
            "threads": 2,
            "processes": 1,
        }
        if name in ("widths", "head"):
            return st.sampled_from([8, 16, 24, 1, 5])
        return st.integers(schema["minimum"], most[name])
    low, high = schema.get("minimum", 0), schema.get("maximum", schema.get("exclusiveMaximum"))
    anything = st.floats(
        low,
        high,
        exclude_min="exclusiveMinimum" in schema,
        exclude_max="exclusiveMaximum" in schema,
    )
    return st.sampled_from([0.001, 0.05, 0.5]) | anything


def section(kind: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    properties = kind.model_json_schema()["properties"]
    return st.fixed_dictionaries(
        {name: plausible(name, schema) for name, schema in properties.items()}
    )


@examples(25, 350)
def test_values_that_fit_the_schema_train_or_are_refused_with_their_name(
    path: Path, examples: int
) -> None:
    ends: Counter[str] = Counter()

    @given(
        section(ModelParams),
        section(TrainParams),
        st.sampled_from([32, 24, 16, 8, 2, 1]),
        st.sampled_from([0, 0.1]),
        st.integers(0, 3),
    )
    @settings(DRAWS, max_examples=examples)
    def check(
        model: dict[str, Any], train: dict[str, Any], size: int, validation: float, repaired: int
    ) -> None:
        if repaired:  # most draws: change keys that do not fit together, so that they train
            model["padding"] = "same" if model["residual"] else model["padding"]
            model["kernel_size"] |= model["padding"] == "same"
            model["layers"] = max(model["layers"], (len(model["widths"]) + 1) * model["residual"])
            model["widths"] = (
                [-(-w // 8) * 8 for w in model["widths"]]
                if model["norm"] == "group"
                else model["widths"]
            )
            train["translate"] %= size
            if isinstance(model["dropout"], list):
                model["dropout"] = ([*model["dropout"], 0] * 4)[: len(model["widths"])]
        content = small()
        content |= {"model": model, "train": train}
        content["data"] |= {"image_size": size, "validation": validation}
        params = loaded(path, content)
        if isinstance(params, Params):
            ends[train_a_step(params, path.parent)] += 1
        else:
            assert all(any(key in fault for key in KEYS) for fault in params)
            ends["refused"] += 1

    check()
    assert ends["trained"] > examples / 4, ends  # not all draws are refused


@examples(20, 100)
def test_unknown_keys_and_wrong_sections_are_named(path: Path, examples: int) -> None:
    names = st.sampled_from(KEYS) | NAMES | st.integers() | st.none()

    @given(st.dictionaries(names, JUNK, min_size=1, max_size=3), st.booleans())
    @settings(DRAWS, max_examples=examples)
    def check(junk: dict[Any, Any], nested: bool) -> None:
        content = small()
        if nested:
            content["train"] |= junk
        else:
            content |= junk
        params = loaded(path, content)
        if isinstance(params, Params):
            train_a_step(params, path.parent)
        else:
            named = [k for k in junk if isinstance(k, str) and k.isprintable() and len(k) < 20]
            assert all(any(key in fault for fault in params) for key in named)

    check()


@examples(30, 100)
def test_a_file_with_arbitrary_content_is_refused(path: Path, examples: int) -> None:
    @given(JUNK)
    @settings(DRAWS, max_examples=examples)
    def check(content: Any) -> None:
        faults = loaded(path, content)
        assert not isinstance(faults, Params)
        assert any(section in fault for fault in faults for section in SECTIONS)

    check()


@examples(30, 100)
def test_a_file_that_is_not_yaml_is_refused(path: Path, examples: int) -> None:
    letters = st.sampled_from("model:laers [{&*!|>-?,'\"\\n\t#%@`01xeé")

    @given(st.binary(max_size=60) | st.text(letters, max_size=60))
    @settings(DRAWS, max_examples=examples)
    def check(text: str | bytes) -> None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError) as caught:
            load_params(path)
        assert str(caught.value).isprintable() or "\n" in str(caught.value)

    check()


DEEP = "[" * 5000
LAUGHS = "a0: &a0 [ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
)


@pytest.mark.timeout(60)  # without limits, some of these take minutes
@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param(f"model: {DEEP}", "not valid YAML", id="deep"),
        pytest.param(f"{LAUGHS}model: *a29\n", "line 5: it has over", id="a billion laughs"),
        pytest.param(
            "model: &m {layers: *m}\n", "line 1: it has over", id="a list that holds itself"
        ),
        pytest.param(
            "model: {layers: 0x" + "f" * 5000 + "}\n",
            "model.layers",
            id="a number of thousands of digits",
        ),
        pytest.param(
            "model: {layers: " + "9" * 5000 + "}\n", "not valid YAML", id="thousands of digits"
        ),
        pytest.param('model: {layers: "\\ud800"}\n', "not valid YAML", id="half a character"),
        pytest.param("? [a]\n: 1\n", "not valid YAML", id="a list for a key"),
        pytest.param(f"{MERGES}model: *a9\n", "line 5: it has over 10,000 values", id="merge keys"),
        pytest.param(f"&a [1, {'*a, ' * 3}]\n", "line 1: it has over", id="a file in itself"),
        pytest.param("a: {k: 1}\na: {k: 2}\n", "line 2: the key 'a' stands twice", id="twice"),
        pytest.param(
            "model:\n  layers: 3\n  norm: batch\n  layers: 4\n",
            "line 4: the key 'layers' stands twice",
            id="a key twice in a section",
        ),
        pytest.param("model: {\n\tlayers: 3}\n\t", "not valid YAML in line", id="a tab"),
        pytest.param("model: \0\n", "not valid YAML", id="a zero"),
        pytest.param("# " + "a" * 10**7, "must hold the sections", id="10 MB"),
        pytest.param(f"model: {'[a,' * 9000}", "not valid YAML", id="nested deeply"),
        pytest.param(
            "model: !!python/object/apply:os.system [ls]\n", "not valid YAML", id="a call"
        ),
    ],
)
def test_a_malicious_file_is_refused_in_short_sentences(path: Path, text: str, named: str) -> None:
    path.write_text(text, "utf-8")
    with pytest.raises(UserError) as caught:
        load_params(path)
    faults = str(caught.value).split("\n")
    assert any(named in fault for fault in faults)
    assert max(map(len, faults)) < 1000


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_aliases_merge_keys_and_the_files_of_other_editors_are_read(
    path: Path, start: str, end: str
) -> None:
    lines = ["first: &first {a: 1, b: 2}", "second: {<<: *first, b: 3}", "third: [*first, *first]"]
    path.write_bytes((start + end.join(lines) + end).encode())
    first = {"a": 1, "b": 2}
    read = read_yaml(path, "")
    assert read == {"first": first, "second": {"a": 1, "b": 3}, "third": [first, first]}


def test_a_merge_key_may_be_merged_again(path: Path) -> None:
    path.write_text("a: &a {x: 1}\nb: {c: &c {<<: *a, x: 2}}\nd: {<<: *c, y: 3}\n", "utf-8")
    inner = {"x": 2}
    assert read_yaml(path, "") == {"a": {"x": 1}, "b": {"c": inner}, "d": inner | {"y": 3}}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "params.yaml"
    make(path)
    with pytest.raises(UserError, match=r"^\S+params.yaml cannot be read: it is not a file; run "):
        load_params(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", [["variant", "tiny"], ["study", "demo"], ["search", "demo"]])
def test_variants_and_questions_are_read_like_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPO / name, tmp_path)
    (tmp_path / "studies").mkdir()
    for name in ("variants.yaml", "studies/demo.yaml"):
        (tmp_path / name).write_text(f"{MERGES}tiny: *a9\nspace: {{}}\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "is not valid YAML in line 5: it has over 10,000 values" in str(result.exception)


def test_a_network_too_large_for_any_memory_is_refused(path: Path) -> None:
    content = small()
    for changes in (
        {"layers": 32, "widths": [4096]},
        {
            "widths": [4096],
            "layers": 1,
            "kernel_size": 15,
            "head": [4096] * 8,
            "global_pool": "none",
            "pool": "none",
        },
    ):
        content["data"]["image_size"] = 512
        content["model"] |= changes
        faults = loaded(path, content)
        assert not isinstance(faults, Params)
        assert "model.widths = [4096]: " in faults[0]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("src", "stages"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@examples(2, 8)
def test_a_stage_prints_one_sentence_for_each_mistake(checkout: Path, examples: int) -> None:
    @given(st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=4), NAMES)
    @settings(DRAWS, max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    def check(changes: dict[str, Any], unknown: str) -> None:
        content = small()
        for key, value in changes.items():
            section, name = key.split(".")
            content[section][name] = value
        content["train"][f"{unknown}?"] = 1
        faults = loaded(checkout / "params.yaml", content)
        assert isinstance(faults, list)
        done = subprocess.run(
            [sys.executable, "-m", "stages.train"],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        printed = done.stderr.removeprefix("error: ").splitlines()
        assert printed == [fault.replace(f"{checkout}/", "") for fault in faults]

    check()


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_validation_share_that_leaves_no_batch_is_refused(
    make_params: Callable[..., Params], share: float
) -> None:
    """Batch normalisation needs two images in each process."""
    labels = np.array([0, 1, 1])  # one of each class is left
    images = np.zeros((3, 32, 32, 3), np.uint8)
    both = {"train": images, "test": images}, {"train": labels, "test": labels}
    params = make_params({"data.validation": share, "train.processes": 2})
    with pytest.raises(UserError, match=r"data\.validation = .* leaves 2 images to train on"):
        prepare(params, Dataset(*both, ["a", "b"], "few"), torch.device("cpu"))

"""params.yaml as typed, validated objects. Imports nothing heavy: a wrong value is refused at once."""

import difflib
import reprlib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from cifarlab import UserError, first_line, without_secrets
from cifarlab.architecture import ModelParams, Positive, Section, Share

Count = Annotated[int, Field(ge=1, le=1_000_000)]


def is_remote(source: str) -> bool:
    """Tell a download from a local file or folder."""
    return source.lower().startswith(("http://", "https://"))


class DataParams(Section):
    """Where the images come from."""

    name: Literal["cifar10", "folder", "digits"]
    sources: list[str]
    """URLs (https, http, file) or paths, tried in turn. Relative paths start at the main checkout."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="64 lowercase hexadecimal digits")] | None
    """Checksum of the archive, required for a download."""
    image_size: Annotated[int, Field(ge=1, le=512)]
    """Height and width in pixels."""
    validation: Share
    """Share of each class's training images held out."""

    @model_validator(mode="after")
    def _consistent(self) -> "DataParams":
        if self.name != "folder" and self.image_size != 32:
            raise ValueError(f"data.image_size = {self.image_size}: {self.name} images are 32×32, only folder images are resized")
        if any(source != without_secrets(source) for source in self.sources):
            raise ValueError("data.sources holds a login; it belongs into ~/.netrc: machine HOST login NAME password PASSWORD")
        if self.name != "digits":
            if not self.sources:
                raise ValueError(f"data.sources is empty: {self.name} needs a URL or a path")
            remote = next(filter(is_remote, self.sources), None)
            if remote and self.sha256 is None:
                raise ValueError(f"data.sha256 = null: the download {remote} needs the SHA-256 of the archive")
        return self


class TrainParams(Section):
    """How the network is trained."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    epochs: Count
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)]
    optimizer: Literal["sgd", "muon", "adam", "adamw"]
    """Stochastic gradient descent with Nesterov momentum, Muon (Jordan 2024), Adam (Kingma & Ba 2014), AdamW (Loshchilov & Hutter 2017)."""
    lr: Positive
    momentum: Share
    """Of sgd; adam and adamw have their own."""
    muon_lr: Positive
    muon_momentum: Share
    weight_decay: Annotated[float, Field(ge=0, le=1e6)]
    norm_bias_lr: Positive
    """Learning rate of the biases of normalisation layers, in multiples of lr (Page 2019; 64 in airbench)."""
    schedule: Literal["linear", "one_cycle", "constant"]
    """Of the learning rates: down to zero, or up and down in one triangle (Smith & Topin 2017), or as they are."""
    loss: Literal["cross_entropy", "quadratic"]
    """quadratic: ½ Σ (softmax(z) - y)² over the classes."""
    label_smoothing: Share
    flip: Literal["none", "random", "alternating"]
    """Mirror left and right: with probability ½, or every image the other way round in the next epoch (Jordan 2024, airbench)."""
    translate: Annotated[int, Field(ge=0)]
    """Pixels, by reflection at the border."""
    cutmix: Annotated[float, Field(ge=0, le=1)]
    """Share of the batches in which each image gets a rectangle of another, and that part of its label (CutMix, Yun et al. 2019)."""
    precision: Literal["auto", "float32", "bfloat16"]
    """Of the arithmetic in training (Micikevicius et al. 2017); weights and the test are float32."""
    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]
    diagnostics: bool
    """Look into each layer after every epoch (`diagnostics.diagnose`) and add it to history.csv."""


class EvaluateParams(Section):
    """How the test set is evaluated."""

    batch_size: Count
    calibration_bins: Count
    mirror: bool
    """Test-time augmentation: also report the accuracy of the mean over each image and its mirror image."""
    shifts: Annotated[int, Field(ge=0, le=16)]
    """Pixels: also report the accuracy on test images shifted by 1, 2, … so many, the mean of the four directions."""


class PlotParams(Section):
    """What the pictures show."""

    dpi: Annotated[int, Field(ge=30, le=600)]
    samples: Annotated[int, Field(ge=1, le=256)]
    mistakes: Annotated[int, Field(ge=1, le=256)]


class TrackingParams(Section):
    """What MLflow gets. Where it goes is MLFLOW_TRACKING_URI's to say, not a parameter's."""

    experiment: Annotated[str, Field(min_length=1)]
    system_metrics: bool
    log_model: bool


class Params(Section):
    """All of params.yaml."""

    data: DataParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    plot: PlotParams
    tracking: TrackingParams

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        plan = list(self.model.plan(self.data.image_size))
        weights = sum(c.in_channels * c.out_channels * self.model.kernel_size**2 for c in plan)
        weights += sum(a * b for a, b in pairwise(self.model.linear(plan[-1])))
        if weights > 10**9:
            widths = f"model.widths = {self.model.widths}"
            raise ValueError(f"{widths}: {weights:,} weights are above a billion; lower model.widths, layers, kernel_size or head")
        for key, pixels in (("train.translate", self.train.translate), ("evaluate.shifts", self.evaluate.shifts)):
            if pixels >= self.data.image_size:
                raise ValueError(f"{key} = {pixels}: must stay below data.image_size = {self.data.image_size}")
        return self

    def flat(self) -> dict[str, Any]:
        """Every parameter under its dotted name, as `dvc params diff` and MLflow show it."""
        return {f"{section}.{key}": value for section, values in self.model_dump().items() for key, value in values.items()}


SECTIONS: dict[str, type[Section]] = Params.__annotations__
KEYS = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring = 3, 10**6  # strings are cut when their passwords are hidden
# JSON schema in words.
KINDS = {"array": "a list", "boolean": "true or false", "integer": "a whole number", "null": "null", "number": "a number", "string": "text"}
LIMITS = {
    "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    "minItems": "of length at least", "maxItems": "of length at most", "minLength": "of length at least",
}  # fmt: skip


def read_yaml(path: Path, hint: str) -> Any:
    """Read a file; UserError where that fails, with the hint where there is none."""
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {hint}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that is none
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or first_line(error)}") from error


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate params.yaml; UserError with a line per fault: key, value, what is allowed, the nearest to an unknown key."""
    content = read_yaml(path, f"run from the top of the checkout, `git checkout {path}` brings it back")
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold the sections {', '.join(SECTIONS)}; it holds {_shown(content)}")
    return _validated(content, f"{path}: ")


def changed(changes: dict[str, Any]) -> Params:
    """Return params.yaml with changes by full key, {"model.layers": 3}, as `dvc exp run -S` makes them; UserError as `load_params`."""
    content = load_params().model_dump()
    for key, value in changes.items():
        section, _, field = key.partition(".")
        content.setdefault(section, {})[field] = value
    return _validated(content, "")


def _validated(content: dict[str, Any], prefix: str) -> Params:
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        # A union reports one fault per member: one sentence per key is enough.
        faults = {_key(fault["loc"]) or fault["msg"]: _sentence(fault, content) for fault in error.errors()}
        raise UserError("\n".join(prefix + sentence for sentence in faults.values())) from error


def _shown(value: Any) -> str:
    try:
        text = without_secrets(SHORT.repr(value))
    except ValueError:  # Python does not write a hexadecimal number of thousands of digits
        return "a number too long to show"
    return text if len(text) <= 200 else text[:199] + "…"


def _key(loc: tuple[int | str, ...]) -> str:
    key = without_secrets(".".join(str(part) for part in loc[:2]))
    return key if key.isprintable() and len(key) < 80 else _shown(key)


def _sentence(fault: Any, content: dict[str, Any]) -> str:
    if fault["type"] == "value_error":  # ours, a whole sentence already
        return str(fault["ctx"]["error"])
    if fault["type"] == "invalid_key":
        return f"the key {_shown(fault['input'])} is refused; a key is text"
    key, (section, *names) = _key(fault["loc"]), fault["loc"][:2]
    if fault["type"] == "extra_forbidden":
        *above, unknown = fault["loc"]
        of, known = (f"the keys of {section}", SECTIONS[section].model_fields) if above else ("the sections", SECTIONS)
        elsewhere = [k for k in KEYS if k.split(".")[1] == unknown]
        nearest = elsewhere or [".".join([*above, *difflib.get_close_matches(unknown, known, 1, 0)])]
        value = "" if isinstance(fault["input"], dict) else f" = {_shown(fault['input'])}"
        return f"unknown key {key}{value}; did you mean {nearest[0]}? ({of} are {', '.join(known)})"
    if names:
        allowed = _in_words(SECTIONS[section].model_json_schema()["properties"][names[0]])
    else:
        allowed = f"a section with the keys {', '.join(SECTIONS[section].model_fields)}"
    if fault["type"] == "missing":
        return f"{key} is missing; it must be {allowed}"
    return f"{key} = {_shown(content[section][names[0]] if names else content[section])} is refused; it must be {allowed}"


def _in_words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_in_words, schema["anyOf"]))
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "description" in schema:
        return str(schema["description"])
    limits = " and ".join(f"{word} {schema[limit]}" for limit, word in LIMITS.items() if limit in schema)
    items = f", each item {_in_words(schema['items'])}" if "items" in schema else ""
    return schema.get("const") or f"{KINDS[schema['type']]} {limits}".strip() + items

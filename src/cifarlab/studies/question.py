"""The questions in studies/*.yaml."""

import itertools
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from cifarlab.digest import json_digest
from cifarlab.errors import UserError, in_a_sentence
from cifarlab.files import QUESTIONS
from cifarlab.params.load import read_yaml

Parameters = dict[str, Any]
"""Values by dotted name: {"train.lr": 0.1}."""
Choices = Annotated[list[Any], Field(min_length=1)]


def names() -> list[str]:
    """Return the names of all questions: studies and searches."""
    return sorted(path.stem for path in QUESTIONS.glob("*.yaml"))


def slug(text: str) -> str:
    """Return a text as it appears in the name of an experiment: lower case, words joined by -."""
    words = re.sub(r"\.\.+", ".", re.sub(r"[^a-z0-9.]+", "-", text.lower())).strip("-.")
    return words or json_digest(text)[:8]  # no letter that Git and DVC take everywhere


def faults(error: Any) -> str:
    """Return all that pydantic says against a file, on one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())


class Question(BaseModel, extra="forbid"):
    """What a study and a search have in common."""

    question: str
    base: Parameters = {}
    """Changes to params.yaml that all points share."""
    findings: str = ""
    """A person's reading of the results, for the page."""

    @classmethod
    def read(cls, name: str) -> Self:
        """Read studies/NAME.yaml.

        Raises
        ------
        UserError
            There is no such file, or its content is not a question of this kind.
        """
        if name not in names():
            known = ", ".join(names()) or "none"
            raise UserError(f"{QUESTIONS}/ has no {name or 'NAME'}.yaml; NAME can be: {known}")
        path, kind = QUESTIONS / f"{name}.yaml", cls.__name__.lower()
        content = read_yaml(path, "run from the top of the checkout")
        keys = {*content} if isinstance(content, dict) else set()
        other = "search" if "space" in keys else "study" if {"variants", "grid"} & keys else kind
        if other != kind:
            raise UserError(f"{path} is a {other}; `cifarlab {other} {name}` runs it")
        with in_a_sentence(f"{path} is not a {kind}: %s", ValidationError, words=faults):
            return cls.model_validate(content)

    @property
    def shared(self) -> str:
        """The base as a sentence in Markdown: All variants share `train.epochs=4`, …"""
        changes = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in self.base.items())
        return f"All variants share {changes or 'nothing'}; everything else is as in params.yaml."


class Study(Question):
    """Compare variants, each trained with every seed."""

    variants: dict[str, Parameters] = {}
    """The changes of each variant. All variants are compared with the first."""
    grid: dict[str, list[Any]] = {}
    """Instead of variants: the values of each parameter. Every combination is a variant."""
    seeds: Annotated[list[int], Field(min_length=2)]
    """The seeds. `seeds: 5..15` with `stop: decided` stands for seeds 0 to 14 and looks after 5, 10
    and 15 of them."""
    looks: list[int] = []
    """Numbers of seeds. After so many, only variants whose answer is undecided get more."""
    margin: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 1
    """Differences of less than this, in percentage points of accuracy, count as equivalent."""
    answer_by: Literal["test", "validation"] = "test"
    """The accuracy that is compared. To choose between variants, use validation."""
    splits: Literal["same", "own"] = "same"
    """own: every seed draws its own images for validation (data.validation_seed), so that the
    differences between seeds, and with them the intervals, also contain this draw."""
    measures: list[str] = []
    """More columns for the table, by their names in metrics/evaluate.json: calibration_error."""

    @model_validator(mode="before")
    @classmethod
    def _expand_seeds(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("seeds"), str):
            return content
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", content["seeds"])
        first, last = map(int, bounds.groups()) if bounds else (0, 0)
        if not 2 <= first < last or content.get("stop") != "decided":
            raise ValueError("seeds are a list, or like 5..15 together with stop: decided")
        others = {key: value for key, value in content.items() if key != "stop"}
        return others | {"seeds": [*range(last)], "looks": [*range(first, last, first), last]}

    @model_validator(mode="after")
    def _expand_grid_and_check(self) -> Self:
        if self.grid and self.variants:
            raise ValueError("a study has variants or a grid, not both")
        for values in itertools.product(*self.grid.values()) if self.grid else ():
            changes = dict(zip(self.grid, values, strict=True))
            settings = (f"{key.split('.')[-1]} {value}" for key, value in changes.items())
            self.variants[", ".join(settings)] = changes
        if len({slug(name) for name in self.variants}) < max(2, len(self.variants)):
            raise ValueError("a study needs at least two variants, or a grid, with different names")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is listed twice")
        drawn = {"train.seed", "data.validation_seed"} if self.splits == "own" else {"train.seed"}
        if wrong := sorted(drawn & {*self.base}.union(*self.variants.values())):
            raise ValueError(f"{wrong[0]} comes from seeds; leave it out")
        self.looks = self.looks or [len(self.seeds)]
        if self.looks != sorted({*self.looks, len(self.seeds)}) or self.looks[0] < 2:
            raise ValueError("looks are growing numbers of seeds; the last one is all seeds")
        return self

    @property
    def within(self) -> str:
        """The margin in words: 1 point, 0.5 points."""
        return f"{self.margin:g} point{'' if self.margin == 1 else 's'}"


class Range(BaseModel, extra="forbid", allow_inf_nan=False):
    """Numbers from low to high; whole numbers if both are."""

    low: int | float
    high: int | float
    log: bool = False
    """Draw the logarithm of the number uniformly."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 with log: true")
        return self


class Search(Question):
    """Find the best parameters within a limited training time."""

    space: Annotated[dict[str, Choices | Range], Field(min_length=1)]
    """The parameters to choose, each with a list of values or a range."""
    rungs: Annotated[list[PositiveInt], Field(min_length=1)]
    """Growing numbers of epochs: every trial trains for the first of them. The better third is
    trained anew for the next, and so on (successive halving)."""
    seconds: PositiveFloat
    """Longest training time on the last rung; slower trials are dropped."""
    trials: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rungs != sorted(set(self.rungs)):
            raise ValueError("rungs must be growing numbers of epochs")
        if "train.epochs" in {*self.base, *self.space}:
            raise ValueError("train.epochs comes from rungs; leave it out")
        return self

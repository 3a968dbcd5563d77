"""Read and validate params.yaml. Every mistake in it becomes one readable sentence."""

import difflib
import math
import re
import reprlib
from itertools import chain, groupby
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cifarlab.errors import UserError, first_line, refuse_conflict, without_secrets
from cifarlab.params.sections import DEFAULT_FOLDER, Params

SECTIONS = Params.__annotations__
KEYS = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]

MAX_VALUES = 10_000  # far above what anyone writes, and read in a second
TAG = "tag:yaml.org,2002:"
# Shortens long lists and deep nesting. Strings stay whole until their passwords are hidden.
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring = 3, 10**6


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate params.yaml.

    Raises
    ------
    UserError
        The file cannot be read, or values are refused. The message has one line for each refused
        key, with its value and the reason. For an unknown key it names the most similar known key.
    """
    content = read_yaml(path, f"run from the top of the checkout, or `git checkout {path}`")
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold the sections {', '.join(SECTIONS)}")
    return _validated(content, f"{path}: ")


def changed(changes: dict[str, Any]) -> Params:
    """Return the parameters of params.yaml with some values changed, as `dvc exp run -S` does.

    The changes are given by full key: {"model.layers": 3}. Raises UserError like `load_params`.
    """
    content = load_params().model_dump()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if not name and isinstance(value, dict) and value:
            raise UserError(f"{key} is refused: write whole keys, such as {key}.{min(value)}")
        content.setdefault(section, {})[name] = value
    return _validated(content, "")


def data_set(parameters: dict[str, Any]) -> str:
    """Return the name of the data set of some parameters, which are given by full key.

    Of an archive it is its file name without suffixes.
    """
    if parameters["data.name"] in ("cifar10", "digits"):
        return str(parameters["data.name"])
    folder, sources = parameters["data.folder"], parameters["data.sources"]
    name = Path(folder if folder != DEFAULT_FOLDER else sources[0]).name
    return re.sub(r"(?i)(\.tar)?\.(tar|tgz|tbz2?|txz|zip|gz|bz2|xz)$", "", name)


def read_yaml(path: Path, hint: str) -> Any:
    """Return the content of a YAML file.

    Raises
    ------
    UserError
        The file cannot be opened (the message ends with `hint`), it is no ordinary file, or it is
        not valid YAML.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device might never end
            raise UserError(f"{path} cannot be read: it is not a file; {hint}")
        text = path.read_text("utf-8")
        refuse_conflict(path, text)
        return parse_yaml(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {hint}") from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = without_secrets(str(error.problem))
        raise UserError(f"{path} is not valid YAML{line}: {problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: it is not UTF-8
        raise UserError(f"{path} is not valid YAML: {first_line(error)}") from error


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML file as DVC reads it."""
    return yaml.load(text, _Loader)  # noqa: S506, it is a safe loader


# The loader in C, if there is one, is ten times as fast.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader for YAML 1.2, which DVC reads, without what DVC refuses.

    PyYAML reads YAML 1.1: there 010 is eight, no is false, 1:30 is ninety and 1e-3 is text. Of two
    equal keys it silently keeps the last. With aliases (`*name`) and merge keys (`<<`), a value may
    hold itself, or a few lines may stand for billions of values.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def get_single_node(self) -> yaml.Node | None:
        """Return the root of the file, before aliases and merge keys are followed."""
        root: yaml.Node | None = super().get_single_node()
        if root:
            self._count(root, {})
        return root

    def _count(self, node: yaml.Node, counts: dict[yaml.Node, float]) -> float:
        """Return how many values a node holds, those of an alias as often as it is used."""
        if node in counts:
            return counts[node]
        counts[node] = math.inf  # if the node holds itself
        inner, keys = node.value if isinstance(node, yaml.CollectionNode) else [], set()
        if isinstance(node, yaml.MappingNode):
            for key, _ in inner:
                if (name := (key.tag, str(key.value))) in keys:
                    self._refuse(f"the key {_shown(key.value)} stands twice; delete one", key)
                keys.add(name)
            inner = chain.from_iterable(inner)
        counts[node] = 1 + sum(self._count(part, counts) for part in inner)
        if counts[node] > MAX_VALUES:
            self._refuse(f"it has over {MAX_VALUES:,} values, its aliases followed", node)
        return counts[node]

    def _refuse(self, problem: str, node: yaml.Node) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _whole(_: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 0 if text.lstrip("+-")[1:2] in {*"oxb"} else 10)


WORDS = {
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?([0-9][0-9_]*|0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+)",
    "float": r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "null": "~|null|Null|NULL|",
    "merge": "<<",
}
for _kind, _pattern in WORDS.items():
    _Loader.add_implicit_resolver(f"{TAG}{_kind}", re.compile(f"(?:{_pattern})$"), None)
_Loader.add_constructor(f"{TAG}int", _whole)


def _validated(content: dict[str, Any], prefix: str) -> Params:
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        by_key = groupby(error.errors(), key=lambda fault: fault["loc"][:2])
        lines = [prefix + _sentence([*faults], content) for _, faults in by_key]
        raise UserError("\n".join(lines)) from error


def _sentence(faults: list[ErrorDetails], content: Any) -> str:
    """Describe what pydantic says about one key."""
    fault, *_ = faults
    loc, shown = fault["loc"][:2], _shown(fault["input"])
    key = without_secrets(".".join(map(str, loc)))
    key = key if key.isprintable() and len(key) < 80 else _shown(key)
    match fault["type"]:
        case "value_error":  # from the validators of this package: already a whole sentence
            return str(fault["ctx"]["error"])
        case "invalid_key":
            return f"the key {shown} is refused: a key must be text"
        case "missing":
            return f"{key} is missing; add it, because no parameter has a default value"
        case "extra_forbidden":
            same_name = [known for known in KEYS if known.partition(".")[2] == loc[-1]]
            known = KEYS if len(loc) > 1 else SECTIONS
            nearest = same_name or difflib.get_close_matches(key, known, 1, 0)
            return f"unknown key {key} = {shown}; did you mean {nearest[0]}?"
    # One message for each type in a union, and for each kind of wrong item in a list. The end of
    # some names a class.
    messages = [fault["msg"].partition(" or instance of ")[0] for fault in faults]
    text = " or ".join(dict.fromkeys(messages)).replace(" or Input should be ", " or ")
    value = content[loc[0]][loc[1]] if len(loc) > 1 else content[loc[0]]
    return f"{key} = {_shown(value)} is refused: {text[0].lower()}{text[1:]}"


def _shown(value: Any) -> str:
    """Return a value as Python writes it, at most 200 characters and without passwords."""
    try:
        text = without_secrets(SHORT.repr(value))
    except ValueError:  # Python does not write integers of more than 4300 digits
        return "a number too long to show"
    return text if len(text) <= 200 else text[:199] + "…"

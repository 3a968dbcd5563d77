"""`make reference`: write docs/parameters.md from the typed parameters and params.yaml."""

import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from cifarlab.params import geometry, sections
from cifarlab.params.load import SECTIONS

PAGE = Path("docs/parameters.md")
HEAD = """# Parameters

Written by `make reference` from [params.yaml](../params.yaml) and from the types that check it. The
value is that of params.yaml; the code has no defaults. A change runs the stage in the last column
again, and those after it. Change a value in the file, or for one experiment:

    dvc exp run -S model.layers=3 -S 'model.widths=[32,64,128]'
"""


def docstrings(module: ModuleType) -> dict[str, str]:
    """Return the docstring below each field of the classes of a module, by `Class.field`."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in pairwise(node.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=v)):
                    found[f"{node.name}.{name}"] = " ".join(str(v).split())
    return found


def comments(text: str) -> dict[str, str]:
    """Return the comment of each key of params.yaml, by `section.key`.

    A comment stands behind the value or, if it is long, in the line above.
    """
    found, section, above = {}, "", ""
    for line in text.splitlines():
        if top := re.match(r"(\w+):", line):
            section = top[1]
        if key := re.match(r"  (\w+):[^#]*(?:# (.*))?", line):
            found[f"{section}.{key[1]}"] = key[2] or above
        above = line.strip(" #") if line.startswith("  #") else ""
    return found


def allowed(schema: dict[str, Any]) -> str:
    """Say in words which values a JSON schema of pydantic allows."""
    if "anyOf" in schema:
        return " or ".join(map(allowed, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "array":
        least = "one or more, each " if schema.get("minItems") else ""
        return f"list: {least}{allowed(schema['items'])}"
    names = {"boolean": "`true`, `false`", "null": "`null`", "string": "text"}
    if kind in names:
        return "64 hexadecimal digits" if "pattern" in schema else names[kind]
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[word]:,.10g}" for word, sign in words.items() if word in schema]
    return " ".join(["whole number" if kind == "integer" else "number", " and ".join(limits)])


def stage(key: str, stages: dict[str, Any]) -> str:
    """Return the first stage of dvc.yaml that runs again if a parameter changes."""
    for name, content in stages.items():
        names = {key, key.split(".", maxsplit=1)[0]}
        if names & set(content["params"]) or f"${{{key}}}" in content["deps"]:
            return str(name)
    return "none"


def meaning(comment: str, docstring: str, schema: dict[str, Any]) -> str:
    """Return what a parameter means: its docstring, or else its comment in params.yaml.

    A comment that lists the values stands beside the docstring, if it explains some of them.
    """
    explains = " | " in comment and "(" in comment
    explains &= not any(f"{value}: " in docstring for value in schema.get("enum", ()))
    parts = [docstring or (comment if " | " not in comment else "")]
    parts += [f"Values: {comment.replace(' | ', ', ')}"] if explains else []
    words = " ".join(part.rstrip(".") + "." for part in parts if part)
    first = words.partition(":")[0]
    return words if first in schema.get("enum", ()) else words[:1].upper() + words[1:]


def row(key: str, value: object, *words: str) -> str:
    """Return the row of one parameter."""
    shown = yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]
    shown = f"{shown[:24]}…" if len(shown) > 24 else shown
    return f"| `{key}` | `{shown}` | {' | '.join(words)} |"


def page() -> str:
    """Return the text of the page."""
    text = Path("params.yaml").read_text("utf-8")
    content, said = yaml.safe_load(text), comments(text)
    types = docstrings(sections) | docstrings(geometry)
    stages = yaml.safe_load(Path("dvc.yaml").read_text("utf-8"))["stages"]
    parts = [HEAD]
    for name, section in SECTIONS.items():
        parts += [f"## {name}\n", "| key | value | allowed | meaning | runs again |"]
        parts += ["|---|---|---|---|---|"]
        schema = section.model_json_schema()["properties"]
        for field, value in content[name].items():
            docstring = types.get(f"{section.__name__}.{field}", "")
            words = meaning(said[f"{name}.{field}"], docstring, schema[field])
            again = stage(f"{name}.{field}", stages)
            parts.append(row(f"{name}.{field}", value, allowed(schema[field]), words, again))
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(PAGE)

"""Digests of values, and of program code that only change when the code itself does."""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from typing import Any

IGNORED = {"ctx", "kind", "type_comment", "type_params"}


def json_digest(content: Any) -> str:
    """Return the SHA-256 of a value that JSON can hold, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def code_digest(sources: Iterable[str]) -> str:
    """Return 16 hexadecimal digits that stand for the code of some Python files, in their order.

    Comments, docstrings and formatting do not count. Python 3.11 to 3.13 give the same digest.
    """
    return hashlib.sha256("\n".join(map(_code, sources)).encode()).hexdigest()[:16]


@cache  # a stage needs several digests of the same files
def _code(source: str) -> str:
    return _dump(ast.parse(source))


def _dump(node: Any) -> str:
    """Write a part of a syntax tree as text, without what only some versions of Python have."""
    if isinstance(node, list):
        return f"[{','.join(_dump(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return f"{type(node).__name__} {node!a}"  # repr knows other letters in each version
    if isinstance(node, ast.JoinedStr):  # Python 3.12 adds empty texts to some
        node.values = [part for part in node.values if getattr(part, "value", None) != ""]
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in IGNORED]
    parts = [f"{name}={_dump(value)}" for name, value in fields if value is not None]
    return f"{type(node).__name__}({','.join(part for part in parts if not part.endswith('=[]'))})"


def _is_docstring(node: Any) -> bool:
    """Return whether a statement is only a string: a docstring, or the description of a field."""
    constant = node.value if isinstance(node, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)

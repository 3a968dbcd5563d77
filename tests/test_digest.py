"""The digest of code changes with the code, and not with comments and formatting."""

from pathlib import Path

import pytest

from cifarlab.digest import code_digest
from cifarlab.pipeline import stage_code

CODE = '''"""A module."""

from math import sqrt


class Point:
    """A point."""

    x: float = 1.5
    """Pixels from the left."""

    def length(self, y: float, *, scale: int = 2) -> float:
        """Return the distance."""
        # Pythagoras
        return sqrt(self.x**2 + y**2) * scale if self.x else f"{y:.2f}"
'''
SAME = {
    "comment": ("# Pythagoras", "# as Euclid proves it"),
    "no comment": ("        # Pythagoras\n", ""),
    "docstring of the module": ("A module.", "A better module."),
    "docstring of a class": ('    """A point."""\n', ""),
    "docstring of a method": ("Return the distance.", "Return it, in pixels.\n\n        Twice.\n"),
    "docstring of a field": ('    """Pixels from the left."""\n', ""),
    "line breaks": ("self.x**2 + y**2", "\n            self.x ** 2\n            + y**2"),
    "parentheses": ("self.x**2 + y**2", "((self.x**2) + y**2)"),
    "quotes": ('f"{y:.2f}"', "f'{y:.2f}'"),
    "blank lines": ("    x: float", "\n    x: float"),
}
OTHER = {
    "constant": ("**2 +", "**3 +"),
    "type of a constant": ("**2 +", "**2.0 +"),
    "operator": ("+ y", "- y"),
    "name": ("sqrt", "cbrt"),
    "name of an argument": ("y", "z"),
    "default": ("scale: int = 2", "scale: int = 3"),
    "no default": (" = 2", ""),
    "annotation": ("scale: int", "scale: float"),
    "order": ("sqrt(self.x**2 + y**2)", "sqrt(y**2 + self.x**2)"),
    "branch": (' if self.x else f"{y:.2f}"', ""),
    "format": (".2f", ".3f"),
    "None for nothing": ('f"{y:.2f}"', "None"),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_comments_docstrings_and_formatting_do_not_change_the_digest(
    change: tuple[str, str],
) -> None:
    edited = CODE.replace(*change)
    assert edited != CODE
    assert code_digest([edited]) == code_digest([CODE])


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_every_change_of_the_code_changes_the_digest(change: tuple[str, str]) -> None:
    edited = CODE.replace(*change)
    assert edited != CODE
    assert code_digest([edited]) != code_digest([CODE])


def test_different_changes_give_different_digests() -> None:
    assert len({code_digest([CODE.replace(*change)]) for change in OTHER.values()}) == len(OTHER)


@pytest.mark.parametrize(
    ("source", "digest"),
    [
        (CODE, "dd9b54e39d461556"),
        ('d = {**a, "ключ": [], None: b"\\x00"}\ns = f"{d!r:>{w}} {d=} 🙂"\n', "520bb3d259f9a77e"),
        ("async def f(x, /): return -1j, ...\n", "a6db9c8285361c2e"),
    ],
)
def test_the_digest_is_the_same_in_every_version_of_python(source: str, digest: str) -> None:
    """Python 3.11 gave these digests."""
    assert code_digest([source]) == digest


def test_order_and_number_of_files_count() -> None:
    assert (
        len({code_digest(["a", "b"]), code_digest(["b", "a"]), code_digest(["a", "b", "b"])}) == 3
    )


def write(folder: Path, deps: dict[str, list[str]], files: dict[str, str]) -> Path:
    """Write a dvc.yaml with stages and their dependencies, and the given files."""
    stages = (f"  {stage}:\n    deps: [{', '.join(names)}]\n" for stage, names in deps.items())
    for name, text in (files | {"dvc.yaml": "stages:\n" + "".join(stages)}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


def test_the_digest_of_stages_covers_their_files_and_folders(tmp_path: Path) -> None:
    deps = {"download": ["a.py", "data"], "train": ["b", "a.py", "b/c.py"], "evaluate": ["data"]}
    files = {
        "b/d/e.py": "e",
        "b/c.py": "c",
        "a.py": "a",
        "data/x.npy": "1",
        "b/n.md": "n",
        "z.py": "z",
    }
    folder = write(tmp_path, deps | {"plot": ["z.py"]}, files)
    assert stage_code(folder) == code_digest(["a", "c", "e"])
    assert stage_code(folder, ["train"]) == code_digest(["a", "c", "e"])
    assert stage_code(folder, ["download"]) == code_digest(["a"])
    assert stage_code(folder, ["plot"]) == code_digest(["z"])


def test_the_project_has_a_digest() -> None:
    assert len(stage_code(Path(__file__).parent.parent)) == 16

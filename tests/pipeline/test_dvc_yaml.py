"""dvc.yaml lists exactly the code and the parameters that each stage depends on."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cifarlab.params.load import KEYS
from tests.conftest import REPO

STAGES = yaml.safe_load((REPO / "dvc.yaml").read_text("utf-8"))["stages"]
# No output depends on validation, error messages, DVC, MLflow, and what differs between machines.
NO_INFLUENCE = {
    *("stages/__init__.py", "src/cifarlab/errors.py", "src/cifarlab/pipeline.py"),
    *("src/cifarlab/params/load.py", "src/cifarlab/params/sections.py"),
    *("src/cifarlab/runtime", "src/cifarlab/tracking"),
}


def files_of(paths: set[str]) -> set[Path]:
    """Return the Python files among some paths and in folders, except __init__.py."""
    found = {file for path in paths for file in [REPO / path, *(REPO / path).rglob("*.py")]}
    return {file for file in found if file.suffix == ".py" and file.name != "__init__.py"}


def imported(path: Path) -> Iterator[Path]:
    """Yield the modules of the project that a file imports, inside functions as well."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this test does not follow"
            module = str(node.module)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            yield REPO / "src" / f"{name.replace('.', '/')}.py"


def test_every_kind_of_import_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    for line in ("import cifarlab.nn.layers as x", "from cifarlab.nn import layers"):
        path.write_text(f"def f():\n    {line}\n")
        assert REPO / "src/cifarlab/nn/layers.py" in imported(path)
    path.write_text("from . import layers")
    with pytest.raises(AssertionError, match="relative import"):
        list(imported(path))


def used_by(path: Path) -> set[Path]:
    """Return a file and all modules it imports, directly or indirectly, that can change outputs."""
    found, todo = set(), {path}
    while todo:
        found |= todo
        modules = {module for file in todo for module in imported(file) if module.exists()}
        todo = modules - found - files_of(NO_INFLUENCE)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_code_that_is_imported(stage: str) -> None:
    """A folder may be a dependency if one of its modules is imported."""
    used = used_by(REPO / "stages" / f"{stage}.py")
    if any(name.split(".")[0] == "model" for name in STAGES[stage]["params"]):
        used.add(REPO / "src/cifarlab/params/geometry.py")  # params.model has methods
    covered = {dep: files_of({dep}) for dep in STAGES[stage]["deps"]}
    code = {dep: files for dep, files in covered.items() if files}
    assert used - set().union(*code.values()) == set()
    assert [dep for dep, files in code.items() if not files & used] == []


@pytest.mark.parametrize("stage", STAGES)
def test_dependencies_and_parameters_exist(stage: str) -> None:
    code = [path for path in STAGES[stage]["deps"] if path.startswith(("src", "stages"))]
    assert [path for path in code if not (REPO / path).exists()] == []
    known = set(KEYS) | {key.split(".")[0] for key in KEYS}
    assert set(STAGES[stage]["params"]) <= known


def test_every_file_is_written_by_one_stage() -> None:
    written = [
        out for stage in STAGES.values() for out in [*stage["outs"], *stage.get("metrics", [])]
    ]
    outs = [next(iter(out)) if isinstance(out, dict) else out for out in written]
    assert len(outs) == len(set(outs))

"""dvc.yaml says exactly what each stage depends on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cifarlab.params import KEYS

REPO = Path(__file__).resolve().parents[2]
STAGES = yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"]
# They validate and mirror; no output depends on them.
NO_INFLUENCE = {"src/cifarlab/__init__.py", "src/cifarlab/params.py", "src/cifarlab/tracking.py"}
IMPORTED = """
import ast, json, sys
from pathlib import Path

def imports(path):  # of a file, the lazy ones inside functions included
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cifarlab":
            for name in [node.module.split(".")[-1], *(alias.name for alias in node.names)]:
                if (module := Path("src/cifarlab") / f"{name}.py").exists():
                    yield module

found, todo = set(), [Path(sys.argv[1])]
while todo:
    path = todo.pop()
    if path in found or path.name in ("params.py", "tracking.py"):
        continue
    found.add(path)
    todo += imports(path)
print(json.dumps(sorted(str(p) for p in found)))
"""


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_code_that_is_imported(stage: str) -> None:
    output = subprocess.run(
        [sys.executable, "-c", IMPORTED, f"stages/{stage}.py"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    used = set(json.loads(output)) - NO_INFLUENCE
    if "model" in STAGES[stage]["params"]:  # params.py hands on its section's object, geometry and all
        used.add("src/cifarlab/architecture.py")
    assert {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")} == used


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_exist(stage: str) -> None:
    known = set(KEYS) | {key.split(".")[0] for key in KEYS}
    assert set(STAGES[stage]["params"]) <= known


def test_every_file_is_written_by_one_stage() -> None:
    written = [out for stage in STAGES.values() for out in [*stage["outs"], *stage.get("metrics", [])]]
    outs = [next(iter(out)) if isinstance(out, dict) else out for out in written]
    assert len(outs) == len(set(outs))

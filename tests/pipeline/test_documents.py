"""Every command of README.md, the tutorial and the recipes works, typed from top to bottom."""

import os
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.support.documents import EXECUTED, blocks
from tests.support.pictures import pictures, write
from tests.support.project import FIGURES, Project

REPO = Path(__file__).resolve().parents[2]
# The reader leaves a server running and goes on in another terminal. So does `serve`.
BEGIN = """set -euo pipefail
serve() {
    local port=$1; shift
    "$@" >"server-$port.log" 2>&1 &
    until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do kill -0 $!; sleep 0.2; done
}
"""
# The whole test suite does not run in one of its tests. test_study.py runs this study.
INSTEAD = {
    "make test": "make --dry-run test",
    "make study NAME=demo": "make --dry-run study NAME=demo",
}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def script(page: str, places: dict[str, str]) -> str:
    """Return the commands of a page as one script, with the places that the test has."""
    lines = "".join(blocks(page)).splitlines()
    for number, line in enumerate(lines):
        for command, other in INSTEAD.items():
            if line.split("#")[0].strip() == command:
                lines[number] = other
        if line.startswith("make ui"):
            lines[number] = f"serve $PORT {line}"
        if line.startswith("mlflow server"):
            lines[number] = f"serve 5000 {line}"
    text = BEGIN + "\n".join(lines)
    for place, here in places.items():
        text = text.replace(place, here)
    return text


def prepare(project: Project) -> None:
    """Give a checkout the environment that `make setup` makes, and the files that a reader has."""
    folder, environment = project.folder, project.folder / ".venv/bin"
    environment.mkdir(parents=True)
    for path in (folder / ".venv/.requirements", environment / "activate"):
        path.touch()
    shutil.copy(REPO / "src/cifarlab/launcher.py", environment / "cifarlab")
    (environment / "cifarlab").chmod(0o755)
    project.env["PATH"] = f"{environment}:{project.env['PATH']}"
    project.run("cifarlab", "page")
    variants = folder / "variants.yaml"  # the notebook's network and one for photos, in seconds
    variants.write_text(re.sub(r"epochs: \d+", "epochs: 1", variants.read_text("utf-8")))
    later = time.time() + 3600  # newer than every file that a command of a page writes
    for name in (".venv/.requirements", ".venv/bin/cifarlab", ".dvc/plots.html"):
        os.utime(folder / name, (later, later))
    write(folder.parent / "photos", pictures(10, "cat", "dog"))  # in HOME
    shutil.copy(folder.parent / "photos/cat/1.png", folder / "new.jpg")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("page", EXECUTED)
def test_every_command_of_a_page_works(
    request: pytest.FixtureRequest, tmp_path: Path, page: str
) -> None:
    first = page == "README.md"
    project = request.getfixturevalue("drawing_project" if first else "project")
    prepare(project)
    places = {"/mnt/cifarlab": str(tmp_path / "remote"), "5000": free_port()}
    env = {"PORT": free_port(), "MLFLOW_WORKERS": "1"}
    with project.start("bash", "-xc", script(page, places), **env) as typed:
        code = typed.end()
    (tmp_path / "output").write_text(typed.output)
    assert code == 0, typed.output[-4000:]
    for status in typed.output.split("+ dvc status\n")[1:]:
        assert status.startswith("Data and pipelines are up to date."), status[:4000]
    for figure in FIGURES if first else ():
        with Image.open(project.folder / figure.replace("figures", "plots")) as image:
            assert min(image.size) > 150

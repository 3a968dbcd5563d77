"""Every command of README.md, the tutorial and the recipes works, typed from top to bottom."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.support.documents import EXECUTED, blocks
from tests.support.pictures import pictures, write
from tests.support.project import Project

REPO = Path(__file__).resolve().parents[2]
# The reader leaves a server running and goes on in another terminal. So does `serve`.
BEGIN = """set -euo pipefail
serve() {
    "$@" >server.log 2>&1 &
    until (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do kill -0 $!; sleep 0.2; done
}
"""
SERVERS = ("make ui", "mlflow server")
# The whole test suite does not run in one of its tests.
INSTEAD = {"make test": "make --dry-run test"}


def script(page: str, places: dict[str, str]) -> str:
    """Return the commands of a page as one script, with the places that the test has."""
    lines = "".join(blocks(page)).splitlines()
    for number, line in enumerate(lines):
        for command, other in INSTEAD.items():
            if line.split("#")[0].strip() == command:
                lines[number] = other
        if line.startswith(SERVERS):
            lines[number] = f"serve {line}"
    text = BEGIN + "\n".join(lines)
    for place, here in places.items():
        text = text.replace(place, here)
    return text


def prepare(project: Project) -> None:
    """Give a checkout the environment that `make setup` makes, and the files that a reader has."""
    folder, now = project.folder, (2**31 - 1, 2**31 - 1)  # newer than every file of the checkout
    shutil.copy(REPO / "requirements.txt", folder)
    environment = folder / ".venv/bin"
    environment.mkdir(parents=True)
    for path in (folder / ".venv/.requirements", environment / "activate"):
        path.touch()
    shutil.copy(REPO / "src/cifarlab/launcher.py", environment / "cifarlab")
    (environment / "cifarlab").chmod(0o755)
    project.env["PATH"] = f"{environment}:{project.env['PATH']}"
    project.run("cifarlab", "page")
    for name in (".venv/.requirements", ".venv/bin/cifarlab", ".dvc/plots.html"):
        os.utime(folder / name, now)
    home = folder.parent  # HOME
    write(home / "photos", pictures(10, "cat", "dog"))
    shutil.copy(home / "photos/cat/1.png", folder / "new.jpg")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", EXECUTED)
def test_every_command_of_a_page_works(project: Project, tmp_path: Path, page: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    prepare(project)
    places = {"/mnt/cifarlab": str(tmp_path / "remote"), ":5000": f":{port}", "5000": port}
    with project.start("bash", "-xc", script(page, places), PORT=port) as typed:
        code = typed.end()
    assert code == 0, typed.output[-4000:]

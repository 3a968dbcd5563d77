"""The `cifarlab` command, and values that are passed to make."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from cifarlab import cli
from cifarlab.cli import main
from cifarlab.report import page
from tests.support.forkserver import ForkServer
from tests.support.pictures import picture, write

REPO = Path(__file__).resolve().parent.parent
HOSTILE = """$(shell touch made-by-make)`touch made-by-shell`'";touch made-by-shell;#"""
LAUNCHER = REPO / "src/cifarlab/launcher.py"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_the_help_of_each_command_has_an_example(name: str) -> None:
    help_text = CliRunner().invoke(main, [name, "--help"]).output
    assert f"cifarlab {name}" in help_text.partition("Example")[2]


def test_the_help_has_examples_of_commands_that_exist() -> None:
    examples = CliRunner().invoke(main, ["--help"]).output.partition("Examples:")[2]
    lines = [line.split() for line in examples.strip().partition("\n\n")[0].splitlines()]
    assert len(lines) >= 3
    assert all(line[0] == "cifarlab" and line[1] in main.commands for line in lines)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files that the command line needs."""
    folder = tmp_path / "a checkout"
    for name in ("src", "studies"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, folder / name, ignore=ignored)
    for name in ("params.yaml", "variants.yaml", "dvc.yaml"):
        shutil.copy(REPO / name, folder)
    return folder


def launch(
    folder: Path, *arguments: str, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    command = [python, str(LAUNCHER), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("place", [".", "src/cifarlab"])
def test_the_command_works_at_the_top_of_a_checkout_and_below(checkout: Path, place: str) -> None:
    done = launch(checkout / place, "check")
    assert (done.returncode, done.stdout) == (0, "params.yaml is valid\n")


def test_paths_start_where_the_command_is_typed(checkout: Path, fork_server: ForkServer) -> None:
    below, python = checkout / "src/cifarlab", fork_server.python
    (below / "mine.safetensors").write_bytes(b"damaged")
    for command in ("export --model mine.safetensors --onnx a", "predict --model x no.png"):
        done = launch(below, *command.split(), python=python)
        assert done.returncode == 1
        # A file that is written or loaded is shown as seen from the top.
        name = "src/cifarlab/mine.safetensors" if "export" in command else "no.png"
        assert done.stderr.startswith(f"error: {name}")
    done = launch(checkout, "predict", "no.png", python=python)
    assert done.stderr.startswith("error: no.png: ")


def test_a_page_is_written_where_the_command_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(cli, "HERE", Path("below"))
    monkeypatch.setattr(page, "write", lambda _, output: written.append(output) or [])
    CliRunner().invoke(main, ["report", "--output", "a.html"])
    CliRunner().invoke(main, ["report"])
    assert written == [Path("below/a.html"), Path("below/report.html")]


def test_the_command_works_without_activating_its_environment(
    checkout: Path, tmp_path: Path
) -> None:
    """It takes the Python beside it, although the one that starts it has no packages."""
    command, python = tmp_path / "bin/cifarlab", tmp_path / "bin/python"
    command.parent.mkdir()
    shutil.copy(LAUNCHER, command)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    bare = shutil.which("python3", path=f"{sys.base_prefix}/bin")
    assert bare
    started = [bare, command, "check"]
    done = subprocess.run(started, cwd=checkout, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "params.yaml is valid\n"), done.stderr
    python.write_text('#!/bin/sh\necho "$PATH"\n')  # where the command looks for dvc
    done = subprocess.run(started, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.stdout.split(":")[0] == str(python.parent)


def test_the_command_runs_the_code_of_the_checkout_around_it(checkout: Path) -> None:
    cli = checkout / "src/cifarlab/cli.py"
    cli.write_text(cli.read_text("utf-8").replace("is valid", "is valid here"), "utf-8")
    assert launch(checkout, "check").stdout == "params.yaml is valid here\n"


def test_a_closed_pipe_ends_the_command_quietly(checkout: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(LAUNCHER), "check"]
    done = subprocess.run(
        command, cwd=checkout, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert not done.stderr


def test_outside_a_checkout_the_command_refuses(tmp_path: Path) -> None:
    done = launch(tmp_path, "check")
    assert done.returncode == 1
    assert (
        done.stderr == f"error: {tmp_path} is not inside a checkout of cifarlab; go there with cd\n"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["study"], "depth"),
        (["study", "../params"], "../params"),
        (["study", "nobody"], "depth"),
        (["search", "../params"], "../params"),
        (["variant", "nobody"], "it has notebook, tiny, strong"),
    ],
)
def test_an_unknown_name_is_refused_in_one_line(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str
) -> None:
    monkeypatch.chdir(checkout)
    before = sorted(checkout.rglob("*"))
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    [line] = done.output.splitlines()
    assert line.startswith("error: ")
    assert reason in line
    assert sorted(checkout.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("5", "it has none"),
        ("[tiny]", "it has none"),
        ("tiny: {1: 2}", "unknown"),
        ("", "none"),
        ("tiny: 0", "has no tiny"),
        ("tiny: {train: {seed: 3}}", r"train is refused: write whole keys, such as train\.seed"),
        ("<<<<<<< HEAD\ntiny: {}\n=======", "merge conflict: edit it, or take one side: `git"),
    ],
)
def test_a_damaged_list_of_variants_is_refused_in_one_line(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, content: str, reason: str
) -> None:
    monkeypatch.chdir(checkout)
    (checkout / "variants.yaml").write_text(content)
    done = CliRunner().invoke(main, ["variant", "tiny"])
    assert done.exit_code == 1
    assert re.fullmatch(rf"error: .*{reason}.*\n", done.output), done.output


def test_a_variant_names_the_folder_of_the_project_only_if_it_holds_images(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, seen = checkout / "params.yaml", list[list[str]]()
    changed = yaml.safe_load(params.read_text("utf-8"))
    changed["data"] |= {"name": "folder", "sources": ["photos.zip"], "sha256": None}
    params.write_text(yaml.safe_dump(changed), "utf-8")

    def run(command: list[str], **_: object) -> SimpleNamespace:
        if command[0] == "dvc":
            seen.append(command)
        return SimpleNamespace(returncode=0, stdout=b"tiny")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(checkout)
    for names in ([], ["cat/1.png"]):
        write(checkout / "images", {name: picture(1) for name in names})
        assert not CliRunner().invoke(main, ["variant", "tiny"]).exit_code
    without, named = ([o for o in options if "data.folder" in o] for options in seen)
    assert without == []
    assert named == [f'data.folder="{checkout / "images"}"']


@pytest.mark.parametrize(
    ("content", "name", "options"),
    [
        ("plain:", "plain", []),
        ("7: {train.seed: 3}", "7", ["-S", "train.seed=3"]),
        ("on: {train.graph: off}", "on", ["-S", 'train.graph="off"']),
    ],
)
def test_names_of_variants_are_text(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    name: str,
    options: list[str],
) -> None:
    seen: list[list[str]] = []

    def note(command: list[str], **_: Any) -> Any:
        seen.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.chdir(checkout)
    Path("variants.yaml").write_text(content)
    done = CliRunner().invoke(main, ["variant", name])
    assert (done.exit_code, seen[0][-len(options) :] if options else []) == (0, options)


def test_one_file_for_both_exports_is_refused() -> None:
    done = CliRunner().invoke(main, ["export", "--onnx", "a", "--torch", "a"])
    assert (done.exit_code, done.output) == (
        1,
        "error: name a file: --onnx FILE or --torch FILE, or two different ones\n",
    )


def test_a_wrong_number_is_refused() -> None:
    for arguments in (["queue", "--jobs", "0"], ["queue", "--jobs", "x"], ["ui", "--port", "0"]):
        assert CliRunner().invoke(main, arguments).exit_code == click.UsageError.exit_code


@pytest.fixture
def makefile(tmp_path: Path) -> Path:
    """A folder with the Makefile, and programs that record their arguments."""
    folder = tmp_path / "a folder"
    up_to_date = ["requirements.txt", "src/cifarlab/launcher.py", ".venv/.requirements"]
    for age, name in enumerate([*up_to_date, ".venv/bin/cifarlab", ".dvc/plots.html"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9 + age, 1e9 + age))
    for name in ("cifarlab", "python"):
        program = folder / ".venv/bin" / name
        time = 1e9 + up_to_date.index(".venv/.requirements") + 1
        program.write_text("""#!/bin/sh\nprintf '%s\\0' "${0##*/}" "$@" >>calls\n""")
        program.chmod(0o755)
        os.utime(program, (time, time))
    shutil.copy(REPO / "Makefile", folder)
    return folder


@pytest.mark.parametrize("source", ["argument", "environment"])
@pytest.mark.parametrize(
    ("target", "variable", "program"),
    [
        ("verify", "REV", "cifarlab"),
        ("study", "NAME", "cifarlab"),
        ("search", "NAME", "cifarlab"),
        ("results", "NAME", "python"),
        ("queue", "JOBS", "cifarlab"),
        ("study", "JOBS", "cifarlab"),
        ("study", "WORKERS", "cifarlab"),
        ("queue", "WORKERS", "cifarlab"),
        ("ui", "PORT", "cifarlab"),
        ("test", "TESTS", "python"),
        ("test-all", "TESTS", "python"),
        ("same-bytes", "BASE", "python"),
    ],
)
def test_a_value_that_is_given_to_make_reaches_the_program_as_one_argument(
    makefile: Path, target: str, variable: str, program: str, source: str
) -> None:
    given = [f"{variable}={HOSTILE}"] if source == "argument" else []
    hidden = (
        "MAKE",
        "MFLAGS",
        "NAME",
        "REV",
        "BASE",
        "JOBS",
        "PORT",
        "TESTS",
        "WITHOUT",
        "WORKERS",
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    env |= {variable: HOSTILE} if source == "environment" else {}
    command = ["make", target, *given]
    done = subprocess.run(
        command, cwd=makefile, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    calls = (makefile / "calls").read_text().split("\0")
    assert calls[0] == program
    # Under WSL, the environment holds the name of the computer as NAME.
    assert (HOSTILE in calls) == ((variable, source) != ("NAME", "environment"))
    assert not list(makefile.glob("made-by-*"))


def test_make_report_passes_each_name_as_it_is(makefile: Path) -> None:
    names = ["HEAD~2", "*", "$(touch", "made-by-shell);"]
    command = ["make", "report", f"NAME={' '.join(names)}"]
    subprocess.run(command, cwd=makefile, capture_output=True, check=True)
    calls = (makefile / "calls").read_text().split("\0")
    assert calls[:-1] == ["cifarlab", "report", "--", *names]
    assert not list(makefile.glob("made-by-*"))

"""`make setup`: which Python and which PyTorch it takes, and what it prints."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench import install

REPO = Path(__file__).resolve().parents[2]
LOCK = (REPO / "requirements.txt").read_text("utf-8")
PYTHONS = re.search(r"^PYTHONS := (.*)$", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)
VERSIONS = PYTHONS[1].split() if PYTHONS else []


def users() -> dict[str, set[str]]:
    """Return the packages of the lock, each with the packages that need it, from its comments."""
    found: dict[str, set[str]] = {}
    for line in LOCK.splitlines():
        if not line.startswith((" ", "#")):
            name = Requirement(line).name
        elif user := re.fullmatch(r"    #(?: via|  ) ([\w.-].*)", line):
            found.setdefault(name, set()).add(user[1])
    return found


def test_the_cpu_build_comes_without_what_only_cuda_needs() -> None:
    cuda, everything = {"torch"}, users()
    linux = {
        Requirement(pin).name for pin in install.pins(LOCK) if "sys_platform == 'linux'" in pin
    }
    while new := {name for name in linux - cuda if everything[name] <= cuda}:
        cuda |= new
    kept = {Requirement(pin).name for pin in install.without_cuda(LOCK).splitlines()}
    assert set(everything) - kept == cuda - {"torch"}
    assert "nvidia-cublas" not in kept
    assert {"torch", "torchvision", "nvidia-ml-py"} <= kept


@pytest.mark.parametrize(
    ("machine", "system", "build"),
    [
        ("x86_64", "linux", "+cpu"),
        ("AMD64", "win32", "+cpu"),
        ("aarch64", "linux", ""),
        ("arm64", "darwin", ""),
        ("x86_64", "darwin", ""),
    ],
)
def test_the_cpu_build_has_the_locked_version(
    monkeypatch: pytest.MonkeyPatch, machine: str, system: str, build: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("sys.platform", system)
    index, url, alone, *named = install.cpu_torch(LOCK)
    assert (index, url, alone) == (
        "--index-url",
        "https://download.pytorch.org/whl/cpu",
        "--no-deps",
    )
    locked = [pin for pin in install.pins(LOCK) if pin.startswith(("torch==", "torchvision=="))]
    assert named == [pin + build for pin in locked]
    assert len(named) == 2


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("system", "machine"), [("linux", "x86_64"), ("darwin", "arm64")])
def test_the_lock_has_one_version_of_each_package(version: str, system: str, machine: str) -> None:
    environment = {
        "python_version": version,
        "python_full_version": f"{version}.0",
        "sys_platform": system,
        "platform_machine": machine,
    }
    pins = [Requirement(pin) for pin in install.pins(LOCK)]
    here = [pin for pin in pins if not pin.marker or pin.marker.evaluate(environment)]
    locked = {pin.name: str(pin.specifier).removeprefix("==") for pin in here}
    assert len(locked) == len(here)
    for line in install.pins((REPO / "requirements.in").read_text("utf-8")):
        direct = Requirement(line.split("#")[0])
        assert direct.specifier.contains(locked[direct.name.lower()])


def test_progress_is_a_line_per_tenth_and_per_large_file() -> None:
    pip = [
        "Looking in links: /wheels\n",
        "WARNING: Location 'file:///pypi' is ignored\n",
        "Collecting a==1 (from -r requirements.txt (line 2))\n",
        "Collecting b==1 (from -r /a b/requirements.txt (line 30))\n",
        "  Downloading b-1-py3-none-any.whl (9.1 kB)\n",
        "Collecting torch==2.14.1 (from -r requirements.txt (line 95))\n",
        "  Downloading https://x.org/a/torch-2.14.1-cp311-cp311-linux.whl (888.1 MB)\n",
        "Collecting a>=1 (from b==1->-r requirements.txt (line 30))\n",
        "Installing collected packages: a, b, torch\n",
    ]
    shown = ["  30 %", "  90 %", "  downloading torch, 888.1 MB", "  unpacking"]
    assert list(install.progress(pip, 100)) == shown


def program(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def set_up(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Let make make .venv in a folder that holds the Makefile."""
    hidden = ("MAKE", "MFLAGS", "PIP", "PYTHON", "TORCH")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return subprocess.run(
        ["make", ".venv/.requirements", *arguments],
        cwd=folder, env=kept | env, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "it's a folder"
    (folder / "bench").mkdir(parents=True)
    for name in ("Makefile", "bench/install.py"):
        shutil.copy(REPO / name, folder / name)
    (folder / "requirements.txt").touch()
    return folder


def test_make_takes_the_newest_python_that_works(folder: Path, tmp_path: Path) -> None:
    programs = tmp_path / "its programs"
    program(programs / "python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
    for version in ("3.12", "3.11"):
        said = f'[ "$1" = -c ] && echo {version} || echo {version} runs "$@"'
        program(programs / f"python{version}", said)
    path = f"{programs}:{os.environ['PATH']}"
    assert "3.12 runs bench/install.py" in set_up(folder, PATH=path).stdout
    for given in (f"{programs}/python3.11", "python3.11"):
        done = set_up(folder, f"PYTHON={given}", PATH=path)
        assert "3.11 runs bench/install.py" in done.stdout
    for unsuitable in ("python3.13", "/bin/false", "a'b c$(touch x)"):
        done = set_up(folder, f"PYTHON={unsuitable}", PATH=path)
        assert done.returncode
        assert "is not Python 3.13 or 3.12 or 3.11" in done.stderr
    assert not list(folder.glob("x"))


def test_a_python_without_venv_is_named(folder: Path) -> None:
    (folder / "venv.py").write_text("raise SystemExit(1)")
    done = set_up(folder, PYTHON=sys.executable)
    assert "Debian and Ubuntu need the package python3-venv" in done.stderr
    assert "Traceback" not in done.stderr


def wheel(index: Path, name: str, version: str) -> None:
    """Put an empty package into an index of files."""
    about = f"{name}-{version}.dist-info"
    (index / name).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(index / name / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "")
    links = (f'<a href="{path.name}">{path.name}</a>' for path in (index / name).glob("*.whl"))
    (index / name / "index.html").write_text("".join(links))


@pytest.mark.slow
def test_the_environment_has_the_cpu_build_and_keeps_it(folder: Path, tmp_path: Path) -> None:
    pypi, pytorch = tmp_path / "pypi", tmp_path / "pytorch"
    for version in ("2.14.1", "2.15.0"):
        wheel(pypi, "torch", version)
    for name in ("nvidia_cublas", "numpy"):
        wheel(pypi, name, "1.0")
    wheel(pytorch, "torch", "2.14.1+cpu")
    code = (REPO / "bench/install.py").read_text("utf-8")
    code = code.replace(install.CPU_INDEX, pytorch.as_uri())
    (folder / "bench/install.py").write_text(code, "utf-8")
    lock = folder / "requirements.txt"
    lock.write_text("torch==2.14.1\nnvidia-cublas==1.0 ; sys_platform == 'linux'\n")
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": pypi.as_uri()}
    settings["PYTHON"] = sys.executable

    def installed() -> dict[str, str]:
        command = [folder / ".venv/bin/python", "-m", "pip", "list", "--format", "json"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {package["name"]: package["version"] for package in json.loads(output)}

    done = set_up(folder, "TORCH=cpu", **settings)
    assert done.returncode == 0, done.stderr
    assert "PyTorch for the CPU" in done.stdout
    assert "WARNING" not in done.stdout + done.stderr
    first = installed()
    assert first["torch"] == "2.14.1+cpu"
    assert not {"nvidia-cublas", "nvidia_cublas", "numpy"} & set(first)

    lock.write_text(lock.read_text() + "numpy==1.0\n")  # a later version of the project
    done = set_up(folder, **settings)
    assert done.returncode == 0, done.stderr
    assert installed() == first | {"numpy": "1.0"}

    lock.write_text(lock.read_text() + "missing==1.0\n")
    done = set_up(folder, **settings)
    assert done.returncode
    assert "No matching distribution found for missing==1.0" in done.stderr
    assert "pip.log" in done.stderr

"""`make setup`: make .venv from requirements.txt, and tell how far it is.

This runs before anything is installed, so it imports the standard library only. The variables
PYTHON and TORCH are those that a person gave to make.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

VENV = Path(".venv")
STAMP = VENV / ".requirements"
LOG = VENV / "pip.log"
LOCK = Path("requirements.txt")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What only PyTorch's CUDA build needs. nvidia-ml-py is small and reads the load of a GPU.
CUDA_ONLY = re.compile(r"(cuda-|triton==|nvidia-(?!ml-py))")
LARGE = 50  # MB: the download of such a file gets a line of its own


def pins(lock: str) -> list[str]:
    """Return the requirements of a lock file, without comments."""
    return [line for line in lock.splitlines() if line and not line.startswith((" ", "#"))]


def without_cuda(lock: str) -> str:
    """Return the lock file without the packages that only PyTorch's CUDA build needs."""
    return "\n".join(pin for pin in pins(lock) if not CUDA_ONLY.match(pin)) + "\n"


def cpu_torch(lock: str) -> list[str]:
    """Return the arguments of pip that install PyTorch's CPU build in the locked version.

    On Linux and Windows on x86-64 the version names the build (+cpu), so that pip cannot take the
    CUDA build from another index. Elsewhere not every file of the index names its build.
    """
    named = platform.machine() in ("x86_64", "AMD64") and sys.platform != "darwin"
    found = re.findall(r"^(?:torch|torchvision)==[^\s;]+", lock, re.MULTILINE)
    return ["--index-url", CPU_INDEX, "--no-deps", *(pin + "+cpu" * named for pin in found)]


def progress(output: Iterable[str], lines: int) -> Iterator[str]:
    """Turn pip's output into a line per tenth of a lock file, and one per large download.

    pip goes through a file of requirements in its order, and names the line of each.
    """
    shown = 0
    for text in output:
        place = re.search(r"-r .*\(line (\d+)\)", text)
        if place and (tenth := int(place[1]) * 10 // lines) > shown:
            shown = tenth
            yield f"  {shown * 10} %"
        size = re.match(r"\s+Downloading (?:\S+/)?([\w.]+)-\S* \(([\d.]+) ([MG])B\)", text)
        if size and (size[3] == "G" or float(size[2]) >= LARGE):
            yield f"  downloading {size[1]}, {size[2]} {size[3]}B"
        if text.startswith("Installing collected"):
            yield "  unpacking"


def pip(*arguments: str, lines: int = 1) -> None:
    """Install with the environment's pip. Its output goes to LOG, only its errors are shown."""
    command = [str(VENV / "bin/python"), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    # What changes pip's output, and PYTHONPATH, with which pip would count our modules.
    hidden = ("PYTHONPATH", "PIP_QUIET", "PIP_VERBOSE", "PIP_PROGRESS_BAR")
    process = subprocess.Popen(
        [*command, "install", "--progress-bar", "off", *arguments],
        env={key: value for key, value in os.environ.items() if key not in hidden},
        text=True,
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout
    said: list[str] = []
    with LOG.open("a", encoding="utf-8") as log:

        def logged(stream: Iterable[str]) -> Iterator[str]:
            for text in stream:
                said.append(text)
                log.write(text)
                yield text

        for line in progress(logged(process.stdout), lines):
            print(line, flush=True)
    if process.wait():
        errors = [text for text in said if text.startswith("ERROR")] or said[-5:]
        sys.exit(f"{''.join(errors)}error: pip failed; {LOG} has all that it said")


def usable() -> bool:
    """Return True if .venv works and, if the user named a Python, has its version."""
    python, code = VENV / "bin/python", "import pip, sys; print(sys.version_info[:2])"
    if not python.exists():
        return False
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    wanted = str(sys.version_info[:2]) if os.environ.get("PYTHON") else ""
    return done.returncode == 0 and wanted in done.stdout


def main() -> None:
    """Make or update .venv, in phases."""
    torch = os.environ.get("TORCH") or (STAMP.read_text("utf-8") if STAMP.exists() else "")
    if torch not in ("", "cpu"):
        sys.exit(f"error: TORCH = {torch} is refused; say TORCH=cpu, or nothing for CUDA")
    if not usable():
        print(f"making {VENV} with Python {platform.python_version()}", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=False).returncode:
            needed = "the reason is above; Debian and Ubuntu need the package python3-venv"
            sys.exit(f"error: {sys.executable} cannot make {VENV}: {needed}")
    LOG.unlink(missing_ok=True)
    lock, requirements = LOCK.read_text("utf-8"), LOCK
    if torch == "cpu":
        print("installing PyTorch for the CPU (about 200 MB)", flush=True)
        pip(*cpu_torch(lock))
        requirements = VENV / LOCK
        requirements.write_text(without_cuda(lock), "utf-8")
    size = "1 GB" if torch == "cpu" else "with PyTorch for CUDA: 7 GB"
    print(f"installing the packages of {LOCK} (some minutes; {size})", flush=True)
    pip("--requirement", str(requirements), lines=len(requirements.read_text().splitlines()))
    STAMP.write_text(torch, "utf-8")


if __name__ == "__main__":
    main()

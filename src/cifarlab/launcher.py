#!/usr/bin/env python3
"""The command `cifarlab`, which `make setup` copies into .venv/bin.

It runs the code of the checkout that it is typed in, at its top or below it. Temporary copies of
the checkout count as checkouts, which is why the package is not installed.
"""

import os
import sys
from pathlib import Path


def main() -> None:
    """Find the checkout and replace this process by its command line."""
    here = Path.cwd()
    checkouts = [top for top in (here, *here.parents) if (top / "src/cifarlab/cli.py").is_file()]
    if not checkouts:
        sys.exit(f"error: {here} is not inside a checkout of cifarlab; go there with cd")
    os.environ["CIFARLAB_HERE"] = os.path.relpath(here, checkouts[0])
    os.chdir(checkouts[0])
    os.environ["PYTHONPATH"] = str(checkouts[0] / "src")
    beside = Path(__file__).parent / "python"  # also if .venv is not activated
    python = str(beside) if beside.exists() else sys.executable
    # DVC, and the Python of its stages, are found by name.
    os.environ["PATH"] = f"{Path(python).parent}:{os.environ.get('PATH', os.defpath)}"
    os.execv(python, [python, "-m", "cifarlab.cli", *sys.argv[1:]])


if __name__ == "__main__":
    main()

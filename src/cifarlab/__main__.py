"""Small commands around the pipeline: `python -m cifarlab compare`, called by the Makefile."""

import argparse
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cifarlab import UserError, first_line
from cifarlab.files import atomic, write_json
from cifarlab.params import load_params

RESULTS = Path("docs/results")


def compare(last: int) -> None:
    """Print the last runs of MLflow side by side."""
    from cifarlab import tracking

    table = tracking.recent_runs(load_params().tracking.experiment, last)
    if table.empty:
        print("MLflow holds no run yet: `make demo` makes two in a few minutes")
    else:
        print(table.to_string(index=False, na_rep="–"))


def page() -> None:
    """Make the pages of `dvc plots` open offline: a template with Vega's JavaScript in it, for this checkout only."""
    import vl_convert

    libraries = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    template = f"""<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  {{refresh_tag}}
  <title>cifarlab: plots</title>
  <script>{libraries}</script>
  <style>
    body {{ font-family: system-ui, sans-serif; margin: 2rem; }}
    body > div {{ margin-bottom: 2.5rem; overflow-x: auto; }}
    table {{ border-spacing: 12px; }}
    img {{ max-width: 44vw; height: auto; }}
  </style>
</head>
<body>
  {{plot_divs}}
</body>
</html>
"""
    with atomic(Path(".dvc/plots.html")) as path:
        path.write_text(template, "utf-8")
    subprocess.run(["dvc", "config", "--local", "plots.html_template", "plots.html"], check=True)


def results(name: str) -> None:
    """Keep the evidence of the run in the workspace under docs/results/NAME/: parameters, lock, metrics, figures, machine."""
    from cifarlab import tracking

    status = subprocess.run(["dvc", "status", "--quiet"], check=False)
    if status.returncode:
        raise UserError("the workspace does not hold what params.yaml says: run `dvc repro` or `dvc exp apply NAME` first")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"NAME = {name!r} is refused; it becomes a folder in {RESULTS}/: letters, digits, _ . and -")
    known = tracking.read_diary(tracking.training_key(load_params()))
    target = RESULTS / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tables = [Path(f"plots/{table}.csv") for table in ("history", "per_class", "confusion")]
    for file in [Path("params.yaml"), Path("dvc.lock"), *Path("metrics").glob("*.json"), *tables, *Path("plots").glob("*.png")]:
        shutil.copy(file, target / file.name)
    machine = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in tracking.VERSIONS},
        **known["conditions"],
        "epoch_seconds": [round(seconds, 1) for _, seconds in known["epochs"].values()],
    }
    write_json(target / "machine.json", machine)
    print(f"kept in {target}/")


def sync() -> None:
    """Print experiments, commits and runs of MLflow side by side, after logging what was missing."""
    from cifarlab import revisions

    table, whole = revisions.sync()
    print(table.to_string(index=False) if len(table) else "no experiment, no commit with a dvc.lock, no run yet")
    if not whole:
        raise UserError("MLflow lacks what the table says")


def verify(name: str) -> None:
    """Repeat an experiment or a commit and say whether it gave the same bytes."""
    from cifarlab import revisions

    sentence, held = revisions.verify(name)
    print(sentence)
    if not held:
        sys.exit(1)


def options(name: str) -> None:
    """Print what `dvc exp run` needs to be told for a variant of variants.yaml."""
    try:
        variants = yaml.safe_load(Path("variants.yaml").read_text("utf-8"))
    except OSError as error:
        raise UserError(f"variants.yaml cannot be read: {error.strerror}; run from the top of the checkout") from error
    if name not in variants:
        raise UserError(f"variants.yaml has no {name}; it has {', '.join(variants)}")
    values = {k: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for k, v in variants[name].items()}
    print(*(f"-S {key}={value}" for key, value in values.items()))


def queue(jobs: int) -> None:
    """Run the queued experiments."""
    from cifarlab import queue

    queue.watch(jobs)


def study(name: str, jobs: int) -> None:
    """Run what a study lacks and print where its answer is."""
    from cifarlab import studies

    print(studies.run(name, jobs))


def search(name: str) -> None:
    """Run what a search lacks and print where its answer is."""
    from cifarlab import search

    print(search.run(name))


def check() -> None:
    """Validate params.yaml."""
    load_params()


def main() -> None:
    """Parse the command line: each command's arguments are those of its function."""
    parser = argparse.ArgumentParser(prog="python -m cifarlab", description="Small commands around the pipeline.")
    commands = parser.add_subparsers(required=True)
    arguments: dict[str, dict[str, Any]] = {
        "name": {},
        "last": {"type": int, "default": 10, "choices": range(1, 1001), "metavar": "N"},
        "jobs": {"type": int, "default": 1, "choices": range(1, 65), "metavar": "N"},
    }
    for function in (compare, page, results, options, sync, verify, queue, study, search, check):
        command = commands.add_parser(function.__name__, help=(function.__doc__ or "").rstrip("."))
        command.set_defaults(function=function)
        for name in inspect.signature(function).parameters:
            command.add_argument(name if name == "name" else f"--{name}", **arguments[name])
    given = vars(parser.parse_args())
    try:
        given.pop("function")(**given)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (OSError, subprocess.CalledProcessError) as error:  # a full disk; not a Git repository
        sys.exit(f"error: {first_line(error)}")


if __name__ == "__main__":
    main()

"""Small commands around the pipeline: `python -m cifarlab compare`, called by the Makefile."""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from cifarlab import UserError, first_line
from cifarlab.files import atomic, write_json
from cifarlab.params import load_params

RESULTS = Path("docs/results")
STYLE = "body { font-family: system-ui, sans-serif; margin: 2rem } body > div { margin-bottom: 2.5rem; overflow-x: auto }"
# Each command's function, imported when it is asked for, its arguments, and its line of help.
COMMANDS = {
    "compare": ("cifarlab.tracking:compare", ["--last"], "Print the last runs of MLflow side by side"),
    "page": ("__main__:page", [], "Make the pages of `dvc plots` open offline, for this checkout only"),
    "results": ("__main__:results", ["name"], "Keep the evidence of the run in the workspace under docs/results/NAME/"),
    "options": ("__main__:options", ["name"], "Print what `dvc exp run` needs to be told for a variant of variants.yaml"),
    "sync": ("cifarlab.revisions:sync", [], "Print experiments, commits and runs of MLflow side by side, after logging what was missing"),
    "verify": ("cifarlab.revisions:verify", ["name"], "Repeat an experiment or a commit and say whether it gave the same bytes"),
    "queue": ("cifarlab.queue:watch", ["--jobs"], "Run the queued experiments"),
    "study": ("cifarlab.studies:run", ["name", "--jobs"], "Run what a study lacks and print where its answer is"),
    "search": ("cifarlab.search:run", ["name"], "Run what a search lacks and print where its answer is"),
    "check": ("cifarlab.params:load_params", [], "Validate params.yaml"),
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "name": {},
    "--last": {"type": int, "default": 10, "choices": range(1, 1001), "metavar": "N"},
    "--jobs": {"type": int, "default": 1, "choices": range(1, 65), "metavar": "N"},
}


def page() -> None:
    """Make the pages of `dvc plots` open offline: DVC's own template with Vega's JavaScript in it, for this checkout only."""
    import vl_convert
    from dvc_render.html import PAGE_HTML

    libraries = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    head = f'<meta charset="utf-8">\n<script>{libraries}</script>\n<style>{STYLE} img {{ max-width: 44vw; height: auto }}</style>'
    with atomic(Path(".dvc/plots.html")) as path:
        path.write_text(PAGE_HTML.replace("DVC Plot", "cifarlab: plots").replace("{scripts}", head), "utf-8")
    subprocess.run(["dvc", "config", "--local", "plots.html_template", "plots.html"], check=True)


def results(name: str) -> None:
    """Keep the evidence of the run in the workspace under docs/results/NAME/: parameters, lock, metrics, figures, machine."""
    from cifarlab import tracking

    if subprocess.run(["dvc", "status", "--quiet"], check=False).returncode:
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
    machine: dict[str, Any] = {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    machine |= {package: version(package) for package in tracking.VERSIONS} | known["conditions"]
    machine["epoch_seconds"] = [round(seconds, 1) for _, seconds in known["epochs"].values()]
    write_json(target / "machine.json", machine)
    print(f"kept in {target}/")


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


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m cifarlab", description="Small commands around the pipeline.")
    commands = parser.add_subparsers(required=True)
    for name, (function, arguments, told) in COMMANDS.items():
        command = commands.add_parser(name, help=told)
        command.set_defaults(function=function)
        for argument in arguments:
            command.add_argument(argument, **ARGUMENTS[argument])
    given = vars(parser.parse_args())
    try:
        answer = resolve_name(given.pop("function"))(**given)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (OSError, subprocess.CalledProcessError) as error:  # a full disk; not a Git repository
        sys.exit(f"error: {first_line(error)}")
    if isinstance(answer, Path):
        print(answer)


if __name__ == "__main__":
    main()

"""`make results NAME=…`: keep the evidence of the run in the workspace in docs/results/NAME."""

import os
import platform
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from cifarlab import files, pipeline
from cifarlab.errors import UserError
from cifarlab.params.load import load_params
from cifarlab.runtime import timings

RESULTS = Path("docs/results")
PACKAGES = ("torch", "numpy", "dvc", "mlflow")


def keep(name: str) -> Path:
    """Copy parameters, dvc.lock, metrics, tables and pictures, describe the machine, return where.

    Raises
    ------
    UserError
        The name is not that of a folder, or the outputs are not those of params.yaml.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"NAME = {name!r} is refused: it names a folder in {RESULTS}/ and may hold "
            "letters, digits, _ . and -"
        )
    if not pipeline.workspace_is_current():
        raise UserError(
            "the outputs in the workspace are not those of params.yaml; run `dvc repro` or "
            "`dvc exp apply NAME` first"
        )
    target = RESULTS / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tables = [files.HISTORY, files.PER_CLASS, files.CONFUSION]
    metrics, pictures = Path("metrics").glob("*.json"), files.PLOTS.glob("*.png")
    for file in [files.PARAMS, files.DVC_LOCK, *metrics, *tables, *pictures]:
        shutil.copy(file, target / file.name)
    known = timings.read(pipeline.training_key(load_params()))
    machine = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        **known.conditions,
        "epoch_seconds": [round(seconds, 1) for _, seconds in known.epochs.values()],
    }
    files.write_json(target / "machine.json", machine)
    return target


if __name__ == "__main__":
    try:
        print(f"kept in {keep(sys.argv[1])}/")
    except UserError as error:
        sys.exit(f"error: {error}")

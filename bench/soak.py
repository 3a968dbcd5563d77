"""`python -m bench.soak 60`: what is left over after many experiments in one checkout.

Clones the last commit into a temporary folder, trains short experiments on digits there, one after
the other, and measures after some of them. Writes bench/results/soak.csv.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

TABLE = Path("bench/results/soak.csv")
SHORT = {
    "data.name": "digits",
    "model.layers": "2",
    "model.widths": "[8,16]",
    "train.epochs": "1",
    "train.flip": "none",
    "tracking.log_model": "false",
}
MEASURED = 5  # rows of the table
MEBIBYTE = 2**20


def timed(folder: Path, *command: str) -> float:
    """Run a command in the folder and return its seconds."""
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - start, 2)


def size(path: Path) -> float:
    """Return the MiB of a file or a folder, links not followed."""
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(file.lstat().st_size for file in files if file.is_file()) / MEBIBYTE, 2)


def processes(folder: Path) -> int:
    """Count the processes that still work in the folder."""
    working = [process.info["cwd"] or "" for process in psutil.process_iter(["cwd"])]
    return sum(Path(cwd).is_relative_to(folder) for cwd in working)


def soak(folder: Path, runs: int) -> pd.DataFrame:
    """Run the experiments in a clone; return a row for some of them."""
    subprocess.run(["git", "clone", "--quiet", ".", str(folder)], check=True)
    changes = [part for key, value in SHORT.items() for part in ("-S", f"{key}={value}")]
    asked = {round(1 + part * (runs - 1) / (MEASURED - 1)) for part in range(MEASURED)}
    rows = []
    for run in range(1, runs + 1):
        command = ["dvc", "exp", "run", "--quiet", "--temp", "--name", f"soak-{run}", *changes]
        seconds = timed(folder, *command, "-S", f"train.seed={run}")
        if run in asked:
            stores = (".dvc/cache", ".dvc/tmp", ".cache", "mlartifacts", "mlflow.db")
            row = {
                "run": run,
                "seconds": seconds,
                "sync_seconds": timed(folder, "cifarlab", "sync"),
                "show_seconds": timed(folder, "dvc", "exp", "show", "--json"),
                **{f"{name}_mib": size(folder / name) for name in stores},
                "processes_left": processes(folder),
            }
            print(row, flush=True)
            rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Write the table."""
    os.environ |= {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        table = soak(Path(name) / "cifarlab", int(sys.argv[1]))
    table.to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()

"""`make bench`: every measurement several times, the notebook's way and ours in turn, then one table.

Each single run is appended to a file in bench/results/ as soon as it is there: an interrupted benchmark continues.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import variant
from cifarlab.training import processor

RESULTS = Path("bench/results")
VARIANTS = ("notebook", "tiny", "default")
Run = dict[str, Any]


def measured(*arguments: str) -> Run:
    """Run one measurement in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "bench.measure", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def pipeline() -> Run:
    """Time `dvc repro` of the default parameters for one epoch, in a clone, data already there; and again, with nothing to do.

    What is neither training nor evaluating is overhead: interpreter and imports of three stages, DVC, MLflow, plots.
    """
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "cifarlab"
        subprocess.run(["git", "clone", "--quiet", ".", clone], check=True)
        for name in ("params.yaml", "dvc.lock"):
            shutil.copy(name, clone)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_ROOT", "DVC_EXP", "MLFLOW_TRACKING"))} | {
            "PYTHONPATH": "src"
        }

        def run(*command: str) -> float:
            start = time.perf_counter()
            subprocess.run(command, cwd=clone, env=environment, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

        run("dvc", "cache", "dir", "--local", str(Path(".dvc/cache").resolve()))
        run("dvc", "repro", "--quiet", "download")
        params = clone / "params.yaml"
        params.write_text(re.sub(r"(?m)^  epochs: \d+", "  epochs: 1", params.read_text("utf-8")), "utf-8")
        # The run cache, shared with the checkout, may know this training from an earlier benchmark.
        times = {"whole": run("dvc", "repro", "--quiet", "--no-run-cache"), "nothing": run("dvc", "repro", "--quiet")}
        run(sys.executable, "-m", "cifarlab", "results", "bench")
        [epoch] = json.loads((clone / "docs/results/bench/machine.json").read_text("utf-8"))["epoch_seconds"]
    return times | {"epoch": epoch}


def plan(quick: bool, seeds: int) -> list[tuple[str, ...]]:
    """Return the measurements in the order they are made: the two ways in turn, so that a slow hour hits both."""
    if quick:  # speeds, of as many images as give a steady one
        ours = [("ours", "notebook", "0", "1", "12800"), ("ours", "tiny", "0"), ("ours", "default", "0", "1", "6400")]
        return [("matmul",), ("reference", "0", "6400"), *ours, ("pipeline",)]
    turns = [("reference", "{}"), ("ours", "tiny", "{}"), ("ours", "default", "{}"), ("ours", "notebook", "{}", "2")]
    return [("pipeline",)] + [("matmul",)] * seeds + [tuple(a.format(seed) for a in turn) for seed in range(seeds) for turn in turns]


def machine() -> Run:
    """Return what the figures depend on."""
    if not Path("data/dataset.json").exists():
        sys.exit("error: data/ is missing; run `dvc repro download`")
    data = json.loads(Path("data/dataset.json").read_text("utf-8"))
    code = ["git", "log", "-1", "--format=%h", "--", "src", "stages", "bench/*.py"]
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchvision", "numpy", "dvc", "mlflow")},
        "commit": subprocess.run(code, capture_output=True, text=True, check=True).stdout.strip(),
        "parameters": hashlib.sha256(
            json.dumps([variant(name).model_dump(include={"model", "train"}) for name in VARIANTS]).encode()
        ).hexdigest()[:12],
        "data": f"{data['name']} {data['digest'][:12]}",
    }


def table(runs: dict[str, list[Run]]) -> str:
    """Return the figures as a Markdown table: medians, and in brackets the extremes."""

    def row(label: str, goal: str, ours: list[float], theirs: list[float] | None = None, form: str = ".0f") -> str:
        columns = [
            "" if v is None else f"{median(v):{form}}" + (f" ({min(v):{form}}–{max(v):{form}})" if len(v) > 1 else "")
            for v in (theirs, ours)
        ]
        ratio = "" if theirs is None else f"{median(ours) / median(theirs):.2f}"
        return "| " + " | ".join([label, goal, *columns, ratio]) + " |"

    reference, default, tiny, notebook = (
        {field: [run[field] for run in runs[what]] for field in runs[what][0]}
        for what in ("reference", "ours default", "ours tiny", "ours notebook")
    )
    [pipeline] = runs["pipeline"]
    overhead = pipeline["whole"] - pipeline["epoch"] - median(default["evaluation_seconds"])
    product = [run["gflop_per_second"] for run in runs["matmul"]]
    full = reference["accuracy"][0] is not None
    rows = [
        row("test accuracy of `tiny`", "≥ 1", tiny["accuracy"], reference["accuracy"] if full else None, ".2%"),
        row("training of `tiny`, s", "≤ 0.083", tiny["seconds"], reference["seconds"]),
    ]
    if full:
        rows += [
            row("test accuracy of the default parameters", "≥ 91 %", default["accuracy"], reference["accuracy"], ".2%"),
            row("training of the default parameters, s", "≤ 1", default["seconds"], reference["seconds"]),
        ]
    rows += [
        row("the notebook's network and batch size, images/s", "≥ 1.8", notebook["images_per_second"], reference["images_per_second"]),
        row("the same network on the test images, s", "≤ 0.5", notebook["evaluation_seconds"], reference["evaluation_seconds"], ".1f"),
        row("default network in training; 4096³ float32 product, GFLOP/s", "≥ 0.7", default["gflop_per_second"], product),
        row("`dvc repro` beside training and evaluating, s", "≤ 25", [overhead], form=".1f"),
        row("`dvc repro` with nothing to do, s", "≤ 2", [pipeline["nothing"]], form=".1f"),
        row("peak memory of a training, MB", "≤ 2500", default["memory_mb"]),
    ]
    return "\n".join(["| | goal | the notebook's way, or as named | cifarlab | cifarlab / other |", "|---|---|---|---|---|", *rows])


def main() -> None:
    """Measure what is missing, then write and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="cifarlab against the notebook's way, on this machine.")
    parser.add_argument("--quick", action="store_true", help="no accuracies but that of `tiny`, in under five minutes")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    here = machine()
    target = RESULTS / ("quick" if args.quick else "full")
    record = target.with_suffix(".jsonl")
    target.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in record.read_text("utf-8").splitlines()] if record.exists() else []
    kept = [line for line in lines if line["machine"] == here]
    runs: dict[str, list[Run]] = {}
    for measurement in plan(args.quick, args.seeds):
        known = next((line for line in kept if line["measurement"] == list(measurement)), None)
        if known:
            kept.remove(known)
        else:
            print(" ".join(measurement), flush=True)
            known = {
                "machine": here,
                "measurement": measurement,
                "result": pipeline() if measurement == ("pipeline",) else measured(*measurement),
            }
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known) + "\n")
            print(f"  {known['result']}", flush=True)
        runs.setdefault(" ".join(a for a in measurement if not a.isdigit()), []).append(known["result"])
    text = table(runs)
    facts = ", ".join(f"{name} {value}" for name, value in here.items())
    target.with_suffix(".md").write_text(f"{text}\n\nMedian (lowest–highest) where brackets stand, else one run. {facts}\n", "utf-8")
    print(f"\n{text}\n\n{facts}")


if __name__ == "__main__":
    main()

"""`make bench`: measure cifarlab and the notebook's way in turn, then write one table.

Every result is appended to a file in bench/results/ at once, so an interrupted benchmark continues
where it stopped.
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

from bench.measure import Measurement, pflop, variant
from cifarlab import files
from cifarlab.runtime.device import processor

RESULTS = Path("bench/results")
VARIANTS = ("notebook", "tiny", "default")
HEADER = """\
| | goal | the notebook's way | cifarlab | ratio | PFLOP of each training |
|---|---|---|---|---|---|"""
EXPLANATION = "Median (lowest–highest) of several runs, or the value of a single run. Measured on:"


def measured(*arguments: str) -> Measurement:
    """Make one measurement in its own process."""
    command = [sys.executable, "-m", "bench.measure", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def pipeline() -> Measurement:
    """Time `dvc repro` of the default parameters for one epoch in a clone, then once more.

    Returns the seconds of the first run (`whole`), of the second, which has nothing to do
    (`nothing`), and of the epoch inside the first (`epoch`). The data is downloaded before. What is
    neither training nor evaluation is overhead: starting Python, imports, DVC, MLflow, figures.
    """
    foreign = ("DVC_ROOT", "DVC_EXP", "MLFLOW_TRACKING")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    environment["PYTHONPATH"] = "src"
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "cifarlab"
        subprocess.run(["git", "clone", "--quiet", ".", clone], check=True)
        for path in (files.PARAMS, files.DVC_LOCK):
            shutil.copy(path, clone)

        def run(*command: str) -> float:
            start = time.perf_counter()
            subprocess.run(
                command, cwd=clone, env=environment, check=True, stdout=subprocess.DEVNULL
            )
            return time.perf_counter() - start

        run("dvc", "cache", "dir", "--local", str(Path(".dvc/cache").resolve()))
        run("dvc", "repro", "--quiet", "download")
        params = clone / files.PARAMS
        text = re.sub(r"(?m)^  epochs: \d+", "  epochs: 1", params.read_text("utf-8"))
        params.write_text(text, "utf-8")
        # The clone shares the run cache, which may know this training from an earlier benchmark.
        whole = run("dvc", "repro", "--quiet", "--no-run-cache")
        nothing = run("dvc", "repro", "--quiet")
        run(sys.executable, "-m", "bench.keep", "bench")
        [epoch] = files.read_json(clone / "docs/results/bench/machine.json")["epoch_seconds"]
    return {"whole": whole, "nothing": nothing, "epoch": epoch}


def plan(quick: bool, seeds: int) -> list[tuple[str, ...]]:
    """Return the arguments of all measurements in the order in which they are made.

    The two ways take turns, so that a slow hour of the machine slows down both.
    """
    if quick:  # speeds only, from as many images as a steady value needs
        return [
            ("matmul",),
            ("reference", "0", "6400"),
            ("ours", "notebook", "0", "1", "12800"),
            ("ours", "tiny", "0"),
            ("ours", "default", "0", "1", "6400"),
            ("pipeline",),
        ]
    measurements: list[tuple[str, ...]] = [("pipeline",), *[("matmul",)] * seeds]
    for seed in map(str, range(seeds)):
        measurements += [
            ("reference", seed),
            ("ours", "tiny", seed),
            ("ours", "default", seed),
            ("ours", "notebook", seed, "2"),
        ]
    return measurements


def machine() -> dict[str, Any]:
    """Return what the results depend on: machine, packages, code, parameters and data."""
    try:
        data = files.read_json(files.DATA / "dataset.json")
    except FileNotFoundError:
        sys.exit("error: data/ is missing; run `dvc repro download`")
    log = ["git", "log", "-1", "--format=%h", "--", "src", "stages", "bench/*.py"]
    packages = ("torch", "torchvision", "numpy", "dvc", "mlflow")
    params = [variant(name).model_dump(include={"model", "train"}) for name in VARIANTS]
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "commit": subprocess.run(log, capture_output=True, text=True, check=True).stdout.strip(),
        "parameters": hashlib.sha256(json.dumps(params).encode()).hexdigest()[:12],
        "data": f"{data['name']} {data['digest'][:12]}",
    }


def label(measurement: list[str] | tuple[str, ...]) -> str:
    """Return the arguments of a measurement without seed and sizes, such as "ours tiny"."""
    return " ".join(argument for argument in measurement if not argument.isdigit())


def row(
    text: str,
    goal: str,
    ours: list[Any],
    reference: list[Any] | None = None,
    form: str = ".0f",
    *,
    trained: str = "",
) -> str:
    """Return a row of the table: medians, with the extremes in brackets, and their ratio.

    Parameters
    ----------
    trained : the arithmetic of the trainings that the row is about
    """
    columns = [
        f"{median(values):{form}}"
        + (f" ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else "")
        if values
        else ""
        for values in (reference, ours)
    ]
    ratio = f"{median(ours) / median(reference):.2f}" if reference else ""
    return "| " + " | ".join([text, goal, *columns, ratio, trained]) + " |"


def table(runs: dict[str, list[Measurement]]) -> str:
    """Return the results as a Markdown table.

    Parameters
    ----------
    runs : the results of every kind of measurement, under the names that `label` gives them
    """
    reference, default, tiny, notebook = (
        {field: [run[field] for run in runs[kind]] for field in runs[kind][0]}
        for kind in ("reference", "ours default", "ours tiny", "ours notebook")
    )
    [repro] = runs["pipeline"]
    overhead = repro["whole"] - repro["epoch"] - median(default["evaluation_seconds"])
    product = [run["gflop_per_second"] for run in runs["matmul"]]
    full = reference["accuracy"][0] is not None  # a quick benchmark trains on a part of the images
    accuracy = reference["accuracy"] if full else None
    speed, testing, memory = "images_per_second", "evaluation_seconds", "memory_mb"

    def arithmetic(ours: dict[str, list[float]]) -> str:
        total = ours["gflop_per_second"][0] * ours["seconds"][0] / 1e6
        return f"{pflop('reference'):.3f} and {total:.3f}"

    rows = [
        row("test accuracy of `tiny`", "ratio ≥ 1", tiny["accuracy"], accuracy, ".2%",
            trained=arithmetic(tiny)),
        row("training time of `tiny`, s", "ratio ≤ 0.083", tiny["seconds"], reference["seconds"],
            trained=arithmetic(tiny)),
    ]  # fmt: skip
    if full:
        rows += [
            row("test accuracy of the default parameters", "≥ 91 %", default["accuracy"], accuracy,
                ".2%", trained=arithmetic(default)),
            row("training time of the default parameters, s", "ratio ≤ 1", default["seconds"],
                reference["seconds"], trained=arithmetic(default)),
        ]  # fmt: skip
    rows += [
        row("training speed with the notebook's network and batch size, images/s", "ratio ≥ 1.8",
            notebook[speed], reference[speed], trained=arithmetic(notebook)),
        row("time to classify the test images with the notebook's network, s", "ratio ≤ 0.5",
            notebook[testing], reference[testing], ".1f"),
        row("default network in training, GFLOP/s (compared with a 4096³ float32 product)",
            "ratio ≥ 0.7", default["gflop_per_second"], product),
        row("`dvc repro` without training and evaluation, s", "≤ 18 s", [overhead], form=".1f"),
        row("`dvc repro` with nothing to do, s", "≤ 2 s", [repro["nothing"]], form=".1f"),
        row("peak memory of a training, MB", "≤ 2500 MB", default[memory]),
    ]  # fmt: skip
    return "\n".join([HEADER, *rows])


def main() -> None:
    """Make the measurements that are missing, then write and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Compare cifarlab with the notebook's way of training."
    )
    parser.add_argument(
        "--quick", action="store_true", help="speeds and the accuracy of `tiny`, in five minutes"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of every training")
    arguments = parser.parse_args()
    target = RESULTS / ("quick" if arguments.quick else "full")
    here = machine()
    runs = complete(target.with_suffix(".jsonl"), here, plan(arguments.quick, arguments.seeds))
    facts = "\n".join(f"- {name}: {value}" for name, value in here.items())
    text = f"{table(runs)}\n\n{EXPLANATION}\n\n{facts}\n"
    target.with_suffix(".md").write_text(text, "utf-8")
    print(f"\n{text}")


def complete(
    record: Path, here: dict[str, Any], measurements: list[tuple[str, ...]]
) -> dict[str, list[Measurement]]:
    """Return the results of all measurements by `label`; make those that `record` lacks.

    A recorded result counts only if everything that `machine` lists is the same.
    """
    record.parent.mkdir(exist_ok=True)
    lines = record.read_text("utf-8").splitlines() if record.exists() else []
    known = [entry for entry in map(json.loads, lines) if entry["machine"] == here]
    runs: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        entry = next((e for e in known if e["measurement"] == list(measurement)), None)
        if entry:
            known.remove(entry)  # the same measurement may be planned several times
        else:
            print(" ".join(measurement), flush=True)
            result = pipeline() if measurement == ("pipeline",) else measured(*measurement)
            print(f"  {result}", flush=True)
            entry = {"machine": here, "measurement": measurement, "result": result}
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        runs.setdefault(label(measurement), []).append(entry["result"])
    return runs


if __name__ == "__main__":
    main()

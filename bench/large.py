"""`python -m bench.large`: images in memory and on disk, one process and two.

Every measurement runs in its own process, several times in turn, on images of random pixels in a
temporary file. Prints a Markdown table, with the median and the extremes of images/s.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml

from bench.measure import Measurement, variant
from cifarlab.data.dataset import Dataset
from cifarlab.files import scratch
from cifarlab.runtime.device import processor, set_up
from cifarlab.training.loop import fit, prepare
from cifarlab.training.ranks import Ranks

REPEATS = 3
SMALL = ["model.widths=[16,32,32]"]
LARGE = [
    "data.name=folder",
    "train.batch_size=64",
    "data.image_size=224",
    "model.layers=3",
    "model.widths=[8,8,8]",
]
# What is measured → images, how they are kept, processes, changes to params.yaml.
ROWS: dict[str, tuple[int, str, int, list[str]]] = {
    "32×32, small network, in memory": (6_400, "memory", 1, SMALL),
    "32×32, small network, on disk and in the page cache": (6_400, "cached", 1, SMALL),
    "224×224, tiny network, in memory": (960, "memory", 1, LARGE),
    "224×224, tiny network, on disk and in the page cache": (960, "cached", 1, LARGE),
    "224×224, tiny network, on disk only": (960, "disk", 1, LARGE),
    "32×32, default network, 1 process": (2_048, "memory", 1, []),
    "32×32, default network, 2 processes": (2_048, "memory", 2, []),
}


def measure(folder: Path, images: int, kept: str, count: int, *changes: str) -> Measurement | None:
    """Train for an epoch in one thread; None from all processes of a training but the first."""
    values = {key: yaml.safe_load(value) for key, value in (c.split("=") for c in changes)}
    exact = {"train.epochs": 1, "train.lr": 1e-3, "train.threads": 1, "train.processes": count}
    params = variant("default", exact | {"train.device": "cpu"} | values)
    device, size, path = set_up(params.train), params.data.image_size, folder / f"{images}.npy"
    ranks = Ranks.join(device)
    array, labels = np.load(path, "r"), np.arange(images) % 10
    data = Dataset({"train": array}, {"train": labels}, [*"0123456789"], "random")
    assert array.shape[1] == size
    network, train, _ = prepare(params, data, device, stream=kept != "memory")
    if kept == "disk":
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    memory = [0]

    def note(*_: Any) -> None:
        status = Path("/proc/self/status").read_text("utf-8")
        memory.append(int(re.findall(r"RssAnon:\s+(\d+)", status)[0]))

    start, cpu = time.perf_counter(), time.process_time()
    fit(network, params.train, train, on_batch=note, ranks=ranks)
    found = {
        "images_per_second": images / (time.perf_counter() - start),
        "cpu_ms_per_image": 1e3 * (time.process_time() - cpu) / images,  # of the first process
        "anonymous_mb": max(memory) / 1024,
    }
    return None if ranks.rank else found


def main() -> None:
    """Measure every row and print the table."""
    results: dict[str, list[Measurement]] = {name: [] for name in ROWS}
    scratch().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        for images, size in {(n, 224 if c == LARGE else 32) for n, _, _, c in ROWS.values()}:
            pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
            np.save(Path(folder) / f"{images}.npy", pixels)
        os.sync()  # pages that are not on disk yet would stay in memory
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        for _ in range(REPEATS):
            for name, (images, kept, count, changes) in ROWS.items():
                arguments = [folder, str(images), kept, str(count), *changes]
                command = [*(torchrun if count > 1 else []), "-m", "bench.large", *arguments]
                run = [sys.executable, *command]
                done = subprocess.run(run, capture_output=True, text=True, check=True)
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, results[name][-1], file=sys.stderr, flush=True)
    print("| | images/s | CPU time, ms per image | anonymous memory, MB |\n|---|---|---|---|")
    for name, found in results.items():
        speeds = sorted(result["images_per_second"] for result in found)
        memory = max(result["anonymous_mb"] for result in found)
        cpu = median(result["cpu_ms_per_image"] for result in found)
        extremes = f"{speeds[0]:,.0f}–{speeds[-1]:,.0f}"
        print(f"| {name} | {median(speeds):,.0f} ({extremes}) | {cpu:.2f} | {memory:,.0f} |")
    print(f"\nn = {REPEATS}, one thread per process, {processor()}, torch {torch.__version__}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        where, number, kept, count, *changes = sys.argv[1:]
        result = measure(Path(where), int(number), kept, int(count), *changes)
        if result:
            print(json.dumps(result))

"""`make gpu-check`: what a GPU gives, in at most six minutes, without a network.

Runs the tests that need CUDA, then trains the default parameters and the notebook's network, with
each step as a CUDA graph and without, and the variants for a GPU. Writes bench/results/gpu.json and
gpu.md, which name the card. Of other packages it needs torch, numpy, pydantic, PyYAML, safetensors,
tqdm, filelock and pytest; the notebook's own way needs torchvision as well. Without data/ it trains
on random images, and accuracies mean nothing. On a machine without CUDA it does what it can, on
fewer images, for fewer epochs.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import peak_memory, synchronize, variant
from cifarlab import files
from cifarlab.data.dataset import Dataset
from cifarlab.nn.network import Network, predict
from cifarlab.runtime.checkpoints import Checkpoint
from cifarlab.runtime.device import conditions, precision, set_up, take_gpu
from cifarlab.training.batches import Images
from cifarlab.training.loop import Row, Trainer, fit, ignore, prepare
from cifarlab.training.ranks import ALONE

SECONDS = 360
JSON, PAGE = Path("bench/results/gpu.json"), Path("bench/results/gpu.md")
CUDA = torch.cuda.is_available()
PROFILED = 50  # steps
Measurement = dict[str, Any]
# Name of the row → variant, train.graph, epochs, what is asked beside the speed.
ROWS = {
    "default, CUDA graph": ("default", "auto", 8, ""),
    "default, again": ("default", "auto", 8, ""),
    "default, killed and resumed": ("default", "auto", 8, "resume"),
    "default, no graph": ("default", "off", 8, ""),
    "notebook's network, CUDA graph": ("notebook", "auto", 8, ""),
    "notebook's network, no graph": ("notebook", "off", 2, ""),
    "gpu, CUDA graph": ("gpu", "auto", 8, ""),
    "gpu-strong, CUDA graph": ("gpu-strong", "auto", 40, ""),
}
THEIRS = "notebook's way"


def data() -> Dataset:
    """Return data/, or random images of its size; a small part where there is no GPU."""
    if (files.DATA / "dataset.json").exists():
        found = Dataset.load(files.DATA)
    else:
        draws, sizes = np.random.default_rng(0), {"train": 50_000, "test": 10_000}
        images = {
            split: draws.integers(0, 256, (n, 32, 32, 3), np.uint8) for split, n in sizes.items()
        }
        labels = {split: draws.integers(0, 10, n) for split, n in sizes.items()}
        found = Dataset(images, labels, [str(label) for label in range(10)], "random")
    if CUDA:
        return found
    few = {"train": 512, "test": 200}
    images = {split: found.images[split][:n] for split, n in few.items()}
    labels = {split: found.labels[split][:n] for split, n in few.items()}
    return Dataset(images, labels, found.classes, found.name)


def train(name: str, graph: str, epochs: int, ask: str) -> Measurement:
    """Train a variant and return its times, its accuracy and a digest of its weights."""
    epochs = epochs if CUDA else 2
    params = variant(name, {"train.epochs": epochs, "train.graph": graph})
    device, dataset = set_up(params.train), data()
    dtype, ended = precision(params.train, device), [time.perf_counter()]

    def note(history: list[Row]) -> None:
        synchronize()
        ended.append(time.perf_counter())
        if stop and len(history) == epochs // 2:
            raise KeyboardInterrupt

    def once(checkpoint: Checkpoint | None) -> tuple[Network, Images]:
        network, images, _ = prepare(params, dataset, device)
        fit(network, params.train, images, None, note, dtype=dtype, checkpoint=checkpoint)
        return network, images

    stop = ask == "resume"
    checkpoint = Checkpoint("gpu-check", conditions(params.train, device)) if stop else None
    with suppress(KeyboardInterrupt):
        network, images = once(checkpoint)
    if checkpoint:
        stop, ended[:] = False, [time.perf_counter()]
        network, images = once(checkpoint)
        checkpoint.path.unlink()
    weights = [t.float().cpu().numpy().tobytes() for t in network.state_dict().values()]
    test = torch.from_numpy(dataset.images["test"].copy()).to(device)
    right = predict(network, test).argmax(1).cpu().numpy() == dataset.labels["test"]
    # The first epoch has the warm-up and the recording.
    usual = float(np.median(np.diff(ended)[1:] if len(ended) > 2 else np.diff(ended)))
    steps = len(images.labels) // min(params.train.batch_size, len(images.labels))
    return {
        "epochs": epochs,
        "seconds": round(ended[-1] - ended[0], 2),
        "first_epoch": round(ended[1] - ended[0], 2),
        "ms_per_step": round(1e3 * usual / steps, 3),
        "gpu_ms_per_step": gpu_time(Trainer(network, params.train, images, dtype, ALONE)),
        "accuracy": float(right.mean()) if dataset.name != "random" else None,
        "weights": hashlib.sha256(b"".join(weights)).hexdigest()[:16],
        "memory_mb": round(torch.cuda.max_memory_allocated() / 2**20 if CUDA else peak_memory()),
    }


def gpu_time(trainer: Trainer) -> float | None:
    """Return for how many milliseconds of a step the GPU works; None without a GPU."""
    if not CUDA:
        return None
    trainer.epoch(1, ignore)
    assert trainer.run_step
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED):
            trainer.run_step()
        synchronize()
    kernels = sum(event.self_device_time_total for event in recorded.key_averages())
    return round(float(kernels) / PROFILED / 1e3, 3)


def take_turns() -> str:
    """Start two holders of one GPU; return what the second one prints while it waits."""
    if not CUDA:
        return "not tried: no GPU"
    locks = files.cache() / "gpu-check"
    held = take_gpu(locks, 1)
    code = (
        "from pathlib import Path; from cifarlab.runtime.device import take_gpu; "
        f"take_gpu(Path({str(locks)!r}), 1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        line = other.stdout.readline()
        held.release()
        other.communicate(timeout=60)
    return line.strip()


def cuda_tests() -> str:
    """Run the tests that need CUDA; return pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/training", "tests/nn"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1] if lines else "pytest printed nothing"


def notebooks_way() -> Measurement:
    """Train the notebook's way, on a GPU if there is one, for a part of an epoch."""
    from bench import notebook

    dataset, images = data(), 10_000 if CUDA else 512
    device = torch.device("cuda" if CUDA else "cpu")
    train = notebook.Pictures(dataset.images["train"][:], dataset.labels["train"])
    start = time.perf_counter()
    network = notebook.network().to(device)
    seen = next(seen for seen in notebook.train(network, train) if seen >= images)
    synchronize()
    speed = seen / (time.perf_counter() - start)
    return {"images_per_second": round(speed), "seconds_for_8_epochs": round(400_000 / speed, 1)}


def check() -> Measurement:
    """Make all measurements, each in its own process, until the time is over."""
    start = time.monotonic()
    card = torch.cuda.get_device_name() if CUDA else "no GPU"
    found: Measurement = {"card": card, "torch": torch.__version__, "images": data().name}
    found["take_turns"] = take_turns()
    found["tests"] = cuda_tests()
    for name in (THEIRS, *ROWS):
        left = SECONDS - (time.monotonic() - start)
        command = [sys.executable, "-m", "bench.gpu", name]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=max(left, 1)
            )
            lines = (done.stdout if not done.returncode else done.stderr).strip().splitlines()
            found[name] = json.loads(lines[-1]) if not done.returncode else {"failed": lines[-1:]}
        except subprocess.TimeoutExpired:
            found[name] = {"failed": "no time left"}
        print(name, found[name], flush=True)
        JSON.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return found


def page(found: Measurement) -> str:
    """Return the measurements as a table in Markdown."""
    fields = "seconds", "first_epoch", "ms_per_step", "gpu_ms_per_step", "accuracy", "memory_mb"
    lines = [
        f"{found['card']}, PyTorch {found['torch']}, {found['images']}, one run each.",
        f"Tests that need CUDA: {found['tests']}. Two trainings: {found['take_turns']}.\n",
        f"| | epochs | {' | '.join(name.replace('_', ' ') for name in fields)} |",
        f"|---|---|{'---|' * len(fields)}",
    ]
    for name in ROWS:
        row = found[name]
        values = [row.get(field, row.get("failed")) for field in ("epochs", *fields)]
        lines.append(f"| {name} | {' | '.join('' if v is None else str(v) for v in values)} |")
    first, *others = (found[name].get("weights") for name in list(ROWS)[:3])
    same, resumed = (
        ("yes" if first == other else "no") if first and other else "not measured"
        for other in others
    )
    lines += [
        f"\nThe same seed gives the same bits: {same}; killed and resumed: {resumed}.",
        f"The notebook's way: {found[THEIRS]}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make one measurement that was asked for, or all of them."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as the stages do
    if name := " ".join(sys.argv[1:]):
        measured = notebooks_way() if name not in ROWS else train(*ROWS[name])
        print(json.dumps(measured))
    else:
        text = page(check())
        PAGE.write_text(text, "utf-8")
        print(text)


if __name__ == "__main__":
    main()

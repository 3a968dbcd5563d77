"""Make one measurement and print it as JSON: `python -m bench.measure ours default 0`.

Every measurement runs in its own process. cifarlab uses a GPU if there is one, the notebook's way
always uses the CPU: compare the two only on machines without a GPU.
"""

import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from bench import notebook
from cifarlab import files
from cifarlab.data.dataset import Dataset
from cifarlab.nn.network import Network, predict
from cifarlab.params.load import changed
from cifarlab.params.sections import Params
from cifarlab.runtime.device import precision, set_up
from cifarlab.runtime.processes import spare_cores
from cifarlab.training.batches import Images
from cifarlab.training.loop import fit, prepare

Measurement = dict[str, Any]
IMAGES = 50_000  # to train on, in CIFAR-10


def variant(name: str, changes: dict[str, Any] | None = None) -> Params:
    """Return the parameters of a variant of variants.yaml; "default" stands for params.yaml.

    No image is held out for validation: both ways train on all training images.
    """
    variants = {"default": {}} | yaml.safe_load(files.VARIANTS.read_text("utf-8"))
    return changed(variants[name] | {"data.validation": 0} | (changes or {}))


def reference(seed: int, limit: int | None = None) -> Measurement:
    """Train and test the notebook's way.

    With a `limit`, only about that many images are trained on: `seconds` is then the time that all
    epochs would take at that speed, and `accuracy` is None.
    """
    data = Dataset.load(files.DATA)
    torch.manual_seed(seed)
    model = notebook.network()
    train, test = (
        notebook.Pictures(data.images[split][:], data.labels[split]) for split in ("train", "test")
    )
    images = notebook.EPOCHS * len(train)
    start = time.perf_counter()
    seen = next(seen for seen in notebook.train(model, train) if seen >= (limit or images))
    trained = time.perf_counter()
    accuracy = notebook.accuracy(model, test)
    speed = seen / (trained - start)
    return {
        "seconds": images / speed,
        "images_per_second": speed,
        "accuracy": None if limit else accuracy,
        "evaluation_seconds": time.perf_counter() - trained,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def ours(name: str, seed: int, epochs: int | None = None, limit: int | None = None) -> Measurement:
    """Train and test a variant as the stages do.

    With a `limit`, only the first images of the training set are used, and `accuracy` is None.
    """
    params = variant(name, {"train.seed": seed} | ({"train.epochs": epochs} if epochs else {}))
    device, data = set_up(params.train), Dataset.load(files.DATA)
    network, everything, _ = prepare(params, data, device)
    train = Images(everything.images[:limit], everything.labels[:limit])
    test = torch.from_numpy(data.images["test"].copy()).to(device)
    labels = torch.from_numpy(data.labels["test"]).to(device)
    dtype = precision(params.train, device)
    start = time.perf_counter()
    fit(network, params.train, train, None, dtype=dtype)
    synchronize()
    trained = time.perf_counter()
    logits = predict(network, test, params.evaluate.batch_size)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    evaluated = time.perf_counter()
    batch_size = min(params.train.batch_size, len(train.labels))
    seen = params.train.epochs * (len(train.labels) // batch_size) * batch_size
    speed = seen / (trained - start)
    return {
        "seconds": trained - start,
        "images_per_second": speed,
        "gflop_per_second": operations(network, params.data.image_size) * speed / 1e9,
        "accuracy": None if limit else accuracy,
        "evaluation_seconds": evaluated - trained,
        "parameters": network.count_parameters(),
        "precision": str(dtype),
        "memory_mb": peak_memory(),
    }


def cost(images: int, *changes: str) -> Measurement:
    """Train the default parameters, changed, on synthetic images for one epoch."""
    params = one_epoch(*changes)
    device = set_up(params.train)
    network, train = synthetic(params, images, device)
    seconds = timed_fit(network, params, train, device)
    return {
        "milliseconds_per_image": 1e3 * seconds / images,
        "memory_mb": peak_memory(),
        "gflop_per_image": operations(network, params.data.image_size) / 1e9,
    }


def compiled(images: int, *changes: str) -> Measurement:
    """Train the default parameters, changed, for an epoch as they are and compiled, in turn."""
    params = one_epoch(*changes)
    device = set_up(params.train)
    eager, train = synthetic(params, images, device)
    faster, _ = synthetic(params, images, device)
    faster.compile()
    first = [timed_fit(network, params, train, device) for network in (eager, faster)]
    then = [[timed_fit(n, params, train, device) for n in (eager, faster)] for _ in range(3)]
    plain, fast = (1e3 * min(seconds) / images for seconds in zip(*then, strict=True))
    return {
        "milliseconds_per_image": plain,
        "compiled_milliseconds_per_image": fast,
        "seconds_of_the_first_epoch": first,
    }


def one_epoch(*changes: str) -> Params:
    """Return the default parameters for one epoch, with changes such as "model.layers=4"."""
    values = dict(change.split("=") for change in changes)
    given = {key: yaml.safe_load(value) for key, value in values.items()}
    return variant("default", {"train.epochs": 1, "train.lr": 1e-3} | given)


def synthetic(params: Params, images: int, device: torch.device) -> tuple[Network, Images]:
    """Return the untrained network, and as many images of ten classes."""
    size = params.data.image_size
    # One image that stands for all of them: only the copy that `prepare` makes takes memory.
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    data = Dataset(
        {"train": np.broadcast_to(image, (images, *image.shape))},
        {"train": np.arange(images) % 10},
        [str(label) for label in range(10)],
        "synthetic",
    )
    network, train, _ = prepare(params, data, device)
    return network, train


def timed_fit(network: Network, params: Params, train: Images, device: torch.device) -> float:
    """Train; return the seconds that it took."""
    start = time.perf_counter()
    fit(network, params.train, train, None, dtype=precision(params.train, device))
    synchronize()
    return time.perf_counter() - start


def matmul(size: int = 4096, repeats: int = 7) -> Measurement:
    """Multiply two float32 matrices; return the speed of the fastest repetition."""
    device = set_up(variant("default").train)
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return {"gflop_per_second": 2 * size**3 / min(seconds) / 1e9}


def pflop(name: str) -> float:
    """Count the operations of a whole training on CIFAR-10, in 10^15.

    `name` is a variant, or "reference" for the notebook's way.
    """
    if name == "reference":
        return operations(notebook.network(), 32) * notebook.EPOCHS * IMAGES / 1e15
    params = variant(name)
    network, batch = Network(params.model, 32, [*"0123456789"]), params.train.batch_size
    return operations(network, 32) * params.train.epochs * (IMAGES // batch * batch) / 1e15


def operations(network: torch.nn.Module, size: int) -> float:
    """Count the floating-point operations that training takes for one image of `size` pixels.

    The forward and the backward pass are counted, the optimizer is not.
    """
    images = torch.zeros(2, 3, size, size, device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        network.train()(images).sum().backward()
    return float(counter.get_total_flops() / 2)


def peak_memory() -> float:
    """Return the peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def synchronize() -> None:
    """Wait until the GPU has finished its work, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    MEASUREMENTS = {
        "reference": reference,
        "ours": ours,
        "cost": cost,
        "compiled": compiled,
        "matmul": matmul,
    }
    kind, *arguments = sys.argv[1:]
    if kind != "reference" and "GOMP_SPINCOUNT" not in os.environ:  # as the stages do
        spare_cores()
        os.execv(sys.executable, [sys.executable, "-m", "bench.measure", *sys.argv[1:]])
    measure: Any = MEASUREMENTS[kind]
    print(json.dumps(measure(*(int(a) if a.isdigit() else a for a in arguments))))

"""One measurement, printed as JSON: `python -m bench.measure ours default 0`. A process of its own for each.

cifarlab's side uses a GPU where there is one, the notebook's way the CPU: compare the two on machines without one.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from bench import notebook
from cifarlab import models, training
from cifarlab.datasets import Dataset
from cifarlab.params import Params, changed

DATA = Path("data")


def variant(name: str, changes: dict[str, Any] | None = None) -> Params:
    """params.yaml, changed as variants.yaml says under `name`; "default" is params.yaml itself."""
    named = {} if name == "default" else yaml.safe_load(Path("variants.yaml").read_text("utf-8"))[name]
    return changed(named | (changes or {}))


def prepare(params: Params) -> tuple[models.Network, training.Images, training.Images]:
    """Return network, training and test images on the device, as the train stage has them; no image is held out."""
    device = training.set_up(params.train)
    data = Dataset.load(DATA)
    train, test = (
        training.Images(torch.from_numpy(data.images[split].copy()).to(device), torch.from_numpy(data.labels[split]).to(device))
        for split in ("train", "test")
    )
    network = models.Network(params.model, params.data.image_size, data.classes)
    network.measure(train.images)
    return network.to(device), train, test


def reference(seed: int, limit: int | None = None) -> dict[str, Any]:
    """Train and test the notebook's way: seconds, images/s, test accuracy, seconds for evaluating the test images.

    With a `limit` on the training images the seconds are those that its epochs would take at that speed, and the accuracy is left out.
    """
    data = Dataset.load(DATA)
    torch.manual_seed(seed)
    model = notebook.network()
    train = notebook.Pictures(data.images["train"][:], data.labels["train"])
    test = notebook.Pictures(data.images["test"][:], data.labels["test"])
    start = time.perf_counter()
    seen = next(seen for seen in notebook.epochs(model, train) if seen >= (limit or notebook.EPOCHS * len(train)))
    trained = time.perf_counter()
    accuracy = notebook.accuracy(model, test)
    return {
        "seconds": (trained - start) / seen * notebook.EPOCHS * len(train),
        "images_per_second": seen / (trained - start),
        "accuracy": None if limit else accuracy,
        "evaluation_seconds": time.perf_counter() - trained,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def ours(name: str, seed: int, epochs: int | None = None, limit: int | None = None) -> dict[str, Any]:
    """Train and test a variant as the stages do: seconds, speed, test accuracy, seconds for evaluating, peak memory.

    Nothing is held out: like the notebook's way, all training images train. With a `limit` only
    the first of them do, and the accuracy is left out.
    """
    params = variant(name, {"train.seed": seed} | ({"train.epochs": epochs} if epochs else {}))
    network, train, test = prepare(params)
    train = training.Images(train.images[:limit], train.labels[:limit])
    start = time.perf_counter()
    training.fit(network, params.train, train, None, lambda _: None)
    synchronize()
    trained = time.perf_counter()
    logits = models.predict(network, test.images, params.evaluate.batch_size)
    accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    evaluated = time.perf_counter()
    batch_size = min(params.train.batch_size, len(train.labels))
    seen = params.train.epochs * (len(train.labels) // batch_size) * batch_size
    return {
        "seconds": trained - start,
        "images_per_second": seen / (trained - start),
        "gflop_per_second": operations(network, params.data.image_size) * seen / (trained - start) / 1e9,
        "accuracy": None if limit else accuracy,
        "evaluation_seconds": evaluated - trained,
        "parameters": network.count_parameters(),
        "precision": str(training.precision(params.train, train.images.device)),
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def operations(network: models.Network, size: int) -> float:
    """Count the floating-point operations of training on one image of `size` pixels, forward and backward."""
    images = torch.zeros(2, 3, size, size, device=network.normalize.mean.device)
    with FlopCounterMode(display=False) as counter:
        network.train()(images).sum().backward()
    return float(counter.get_total_flops() / 2)


def cost(images: int, *changes: str) -> dict[str, Any]:
    """Train the default parameters, changed, for an epoch of synthetic images: milliseconds an image, peak memory."""
    values = {key: yaml.safe_load(value) for key, value in (change.split("=") for change in changes)}
    params = variant("default", {"train.epochs": 1, "train.lr": 1e-3, **values})
    device = training.set_up(params.train)
    pixels = torch.randint(0, 256, (images, params.data.image_size, params.data.image_size, 3), dtype=torch.uint8, device=device)
    network = models.Network(params.model, params.data.image_size, [str(c) for c in range(10)])
    network.measure(pixels)
    start = time.perf_counter()
    training.fit(network.to(device), params.train, training.Images(pixels, torch.arange(images, device=device) % 10), None, lambda _: None)
    synchronize()
    seconds = time.perf_counter() - start
    return {
        "milliseconds_per_image": 1e3 * seconds / images,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gflop_per_image": operations(network, params.data.image_size) / 1e9,
    }


def matmul(size: int = 4096, repeats: int = 7) -> dict[str, Any]:
    """GFLOP/s of the machine's own float32 matrix product, the best of some."""
    device = training.set_up(variant("default").train)
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return {"gflop_per_second": 2 * size**3 / min(seconds) / 1e9}


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    function = {"reference": reference, "ours": ours, "cost": cost, "matmul": matmul}[what]
    result = function(*(int(a) if a.isdigit() else a for a in arguments))  # type: ignore[operator]
    print(json.dumps(result))

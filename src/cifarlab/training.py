"""The training loop. Knows neither DVC nor MLflow nor where files lie: images in, a trained network out."""

import contextlib
import itertools
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from cifarlab import UserError
from cifarlab.augment import Draws, augment, cutmix, draw
from cifarlab.checkpoints import Checkpoint
from cifarlab.diagnostics import diagnose
from cifarlab.models import Network, keep_memory, predict
from cifarlab.optimizers import make_optimizers
from cifarlab.params import TrainParams

DIAGNOSED = 512  # training images that train.diagnostics looks at


class Images(NamedTuple):
    """Images uint8 (N, height, width, 3) and labels int64 (N,), on the training device."""

    images: Tensor
    labels: Tensor


class Epoch(NamedTuple):
    """A row of history.csv. The validation figures are None where nothing is held out."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    learning_rate: float
    diagnostics: dict[str, float]

    def row(self) -> dict[str, float | None]:
        """Return the columns of history.csv."""
        return {**{k: v for k, v in self._asdict().items() if k != "diagnostics"}, **self.diagnostics}


def set_up(params: TrainParams) -> torch.device:
    """Make what follows repeatable and return the device to train on."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = cuda: PyTorch sees no CUDA device here; use train.device: auto or cpu")
    torch.manual_seed(params.seed)
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms(True), but that imports the compiler: 2 s
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is written before it is read
    keep_memory()
    torch.backends.cudnn.benchmark = False
    if params.threads != "auto":
        torch.set_num_threads(params.threads)
    return torch.device("cuda" if params.device != "cpu" and torch.cuda.is_available() else "cpu")


def take_gpu(locks: Path, count: int) -> FileLock:
    """Make a GPU that no other training with the same `locks` uses the current one; wait for it where all are taken.

    Returns the lock that keeps it until it is released or the process ends, however it ends.
    """
    locks.mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count():
        for index in range(count):
            lock = FileLock(locks / f"gpu-{index}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0.5)
                torch.cuda.set_device(index)
                return lock
        if attempt == 0:
            print("every GPU trains another experiment of this checkout; this one waits for its turn", flush=True)
    raise AssertionError


def precision(params: TrainParams, device: torch.device) -> torch.dtype:
    """Return the type that convolutions and matrix products compute in; auto is bfloat16 where the hardware is faster at it."""
    if params.precision == "auto":
        cpu = torch.cpu.get_capabilities()
        # Intel's AVX-512 takes as long for bfloat16 as for float32, and the conversions come on top; its AMX is faster.
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "Intel" not in str(cpu.get("cpu_name")))
        )
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if params.precision == "bfloat16" else torch.float32


def processor() -> str:
    """Return the name of the CPU, and of the vector instructions that PyTorch takes there."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def conditions(params: TrainParams, device: torch.device) -> dict[str, str]:
    """Return what, beside the inputs of the train stage, decides the bits of its outputs."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        "precision": str(precision(params, device)).removeprefix("torch."),
        "torch": str(torch.__version__),
    }


def loss_function(name: str, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean loss of logits (N, classes) against labels, int64 (N,) or shares of the classes, float (N, classes).

    cross_entropy in nats; quadratic is ½ Σ (softmax(z) - y)² over the classes, y smoothed alike.
    """
    if name == "cross_entropy":
        return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def quadratic(logits: Tensor, labels: Tensor) -> Tensor:
        classes = logits.shape[1]
        target = labels if labels.ndim == 2 else F.one_hot(labels, classes)
        target = target * (1 - label_smoothing) + label_smoothing / classes
        return (logits.softmax(1) - target).square().sum(1).mean() / 2

    return quadratic


def fit(
    network: Network,
    params: TrainParams,
    train: Images,
    validation: Images | None,
    on_epoch: Callable[[list[Epoch]], None],
    *,
    checkpoint: Checkpoint | None = None,
) -> list[Epoch]:
    """Train `network` in place and return all epochs; `on_epoch` is called with those so far after every one.

    The order and the augmentation of an epoch depend on (seed, epoch) only, not on how the epochs before it went: a training
    that goes on from `checkpoint` ends in the same bytes as one that was never stopped. The training accuracy of images
    that CutMix has changed counts the class of the image that got a piece of another.

    Raises
    ------
    UserError
        The loss is no longer a number.
    """
    n = len(train.labels)
    batch_size = min(params.batch_size, n)
    batches = n // batch_size  # what is left over waits for another epoch's order
    device, dtype = train.images.device, precision(params, train.images.device)
    network.to(memory_format=torch.channels_last)
    optimizers = make_optimizers(network, params, params.epochs * batches, dtype)
    loss_of, mix = loss_function(params.loss, params.label_smoothing), cutmix(params.cutmix, len(network.classes))
    history: list[Epoch] = []
    parts: dict[str, Any] = {"network": network} | {str(i): part for i, part in enumerate(itertools.chain(*optimizers))}
    if checkpoint and (state := checkpoint.load()):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        history = [Epoch(*row) for row in state["history"]]
        print(f"continuing after epoch {len(history)} of {params.epochs}", flush=True)
    started, seen = time.perf_counter(), 0
    for epoch in range(len(history) + 1, params.epochs + 1):
        network.train()
        # The order, CutMix, and on the device dropout, draw from the global generators.
        torch.manual_seed(params.seed * 100_003 + epoch)
        order = torch.randperm(n)[: batches * batch_size].to(device)
        draws = draw(n, params.seed, epoch, flip=params.flip, translate=params.translate)
        draws = draws and Draws(*(drawn.to(device)[order] for drawn in draws))
        loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        with tqdm(total=len(order), desc=f"epoch {epoch}/{params.epochs}", unit=" images", disable=None, leave=False) as bar:
            for step, chosen in enumerate(torch.split(order, batch_size), 1):
                labels = train.labels[chosen]
                batch = slice((step - 1) * batch_size, step * batch_size)
                images, targets = mix(augment(train.images[chosen], draws and Draws(*(drawn[batch] for drawn in draws))), labels)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits = network(images)
                loss = loss_of(logits.float(), targets)
                network.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                for optimizer, schedule in optimizers:
                    optimizer.step()
                    schedule.step()
                loss_sum += loss.detach()
                correct += (logits.detach().argmax(1) == labels).sum()
                bar.update(batch_size)
                if not bar.disable and step % 10 == 0:
                    bar.set_postfix(loss=f"{loss_sum.item() / step:.3f}", accuracy=f"{correct.item() / (step * batch_size):.1%}")
        train_loss = loss_sum.item() / batches
        val_loss, val_accuracy = validate(network, validation, params.loss, dtype) if validation else (None, None)
        # What the last step broke shows in the weights or in the validation only.
        if not (math.isfinite(train_loss + (val_loss or 0)) and all(bool(p.isfinite().all()) for p in network.parameters())):
            muon = " or a lower train.muon_lr" if params.optimizer == "muon" else ""
            raise UserError(f"the training diverged in epoch {epoch}; try a train.lr below {params.lr:g}{muon}")
        inside = diagnose(network, train.images[:DIAGNOSED], train.labels[:DIAGNOSED], loss_of) if params.diagnostics else {}
        result = Epoch(
            epoch, train_loss, correct.item() / len(order), val_loss, val_accuracy, float(optimizers[0][1].get_last_lr()[0]), inside
        )
        history.append(result)
        if checkpoint:
            checkpoint.save({name: part.state_dict() for name, part in parts.items()} | {"history": [tuple(row) for row in history]})
        seen, elapsed = seen + len(order), time.perf_counter() - started
        report(result, params.epochs, seen / elapsed, elapsed / seen * len(order) * (params.epochs - epoch))
        on_epoch(history)
    return history


def validate(network: Network, held_out: Images, loss: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return loss, without label smoothing, and accuracy."""
    with torch.autocast(held_out.images.device.type, dtype, enabled=dtype != torch.float32):
        logits = predict(network, held_out.images, 100).float()
    return loss_function(loss)(logits, held_out.labels).item(), (logits.argmax(1) == held_out.labels).float().mean().item()


def report(epoch: Epoch, epochs: int, speed: float, left: float) -> None:
    """Print the line of an epoch: a terminal keeps it above its progress bar, a log has nothing else."""
    held_out = "" if epoch.val_loss is None else f"   validation loss {epoch.val_loss:.3f}, accuracy {epoch.val_accuracy:.1%}"
    tqdm.write(
        f"epoch {epoch.epoch}/{epochs}   loss {epoch.train_loss:.3f}, accuracy {epoch.train_accuracy:.1%}{held_out}   "
        f"{speed:,.0f} images/s, {left:.0f} s left",
        file=sys.stdout,
    )
    sys.stdout.flush()

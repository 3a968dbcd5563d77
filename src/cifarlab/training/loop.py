"""The training loop: images in, a trained network out."""

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cifarlab.data.augment import Draws, augment, cutmix, draw
from cifarlab.data.dataset import Dataset
from cifarlab.errors import UserError
from cifarlab.nn.diagnostics import diagnose
from cifarlab.nn.network import Network, predict
from cifarlab.params.sections import Params, TrainParams
from cifarlab.training.optimizers import make_optimizers

Row = dict[str, float | None]  # of history.csv


class Images(NamedTuple):
    """Images, uint8 (N, height, width, 3), and labels, int64 (N,), on the training device."""

    images: Tensor
    labels: Tensor


class Checkpoint(Protocol):
    """Where a training keeps its state, to resume if it is killed."""

    def load(self) -> dict[str, Any] | None:
        """Return the state that was saved last; None to start from the beginning."""

    def save(self, state: dict[str, Any]) -> None:
        """Keep the state after an epoch."""


def prepare(
    params: Params, data: Dataset, device: torch.device
) -> tuple[Network, Images, Images | None]:
    """Split the training images, build the network and measure its normalisation and stem.

    The initial weights depend on train.seed.

    Returns
    -------
    The untrained network, the images to train on, and those held out for validation (None where
    data.validation leaves none), all on `device`.

    Raises
    ------
    UserError
        Fewer than two images are left to train on.
    """
    kept, held_out = data.split(params.data.validation)
    if len(kept) < 2:
        left = f"data.validation = {params.data.validation} leaves {len(kept)} images to train on"
        raise UserError(f"{left}, too few for a batch; lower it")

    def select(indices: npt.NDArray[np.int64]) -> Images:
        arrays = data.images["train"][indices], data.labels["train"][indices]
        return Images(*(torch.from_numpy(array).to(device) for array in arrays))

    train = select(kept)
    torch.manual_seed(params.train.seed)
    network = Network(params.model, params.data.image_size, data.classes)
    network.measure(train.images)
    return network.to(device), train, select(held_out) if len(held_out) else None


def ignore(*_: object) -> None:
    """Do nothing after an epoch or a batch."""


def fit(
    network: Network,
    params: TrainParams,
    train: Images,
    validation: Images | None = None,
    on_epoch: Callable[[list[Row]], None] = ignore,
    *,
    on_batch: Callable[..., None] = ignore,
    dtype: torch.dtype = torch.float32,
    checkpoint: Checkpoint | None = None,
) -> list[Row]:
    """Train `network` in place and return the rows of history.csv.

    Batches and dropout of an epoch depend only on the seed and the epoch. So a training that
    resumes from `checkpoint` ends in the same bytes as one that was never stopped.

    Parameters
    ----------
    on_epoch : called after each epoch with the rows so far
    on_batch : called after each batch with the epoch, the number of images seen in this epoch and
        in all of it, and a function that returns the epoch's loss and accuracy so far. That
        function waits for the GPU.
    dtype : for convolutions and matrix products; the weights stay float32

    Raises
    ------
    UserError
        The loss or a weight became NaN or infinite.
    """
    trainer = Trainer(network, params, train, dtype)
    history = trainer.resume(checkpoint) if checkpoint else []
    for epoch in range(len(history) + 1, params.epochs + 1):
        row = trainer.epoch(epoch, on_batch) | trainer.validate(validation)
        check_finite(network, row, params)
        row["learning_rate"] = float(trainer.optimizers[0][1].get_last_lr()[0])  # of the next step
        if params.diagnostics:
            row.update(diagnose(network, *train, trainer.loss_of))
        history.append(row)
        if checkpoint:
            checkpoint.save(trainer.state() | {"history": history})
        on_epoch(history)
    return history


class Trainer:
    """A network in training, with its batches, loss and optimizers."""

    def __init__(self, net: Network, params: TrainParams, data: Images, dtype: torch.dtype) -> None:
        self.network, self.params = net.to(memory_format=torch.channels_last), params
        self.data, self.device = data, data.images.device
        # Images that are left over come in other epochs.
        self.batch_size = min(params.batch_size, len(data.labels))
        self.steps = len(data.labels) // self.batch_size
        self.mix = cutmix(params.cutmix, len(net.classes))
        balanced = params.class_weights == "balanced"
        weights = class_weights(data.labels, len(net.classes)) if balanced else None
        self.loss_of = loss_function(params.loss, params.label_smoothing, weights)
        self.optimizers = make_optimizers(net, params, params.epochs * self.steps, dtype)
        parts = enumerate(chain(*self.optimizers))
        self.parts: dict[str, Any] = {"network": net} | {str(i): part for i, part in parts}
        # Convolutions and matrix products compute in `dtype`.
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batches of an epoch (1, 2, …), which depend on the seed and the epoch only.

        The iterator seeds torch's global generators. Order and CutMix draw from them, and so does
        dropout in the training steps between the batches: do not compute batches in advance.

        Yields
        ------
        Augmented images, uint8 (N, 3, height, width). Targets: the labels or, after CutMix, the
        share of each class, float (N, classes). Labels, int64 (N,): after CutMix, the class of the
        image that got a piece of another.
        """
        (images, labels), params = self.data, self.params
        torch.manual_seed(params.seed * 100_003 + epoch)
        order = torch.randperm(len(labels))[: self.steps * self.batch_size].to(self.device)
        draws = draw(len(labels), params.seed, epoch, flip=params.flip, translate=params.translate)
        draws = draws and Draws(*(values.to(self.device) for values in draws))
        for chosen in torch.split(order, self.batch_size):
            drawn = draws and Draws(*(values[chosen] for values in draws))
            classes = labels[chosen]
            yield *self.mix(augment(images[chosen], drawn), classes), classes

    def epoch(self, epoch: int, on_batch: Callable[..., None]) -> Row:
        """Train for an epoch and return its mean loss and its accuracy, over all batches."""
        size, (loss_sum, correct) = self.batch_size, torch.zeros(2, device=self.device)

        def results() -> tuple[float, float]:
            return loss_sum.item() / step, correct.item() / (step * size)

        self.network.train()
        for step, (images, targets, labels) in enumerate(self.batches(epoch), 1):
            loss, logits = self.step(images, targets)
            loss_sum += loss
            correct += (logits.argmax(1) == labels).sum()
            on_batch(epoch, step * size, self.steps * size, results)
        mean_loss, accuracy = results()
        return {"epoch": epoch, "train_loss": mean_loss, "train_accuracy": accuracy}

    def step(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Make one step and return the loss and the logits before it."""
        with self.autocast:
            logits = self.network(images)
        loss = self.loss_of(logits.float(), targets)
        self.network.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in self.optimizers:
            optimizer.step()
            schedule.step()
        return loss.detach(), logits.detach()

    def validate(self, held_out: Images | None) -> Row:
        """Return the loss, without label smoothing, and the accuracy; None without images."""
        if held_out is None:
            return {"val_loss": None, "val_accuracy": None}
        with self.autocast:
            logits = predict(self.network, held_out.images, 100).float()
        loss = loss_function(self.params.loss)(logits, held_out.labels)
        accuracy = (logits.argmax(1) == held_out.labels).float().mean()
        return {"val_loss": loss.item(), "val_accuracy": accuracy.item()}

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs: weights, optimizers and schedules."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def resume(self, checkpoint: Checkpoint) -> list[Row]:
        """Continue from the checkpoint, if there is one, and return the rows it has."""
        if (state := checkpoint.load()) is None:
            return []
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        history: list[Row] = state["history"]
        print(f"continuing after epoch {len(history)} of {self.params.epochs}", flush=True)
        return history


@torch.no_grad()
def check_finite(network: Network, row: Row, params: TrainParams) -> None:
    """Refuse a loss or a weight that is NaN or infinite.

    Damage from the last step of an epoch shows only in the weights and in the validation loss.
    """
    results = [value for value in row.values() if value is not None]
    if all(map(math.isfinite, results)) and all(p.isfinite().all() for p in network.parameters()):
        return
    muon = " or a lower train.muon_lr" if params.optimizer == "muon" else ""
    reason = f"diverged in epoch {row['epoch']}: the loss or a weight became NaN or infinite"
    raise UserError(f"the training {reason}; try a train.lr below {params.lr:g}{muon}")


def loss_function(
    name: str, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean loss of logits (N, classes) and targets.

    Targets are labels, int64 (N,), or the share of each class, float (N, classes). cross_entropy
    is in nats. quadratic is ½ Σ (softmax(z) - y)² over the classes, with y smoothed likewise.

    Parameters
    ----------
    weights : float (classes,), factors on the loss of each image; without them, all are 1
    """
    reduction = "mean" if weights is None else "none"

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        if name == "cross_entropy":
            losses = F.cross_entropy(
                logits, targets, reduction=reduction, label_smoothing=label_smoothing
            )
        else:
            classes = logits.shape[1]
            target = targets if targets.ndim == 2 else F.one_hot(targets, classes)
            target = target * (1 - label_smoothing) + label_smoothing / classes
            losses = (logits.softmax(1) - target).square().sum(1)
            losses = (losses.mean() if weights is None else losses) / 2
        if weights is None:
            return losses
        return (losses * (targets @ weights if targets.ndim == 2 else weights[targets])).mean()

    return loss


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return for each class images / (classes · images of the class), float (classes,).

    The mean over the images is 1. It is "balanced" in scikit-learn (King & Zeng 2001).
    """
    # On the CPU, because on CUDA counting need not be deterministic.
    images = torch.bincount(labels.cpu(), minlength=classes).clamp(min=1)
    return (len(labels) / (classes * images.float())).to(labels.device)

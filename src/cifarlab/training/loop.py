"""The training loop: images in, a trained network out."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cifarlab.data.dataset import Dataset, Labels
from cifarlab.data.mapped import Mapped
from cifarlab.errors import UserError, first_line
from cifarlab.nn.diagnostics import diagnose
from cifarlab.nn.network import Network, predict
from cifarlab.params.sections import Params, TrainParams
from cifarlab.training import graph
from cifarlab.training.batches import Batches, Images
from cifarlab.training.optimizers import make_optimizers, schedule
from cifarlab.training.ranks import ALONE, Ranks

Row = dict[str, float | None]  # of history.csv
Loss = Callable[[Tensor, Tensor], Tensor]


class Checkpoint(Protocol):
    """Where a training keeps its state, to resume if it is killed."""

    def load(self) -> dict[str, Any] | None:
        """Return the state that was saved last; None to start from the beginning."""

    def save(self, state: dict[str, Any]) -> None:
        """Keep the state after an epoch."""


def prepare(
    params: Params, data: Dataset, device: torch.device, *, stream: bool = False
) -> tuple[Network, Images, Images | None]:
    """Split the training images, build the network and measure its normalisation and stem.

    The initial weights depend on train.seed.

    Parameters
    ----------
    stream : leave the images on disk, instead of copying them to the memory of the device

    Returns
    -------
    The untrained network, the images to train on, and those held out for validation (None where
    data.validation leaves none), all on `device`.

    Raises
    ------
    UserError
        Fewer than two images are left to train on, for each process.
    """
    kept, held_out = data.split(params.data.validation, params.data.validation_seed)
    if len(kept) < 2 * params.train.processes:
        left = f"data.validation = {params.data.validation} leaves {len(kept)} images to train on"
        raise UserError(f"{left}, too few for a batch; lower it")

    def select(indices: Labels) -> Images:
        images = Mapped(data.images["train"], indices, device)
        labels = torch.from_numpy(data.labels["train"][indices]).to(device)
        return Images(images if stream else images[:], labels)

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
    ranks: Ranks = ALONE,
) -> list[Row]:
    """Train `network` in place and return the rows of history.csv.

    Batches and dropout of an epoch depend only on the seed and the epoch. So a training that
    resumes from `checkpoint` ends in the same bytes as one that was never stopped.

    Parameters
    ----------
    on_epoch : called after each epoch with the rows so far
    on_batch : called after each batch with the epoch, how many of its images were seen, how many
        it has, and a function that returns the epoch's loss and accuracy so far; it waits for a GPU
    dtype : for convolutions and matrix products; the weights stay float32
    ranks : the processes of this training, each of which calls this function; the first one may
        have a checkpoint

    Raises
    ------
    UserError
        The loss or a weight became NaN or infinite.
    """
    trainer = Trainer(network, params, train, dtype, ranks)
    history = trainer.resume(checkpoint)
    for epoch in range(len(history) + 1, params.epochs + 1):
        row = trainer.epoch(epoch, on_batch) | trainer.validate(validation)
        check_finite(network, row, params)
        # Of the next step, for what `train.lr` is for.
        row["learning_rate"] = float(trainer.schedule[epoch * trainer.steps]) * params.lr
        if params.diagnostics:
            row.update(diagnose(network, *train, trainer.loss_of))
        history.append(row)
        if checkpoint:
            checkpoint.save({"parts": [p.state_dict() for p in trainer.parts], "history": history})
        on_epoch(history)
    return history


class Trainer:
    """A network in training, with its batches, loss and optimizers.

    A step takes everything from tensors that stay where they are in memory, and leaves its results
    in such tensors. So the same function runs on a CPU and can be recorded as a CUDA graph.
    """

    def __init__(
        self, net: Network, params: TrainParams, data: Images, dtype: torch.dtype, ranks: Ranks
    ) -> None:
        self.network, self.params = net.to(memory_format=torch.channels_last), params
        self.device, classes = data.images.device, len(net.classes)
        self.batches, self.ranks = Batches(data, params, classes, ranks), ranks
        self.steps = self.batches.steps
        self.share = self.batches.order.shape[1] / self.batches.size  # of a batch, here
        self.trained = [p for p in net.parameters() if p.requires_grad]
        self.statistics = [b for name, b in net.named_buffers() if "running_" in name]
        balanced = params.class_weights == "balanced"
        weights = class_weights(data.labels, classes) if balanced else None
        self.loss_of = loss_function(params.loss, params.label_smoothing, weights)
        self.optimizers = make_optimizers(net, params, dtype)
        self.parts: list[Any] = [net, *self.optimizers]
        self.highest = [[g["lr"] for g in optimizer.param_groups] for optimizer in self.optimizers]
        self.schedule = schedule(params.schedule, params.epochs * self.steps)
        # The rates of an epoch, the highest is 1. Fused optimizers take float32 on CUDA; on a CPU,
        # double precision is that of a plain number.
        exact = torch.float64 if self.device.type == "cpu" else torch.float32
        self.rates = torch.zeros(self.steps, dtype=exact, device=self.device)
        self.sums = torch.zeros(3, device=self.device)  # of losses, correct images, steps
        # Convolutions and matrix products compute in `dtype`.
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.run_step: Callable[[], None] | None = None

    def epoch(self, epoch: int, on_batch: Callable[..., None]) -> Row:
        """Train for an epoch and return its mean loss and its accuracy, over all batches.

        Of several processes, each normalises its part of a batch by the statistics of that part.
        After the epoch, the running statistics become the mean over the processes.
        """
        size, steps, own = self.batches.size, self.steps, self.batches.order.shape[1]

        def results() -> tuple[float, float]:
            loss, correct, count = self.sums.tolist()
            return loss / max(count, 1), correct / max(count * own, 1)

        self.network.train()
        self.run_step = self.run_step or self.record()
        self.batches.begin(epoch)
        self.rates.copy_(torch.from_numpy(self.schedule[(epoch - 1) * steps : epoch * steps]))
        self.sums.zero_()
        for step in range(1, steps + 1):
            self.run_step()
            on_batch(epoch, step * size, steps * size, results)
        found = torch.tensor(results(), dtype=torch.float64, device=self.device)
        self.ranks.average([found], self.share)
        self.ranks.average(self.statistics, 1 / self.ranks.size)
        mean_loss, accuracy = found.tolist()
        return {"epoch": epoch, "train_loss": mean_loss, "train_accuracy": accuracy}

    def step(self) -> None:
        """Make one step, and add the loss and the correct images before it to the sums."""
        rate = self.batches.row(self.rates)
        images, targets, labels = self.batches.next()
        with self.autocast:
            logits = self.network(images)
        loss = self.loss_of(logits.float(), targets)
        self.network.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.ranks.average([p.grad for p in self.trained if p.grad is not None], self.share)
        recorded = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        for optimizer, highest in zip(self.optimizers, self.highest, strict=True):
            for group, peak in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * peak
                group["capturable"] = recorded  # Adam wants to be told
            optimizer.step()
        correct = (logits.argmax(1) == labels).sum().float()
        self.sums += torch.stack([loss.detach(), correct, torch.ones_like(correct)])

    def record(self) -> Callable[[], None]:
        """Return the function that makes a step: on CUDA, the replay of a graph.

        The steps that a recording needs leave no trace: weights, running statistics and optimizers
        are as before, and `Batches.begin` seeds the random generators.
        """
        if self.device.type not in graph.DEVICES or self.params.graph == "off":
            return self.step
        if self.ranks.size > 1 or isinstance(self.batches.data.images, Mapped):
            reason = "several processes" if self.ranks.size > 1 else "the images stay on disk"
            self.ranks.say(f"no CUDA graph, the training is slower: {reason}")
            return self.step
        before = [(tensor, tensor.clone()) for tensor in self.tensors()]
        self.rates.zero_()
        try:
            replay = graph.record(self.step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.ranks.say(f"no CUDA graph, the training is slower: {first_line(error)}")
            replay = self.step
        for tensor in self.tensors():
            tensor.zero_()  # the state of a new optimizer begins with zeros
        for tensor, value in before:
            tensor.copy_(value)
        return replay

    def tensors(self) -> list[Tensor]:
        """Return all that a step changes for good.

        Those of the network, momenta, and with Adam squared gradients and numbers of steps.
        """
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        values = [value for state in states for value in state.values()]
        return [*self.network.state_dict().values(), *filter(torch.is_tensor, values)]

    def validate(self, held_out: Images | None) -> Row:
        """Return the loss, without label smoothing, and the accuracy; None without images."""
        if held_out is None:
            return {"val_loss": None, "val_accuracy": None}
        with self.autocast:
            logits = predict(self.network, held_out.images).float()
        loss = loss_function(self.params.loss)(logits, held_out.labels)
        accuracy = (logits.argmax(1) == held_out.labels).float().mean()
        return {"val_loss": loss.item(), "val_accuracy": accuracy.item()}

    def resume(self, checkpoint: Checkpoint | None) -> list[Row]:
        """Continue from the checkpoint of the first process, if there is one; return its rows."""
        if (state := self.ranks.from_first(checkpoint and checkpoint.load())) is None:
            return []
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        history: list[Row] = state["history"]
        self.ranks.say(f"continuing after epoch {len(history)} of {self.params.epochs}")
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


def loss_function(name: str, smoothing: float = 0.0, weights: Tensor | None = None) -> Loss:
    """Return the mean loss of logits (N, classes) and targets.

    Targets are labels, int64 (N,), or the share of each class, float (N, classes). cross_entropy
    is in nats. quadratic is ½ Σ (softmax(z) - y)² over the classes, with y smoothed likewise.

    Parameters
    ----------
    weights : float (classes,), factors on the loss of each image; without them, all are 1
    """
    reduce = "mean" if weights is None else "none"

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        if name == "cross_entropy":
            losses = F.cross_entropy(logits, targets, reduction=reduce, label_smoothing=smoothing)
        else:
            classes = logits.shape[1]
            target = targets if targets.ndim == 2 else F.one_hot(targets, classes)
            target = target * (1 - smoothing) + smoothing / classes
            losses = (logits.softmax(1) - target).square().sum(1) / 2
        if weights is not None:
            losses = losses * (targets @ weights if targets.ndim == 2 else weights[targets])
        return losses.mean()

    return loss


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return for each class images / (classes · images of the class), float (classes,).

    The mean over the images is 1, as classes without images do not count. It is "balanced" in
    scikit-learn (King & Zeng 2001).
    """
    # On the CPU, because on CUDA counting need not be deterministic.
    images = torch.bincount(labels.cpu(), minlength=classes).float()
    present = int((images > 0).sum())
    return (len(labels) / (present * images.clamp(min=1))).to(labels.device)

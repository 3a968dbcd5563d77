"""The network family: stages of convolutions, their variants and their initialisation."""

import ctypes
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cifarlab import UserError, first_line
from cifarlab.architecture import STEM_CHANNELS, Convolution, ModelParams
from cifarlab.files import atomic

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
POOLS: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


class Normalize(nn.Module):
    """Pixels 0…255 to zero mean and unit variance of the training images, channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 127.5))
        self.register_buffer("std", torch.full((3, 1, 1), 127.5))

    def measure(self, images: Tensor) -> None:
        """Take mean and standard deviation from uint8 images (N, height, width, 3)."""
        # Counting the 256 values of a byte is exact, in double precision, and needs no float copy of the images.
        values = torch.arange(256, dtype=torch.float64)
        for channel in range(3):
            count = torch.bincount(images[..., channel].flatten().cpu(), minlength=256).double()
            mean = (count * values).sum() / count.sum()
            variance = (count * (values - mean) ** 2).sum() / count.sum()
            self.mean[channel] = mean.float()
            self.std[channel] = variance.sqrt().clamp(min=1).float()

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 of the same shape (N, 3, height, width)."""
        return (images.float() - self.mean) / self.std


class GlobalPool(nn.Module):
    """Maximum or mean of each feature map, of any size; unlike those of torch's adaptive pooling its gradient is deterministic on CUDA."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, height, width) to (N, channels)."""
        return x.amax((2, 3)) if self.kind == "max" else x.mean((2, 3))


class Whiten(nn.Conv2d):
    """Maps 2×2 patches to their principal components, each at unit variance and with both signs; only the bias is trained.

    Page 2019 ("How to train your ResNet 8"), in the form of hlb-CIFAR10 (tysam-code) and airbench (Jordan 2024).
    """

    IMAGES = 2000  # enough for a covariance of 12 numbers
    EPSILON = 5e-4  # keeps the faintest components from being all noise

    def __init__(self) -> None:
        super().__init__(3, STEM_CHANNELS, 2)
        self.weight.requires_grad = False

    def measure(self, images: Tensor) -> None:
        """Set the filters from normalised images, float32 (N, 3, height, width)."""
        moments, count = torch.zeros(12, 12, dtype=torch.float64), 0
        for batch in torch.split(images, 32):  # all patches at once are a dozen times the images
            patches = batch.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
            moments, count = moments + patches.T @ patches, count + len(patches)
        variance, components = torch.linalg.eigh(moments / count)
        filters = (components / (variance + self.EPSILON).sqrt()).T.reshape(12, 3, 2, 2)
        self.weight.data.copy_(torch.cat([filters, -filters]))


class StridedPointwise(nn.Conv2d):
    """A 1×1 convolution of every second pixel: picks them, then convolves.

    As a convolution that strides, its backward pass corrupts memory in oneDNN (PyTorch 2.14; AVX2; fewer than 8 input channels).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, height, width) to (N, out, ⌈height / 2⌉, ⌈width / 2⌉)."""
        return super().forward(x[..., ::2, ::2])


class Stage(nn.Module):
    """Convolutions of one width, pooling and dropout."""

    def __init__(self, params: ModelParams, convolutions: list[Convolution], dropout: float) -> None:
        super().__init__()
        self.first = _layer(params, convolutions[0])
        self.rest = nn.Sequential(*(_layer(params, c) for c in convolutions[1:]))
        self.residual = params.residual and len(convolutions) > 1
        self.pool = POOLS[params.pool](2) if params.pool in POOLS and params.pool_at == "end" else nn.Identity()
        self.dropout = nn.Dropout2d(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, height, width) to (N, width of the stage, smaller height, smaller width)."""
        x = self.first(x)
        x = x + self.rest(x) if self.residual else self.rest(x)
        return cast(Tensor, self.dropout(self.pool(x)))


def _layer(params: ModelParams, c: Convolution) -> nn.Sequential:
    padding = params.kernel_size // 2 if params.padding == "same" else 0
    if params.kernel_size == 1 and c.stride == 2:
        layer = nn.Sequential(StridedPointwise(c.in_channels, c.out_channels, 1))
    else:
        layer = nn.Sequential(nn.Conv2d(c.in_channels, c.out_channels, params.kernel_size, c.stride, padding))
    if c.pooled and params.pool_at == "start":
        layer.append(POOLS[params.pool](2))
    if params.norm != "none":
        norm = nn.BatchNorm2d(c.out_channels, momentum=params.norm_momentum) if params.norm == "batch" else nn.GroupNorm(8, c.out_channels)
        norm.weight.requires_grad = params.norm_scale
        layer.append(norm)
    return layer.append(ACTIVATIONS[params.activation]())


class Network(nn.Module):
    """A member of the family for images of one size and a list of classes.

    Takes images as they are on disk, so that a saved network needs nothing beside itself: uint8 (or float 0…255)
    of shape (N, 3, image_size, image_size). Returns logits, float32 (N, classes).
    """

    def __init__(self, params: ModelParams, image_size: int, classes: list[str]) -> None:
        super().__init__()
        self.params, self.image_size, self.classes = params, image_size, classes
        plan = list(params.plan(image_size))
        self.normalize = Normalize()
        self.stem = nn.Sequential(Whiten(), ACTIVATIONS[params.activation]()) if params.stem == "whiten" else nn.Identity()
        self.stages = nn.Sequential(
            *(Stage(params, [c for c in plan if c.stage == s], dropout) for s, dropout in enumerate(params.stage_dropout))
        )
        self.global_pool = nn.Identity() if params.global_pool == "none" else GlobalPool(params.global_pool)
        head: list[nn.Module] = [nn.Flatten()]
        sizes = params.linear(plan[-1])
        for features, hidden in pairwise(sizes):
            head += [nn.Linear(features, hidden), ACTIVATIONS[params.activation]()]
        self.head = nn.Sequential(*head, nn.Linear(sizes[-1], len(classes)))
        initialise(self, params.init, params.init_gain)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch."""
        features = self.stages(self.stem(self.normalize(images)))
        return cast(Tensor, self.head(self.global_pool(features)) * self.params.logit_scale)

    def measure(self, images: Tensor) -> None:
        """Fit what is not trained, normalisation and stem, to the training images, uint8 (N, height, width, 3).

        The network must still be on the CPU, the images need not.
        """
        self.normalize.measure(images)
        if isinstance(self.stem, nn.Sequential):
            some = images[:: max(1, len(images) // Whiten.IMAGES)].cpu()  # from end to end: images may lie in order of class
            cast(Whiten, self.stem[0]).measure(self.normalize(some.permute(0, 3, 1, 2)))

    def count_parameters(self) -> int:
        """How many numbers training may change."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def initialise(network: nn.Module, init: str, gain: float) -> None:
    """Set the weights of convolutions and linear layers from torch's global generator; biases zero but for "default".

    kaiming: He et al. 2015; xavier: Glorot & Bengio 2010; dirac: the first filters pass the input channels on
    (Zagoruyko & Komodakis 2017), what is left and linear layers as by default; normal and constant: `gain` is the
    standard deviation or the value itself.
    """
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or isinstance(module, Whiten):
            continue
        weight = module.weight.data
        if init == "kaiming":
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        elif init == "xavier":
            nn.init.xavier_normal_(weight)
        elif init == "dirac" and isinstance(module, nn.Conv2d):
            nn.init.dirac_(weight[: weight.shape[1]])
        elif init == "normal":
            nn.init.normal_(weight)
        elif init == "constant":
            nn.init.ones_(weight)
        elif init == "zeros":
            nn.init.zeros_(weight)
        weight.mul_(gain)
        if init != "default" and module.bias is not None:
            nn.init.zeros_(module.bias)


def keep_memory() -> None:
    """Let glibc keep the large blocks that every batch needs again: from the kernel they come back page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and (mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)):  # M_MMAP_THRESHOLD; older glibc takes 32 MiB at most
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@torch.inference_mode()
def predict(network: Network, images: Tensor, batch_size: int) -> Tensor:
    """Return the logits of uint8 images (N, height, width, 3), in evaluation mode; the mode is put back afterwards."""
    was_training = network.training
    network.eval()
    logits = torch.cat([network(batch.permute(0, 3, 1, 2)) for batch in torch.split(images, batch_size)])
    network.train(was_training)
    return logits


def save(network: Network, path: Path) -> None:
    """Write the weights as safetensors; the header says how to build the network again."""
    # One key only: the order of several is not fixed, and the same network must give the same bytes.
    header = {"params": network.params.model_dump(), "image_size": network.image_size, "classes": network.classes}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, {"network": json.dumps(header)})
        except SafetensorError as error:  # what it makes of a full disk
            raise UserError(f"{path} cannot be written: {first_line(error)}; make room and type the same command again") from error
        temporary.chmod(0o644)  # safetensors lets nobody else read


def load(path: Path) -> Network:
    """Read what `save` wrote, onto the CPU.

    Raises
    ------
    UserError
        The file is missing, damaged, or not a network of this family.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["network"])
            network = Network(ModelParams(**header["params"]), header["image_size"], header["classes"])
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, not a dict
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds no network of this version ({first_line(error)}); `dvc repro -f train` trains it anew") from error
    return network.eval()

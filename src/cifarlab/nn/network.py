"""The family of networks: stages of convolutions and their variants, and initial weights."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from cifarlab.data.mapped import Rows
from cifarlab.nn.layers import ACTIVATIONS, POOLS, GlobalPool, Normalize, StridedPointwise, Whiten
from cifarlab.params.geometry import Convolution, ModelParams


class Stage(nn.Module):
    """Convolutions of the same width, followed by pooling and dropout."""

    def __init__(self, params: ModelParams, plan: list[Convolution], dropout: float) -> None:
        super().__init__()
        first, *rest = (make_layer(params, convolution) for convolution in plan)
        self.first, self.rest = first, nn.Sequential(*rest)
        self.residual = params.residual and len(plan) > 1
        pooled_at_end = params.pool in POOLS and params.pool_at == "end"
        self.pool = POOLS[params.pool](2) if pooled_at_end else nn.Identity()
        self.dropout = nn.Dropout2d(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, height, width) to (N, width of the stage, smaller height, smaller width)."""
        x = self.first(x)
        x = x + self.rest(x) if self.residual else self.rest(x)
        return cast(Tensor, self.dropout(self.pool(x)))


def make_layer(params: ModelParams, convolution: Convolution) -> nn.Sequential:
    """Return a convolution with its pooling at the start, its norm and its activation."""
    channels = convolution.in_channels, convolution.out_channels
    size, stride = params.kernel_size, convolution.stride
    padding = size // 2 if params.padding == "same" else 0
    kind = StridedPointwise if size == 1 and stride == 2 else nn.Conv2d
    layer = nn.Sequential(kind(*channels, size, stride, padding))
    if convolution.pooled and params.pool_at == "start":
        layer.append(POOLS[params.pool](2))
    if params.norm == "batch":
        layer.append(nn.BatchNorm2d(channels[1], momentum=params.norm_momentum))
    elif params.norm == "group":
        layer.append(nn.GroupNorm(8, channels[1]))
    if params.norm != "none":
        layer[-1].weight.requires_grad = params.norm_scale
    return layer.append(ACTIVATIONS[params.activation]())


def _dirac(weight: Tensor) -> None:
    # The first filters pass the input channels on. The others, and linear layers, keep PyTorch's
    # default.
    if weight.ndim == 4:
        nn.init.dirac_(weight[: weight.shape[1]])


INITIALISERS: dict[str, Callable[[Tensor], object]] = {
    "default": lambda weight: weight,  # PyTorch's own, set when the layer was made
    "kaiming": nn.init.kaiming_normal_,  # He et al. 2015
    "xavier": nn.init.xavier_normal_,  # Glorot & Bengio 2010
    "dirac": _dirac,  # Zagoruyko & Komodakis 2017
    "normal": nn.init.normal_,
    "constant": nn.init.ones_,
    "zeros": nn.init.zeros_,
}


def initialise(network: nn.Module, init: str, gain: float) -> None:
    """Set the weights of all convolutions and linear layers, except the whitening stem.

    Random weights come from torch's global generator. The weights are multiplied by `gain`, which
    is the standard deviation of "normal" and the value of "constant". Biases become zero, except
    with "default".
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not isinstance(module, Whiten):
            INITIALISERS[init](module.weight.data)
            module.weight.data.mul_(gain)
            if init != "default" and module.bias is not None:
                nn.init.zeros_(module.bias)


class Network(nn.Module):
    """One network of the family, for images of one size and a list of classes.

    It takes raw pixels, so a saved network can be used without anything else: uint8 (or float
    0…255) of shape (N, 3, image_size, image_size). It returns logits, float32 (N, classes).
    """

    def __init__(self, params: ModelParams, image_size: int, classes: list[str]) -> None:
        super().__init__()
        self.params, self.image_size, self.classes = params, image_size, classes
        plan = list(params.plan(image_size))
        activation = ACTIVATIONS[params.activation]
        whiten, pool = params.stem == "whiten", params.global_pool
        self.normalize = Normalize()
        self.stem = nn.Sequential(Whiten(), activation()) if whiten else nn.Identity()
        dropouts = enumerate(params.stage_dropout)
        stages = (Stage(params, [c for c in plan if c.stage == s], p) for s, p in dropouts)
        self.stages = nn.Sequential(*stages)
        self.global_pool = nn.Identity() if pool == "none" else GlobalPool(pool)
        sizes = params.linear(plan[-1])
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
        self.head = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], len(classes)))
        initialise(self, params.init, params.init_gain)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch."""
        features = self.stages(self.stem(self.normalize(images)))
        return cast(Tensor, self.head(self.global_pool(features)) * self.params.logit_scale)

    def measure(self, images: Rows) -> None:
        """Set normalisation and stem, which are not trained, from the training images.

        Parameters
        ----------
        images : uint8 (N, height, width, 3), on any device; the network must still be on the CPU
        """
        self.normalize.measure(images)
        if isinstance(self.stem, nn.Sequential):
            # From the whole range, because a folder's images are sorted by class.
            step = max(1, len(images) // Whiten.IMAGES)
            starts = range(0, len(images), step * Whiten.BATCH)
            batches = (images[i : i + step * Whiten.BATCH : step].cpu() for i in starts)
            normal = (self.normalize(batch.permute(0, 3, 1, 2)) for batch in batches)
            cast(Whiten, self.stem[0]).measure(normal)

    def count_parameters(self) -> int:
        """Return the number of trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


View = Callable[[Tensor], Tensor]
same: View = nn.Identity()


@torch.inference_mode()
def predict(
    network: Network, images: Rows, batch_size: int | Literal["auto"] = "auto", view: View = same
) -> Tensor:
    """Return the logits, float32 (N, classes), of uint8 images (N, height, width, 3).

    The network predicts in evaluation mode. Afterwards it is back in the mode it was in.

    Parameters
    ----------
    batch_size : images at a time; auto: 2,000 of 32×32 pixels on CUDA, 100 of any size on a CPU
    view : changes the images of a batch before they are used
    """
    if batch_size == "auto":
        height, width = images.shape[1:3]
        on_cuda = max(1, 2000 * 32 * 32 // (height * width))
        batch_size = on_cuda if images.device.type == "cuda" else 100
    was_training = network.training
    network.eval()
    # All at once: small results between the large blocks of the batches would scatter the memory.
    logits = torch.empty(len(images), len(network.classes), device=images.device)
    for start in range(0, len(images), batch_size):
        batch = view(images[start : start + batch_size])
        logits[start : start + batch_size] = network(batch.permute(0, 3, 1, 2))
    network.train(was_training)
    return logits

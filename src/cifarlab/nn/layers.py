"""The layers that PyTorch does not have."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cifarlab.data.mapped import Rows
from cifarlab.params.geometry import STEM_CHANNELS

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
    """Scales pixels (0…255) so that each channel of the training images has mean 0, variance 1."""

    PIXELS = 2**22  # counted at a time

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.full((3, 1, 1), 127.5))
        self.std = nn.Buffer(torch.full((3, 1, 1), 127.5))

    def measure(self, images: Rows) -> None:
        """Set mean and standard deviation to those of uint8 images (N, height, width, 3)."""
        # A histogram of the 256 values gives exact sums and needs no float copy of the images.
        values = torch.arange(256, dtype=torch.float64)
        counts = torch.zeros(3, 256, dtype=torch.int64)
        count = max(1, self.PIXELS // (images.shape[1] * images.shape[2]))
        for start in range(0, len(images), count):
            block = images[start : start + count].cpu()
            for channel in range(3):
                counts[channel] += torch.bincount(block[..., channel].flatten(), minlength=256)
        for channel, count in enumerate(counts.double()):
            mean = (count * values).sum() / count.sum()
            variance = (count * (values - mean) ** 2).sum() / count.sum()
            self.mean[channel] = mean.float()
            self.std[channel] = variance.sqrt().clamp(min=1).float()

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 of the same shape (N, 3, height, width)."""
        return (images.float() - self.mean) / self.std


class GlobalPool(nn.Module):
    """Takes the maximum or the mean of each feature map, whatever its size.

    Unlike torch's adaptive pooling, its gradient is deterministic on CUDA.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, height, width) to (N, channels)."""
        return x.amax((2, 3)) if self.kind == "max" else x.mean((2, 3))


class Whiten(nn.Conv2d):
    """Maps 2×2 patches to their principal components, scaled to variance 1, with both signs.

    Only the bias is trained. Page 2019 ("How to train your ResNet 8"), in the form of hlb-CIFAR10
    (tysam-code) and airbench (Jordan 2024).
    """

    IMAGES = 2000  # enough for a covariance matrix of 12 × 12
    BATCH = 32  # images at a time: the patches take twelve times their memory
    EPSILON = 5e-4  # added to the variances, so that the weakest components are not only noise

    def __init__(self) -> None:
        super().__init__(3, STEM_CHANNELS, 2)
        self.weight.requires_grad = False

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Compute the filters from normalised images, float32 (n, 3, height, width) each."""
        moments, count = torch.zeros(12, 12, dtype=torch.float64), 0
        for batch in batches:
            patches = batch.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5)
            rows = patches.reshape(-1, 12).double()
            moments, count = moments + rows.T @ rows, count + len(rows)
        variance, components = torch.linalg.eigh(moments / count)
        filters = (components / (variance + self.EPSILON).sqrt()).T.reshape(12, 3, 2, 2)
        self.weight.data.copy_(torch.cat([filters, -filters]))


class StridedPointwise(nn.Conv2d):
    """A 1×1 convolution with stride 2 that first selects the pixels, then convolves.

    The backward pass of the usual strided convolution corrupts memory in oneDNN (PyTorch 2.14,
    AVX2, fewer than 8 input channels).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, height, width) to (N, out, ⌈height / 2⌉, ⌈width / 2⌉)."""
        return nn.functional.conv2d(x[..., ::2, ::2], self.weight, self.bias)

"""The geometry of the network family: the list of convolutions that a model section describes."""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Width = Annotated[int, Field(ge=1, le=4096)]

# A 2×2 patch of three colours has 12 principal components. Each one is used with both signs.
STEM_CHANNELS = 24


class Section(BaseModel):
    """A section of params.yaml. No field has a default: every value stands in the file.

    Values must have the type of their field: true and "1" are no numbers, 1 is a float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Convolution(NamedTuple):
    """One convolution of the network. All images are square, all sizes are sides in pixels."""

    stage: int
    in_channels: int
    out_channels: int
    stride: int
    in_size: int
    """Side of the input."""
    out_size: int
    """Side of the output, before pooling."""
    pooled: bool
    """Is the output pooled 2×2?"""

    @property
    def pooled_size(self) -> int:
        """Side of the output after the pooling, if there is one."""
        return self.out_size // 2 if self.pooled else self.out_size


class ModelParams(Section):
    """One network of the family: stages of convolutions, then a classifier."""

    stem: Literal["none", "whiten"]
    """whiten: a frozen 2×2 convolution before the first layer makes the pixels uncorrelated
    (Page 2019, "How to Train Your ResNet 8")."""
    layers: Annotated[int, Field(ge=1, le=32)]
    """Number of convolutions, spread evenly over the stages. With fewer layers than stages,
    the last stages are left out."""
    widths: Annotated[list[Width], Field(min_length=1, max_length=8)]
    """Output channels of each stage of the network: some convolutions and one pooling. They are
    not the stages of DVC."""
    kernel_size: Annotated[int, Field(ge=1, le=15)]
    padding: Literal["same", "valid"]
    norm: Literal["batch", "group", "none"]
    """Batch normalisation (Ioffe & Szegedy 2015), or group normalisation with 8 groups
    (Wu & He 2018)."""
    norm_scale: bool
    """Learn the scale of normalisation layers. false: the scale stays 1, only the bias is
    learned (Page 2019)."""
    norm_momentum: Annotated[float, Field(gt=0, le=1)]
    """Weight of the newest batch in the running statistics of batch normalisation, as in
    PyTorch."""
    activation: Literal["relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "sigmoid"]
    """What follows each convolution and each hidden layer of the classifier."""
    pool: Literal["max", "avg", "stride", "none"]
    """How a stage halves the image. max, avg: by 2×2 pooling. stride: by stride 2 in its first
    convolution. none: not at all."""
    pool_at: Literal["end", "start"]
    """Where a stage pools. start: right after its first convolution, before the normalisation
    (Jordan 2024, airbench). end: after its last activation."""
    global_pool: Literal["max", "avg", "none"]
    """How the last feature maps become a vector. none: they are flattened."""
    dropout: Share | list[Share]
    """Share of channels that Dropout2d (Tompson et al. 2015) removes after each stage: one number
    for all stages, or a list with one number per stage."""
    residual: bool
    """Add the output of a stage's first convolution to the output of its last (He et al. 2015)."""
    head: Annotated[list[Width], Field(max_length=8)]
    """Sizes of the hidden layers of the classifier."""
    init: Literal["default", "kaiming", "xavier", "dirac", "normal", "constant", "zeros"]
    """The first weights. default: PyTorch's own. kaiming: He et al. 2015. xavier: Glorot & Bengio
    2010. dirac: the first filters of each convolution pass its input on (Zagoruyko & Komodakis
    2017), the rest is PyTorch's. normal, constant: with `init_gain` as deviation or value. zeros:
    all equal. Biases start at zero, except with default."""
    init_gain: Positive
    logit_scale: Positive
    """Factor on the logits. Below 1, the first predictions are close to uniform (Page 2019)."""

    @property
    def stages(self) -> list[int]:
        """Number of convolutions in each stage that exists. The last stages get the remainder."""
        n = min(len(self.widths), self.layers)
        each, remainder = divmod(self.layers, n)
        return [each + (stage >= n - remainder) for stage in range(n)]

    @property
    def stage_dropout(self) -> list[float]:
        """Share of channels removed after each stage that exists."""
        n = len(self.stages)
        return self.dropout[:n] if isinstance(self.dropout, list) else [self.dropout] * n

    def plan(self, image_size: int) -> Iterator[Convolution]:
        """Yield the convolutions in order, for square images with sides of `image_size` pixels.

        Raises
        ------
        ValueError
            The image becomes too small for a kernel, a pooling or a normalisation.
        """
        size, channels = image_size, 3
        if self.stem == "whiten":
            size, channels = size - 1, STEM_CHANNELS
            if size < 1:
                raise ValueError("model.stem = whiten needs images of 2×2 pixels, not 1×1")
        places = [(stage, i) for stage, n in enumerate(self.stages) for i in range(n)]
        for layer, (stage, i) in enumerate(places, start=1):
            stride = 2 if self.pool == "stride" and i == 0 else 1
            steps = size - 1 if self.padding == "same" else size - self.kernel_size
            out_size, width = steps // stride + 1, self.widths[stage]
            pooled_layer = 0 if self.pool_at == "start" else self.stages[stage] - 1
            pooled = self.pool in ("max", "avg") and i == pooled_layer
            convolution = Convolution(stage, channels, width, stride, size, out_size, pooled)
            self._check(convolution, layer)
            yield convolution
            size, channels = convolution.pooled_size, width

    def _check(self, convolution: Convolution, layer: int) -> None:
        """Raise ValueError where too few pixels are left. Layers are counted from 1."""
        size, k, place = convolution.in_size, self.kernel_size, f"layer {layer}"
        if self.padding == "valid" and size < k:
            small = f"{place} gets {size}×{size} pixels, too few for its {k}×{k} kernel"
            raise ValueError(f"model.layers = {self.layers}: {small}; use fewer or padding: same")
        if convolution.pooled and convolution.out_size < 2:
            small = f"the {self.pool}-pooling after {place} would shrink 1×1 to nothing"
            raise ValueError(f"model.layers = {self.layers}: {small}; use fewer, or pool: none")
        normed = convolution.pooled_size if self.pool_at == "start" else convolution.out_size
        if self.norm == "group" and normed == 1 and convolution.out_channels == 8:
            small = f"norm: group would see one value per group in {place} (1×1 pixels)"
            raise ValueError(f"model.widths = {self.widths}: {small}; use wider or fewer stages")

    def linear(self, last: Convolution) -> list[int]:
        """Return the input size of each linear layer, given the `last` convolution."""
        side = last.pooled_size if self.global_pool == "none" else 1
        return [last.out_channels * side**2, *self.head]

    @model_validator(mode="after")
    def _keys_fit_together(self) -> "ModelParams":
        n, k, widths = len(self.widths), self.kernel_size, f"model.widths = {self.widths}"
        if self.padding == "same" and k % 2 == 0:
            raise ValueError(f"model.kernel_size = {k}: padding same needs an odd one")
        if isinstance(self.dropout, list) and len(self.dropout) != n:
            raise ValueError(f"model.dropout = {self.dropout}: one share or {n}, as {widths}")
        if self.norm == "group" and (bad := [w for w in self.widths if w % 8]):
            raise ValueError(f"{widths}: model.norm: group needs multiples of 8, not {bad[0]}")
        if self.residual and self.padding == "valid":  # which changes the size of its input
            raise ValueError("model.residual = true: needs model.padding: same")
        if self.residual and max(self.stages) < 2:  # nothing to skip
            raise ValueError(f"model.residual = true: use model.layers of {n + 1} or more")
        return self

    def describe(self) -> str:
        """Return a short description for titles and run names."""
        layers = f"{self.layers} {'layer' if self.layers == 1 else 'layers'}"
        widths = "-".join(str(w) for w in self.widths[: len(self.stages)])
        norm = "no norm" if self.norm == "none" else f"{self.norm} norm"
        residual = ", residual" if self.residual else ""
        return f"{layers} {widths}, {norm}, {self.activation}{residual}"

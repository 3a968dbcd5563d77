"""The geometry of the network family: which convolutions a model section spells, and whether they fit the image."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
STEM_CHANNELS = 24  # a 2×2 patch of three colours has 12 principal components, each taken with both signs
Width = Annotated[int, Field(ge=1, le=4096)]


class Section(BaseModel):
    """A section of params.yaml. No field has a default: the file says everything, once."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        values = value if isinstance(value, list) else [value]
        if cls.model_fields[str(info.field_name)].annotation is not bool and any(isinstance(v, bool) for v in values):
            raise PydanticCustomError("bool", "true and false are no numbers")
        return value


class Convolution(NamedTuple):
    """One convolution of the plan: channels, stride, the side of its square input and output in pixels, is it pooled 2×2."""

    stage: int
    in_channels: int
    out_channels: int
    stride: int
    in_size: int
    out_size: int
    pooled: bool


class ModelParams(Section):
    """One member of the `cnn` family."""

    stem: Literal["none", "whiten"]
    """A frozen 2×2 convolution that decorrelates the pixels, before the first layer (Page 2019, "How to train your ResNet 8")."""
    layers: Annotated[int, Field(ge=1, le=32)]
    """Convolutions, spread evenly over the stages; with fewer layers than stages the last stages are left out."""
    widths: Annotated[list[Width], Field(min_length=1, max_length=8)]
    """Output channels of each stage."""
    kernel_size: Annotated[int, Field(ge=1, le=15)]
    padding: Literal["same", "valid"]
    norm: Literal["batch", "group", "none"]
    """Batch normalisation (Ioffe & Szegedy 2015), group normalisation of 8 groups (Wu & He 2018)."""
    norm_scale: bool
    """Learn the scale of normalisation layers; false leaves it at one and learns their bias only (Page 2019)."""
    norm_momentum: Annotated[float, Field(gt=0, le=1)]
    """Weight of the newest batch in the running statistics of batch normalisation, as PyTorch counts it."""
    activation: Literal["relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "sigmoid"]
    pool: Literal["max", "avg", "stride", "none"]
    """How a stage halves the image: 2×2 pooling, or a stride of 2 in its first convolution."""
    pool_at: Literal["end", "start"]
    """After the stage's last activation, or right after its first convolution, before its norm (Jordan 2024, airbench)."""
    global_pool: Literal["max", "avg", "none"]
    """What turns the last feature maps into a vector; none flattens them."""
    dropout: Share | list[Share]
    """Dropout2d (Tompson et al. 2015) after every stage, or one share per stage."""
    residual: bool
    """Adds the output of a stage's first convolution to that of its last (He et al. 2015)."""
    head: Annotated[list[Width], Field(max_length=8)]
    """Hidden sizes of the classifier."""
    init: Literal["default", "kaiming", "xavier", "dirac", "normal", "constant", "zeros"]
    init_gain: Positive
    logit_scale: Positive
    """Multiplies the logits; below 1 the network starts out unsure (Page 2019)."""

    @property
    def stages(self) -> list[int]:
        """Convolutions of each stage that is there."""
        n = min(len(self.widths), self.layers)
        each, more = divmod(self.layers, n)
        return [each + (s >= n - more) for s in range(n)]

    @property
    def stage_dropout(self) -> list[float]:
        """Share of channels dropped after each stage that is there."""
        shares = self.dropout if isinstance(self.dropout, list) else [self.dropout] * len(self.widths)
        return shares[: len(self.stages)]

    def plan(self, image_size: int) -> Iterator[Convolution]:
        """Yield the convolutions in order, for square images of `image_size` pixels.

        Raises
        ------
        ValueError
            A layer or a pooling has no pixel left to work on.
        """
        size, channels, layer = image_size, 3, 0
        if self.stem == "whiten":
            if size < 2:
                raise ValueError(f"model.stem = whiten: needs images of 2×2 pixels or more, not {size}×{size}")
            size, channels = size - 1, STEM_CHANNELS
        for stage, convolutions in enumerate(self.stages):
            for i in range(convolutions):
                layer += 1
                stride = 2 if self.pool == "stride" and i == 0 else 1
                if self.padding == "valid" and size < self.kernel_size:
                    k = self.kernel_size
                    raise ValueError(
                        f"model.layers = {self.layers}: layer {layer} would shrink {size}×{size} below its {k}×{k} kernel; "
                        "use fewer layers or model.padding: same"
                    )
                room = size - 1 if self.padding == "same" else size - self.kernel_size
                out = room // stride + 1
                pooled = self.pool in ("max", "avg") and i == (0 if self.pool_at == "start" else convolutions - 1)
                if pooled and out < 2:
                    raise ValueError(
                        f"model.layers = {self.layers}: the {self.pool}-pooling after layer {layer} would shrink {out}×{out} to nothing; "
                        "use fewer layers or widths, model.padding: same, or model.pool: none"
                    )
                normed = out // 2 if pooled and self.pool_at == "start" else out
                if self.norm == "group" and normed == 1 and self.widths[stage] == 8:
                    raise ValueError(
                        f"model.widths = {self.widths}: layer {layer} has 1×1 pixels and 8 channels, one value for each group of "
                        "model.norm: group; use wider or fewer stages"
                    )
                yield Convolution(stage, channels, self.widths[stage], stride, size, out, pooled)
                size, channels = out // 2 if pooled else out, self.widths[stage]

    def linear(self, last: Convolution) -> list[int]:
        """Sizes of the vectors before and between the linear layers, after the `last` convolution."""
        side = 1 if self.global_pool != "none" else last.out_size // (2 if last.pooled else 1)
        return [last.out_channels * side**2, *self.head]

    @model_validator(mode="after")
    def _consistent(self) -> "ModelParams":
        if self.padding == "same" and self.kernel_size % 2 == 0:
            raise ValueError(f"model.kernel_size = {self.kernel_size}: padding same needs an odd kernel size")
        if isinstance(self.dropout, list) and len(self.dropout) != len(self.widths):
            raise ValueError(
                f"model.dropout = {self.dropout}: one share or {len(self.widths)}, one for each of model.widths = {self.widths}"
            )
        if self.norm == "group" and (bad := [w for w in self.widths if w % 8]):
            raise ValueError(f"model.widths = {self.widths}: model.norm: group makes 8 groups, {bad[0]} is not a multiple of 8")
        if self.residual and self.padding == "valid":
            raise ValueError("model.residual = true: needs model.padding: same, a valid convolution changes the size of its input")
        if self.residual and max(self.stages) < 2:
            raise ValueError(
                f"model.residual = true: no stage has a second convolution to skip; use model.layers of {len(self.widths) + 1} or more"
            )
        return self

    def describe(self) -> str:
        """Name the variant in a few words, for titles and run names."""
        norm = "no norm" if self.norm == "none" else f"{self.norm} norm"
        widths = "-".join(str(w) for w in self.widths[: len(self.stages)])
        return f"{self.layers} {'layer' if self.layers == 1 else 'layers'} {widths}, {norm}, {self.activation}" + (
            ", residual" if self.residual else ""
        )

"""The sections of params.yaml."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cifarlab.errors import without_secrets
from cifarlab.params.geometry import ModelParams, Positive, Section, Share

DEFAULT_FOLDER = "images"
"""It comes with the project, and holds no images."""
Count = Annotated[int, Field(ge=1, le=1_000_000)]


def is_remote(source: str) -> bool:
    """Return True for a download, False for a local file or folder."""
    return source.lower().startswith(("http://", "https://"))


class DataParams(Section):
    """Where the images come from."""

    name: Literal["cifar10", "folder", "digits"]
    folder: Annotated[str, Field(min_length=1)]
    """A folder or archive of images, which DVC watches. Relative paths start where the pipeline
    runs. Only name: folder reads it."""
    labels: Annotated[str, Field(min_length=1)] | None
    """A table inside or beside the folder with the columns file, label and perhaps split."""
    test: Share
    """Share of a folder's images for testing, where it has neither test/ nor val/."""
    sources: list[str]
    """URLs (https, http, file) or paths, tried in this order. Relative paths start at the main
    checkout."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    """Checksum of the archive. A download needs one."""
    image_size: Annotated[int, Field(ge=1, le=512)]
    """Height and width in pixels."""
    validation: Share
    """Share of the training images held out for validation, the same in every class, unless the
    folder has its own."""
    validation_seed: Annotated[int, Field(ge=0)]
    """Which images are drawn for validation. It does not depend on train.seed, so that trainings
    with other seeds are compared on the same images."""

    @model_validator(mode="after")
    def _keys_fit_together(self) -> "DataParams":
        if self.name != "folder" and (self.folder != DEFAULT_FOLDER or self.labels):
            key = "labels" if self.labels else "folder"
            wrong = f"data.{key} = {getattr(self, key)}: data.name = {self.name} does not read it"
            raise ValueError(f"{wrong}; set data.name=folder")
        if self.name != "folder" and self.image_size != 32:
            raise ValueError(f"data.image_size = {self.image_size}: {self.name} images are 32×32")
        if any(source != without_secrets(source) for source in self.sources):
            advice = "use ~/.netrc (machine, login, password), or download it and name its path"
            raise ValueError(f"data.sources holds a login or a token; {advice}")
        if not self.sources and self.name != "digits":
            raise ValueError(f"data.sources is empty: {self.name} needs a URL or a path")
        remote = next(filter(is_remote, self.sources), None)
        if remote and self.sha256 is None:
            raise ValueError(f"data.sha256 = null: {remote} needs the SHA-256 of the archive")
        return self


class TrainParams(Section):
    """How the network is trained."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    """Seed of initialisation, order of the images, and augmentation."""
    epochs: Count
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)]
    """Images per step. Batch normalisation needs two or more."""
    optimizer: Literal["sgd", "muon", "adam", "adamw"]
    """sgd: stochastic gradient descent with Nesterov momentum. muon: Muon (Jordan 2024) for the
    filters and sgd for the rest. adam (Kingma & Ba 2014), adamw (Loshchilov & Hutter 2017)."""
    lr: Positive
    """Highest learning rate of the schedule."""
    momentum: Share
    """Momentum of sgd. adam and adamw use their own defaults."""
    muon_lr: Positive
    """Highest learning rate of Muon's filters."""
    muon_momentum: Share
    """Momentum of Muon."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)]
    """L2 penalty (sgd, adam) or decoupled weight decay (adamw). Not for the filters of Muon."""
    norm_bias_lr: Positive
    """Learning rate of the biases of normalisation layers, as a multiple of lr (Page 2019;
    airbench uses 64)."""
    schedule: Literal["linear", "one_cycle", "constant"]
    """How the learning rates change. linear: down to zero. one_cycle: up for a quarter of the
    steps, then down to zero (Smith & Topin 2017). constant: not at all."""
    loss: Literal["cross_entropy", "quadratic"]
    """quadratic: ½ Σ (softmax(z) - y)² over the classes."""
    label_smoothing: Share
    class_weights: Literal["none", "balanced"]
    """balanced: in the loss, every class counts as much as every other, however many images it
    has."""
    flip: Literal["none", "random", "alternating"]
    """Mirror images left to right. random: each with probability ½. alternating: each image is
    mirrored in every second epoch (Jordan 2024, airbench)."""
    translate: Annotated[int, Field(ge=0)]
    """Shift images by up to this many pixels. Pixels that appear are reflected at the border."""
    cutmix: Annotated[float, Field(ge=0, le=1)]
    """Share of the batches in which each image gets a rectangle of another image, and the same
    share of its label (CutMix, Yun et al. 2019)."""
    precision: Literal["auto", "float32", "bfloat16"]
    """Number format of the arithmetic in training and in validation (Micikevicius et al. 2017).
    Weights and the evaluate stage are float32."""
    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]
    """CPU threads. auto: one for each core that PyTorch finds; several processes share them."""
    processes: Annotated[int, Field(ge=1, le=64)]
    """Processes that share each batch, on one machine, and on CUDA as many GPUs (docs/scale.md)."""
    graph: Literal["auto", "off"]
    """auto: on CUDA, each step is one launch, a CUDA graph."""
    diagnostics: bool
    """After every epoch, examine each layer and add the results to history.csv."""

    @model_validator(mode="after")
    def _every_process_has_images(self) -> "TrainParams":
        if self.batch_size < 2 * self.processes:
            few = f"leaves fewer than two images of train.batch_size = {self.batch_size} for each"
            raise ValueError(f"train.processes = {self.processes}: {few}; lower it")
        return self


class EvaluateParams(Section):
    """How the test set is evaluated."""

    batch_size: Count | Literal["auto"]
    """Images at a time. auto: 100 on a CPU; on CUDA 2,000 of 32×32 pixels, fewer larger ones."""
    calibration_bins: Count
    """Number of bins of the expected calibration error."""
    views: Literal[1, 2, 6]
    """Test-time augmentation: also report the accuracy of the mean logits over several views of
    each image. 2: the image and its mirror image. 6: also both shifted by one pixel to the top left
    and to the bottom right, with half of the weight (Jordan 2024, airbench)."""
    shifts: Annotated[int, Field(ge=0, le=16)]
    """Also report the accuracy on test images shifted by 1, 2, … up to this many pixels, as the
    mean over the four directions."""


class PlotParams(Section):
    """What the figures show."""

    dpi: Annotated[int, Field(ge=30, le=600)]
    samples: Annotated[int, Field(ge=1, le=256)]
    """How many training images are shown as the network sees them."""
    mistakes: Annotated[int, Field(ge=1, le=256)]
    """How many wrong predictions are shown: those of which the network was most confident."""


class TrackingParams(Section):
    """What is logged to MLflow. The variable MLFLOW_TRACKING_URI says where it goes."""

    experiment: Annotated[str, Field(min_length=1)]
    system_metrics: bool
    log_model: bool


class Params(Section):
    """All of params.yaml."""

    data: DataParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    plot: PlotParams
    tracking: TrackingParams

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "Params":
        plan = list(self.model.plan(self.data.image_size))
        weights = sum(c.in_channels * c.out_channels * self.model.kernel_size**2 for c in plan)
        weights += sum(a * b for a, b in pairwise(self.model.linear(plan[-1])))
        if weights > 10**9:
            large = f"{weights:,} weights are more than a billion; lower widths, layers or head"
            raise ValueError(f"model.widths = {self.model.widths}: {large}")
        size, flat = self.data.image_size, self.flat()
        for key in ("train.translate", "evaluate.shifts"):
            if flat[key] >= size:
                raise ValueError(f"{key} = {flat[key]}: must be below data.image_size = {size}")
        return self

    def flat(self) -> dict[str, Any]:
        """Return every parameter under its full key, as `dvc params diff` and MLflow show it."""
        return dict(flat(self.model_dump()))


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values under their full key."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        yield from flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]

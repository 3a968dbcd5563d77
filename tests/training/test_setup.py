"""The images and the untrained network with which a training starts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cifarlab.data.dataset import Dataset, stratified_split
from cifarlab.errors import UserError
from cifarlab.params.sections import Params
from cifarlab.training.loop import prepare

MakeParams = Callable[..., Params]
CPU = torch.device("cpu")
NAMES = ["a", "b", "c"]


@pytest.fixture
def data() -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(30) % 3
    return Dataset({"train": images, "test": images}, {"train": labels, "test": labels}, NAMES, "x")


def small(make_params: MakeParams, **changes: Any) -> Params:
    size = {"model.widths": [8, 8], "model.layers": 2}
    return make_params(size | {key.replace("__", "."): value for key, value in changes.items()})


def test_images_are_split_and_the_network_is_measured_on_the_training_images(
    make_params: MakeParams, data: Dataset
) -> None:
    network, train, validation = prepare(small(make_params, data__validation=0.2), data, CPU)
    kept, held_out = stratified_split(data.labels["train"], 0.2)
    assert validation is not None
    for images, indices in ((train, kept), (validation, held_out)):
        assert np.array_equal(images.images, data.images["train"][indices])
        assert np.array_equal(images.labels, data.labels["train"][indices])
    values = data.images["train"][kept].astype(float).reshape(-1, 3)
    np.testing.assert_allclose(network.normalize.mean.flatten(), values.mean(0), rtol=1e-6)
    # Without `measure`, the stem would have PyTorch's random filters.
    assert torch.equal(network.stem[0].weight[:12], -network.stem[0].weight[12:])
    assert (network.image_size, network.classes) == (32, NAMES)


def test_without_a_validation_share_there_are_no_validation_images(
    make_params: MakeParams, data: Dataset
) -> None:
    _, train, validation = prepare(small(make_params, data__validation=0), data, CPU)
    assert validation is None
    assert np.array_equal(train.images, data.images["train"])


def test_the_seed_decides_the_initial_weights(make_params: MakeParams, data: Dataset) -> None:
    def initial(seed: int) -> torch.Tensor:
        torch.rand(seed)  # earlier random numbers must not matter
        network, *_ = prepare(small(make_params, train__seed=seed), data, CPU)
        return network.head[1].weight

    one, again = initial(3), initial(3)
    assert torch.equal(one, again)
    assert not torch.equal(one, initial(4))


def test_too_few_images_are_refused(make_params: MakeParams, data: Dataset) -> None:
    few, classes = small(make_params, data__validation=0.99, train__processes=16), len(data.classes)
    with pytest.raises(UserError, match=rf"= 0\.99 leaves {classes} images.* lower it"):
        prepare(few, data, CPU)

"""Every value that a parameter may have does something else than the others."""

from typing import Any, get_args

import pytest
import torch

from cifarlab.nn.network import Network
from cifarlab.params.geometry import ModelParams
from cifarlab.params.sections import TrainParams
from cifarlab.training.batches import Images
from cifarlab.training.loop import fit
from tests.conftest import MakeTrain
from tests.support.networks import SIZE, coloured, small_params

pytestmark = pytest.mark.usefixtures("restored_torch")
SAME = {"device", "graph", "precision"}  # where a network is trained, and how exactly


def choices(section: type[Any]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the parameters of a section that are one of some words."""
    fields = {key: get_args(field.annotation) for key, field in section.model_fields.items()}
    words = {
        key: values for key, values in fields.items() if values and set(map(type, values)) == {str}
    }
    return [(key, values) for key, values in words.items() if key not in SAME]


@pytest.mark.parametrize(("key", "values"), choices(ModelParams))
def test_values_of_the_network(key: str, values: tuple[str, ...]) -> None:
    images = torch.randint(256, (12, 32, 32, 3), dtype=torch.uint8)
    found = dict[str, bytes]()
    for value in values:
        torch.manual_seed(0)
        network = Network(small_params(layers=4, **{key: value}), 32, ["a", "b", "c"])
        network.measure(images)
        found[value] = network.train()(images.permute(0, 3, 1, 2)).detach().numpy().tobytes()
    assert len(set(found.values())) == len(values)


@pytest.mark.parametrize(("key", "values"), choices(TrainParams))
def test_values_of_the_training(train_params: MakeTrain, key: str, values: tuple[str, ...]) -> None:
    data, found = coloured(50), dict[str, bytes]()
    uneven = Images(data.images, data.labels.clamp(max=1))
    for value in values:
        torch.manual_seed(0)
        network = Network(small_params(), SIZE, ["a", "b", "c"])
        params = train_params(epochs=2, batch_size=16, lr=0.01, translate=1, **{key: value})
        fit(network, params, uneven)
        weights = network.state_dict().values()
        found[value] = b"".join(tensor.numpy().tobytes() for tensor in weights)
    assert len(set(found.values())) == len(values)

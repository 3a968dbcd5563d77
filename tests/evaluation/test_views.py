"""Accuracy on mirrored and shifted images, compared with numpy's mirroring and padding."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import accuracy_score

from cifarlab.evaluation.metrics import accuracies_of_views
from cifarlab.nn.network import Network, predict
from cifarlab.params.sections import EvaluateParams
from tests.support.networks import SIZE, colour_network

Pictures = npt.NDArray[np.uint8]


@pytest.fixture
def network(content: dict[str, Any]) -> Network:
    """A network whose predictions vary, though it is not trained."""
    return colour_network(content["model"], norm="none", init="normal")


@pytest.fixture
def evaluate_params(content: dict[str, Any]) -> Callable[..., EvaluateParams]:
    return lambda **changes: EvaluateParams(**content["evaluate"] | {"batch_size": 7} | changes)


def test_accuracies_on_mirrored_and_shifted_images(
    network: Network, evaluate_params: Callable[..., EvaluateParams]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, SIZE, SIZE, 3), dtype=np.uint8)

    def logits(pictures: Pictures) -> torch.Tensor:
        return predict(network, torch.from_numpy(pictures.copy()), 60)

    def crop(n: int, down: int, right: int) -> Pictures:
        padded = np.pad(images, [(0, 0), (n, n), (n, n), (0, 0)], mode="reflect")
        return padded[:, n + down : n + down + SIZE, n + right : n + right + SIZE]

    def both(pictures: Pictures) -> torch.Tensor:
        return (logits(pictures) + logits(pictures[:, :, ::-1])) / 2

    two = both(images)
    six = two / 2 + (both(crop(1, -1, -1)) + both(crop(1, 1, 1))) / 4
    labels = torch.where(torch.arange(60) % 4 == 0, 0, two.argmax(1))
    ways = [accuracy_score(labels, found.argmax(1)) for found in (logits(images), two, six)]
    assert len(set(ways)) == 3

    def shifted(n: int) -> float:
        views = [crop(n, *by) for by in ((-n, 0), (n, 0), (0, -n), (0, n))]
        return float(np.mean([accuracy_score(labels, logits(v).argmax(1)) for v in views]))

    arguments = network, torch.from_numpy(images), labels, logits(images)
    expected = {"accuracy_views_2": pytest.approx(ways[1])}
    assert accuracies_of_views(*arguments, evaluate_params(views=2)) == expected
    expected |= {"accuracy_views_6": pytest.approx(ways[2])}
    assert accuracies_of_views(*arguments, evaluate_params(views=6)) == expected
    expected = {f"accuracy_shifted_{n}": pytest.approx(shifted(n), abs=1e-6) for n in (1, 2)}
    assert accuracies_of_views(*arguments, evaluate_params(shifts=2)) == expected
    assert accuracies_of_views(*arguments, evaluate_params()) == {}

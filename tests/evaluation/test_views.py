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

    mean = (logits(images) + logits(images[:, :, ::-1])) / 2
    labels = torch.where(torch.arange(60) % 4 == 0, 0, mean.argmax(1))
    plain = accuracy_score(labels, logits(images).argmax(1))
    mirrored = accuracy_score(labels, mean.argmax(1))
    assert plain != mirrored

    def shifted(pixels: int) -> float:
        n = pixels
        padded = np.pad(images, [(0, 0), (n, n), (n, n), (0, 0)], mode="reflect")
        corners = [(0, n), (2 * n, n), (n, 0), (n, 2 * n)]
        views = [padded[:, y : y + SIZE, x : x + SIZE] for y, x in corners]
        return float(np.mean([accuracy_score(labels, logits(v).argmax(1)) for v in views]))

    arguments = network, torch.from_numpy(images), labels, logits(images)
    expected = {"accuracy_mirrored": pytest.approx(mirrored)}
    assert accuracies_of_views(*arguments, evaluate_params(mirror=True)) == expected
    expected = {f"accuracy_shifted_{n}": pytest.approx(shifted(n), abs=1e-6) for n in (1, 2)}
    assert accuracies_of_views(*arguments, evaluate_params(shifts=2)) == expected
    assert accuracies_of_views(*arguments, evaluate_params()) == {}

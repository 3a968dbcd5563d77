"""Accuracy, confusion and calibration on the test images, and accuracy on other views of them."""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cifarlab.data.augment import augment
from cifarlab.data.dataset import Labels
from cifarlab.data.draws import Draws
from cifarlab.data.mapped import Rows
from cifarlab.errors import UserError
from cifarlab.nn.network import Network, predict
from cifarlab.params.sections import EvaluateParams

Floats = npt.NDArray[np.float64]
Table = list[dict[str, Any]]


def confusion_matrix(actual: Labels, predicted: Labels, classes: int) -> npt.NDArray[np.int64]:
    """Count images: int64 (classes, classes), row = actual class, column = predicted class."""
    return np.bincount(actual * classes + predicted, minlength=classes**2).reshape(classes, classes)


def expected_calibration_error(probabilities: Floats, actual: Labels, bins: int) -> float:
    """Return the mean gap between confidence and accuracy, in 0…1 (Guo et al. 2017).

    Parameters
    ----------
    probabilities : float (N, classes), rows sum to one
    actual : int (N,)
    bins : number of equal intervals of confidence
    """
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == actual
    # As in the paper, an interval includes its upper end and excludes its lower end.
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(actual))


def macro_auroc(probabilities: Floats, actual: Labels) -> float:
    """Return the mean area under the ROC curve of each class against the rest.

    It is the share of pairs of an image of the class and another image in which the former has the
    higher probability of the class; a tie counts half (Hanley & McNeil 1982). Classes without
    images, or with all of them, are left out.
    """
    areas = []
    for label, scores in enumerate(probabilities.T):
        positive = actual == label
        one, rest = int(positive.sum()), int((~positive).sum())
        if one and rest:
            _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
            ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # the mean of equal ones
            areas.append((ranks[positive].sum() - one * (one + 1) / 2) / (one * rest))
    return float(np.mean(areas)) if areas else 0.5


def evaluate(
    probabilities: Floats, actual: Labels, classes: list[str], bins: int
) -> tuple[dict[str, Any], dict[str, Table]]:
    """Return the metrics and the tables predictions, per_class and confusion.

    balanced_accuracy is the mean accuracy of the classes, however many images they have.
    top5_accuracy is the share of images whose class is among the five most probable ones; with
    five classes or fewer there is none. The loss is the mean cross-entropy in nats, at most 708 for
    an image, whatever the network was trained on, so that runs can be compared. As in scikit-learn,
    a class that is never predicted has precision 0, and of equal probabilities those of the last
    classes count as the five highest.

    Raises
    ------
    UserError
        A probability is NaN.
    """
    if np.isnan(probabilities).any():
        advice = "try a lower train.lr, model.init_gain or model.logit_scale"
        raise UserError(f"the network's output overflows on the test images; {advice}")
    predicted = probabilities.argmax(1)
    confusion = confusion_matrix(actual, predicted, len(classes))
    hits, images = np.diag(confusion), confusion.sum(1)
    recall = hits / np.maximum(images, 1)
    precision = hits / np.maximum(confusion.sum(0), 1)
    f1 = 2 * hits / np.maximum(images + confusion.sum(0), 1)
    likelihood = probabilities[np.arange(len(actual)), actual]
    names = np.asarray(classes)
    metrics = {
        "accuracy": float(hits.sum() / len(actual)),
        "balanced_accuracy": float(recall[images > 0].mean()),
        "loss": float(-np.log(np.maximum(likelihood, np.finfo(np.float64).tiny)).mean()),
        "macro_f1": float(f1.mean()),
        "macro_auroc": macro_auroc(probabilities, actual),
        "calibration_error": expected_calibration_error(probabilities, actual, bins),
    }
    if len(classes) > 5:
        five = np.argsort(probabilities, 1, kind="stable")[:, -5:]
        metrics["top5_accuracy"] = float((five == actual[:, None]).any(1).mean())
    highest, counts = probabilities.max(1), dict(zip(classes, confusion.T, strict=True))
    rates = {"accuracy": recall, "precision": precision, "f1": f1, "images": images}
    tables = {
        "predictions": _table(actual=names[actual], predicted=names[predicted], confidence=highest),
        "per_class": _table(**{"class": names}, **rates),
        "confusion": _table(**{"actual/predicted": names}, **counts),
    }
    return metrics, tables


def accuracies_of_views(
    network: Network, images: Rows, labels: Tensor, logits: Tensor, params: EvaluateParams
) -> dict[str, float]:
    """Return the accuracies that evaluate.views and evaluate.shifts ask for.

    accuracy_views_2 is that of the mean over each image and its mirror image. accuracy_views_6 also
    takes both after shifts by one pixel, to the top left and to the bottom right (Jordan 2024,
    airbench). accuracy_shifted_1, 2, … are those on images shifted by 1, 2, … pixels, each the mean
    of the four directions.

    Parameters
    ----------
    images : uint8 (N, height, width, 3), with labels int64 (N,)
    logits : those of the images, float (N, classes)
    """

    def share(logits: Tensor) -> float:
        return int((logits.argmax(1) == labels).sum()) / len(labels)

    def seen(up: int, left: int, *, mirrored: bool = False) -> Tensor:
        view = partial(moved, up=up, left=left, mirrored=mirrored)
        return predict(network, images, params.batch_size, view)

    found: dict[str, float] = {}
    if params.views > 1:
        logits = logits + seen(0, 0, mirrored=True)
        found["accuracy_views_2"] = share(logits)
    if params.views > 2:
        corners = [seen(n, n, mirrored=way) for n in (1, -1) for way in (False, True)]
        found["accuracy_views_6"] = share(logits + sum(corners) / 2)
    for n in range(1, params.shifts + 1):
        shares = [share(seen(*by)) for by in ((n, 0), (-n, 0), (0, n), (0, -n))]
        found[f"accuracy_shifted_{n}"] = sum(shares) / len(shares)
    return found


def moved(images: Tensor, up: int, left: int, *, mirrored: bool) -> Tensor:
    """Return uint8 images (N, height, width, 3), shifted by some pixels and perhaps mirrored."""
    mirrors = torch.full((len(images),), mirrored, device=images.device)
    shifts = torch.tensor((up, left), device=images.device).expand(len(images), 2)
    return augment(images, Draws(mirrors, shifts)).permute(0, 2, 3, 1)


def _table(**columns: npt.NDArray[Any]) -> Table:
    values = (column.tolist() for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

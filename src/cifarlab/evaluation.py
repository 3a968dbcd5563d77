"""What the test set says about a network: accuracy, confusion, calibration."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from cifarlab import UserError

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def confusion_matrix(actual: Labels, predicted: Labels, classes: int) -> npt.NDArray[np.int64]:
    """Count images: int64 (classes, classes), row = actual class, column = predicted class."""
    return np.bincount(actual * classes + predicted, minlength=classes**2).reshape(classes, classes)


def expected_calibration_error(probabilities: Floats, actual: Labels, bins: int) -> float:
    """Mean gap between confidence and accuracy over `bins` equal intervals (Guo et al. 2017), in 0…1.

    Parameters
    ----------
    probabilities : float (N, classes), rows sum to one
    actual : int (N,)
    """
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == actual
    # Intervals are open on the left, closed on the right, as in the paper.
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(actual))


def evaluate(probabilities: Floats, actual: Labels, classes: list[str], bins: int) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Return the metrics, and the tables predictions, per_class and confusion.

    The loss is the mean cross-entropy in nats whatever the network was trained on, so that runs compare.
    A class that is never predicted has precision 0, as in scikit-learn. Probabilities that are no numbers are refused.
    """
    if np.isnan(probabilities).any():
        raise UserError("the network's output overflows on the test images; try a lower train.lr, model.init_gain or model.logit_scale")
    predicted = probabilities.argmax(1)
    confusion = confusion_matrix(actual, predicted, len(classes))
    hits, images = np.diag(confusion), confusion.sum(1)
    recall = hits / np.maximum(images, 1)
    precision = hits / np.maximum(confusion.sum(0), 1)
    f1 = 2 * hits / np.maximum(images + confusion.sum(0), 1)
    likelihood = probabilities[np.arange(len(actual)), actual]
    metrics = {
        "accuracy": float(hits.sum() / len(actual)),
        "loss": float(-np.log(np.maximum(likelihood, np.finfo(np.float64).tiny)).mean()),
        "macro_f1": float(f1.mean()),
        "calibration_error": expected_calibration_error(probabilities, actual, bins),
        "accuracy_per_class": dict(zip(classes, recall.tolist(), strict=True)),
    }
    names = np.asarray(classes)
    predictions = pd.DataFrame({"actual": names[actual], "predicted": names[predicted], "confidence": probabilities.max(1)})
    per_class = pd.DataFrame({"class": names, "accuracy": recall, "precision": precision, "f1": f1, "images": images})
    matrix = pd.DataFrame(confusion, index=pd.Index(names, name="actual/predicted"), columns=names).reset_index()
    return metrics, {"predictions": predictions, "per_class": per_class, "confusion": matrix}

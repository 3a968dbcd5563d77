"""What the page computes from predictions: tables with an interval for each accuracy.

Predictions are a table with the columns actual, predicted and confidence, a row for each image.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from cifarlab.tracking.registry import mcnemar


def accuracy(right: Any, images: Any) -> pd.DataFrame:
    """Return the columns images, accuracy, low and high: the 95 % interval of Wilson (1927).

    Without images, the accuracy is NaN, and the interval means nothing.
    """
    low, high = proportion_confint(right, np.maximum(images, 1), method="wilson")
    return pd.DataFrame({"images": images, "accuracy": right / images, "low": low, "high": high})


def holm(p: Any) -> Any:
    """Return p values, corrected for their number (Holm 1979).

    The function of statsmodels collects garbage in each call, which takes up to 0.3 s.
    """
    rising = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1))
    return np.minimum(rising, 1)[np.argsort(np.argsort(p))]


def right(predictions: pd.DataFrame) -> "pd.Series[bool]":
    """Tell which images are classified correctly."""
    return predictions.actual == predictions.predicted


def confusion(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Count images: a row for each actual class, a column for each predicted class."""
    counts = pd.crosstab(predictions.actual, predictions.predicted)
    return counts.reindex(index=[*classes], columns=[*classes], fill_value=0)


def per_class(counts: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy, precision and F1 of each class of a confusion matrix.

    As in scikit-learn, a class that is never predicted has precision 0.
    """
    hits, images, said = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    f1 = 2 * hits / np.maximum(images + said, 1)
    return accuracy(hits, images).assign(precision=hits / np.maximum(said, 1), f1=f1)


def confused(predictions: pd.DataFrame, most: int) -> list[tuple[str, str, int]]:
    """Return the most frequent mistakes: actual class, predicted class, images."""
    wrong = predictions[~right(predictions)]
    counts = wrong.value_counts(["actual", "predicted"]).head(most)
    return [(*pair, n) for pair, n in counts.items()]  # type: ignore[misc]


def calibration(predictions: pd.DataFrame, bins: int) -> pd.DataFrame:
    """Return accuracy and mean confidence of the images in each interval of confidence.

    The index is the upper end, which belongs to the interval, as in `expected_calibration_error`.
    Intervals without images are left out.
    """
    upper = np.ceil(predictions.confidence * bins).clip(1, bins) / bins
    groups = predictions.assign(right=right(predictions)).groupby(upper)
    table = accuracy(groups.right.sum(), groups.right.count())
    return table.assign(confidence=groups.confidence.mean())


def compare(
    one: pd.DataFrame, other: pd.DataFrame, classes: Sequence[str]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Compare predictions for the same images: all of them, and those of each class.

    first and second are the accuracies, only_first and only_second the images that only one gets
    right, p is McNemar's exact test. The p of the classes are corrected for their number (Holm
    1979).
    """
    a, b = right(one), right(other)

    def row(those: Any) -> dict[str, Any]:
        only_first, only_second, p = mcnemar(a[those], b[those])
        accuracies = {"first": a[those].mean(), "second": b[those].mean()}
        counts = {"images": int(those.sum()), "only_first": only_first, "only_second": only_second}
        return counts | accuracies | {"p": p}

    each = pd.DataFrame([row(one.actual == name) for name in classes], [*classes])
    each["p"] = holm(each["p"])
    return row(one.index >= 0), each

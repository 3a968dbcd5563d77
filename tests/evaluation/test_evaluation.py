"""Metrics and tables compared with scikit-learn, with results by hand, and with simulations."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from cifarlab.errors import UserError
from cifarlab.evaluation.metrics import (
    Floats,
    Labels,
    confusion_matrix,
    evaluate,
    expected_calibration_error,
)

CLASSES = ["cat", "dog", "猫", "7"]


def network(n: int, present: list[int], sharpness: float = 1.0) -> tuple[Floats, Labels]:
    """Imitate a network that is mostly right; return probabilities and actual classes."""
    rng = np.random.default_rng(n)
    actual = rng.choice(present, n)
    logits = sharpness * (rng.normal(size=(n, len(CLASSES))) + 1.5 * np.eye(len(CLASSES))[actual])
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), actual


@pytest.mark.parametrize("never_predicted", [None, 1])
@pytest.mark.parametrize("present", [[0, 1, 2, 3], [0, 1, 3], [2]], ids=str)
def test_metrics_equal_those_of_scikit_learn(
    present: list[int], never_predicted: int | None
) -> None:
    probabilities, actual = network(500, present)
    if never_predicted is not None:
        probabilities[:, never_predicted] *= 1e-3
        probabilities /= probabilities.sum(1, keepdims=True)
    predicted = probabilities.argmax(1)
    assert never_predicted not in predicted

    metrics, tables = evaluate(probabilities, actual, CLASSES, 15)
    every = {"labels": range(len(CLASSES)), "zero_division": 0}
    per_class, confusion = (pd.DataFrame(tables[name]) for name in ("per_class", "confusion"))
    assert np.array_equal(
        confusion[CLASSES], sk.confusion_matrix(actual, predicted, labels=range(len(CLASSES)))
    )
    assert per_class["accuracy"].tolist() == pytest.approx(
        sk.recall_score(actual, predicted, average=None, **every)
    )
    assert per_class["precision"].tolist() == pytest.approx(
        sk.precision_score(actual, predicted, average=None, **every)
    )
    assert per_class["f1"].tolist() == pytest.approx(
        sk.f1_score(actual, predicted, average=None, **every)
    )
    assert per_class["images"].tolist() == [
        np.count_nonzero(actual == c) for c in range(len(CLASSES))
    ]
    assert metrics["accuracy"] == pytest.approx(sk.accuracy_score(actual, predicted))
    assert metrics["macro_f1"] == pytest.approx(
        sk.f1_score(actual, predicted, average="macro", **every)
    )
    assert metrics["loss"] == pytest.approx(
        sk.log_loss(actual, probabilities, labels=range(len(CLASSES)))
    )


def test_tables_have_a_row_per_image_in_order_and_a_row_per_class() -> None:
    probabilities = np.array([[0.7, 0.1, 0.1, 0.1], [0.2, 0.3, 0.1, 0.4], [0.1, 0.2, 0.6, 0.1]])
    _, tables = evaluate(probabilities, np.array([0, 1, 2]), CLASSES, 15)
    assert tables["predictions"] == [
        {"actual": "cat", "predicted": "cat", "confidence": 0.7},
        {"actual": "dog", "predicted": "7", "confidence": 0.4},
        {"actual": "猫", "predicted": "猫", "confidence": 0.6},
    ]
    assert list(tables["per_class"][0]) == ["class", "accuracy", "precision", "f1", "images"]
    assert [row["class"] for row in tables["per_class"]] == CLASSES
    assert tables["confusion"] == [
        {"actual/predicted": "cat", "cat": 1, "dog": 0, "猫": 0, "7": 0},
        {"actual/predicted": "dog", "cat": 0, "dog": 0, "猫": 0, "7": 1},
        {"actual/predicted": "猫", "cat": 0, "dog": 0, "猫": 1, "7": 0},
        {"actual/predicted": "7", "cat": 0, "dog": 0, "猫": 0, "7": 0},
    ]


@pytest.mark.parametrize("name", ["actual", "predicted", "class"])
def test_a_class_may_have_the_name_of_a_column(name: str) -> None:
    _, tables = evaluate(np.eye(2), np.array([0, 1]), [name, "other"], 15)
    assert [(row["class"], row["accuracy"]) for row in tables["per_class"]] == [
        (name, 1.0),
        ("other", 1.0),
    ]
    rows = [list(row.values()) for row in tables["confusion"]]
    assert rows == [[name, 1, 0], ["other", 0, 1]]


def test_rows_of_the_confusion_matrix_are_the_actual_classes() -> None:
    assert confusion_matrix(np.array([0, 0, 2]), np.array([1, 1, 0]), 3).tolist() == [
        [0, 2, 0],
        [0, 0, 0],
        [1, 0, 0],
    ]


def test_probability_zero_for_the_right_class_gives_a_large_but_finite_loss() -> None:
    metrics, _ = evaluate(np.eye(4), np.array([0, 1, 2, 0]), CLASSES, 15)
    assert 100 < metrics["loss"] < 1000


@pytest.mark.parametrize(
    ("confidence", "correct", "bins", "expected"),
    [
        # 0.9 and 0.8, one of two right: |1.7 - 1|; 0.6 and 0.7, both right: |1.3 - 2|.
        ([0.9, 0.8, 0.6, 0.7], [1, 0, 1, 1], 4, (0.7 + 0.7) / 4),
        # An image on the border of two intervals is in the lower one, so the gaps do not cancel.
        ([0.5, 0.6], [1, 0], 2, (0.5 + 0.6) / 2),
        # In a single interval they cancel.
        ([0.5, 0.6], [1, 0], 1, abs(1.1 - 1) / 2),
        ([1.0, 1.0], [1, 1], 15, 0),
        ([1.0, 1.0], [0, 0], 15, 1),
    ],
)
def test_calibration_error_by_hand(
    confidence: list[float], correct: list[int], bins: int, expected: float
) -> None:
    probabilities = np.array([[c, 1 - c] for c in confidence])
    actual = np.array([0 if right else 1 for right in correct])
    assert expected_calibration_error(probabilities, actual, bins) == pytest.approx(expected)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_equals_the_definition_written_as_a_loop(bins: int) -> None:
    probabilities, actual = network(400, [0, 1, 2, 3])
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == actual
    expected = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(probabilities, actual, bins) == pytest.approx(expected)


def test_calibration_error_is_near_zero_only_if_confidence_is_the_probability_to_be_right() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 100_000)
    probabilities = np.stack([confidence, 1 - confidence], 1)
    actual = (rng.uniform(size=len(confidence)) > confidence).astype(np.int64)
    assert expected_calibration_error(probabilities, actual, 15) < 0.01
    # Overconfident: the probability of being wrong is halved, by an eighth on average.
    overconfident = np.stack([(1 + confidence) / 2, (1 - confidence) / 2], 1)
    assert expected_calibration_error(overconfident, actual, 15) == pytest.approx(0.125, abs=0.01)


def test_nan_is_refused() -> None:
    with pytest.raises(UserError, match=r"overflows on the test images; try a lower train\.lr"):
        evaluate(np.full((2, 4), np.nan), np.array([0, 1]), CLASSES, 15)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 6, 10])
def test_balanced_accuracy_top_5_and_auroc_equal_those_of_scikit_learn(
    classes: int, ties: bool
) -> None:
    rng = np.random.default_rng(classes)
    # The classes have very different numbers of images.
    actual = np.concatenate([np.arange(classes), rng.geometric(0.5, 400) % classes])
    logits = rng.normal(size=(len(actual), classes)) + np.eye(classes)[actual]
    logits = logits.round() if ties else logits
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    metrics, _ = evaluate(probabilities, actual, [str(i) for i in range(classes)], 15)
    predicted = probabilities.argmax(1)
    balanced = sk.balanced_accuracy_score(actual, predicted)
    assert metrics["balanced_accuracy"] == pytest.approx(balanced)
    one_class = [sk.roc_auc_score(actual == c, probabilities[:, c]) for c in range(classes)]
    assert metrics["macro_auroc"] == pytest.approx(np.mean(one_class))
    if classes > 5:
        labels = range(classes)
        top5 = sk.top_k_accuracy_score(actual, probabilities, k=5, labels=labels)
        assert metrics["top5_accuracy"] == pytest.approx(top5)
    else:
        assert "top5_accuracy" not in metrics

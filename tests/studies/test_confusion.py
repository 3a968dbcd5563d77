"""Test the confused pairs against an example counted by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cifarlab.data.dataset import Dataset
from cifarlab.studies.page import page_of
from studies import confusion

# Actual class, predicted class, number of images.
COUNTS = [("0", "1", 12), ("1", "0", 2), ("2", "0", 3), ("0", "2", 3), ("0", "0", 50)]

CLASSES = list("0123456789")


def predictions() -> pd.DataFrame:
    rows = [
        (actual, predicted, 0.5 + i / 1000) for actual, predicted, n in COUNTS for i in range(n)
    ]
    return pd.DataFrame(rows, columns=["actual", "predicted", "confidence"])


def test_pairs_by_hand() -> None:
    table = confusion.pairs(predictions(), ["0", "1", "2"])
    assert [pair[:4] for pair in table] == [("0", "1", 12, 2), ("0", "2", 3, 3), ("1", "2", 0, 0)]
    assert [pair.share for pair in table] == pytest.approx([14 / 20, 6 / 20, 0])
    # 2 (1 + 14 + 91) / 2**14, the smallest of three p-values, times three.
    assert [pair.p for pair in table] == pytest.approx([3 * 2 * 106 / 2**14, 1, 1])


def test_the_page_names_the_most_confused_pair() -> None:
    table = confusion.pairs(predictions(), CLASSES)
    page = confusion.page(table, "digits", "commit 1234567")
    assert "- Half of all mistakes are in 1 of the 45 pairs of classes." in page
    assert "- *0* and *1* alone account for 70%." in page
    assert "| 0 → 1 | 12 | 2 | 70.0% |" in page
    # Significant for three pairs, not for 45.
    assert "- More frequent in one direction than chance explains: none." in page


def test_the_page_names_the_direction_of_an_uneven_pair() -> None:
    table = confusion.pairs(predictions(), ["0", "1", "2"])
    page = confusion.page(table, "digits", "commit 1234567")
    assert "chance explains: 0 → 1 (12 against 2)." in page


def test_the_picture_has_its_size(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (len(predictions()), 8, 8, 3), np.uint8)
    data = Dataset({"test": images}, {}, CLASSES, "noise")
    table = confusion.pairs(predictions(), CLASSES)
    figure = confusion.draw(table, predictions(), data)
    figure.savefig(tmp_path / "confusion.png", dpi=90)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.size == (1350, 540)


def test_a_page_about_other_data_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answers = Path("docs/studies")
    assert page_of("confusion", "digits").parent == answers  # there is no page yet
    answers.mkdir(parents=True)
    (answers / "confusion.md").write_text("cifar10-jpeg, 6 layers: test accuracy 89 %.\n")
    assert page_of("confusion", "cifar10-jpeg").parent == answers
    assert page_of("confusion", "cifar10").parent == answers / "cifar10"
    assert page_of("confusion", "digits").parent == answers / "digits"

"""Confused pairs beside a case counted by hand."""

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from cifarlab import sources
from studies import confusion

# Of each: actual, predicted, how often.
COUNTS = [("0", "1", 12), ("1", "0", 2), ("2", "0", 3), ("0", "2", 3), ("0", "0", 50)]


def predictions() -> pd.DataFrame:
    rows = [(actual, predicted, 0.5 + i / 1000) for actual, predicted, n in COUNTS for i in range(n)]
    return pd.DataFrame(rows, columns=["actual", "predicted", "confidence"])


def test_pairs_by_hand() -> None:
    table = confusion.pairs(predictions(), ["0", "1", "2"])
    assert [pair[:4] for pair in table] == [("0", "1", 12, 2), ("0", "2", 3, 3), ("1", "2", 0, 0)]
    assert [pair.share for pair in table] == pytest.approx([14 / 20, 6 / 20, 0])
    # 2 (1 + 14 + 91) / 2**14, the smallest of three, times three.
    assert [pair.p for pair in table] == pytest.approx([3 * 2 * 106 / 2**14, 1, 1])


def test_the_page_names_the_pair_and_the_way(tmp_path: Path) -> None:
    data = sources.digits()
    table = confusion.pairs(predictions(), data.classes)
    told = confusion.page(table, "digits")
    assert "Of 45 pairs of classes 1 make half of all mistakes; *0* and *1* alone make\n70%" in told
    assert "Uneven beyond chance (binomial test, Holm): none." in told  # 45 comparisons
    confusion.draw(tmp_path / "confusion.png", table, predictions(), data)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.size == (1350, 540)

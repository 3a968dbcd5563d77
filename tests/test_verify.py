"""When two test accuracies agree. tests/faults/test_revisions.py repeats real trainings."""

import json
from pathlib import Path

import pytest

from cifarlab import files, verify
from cifarlab.errors import UserError


def outputs(right: int, images: int) -> dict[Path, bytes]:
    table = b"actual,predicted,confidence\n" + b"a,a,1\n" * images
    return {
        files.EVALUATION: json.dumps({"accuracy": right / images}).encode(),
        files.PREDICTIONS: table,
    }


@pytest.mark.parametrize(("one", "other", "images"), [(300, 299, 300), (40, 39, 40), (36, 33, 40)])
def test_the_order_of_two_accuracies_does_not_matter(
    one: int, other: int, images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for first, again in ((one, other), (other, one)):
        verify._compare_accuracy(outputs(first, images), outputs(again, images), "They differ")
        assert "now, within ±" in capsys.readouterr().out


def test_another_accuracy_is_refused() -> None:
    # By hand: p = 171 / 204, 1.96 √(2 · 0.83824 · 0.16176 / 100) = 10.207 %.
    with pytest.raises(UserError, match=r"90\.00% then, 79\.00% now, NOT within ±10\.21% for 100"):
        verify._compare_accuracy(outputs(90, 100), outputs(79, 100), "They differ")

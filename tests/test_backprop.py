import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from studies import backprop
from tests.conftest import REPO

# The same draws on every machine.
DRAWS = settings(derandomize=True, deadline=None, database=None)
# Computed by pen.
X, FILTER, OUTPUT, UPSTREAM = [[1, 2, 3], [-1, 4, 1], [2, 1, 5]], [[1, 2], [3, -1]], [[-2, 19], [12, 4]], [[1, -1], [3, 2]]
TO_FILTER, TO_X = [[4, 13], [3, 16]], [[1, 1, -2], [6, 4, 5], [9, 3, -2]]


def test_the_exercise_gives_the_numbers_computed_by_pen() -> None:
    x, f, upstream = np.array([X], float), np.array([[FILTER]], float), np.array([UPSTREAM], float)
    assert backprop.convolve(x, f).tolist() == [OUTPUT]
    for way in (backprop.gradients, backprop.autograd):
        to_x, to_filter = way(x, f, upstream)
        assert to_x.tolist() == [TO_X]
        assert to_filter.tolist() == [[TO_FILTER]]
    hand = backprop.by_hand(x[0], f[0, 0], upstream[0])
    assert [backprop.value(terms) for terms in hand.values()] == [number for row in TO_FILTER + TO_X for number in row]
    assert list(hand)[:5] == ["∂L/∂F₁₁", "∂L/∂F₁₂", "∂L/∂F₂₁", "∂L/∂F₂₂", "∂L/∂X₁₁"]


def test_the_page_is_about_this_exercise_and_spells_its_sums() -> None:
    assert (backprop.X.tolist(), backprop.FILTER.tolist(), backprop.UPSTREAM.tolist()) == (X, FILTER, UPSTREAM)
    page = (REPO / backprop.PAGE).read_text("utf-8")
    terms = "X₁₁·∂L/∂O₁₁ + X₁₂·∂L/∂O₁₂ + X₂₁·∂L/∂O₂₁ + X₂₂·∂L/∂O₂₂"
    assert f"| ∂L/∂F₁₁ | {terms} | 1·1 + 2·(−1) + (−1)·3 + 4·2 | 4 | 4 | 4 |" in page
    assert "| ∂L/∂X₁₁ | F₁₁·∂L/∂O₁₁ | 1·1 | 1 | 1 | 1 |" in page
    terms = "F₂₂·∂L/∂O₁₁ + F₂₁·∂L/∂O₁₂ + F₁₂·∂L/∂O₂₁ + F₁₁·∂L/∂O₂₂"
    assert f"| ∂L/∂X₂₂ | {terms} | (−1)·1 + 3·(−1) + 2·3 + 1·2 | 4 | 4 | 4 |" in page


def test_numpy_and_autograd_agree_whatever_the_shapes() -> None:
    seen: Counter[str] = Counter()

    @given(st.data())
    @settings(DRAWS, max_examples=300)
    def check(data: st.DataObject) -> None:
        stride, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
        inputs, outputs = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        kernel = [data.draw(st.integers(1, 4)) for _ in range(2)]
        size = [data.draw(st.integers(max(1, k - 2 * padding), 9)) for k in kernel]
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        x, f = rng.normal(size=(inputs, *size)), rng.normal(size=(outputs, inputs, *kernel))
        output = backprop.convolve(x, f, stride, padding)
        expected = torch.nn.functional.conv2d(torch.tensor(x), torch.tensor(f), stride=stride, padding=padding).numpy()
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-9)
        upstream = rng.normal(size=output.shape)
        ours, theirs = (way(x, f, upstream, stride, padding) for way in (backprop.gradients, backprop.autograd))
        for here, there, like in zip(ours, theirs, (x, f), strict=True):
            assert here.shape == like.shape
            np.testing.assert_allclose(here, there, rtol=0, atol=1e-9)
        seen["oblong filter"] += kernel[0] != kernel[1]
        seen["stride does not divide"] += any((s + 2 * padding - k) % stride for s, k in zip(size, kernel, strict=True))
        seen["input smaller than filter"] += any(s < k for s, k in zip(size, kernel, strict=True))

    check()
    assert min(seen[kind] for kind in ("oblong filter", "stride does not divide", "input smaller than filter")) > 20, seen


def test_two_equal_filters_get_equal_gradients_and_a_third_another() -> None:
    first, second, third = (row.split("|")[2:] for row in backprop.symmetry().splitlines()[2:])
    assert first == second
    f, outgoing, *others = zip(first, third, strict=True)
    assert f[0] != f[1]
    assert outgoing[0] == outgoing[1]
    assert all(ours != theirs for ours, theirs in others[:-1])  # behind the last bar is nothing


@pytest.mark.parametrize("part", [0, 1])
def test_the_script_fails_and_writes_nothing_where_the_three_ways_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    right = backprop.gradients

    def wrong(*operands: backprop.Floats) -> list[backprop.Floats]:
        both = list(right(*operands))
        both[part] = both[part][..., ::-1, ::-1]  # turned where it should not be, or not turned
        return both

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backprop, "gradients", wrong)
    with pytest.raises(SystemExit, match="differs"):
        backprop.main()
    assert not list(tmp_path.iterdir())


def test_the_script_writes_the_committed_page_and_picture_anywhere(tmp_path: Path) -> None:
    alone = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, REPO / "studies/backprop.py"], cwd=tmp_path, env=alone, check=True, timeout=120)
    folder = tmp_path / backprop.PAGE.parent
    assert sorted(path.name for path in folder.iterdir()) == ["backprop.md", "backprop.png"]
    assert (tmp_path / backprop.PAGE).read_bytes() == (REPO / backprop.PAGE).read_bytes()
    written, committed = (Image.open((root / backprop.PAGE).with_suffix(".png")) for root in (tmp_path, REPO))
    assert "Software" not in written.info
    assert written.size == committed.size
    # Another machine may round a shade of grey otherwise; a number that moved changes black to white.
    assert np.abs(np.asarray(written, float) - np.asarray(committed, float)).max() < 64

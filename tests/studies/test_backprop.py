"""Test the gradients of a convolution against numbers computed by pen and against autograd."""

from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from studies import backprop

REPO = Path(__file__).resolve().parents[2]
# The same draws on every machine.
DRAWS = settings(derandomize=True, deadline=None, database=None)
# Computed by pen.
X, FILTER = [[1, 2, 3], [-1, 4, 1], [2, 1, 5]], [[1, 2], [3, -1]]
OUTPUT, UPSTREAM = [[-2, 19], [12, 4]], [[1, -1], [3, 2]]
TO_FILTER, TO_X = [[4, 13], [3, 16]], [[1, 1, -2], [6, 4, 5], [9, 3, -2]]


def test_the_exercise_gives_the_numbers_computed_by_pen() -> None:
    x, f, upstream = np.array([X], float), np.array([[FILTER]], float), np.array([UPSTREAM], float)
    assert backprop.convolve(x, f).tolist() == [OUTPUT]
    for way in (backprop.gradients, backprop.autograd):
        to_x, to_filter = way(x, f, upstream)
        assert to_x.tolist() == [TO_X]
        assert to_filter.tolist() == [[TO_FILTER]]
    hand = backprop.by_hand(x[0], f[0, 0], upstream[0])
    expected = [number for row in TO_FILTER + TO_X for number in row]
    assert [backprop.value(terms) for terms in hand.values()] == expected
    assert list(hand)[:5] == ["∂L/∂F₁₁", "∂L/∂F₁₂", "∂L/∂F₂₁", "∂L/∂F₂₂", "∂L/∂X₁₁"]


def test_the_page_shows_this_exercise_and_writes_out_its_sums() -> None:
    assert backprop.X.tolist() == X
    assert backprop.FILTER.tolist() == FILTER
    assert backprop.UPSTREAM.tolist() == UPSTREAM
    page = (REPO / backprop.PAGE).read_text("utf-8")
    terms = "X₁₁·∂L/∂O₁₁ + X₁₂·∂L/∂O₁₂ + X₂₁·∂L/∂O₂₁ + X₂₂·∂L/∂O₂₂"
    assert f"| ∂L/∂F₁₁ | {terms} | 1·1 + 2·(−1) + (−1)·3 + 4·2 | 4 | 4 | 4 |" in page
    assert "| ∂L/∂X₁₁ | F₁₁·∂L/∂O₁₁ | 1·1 | 1 | 1 | 1 |" in page
    terms = "F₂₂·∂L/∂O₁₁ + F₂₁·∂L/∂O₁₂ + F₁₂·∂L/∂O₂₁ + F₁₁·∂L/∂O₂₂"
    assert f"| ∂L/∂X₂₂ | {terms} | (−1)·1 + 3·(−1) + 2·3 + 1·2 | 4 | 4 | 4 |" in page


def test_numpy_and_autograd_agree_for_every_shape() -> None:
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
        expected = torch.nn.functional.conv2d(
            torch.tensor(x), torch.tensor(f), stride=stride, padding=padding
        )
        np.testing.assert_allclose(output, expected.numpy(), rtol=0, atol=1e-9)
        upstream = rng.normal(size=output.shape)
        operands = x, f, upstream, stride, padding
        ours, theirs = backprop.gradients(*operands), backprop.autograd(*operands)
        for here, there, operand in zip(ours, theirs, (x, f), strict=True):
            assert here.shape == operand.shape
            np.testing.assert_allclose(here, there, rtol=0, atol=1e-9)
        sides = list(zip(size, kernel, strict=True))
        seen["filter not square"] += kernel[0] != kernel[1]
        seen["stride does not divide"] += any((s + 2 * padding - k) % stride for s, k in sides)
        seen["input smaller than filter"] += any(s < k for s, k in sides)

    check()
    assert len(seen) == 3
    assert min(seen.values()) > 20, seen


def test_two_equal_filters_get_equal_gradients_and_a_third_gets_others() -> None:
    table = backprop.symmetry().splitlines()[2:]
    first, second, third = (row.strip("| ").split(" | ")[1:] for row in table)
    assert first == second
    f, outgoing, *others = zip(first, third, strict=True)
    assert f[0] != f[1]
    assert outgoing[0] == outgoing[1]
    assert len(others) == 4
    assert all(of_first != of_third for of_first, of_third in others)


@pytest.mark.parametrize("part", [0, 1])
def test_the_script_fails_and_writes_nothing_if_the_three_ways_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    right = backprop.gradients

    def wrong(*operands: backprop.Floats) -> list[backprop.Floats]:
        both = list(right(*operands))
        both[part] = both[part][..., ::-1, ::-1]  # rotated by 180° where it must not be
        return both

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backprop, "gradients", wrong)
    with pytest.raises(SystemExit, match="differs"):
        backprop.main()
    assert not list(tmp_path.iterdir())


def test_the_script_writes_the_committed_page_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a script starts with these
        backprop.main()
    written, committed = tmp_path / backprop.PAGE, REPO / backprop.PAGE
    assert sorted(p.name for p in written.parent.iterdir()) == ["backprop.md", "backprop.png"]
    assert written.read_bytes() == committed.read_bytes()
    pictures = [Image.open(page.with_suffix(".png")) for page in (written, committed)]
    assert "Software" not in pictures[0].info
    assert pictures[0].size == pictures[1].size
    # Another machine may round a shade of grey differently. A number in another place changes
    # black to white.
    ours, theirs = (np.asarray(picture, float) for picture in pictures)
    assert np.abs(ours - theirs).max() < 64

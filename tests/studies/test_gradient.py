"""Test the gradients of the two losses: the formulas against autograd."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.gradient import LOSSES, by_autograd, by_formula, probabilities


@given(st.floats(1e-6, 1 - 1e-6), st.sampled_from(sorted(LOSSES)))
@settings(derandomize=True, deadline=None, database=None)
def test_formula_and_autograd_agree(right: float, loss: str) -> None:
    p = probabilities(right)
    assert np.isclose(p.sum(), 1)
    np.testing.assert_allclose(by_autograd(loss, p), by_formula(loss, p), rtol=1e-6, atol=1e-12)


def test_only_cross_entropy_learns_where_the_network_is_confidently_wrong() -> None:
    wrong = probabilities(1e-4)
    assert np.linalg.norm(by_autograd("cross_entropy", wrong)) > 1.4
    assert np.linalg.norm(by_autograd("quadratic", wrong)) < 0.01

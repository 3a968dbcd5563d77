"""The gradients of the two costs: formula beside autograd."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from studies.gradient import COSTS, by_autograd, by_formula, probabilities


@given(st.floats(1e-6, 1 - 1e-6), st.sampled_from(sorted(COSTS)))
def test_formula_and_autograd_agree(right: float, cost: str) -> None:
    p = probabilities(right)
    assert np.isclose(p.sum(), 1)
    np.testing.assert_allclose(by_autograd(cost, p), by_formula(cost, p), rtol=1e-6, atol=1e-12)


def test_confidently_wrong_only_cross_entropy_learns() -> None:
    wrong = probabilities(1e-4)
    assert np.linalg.norm(by_autograd("cross_entropy", wrong)) > 1.4
    assert np.linalg.norm(by_autograd("quadratic", wrong)) < 0.01

"""Settings for property tests: few random examples by default, many in the slow tests."""

import pytest
from hypothesis import settings

# The same random examples on every machine.
DRAWS = settings(derandomize=True, deadline=None, database=None)


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """Run a test with `examples=few`, and as a slow test with `examples=many`."""
    slow = pytest.param(many, marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [few, slow])

"""The checkout of the pipeline tests, for faults."""

from tests.pipeline.conftest import project  # noqa: F401, a fixture

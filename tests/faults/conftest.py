"""The fixtures of the pipeline tests and of tests/test_sources.py, for what else can go wrong."""

from tests.pipeline.conftest import project
from tests.test_sources import get, refused, server

__all__ = ["get", "project", "refused", "server"]

"""The fixtures of tests/test_sources.py, for what else can go wrong with a source."""

from tests.test_sources import get, refused, server

__all__ = ["get", "refused", "server"]

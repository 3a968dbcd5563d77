"""Measure how a network does on the test images."""

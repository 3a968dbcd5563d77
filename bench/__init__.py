"""Measure speed and accuracy, compared with the notebook's way of training: `make bench`."""

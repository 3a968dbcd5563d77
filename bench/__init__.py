"""Speed and accuracy, side by side with the notebook's way of training: `make bench`."""

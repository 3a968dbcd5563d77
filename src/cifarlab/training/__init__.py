"""Train a network: batches, loss, optimizers, loop. Knows no files, no DVC, no MLflow."""

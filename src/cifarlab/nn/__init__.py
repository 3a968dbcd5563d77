"""The networks: layers, the family of networks, initial weights, weights on disk, diagnostics."""

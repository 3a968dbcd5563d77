"""Questions asked over variants and seeds, and their answers."""

"""A page about a run, or about the differences of several, to show to others."""

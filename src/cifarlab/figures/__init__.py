"""Pictures of runs and of studies."""

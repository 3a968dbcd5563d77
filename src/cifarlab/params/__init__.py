"""params.yaml as typed and validated objects."""

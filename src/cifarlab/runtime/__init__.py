"""What depends on the machine: device, precision, threads, checkpoints, times, progress output.

No stage of dvc.yaml depends on this package, so a change here trains nothing again.
"""

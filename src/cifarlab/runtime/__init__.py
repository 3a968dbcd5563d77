"""What may differ between machines and never changes a result.

Device and threads, checkpoints, the times of epochs, progress output. No stage of dvc.yaml depends
on this package.
"""

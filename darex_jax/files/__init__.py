"""Checkpoints and artifacts: what is read from and written to a disk, streamed."""

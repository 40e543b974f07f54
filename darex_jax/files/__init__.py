"""Streamed reading and writing of checkpoints, artifacts and adapters."""

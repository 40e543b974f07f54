"""Serving many deltas of one base: switching between them, or mixing them in one batch."""

"""Many deltas on one base, in memory: switched, or side by side in one batch."""

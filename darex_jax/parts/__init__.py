"""Compact representations of a pruned parameter: sums of parts, each a small PyTree. No model, no file."""

"""Delta algebra: pure functions on PyTrees. No model, no file."""

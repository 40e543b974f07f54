"""Ways to prune a delta: one file, one function each. Pure; no model, no file."""

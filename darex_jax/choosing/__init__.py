"""Choosing q for a fine-tuned model and its base: a file holds a way, or several that differ in little."""

"""Choosing q for a fine-tuned model and its base: one file per way, or per group of similar ways."""

"""Choosing q: the number that survivors are divided by."""

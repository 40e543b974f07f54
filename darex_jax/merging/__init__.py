"""Merging several deltas of one base into one: pure functions on trees."""

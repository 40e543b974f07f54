"""Whole runs, from files to files: training, repeating one, the demo."""

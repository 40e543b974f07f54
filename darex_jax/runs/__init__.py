"""End-to-end runs from files to files: pruning, training, repeating, recommending, the demo."""

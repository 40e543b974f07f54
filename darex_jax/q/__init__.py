"""The mathematics of q, the number that survivors are divided by: of numbers and functions alone."""

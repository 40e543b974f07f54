"""The mathematics of q, the divisor of the survivors: pure functions of numbers and callables."""

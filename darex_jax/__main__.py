"""`python -m darex_jax`: the `darex` command."""

from darex_jax.cli import main

main()

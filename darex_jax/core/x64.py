"""JAX's context for float64, whatever its release calls it."""

try:
    from jax import enable_x64 as enable_x64
except ImportError:  # of JAX before 0.8
    from jax.experimental import enable_x64 as enable_x64  # type: ignore[attr-defined, no-redef]

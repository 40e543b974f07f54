"""High-probability bound on the output error of a pruned layer: the theory behind DAREx-q."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


@jax.jit
def phi(drop_rate: ArrayLike) -> jax.Array:
    """Phi(p) = (1 - 2p) / log((1 - p) / p), the Kearns-Saul constant; 1/2 at p = 1/2, 0 at 0 and 1. Float32.

    Source: Berend and Kontorovich, arXiv:1210.3248, Theorem 4; DAREx, arXiv:2410.09344, Theorem 3.1.
    """
    p = jnp.asarray(drop_rate, jnp.float32)
    # With x = 1 - 2p this is x / (2 artanh(x)): smooth at 0, where the series avoids 0/0.
    x = 1.0 - 2.0 * p
    near, ends = jnp.abs(x) < 1e-2, (p <= 0.0) | (p >= 1.0)
    series = 0.5 * (1.0 - x * x / 3.0 - 4.0 * x**4 / 45.0)
    safe = jnp.where(near | ends, 0.25, p)
    exact = (1.0 - 2.0 * safe) / (jnp.log1p(-safe) - jnp.log(safe))
    return jnp.where(ends, 0.0, jnp.where(near, series, exact))


def output_error_bound(
    influence: ArrayLike, drop_rate: ArrayLike, q: ArrayLike, gamma: ArrayLike
) -> jax.Array:
    """Upper bound on the error of a pruned output, holding with probability at least 1 - gamma.

    Args:
      influence: c[..., n] = delta_W[i, j] * x[j], the influence of each delta entry on an output.
      drop_rate: p, the probability that an entry is dropped.
      q: divisor of the survivors.
      gamma: the probability that the bound fails, in (0, 1).
    Returns: the bound over the last axis, [...], float32:
      |1 - (1-p)/q| |S| + sqrt(Phi(p) log(2/gamma) Q) / q, with S = sum c and Q = sum c^2.
      If all influences are 0, the bound and its gradient are 0.
    Source: DAREx, arXiv:2410.09344, Theorem 3.1, with the square root of appendix equation 8, which the
      theorem as printed in the main text lacks.
    """
    c = jnp.asarray(influence, jnp.float32)
    p, q = jnp.asarray(drop_rate, jnp.float32), jnp.asarray(q, jnp.float32)
    bias = (1.0 - (1.0 - p) / q) * jnp.sum(c, axis=-1)
    bias = bias * jnp.sign(bias)  # the gradient of jnp.abs at 0 is 1
    square = phi(p) * jnp.log(2.0 / jnp.asarray(gamma, jnp.float32)) * jnp.sum(c * c, axis=-1)
    # The gradient of sqrt is infinite at 0, where the bound has its minimum: 0 is used instead.
    spread = jnp.where(square > 0.0, jnp.sqrt(jnp.where(square > 0.0, square, 1.0)), 0.0)
    return bias + spread / q

"""Per-layer q from each linear layer's delta and mean input."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from darex_jax.core.errors import DarexError
from darex_jax.q.analytic import Rule, analytic_q


@jax.jit
def row_sums(
    deltas: Mapping[str, jax.Array], means: Mapping[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """S = sum_j c_j and Q = sum_j c_j^2 of every row, with c_j = delta_W[i, j] E[x_j], float32 [O] each.

    The delta of a layer's bias is one more c_j.

    Args:
      deltas: by parameter name: weights [O, D], biases [O] beside them, others.
      means: E[x], [D], by weight name, for the layers to compute.
    Source: DAREx, arXiv:2410.09344, Algorithm 3.
    """
    sums = {}
    for name, mean in means.items():
        c = deltas[name].astype(jnp.float32) * mean[None]
        bias = deltas.get(bias_of(name), jnp.zeros(len(c)))
        sums[name] = (jnp.sum(c, axis=1) + bias, jnp.sum(c * c, axis=1) + bias * bias)
    return sums


def layer_q(
    sums: Mapping[str, tuple[ArrayLike, ArrayLike]],
    drop_rate: float,
    eta: float,
    rule: Rule = "exact",
    prob: float = 0.95,
) -> dict[str, float]:
    """One q per layer: the mean of `analytic_q` over its rows. Args: sums: from `row_sums`."""
    return {
        name: float(np.mean(analytic_q(*pair, drop_rate, eta, prob, rule))) for name, pair in sums.items()
    }


def spread_q(by_layer: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """A q for every parameter that is pruned.

    Weights and biases get their layer's q. All others (norms, embeddings), and layers with an infinite q (no
    output on the examples), get the mean over the layers.

    Raises: ValueError if no layer has a finite q.
    """
    known = {name: q for name, q in by_layer.items() if math.isfinite(q)}
    if not known:
        raise DarexError("no layer has a finite q to assign to the parameters.")
    mean = float(np.mean(list(known.values())))
    by_name = {**{bias_of(name): q for name, q in known.items()}, **known}
    return {name: by_name.get(name, mean) for name in names}


def bias_of(weight: str) -> str:
    """The name of the bias that belongs to a weight."""
    return f"{weight.removesuffix('weight')}bias"

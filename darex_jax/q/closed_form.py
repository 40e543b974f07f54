"""q in closed form: the minimiser of an expected squared error, of layers' outputs or of the model's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from darex_jax.core.errors import DarexError


def closed_form_q(energies: Any, squares: Any, drop_rate: float) -> Any:
    """The q that minimises E[h^2], the error of outputs pruned at `drop_rate` and divided by q.

    With S = sum_j c_j and Q = sum_j c_j^2 over the influences c_j = delta_W[i, j] x_j of an output,
    E[h^2] = (1 - (1-p)/q)^2 E[S^2] + p (1-p) / q^2 E[Q], which is least at q = (1-p) + p E[Q] / E[S^2].

    Args:
      energies: E[Q] over calibration tokens: `sum_j delta_W[i, j]^2 E[x_j^2]`, any shape.
      squares: E[S^2]: `E[(delta_W x)_i^2]`, the same shape. Returns one q per entry; for the q of a layer or
        a model, pass both summed over its rows or layers.
      drop_rate: p, in [0, 1).
    Returns: at least 1 - p, in NumPy's float64; above 1 the delta should shrink. If there is no output
      (E[S^2] = 0) it is 1 - p if there is no influence either, else infinity: drop everything. Traced
      arguments (under jit, grad, vmap) give a JAX array, and their values are not checked.
    Raises: ValueError for a drop_rate out of range, shapes that differ, or negative or non-finite values.
    Source: from the error's mean and variance in DAREx, arXiv:2410.09344, Theorem 3.1.
    """
    traced = isinstance(energies, jax.core.Tracer) or isinstance(squares, jax.core.Tracer)
    xp: Any = jnp if traced else np
    energy, square = xp.asarray(energies, float), xp.asarray(squares, float)
    if energy.shape != square.shape:
        raise DarexError(
            f"energies and squares must have the same shape, got {energy.shape} and {square.shape}."
        )
    if not 0.0 <= drop_rate < 1.0:
        raise DarexError(f"drop_rate is a probability in [0, 1), got {drop_rate}.")
    if not traced and not all((np.isfinite(x) & (x >= 0)).all() for x in (energy, square)):
        raise DarexError("energies and squares must be finite and non-negative.")
    nothing = (energy == 0) | (drop_rate == 0)
    with np.errstate(divide="ignore", over="ignore"):
        ratio = xp.where(nothing, 0.0, energy / xp.where(nothing, 1.0, square))
    return (1.0 - drop_rate) + drop_rate * ratio


class ClosedForm(NamedTuple):
    """The q that minimise the expected squared error of linear layers' outputs.

    Attributes:
      q: for the model; finite.
      layers: for each layer, finite. A layer whose delta has influence but no output on the calibration text
        would have an infinite q (drop it entirely): it is not listed here, but counts in the model's q.
      rows: for each row of every layer; infinite for such rows.
    """

    q: float
    layers: dict[str, float]
    rows: dict[str, NDArray[np.float64]]


def closed_form(influences: Mapping[str, tuple[ArrayLike, ArrayLike]], drop_rate: float) -> ClosedForm:
    """`closed_form_q` per row, per layer and for the model.

    Args: influences: E[Q] and E[S^2] of every row, [O], by the layer's name.
    Raises: ValueError if there is no layer, or influence but no output in any; otherwise as `closed_form_q`.
    """
    if not influences:
        raise DarexError("no linear layer is in scope, so there is nothing to calibrate.")
    sums = {name: np.asarray(pair, np.float64) for name, pair in influences.items()}  # [2, O] each
    layers = {name: pair.sum(axis=1) for name, pair in sums.items()}

    def best(pair: NDArray[Any]) -> NDArray[np.float64]:
        return closed_form_q(pair[0], pair[1], drop_rate)

    q = float(best(np.sum(list(layers.values()), axis=0)))
    if not math.isfinite(q):
        raise DarexError("no layer's delta changes an output on these texts: calibrate on other texts.")
    by_layer = {name: float(best(pair)) for name, pair in layers.items()}
    finite = {name: value for name, value in by_layer.items() if math.isfinite(value)}
    return ClosedForm(q, finite, {name: best(pair) for name, pair in sums.items()})


def two_point_q(without: float, error: float, drop_rate: float, at: float | None = None) -> float:
    """The q that minimises the squared error of a model's outputs, from its values at two q.

    If outputs are linear in the delta, the error of a model pruned at `drop_rate` and divided by q is
    E(q) = a (1 - (1-p)/q)^2 + b / q^2: a is the error without any delta (q infinite), b follows from any
    other measurement, and E is minimal at q = (1-p) + b / (a (1-p)). Measured with DARE, at 1 - p, that is
    (1-p) (1 + E(1-p) / a). Where E(at) exceeds a, the result is at least 2 `at`.

    Args:
      without: a, positive.
      error: E(at), at least 0.
      drop_rate: p, in [0, 1).
      at: positive; None is 1 - p.
    Returns: at least 1 - p.
    Raises: ValueError for arguments out of range.
    """
    density = 1.0 - drop_rate
    at = density if at is None else at
    if not (0.0 <= drop_rate < 1.0 and 0.0 < at < math.inf):
        raise DarexError(f"need 0 <= drop_rate < 1 and at > 0, got {drop_rate} and {at}.")
    if not (0.0 < without < math.inf and 0.0 <= error < math.inf):
        raise DarexError(
            f"errors must be finite, and the one without a delta positive; got {without} and {error}."
        )
    spread = at**2 * (error - without * (1.0 - density / at) ** 2)
    return density + max(0.0, spread) / (without * density)

"""Algorithm 3 of DAREx: the q of each row of a layer, from two sums over its inputs."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from darex_jax.core.bound import phi
from darex_jax.core.errors import DarexError

Rule = Literal["exact", "published"]
PUBLISHED_STEP = 1000  # the authors' scan visits q = k / 1000
PUBLISHED_SHARE = 0.8  # share of rows without improvement at which their scan stops
PUBLISHED_WORST = 10_000.0  # initial best value of each row in their scan


def analytic_q(
    sums: Any,
    energies: Any,
    drop_rate: float,
    eta: float,
    prob: float = 0.95,
    rule: Rule = "exact",
) -> Any:
    """The q in [1 - p, 1] of every row that minimises the magnitude of

        f(q) = eta (1 - (1-p)/q) S + eta^2 Phi(p) Q / (4 q^2) + log(2 / (1 - prob)).

    Args:
      sums: S = sum_j c_j, with c_j = delta_W[i, j] mean(x_j) and the bias delta as one more c_j; any shape.
      energies: Q = sum_j c_j^2, the same shape.
      drop_rate: p, in (0, 1).
      eta: weighs the two terms; positive.
      prob: the confidence of the bound, in [0, 1).
      rule: "exact" is the minimiser itself: f is a quadratic in u = 1/q, so it is a root in [1, 1/(1-p)], of
        which there is at most one, else the vertex or an end; ties give the smaller q. "published" emulates
        the authors' scan over the rows of one layer, in steps of 0.001, with float16 values. It stops for all
        rows once 80 % of them had a value without improvement, which float16 ties cause after a few steps.
    Returns: q, the shape of `sums`, in NumPy's float64. By "exact" rows without influence (S = Q = 0) get
      1 - p. Traced sums (under jit, grad, vmap) give a JAX array, by the rule "exact", and their values are
      not checked.
    Raises: ValueError for arguments out of range, or sums that are not finite.
    Source: DAREx, arXiv:2410.09344, Algorithm 3 and appendix B; their code scans.
    """
    traced = isinstance(sums, jax.core.Tracer) or isinstance(energies, jax.core.Tracer)
    xp: Any = jnp if traced else np
    s, energy = xp.asarray(sums, float), xp.asarray(energies, float)
    if s.shape != energy.shape:
        raise DarexError(f"sums and energies must have the same shape, got {s.shape} and {energy.shape}.")
    if not (0.0 < drop_rate < 1.0 and 0.0 <= prob < 1.0 and 0.0 < eta < math.inf):
        raise DarexError(
            f"need 0 < drop_rate < 1, 0 <= prob < 1 and a finite eta > 0, got {drop_rate}, {prob} and {eta}."
        )
    if not traced and not (np.isfinite(s).all() and np.isfinite(energy).all() and (energy >= 0).all()):
        raise DarexError("sums must be finite, energies finite and non-negative.")
    if rule == "published":
        if traced:
            raise DarexError(
                "rule='published' runs on the host and cannot be traced; use rule='exact' under jit."
            )
        return _published_scan(s, energy, drop_rate, eta, prob)
    if rule != "exact":
        raise DarexError(f"rule is 'exact' or 'published', got {rule!r}.")
    return _exact(xp, s, energy, drop_rate, eta, prob)


def _exact(xp: Any, s: Any, energy: Any, drop_rate: float, eta: float, prob: float) -> Any:
    """With u = 1/q, f(u) = square u^2 - pull u + constant, and f > 0 at the upper end.

    With S >= 0, f is positive on all of [1, high], as (1-p) u <= 1, and the vertex is optimal. With S < 0, f
    increases from `constant` at u = 0: its root is optimal, or the lower end if f is positive there.
    """
    high = 1.0 / (1.0 - drop_rate)
    with jax.ensure_compile_time_eval():
        phi_of_rate = float(phi(drop_rate))
    square = (eta**2 * phi_of_rate / 4.0) * energy
    pull = (eta * (1.0 - drop_rate)) * s
    constant = eta * s + math.log(2.0 / (1.0 - prob))
    falls, bends = s < 0.0, square > 0.0
    below = xp.minimum(constant, 0.0)  # if f has no positive root: 0, clipped to the lower end
    with np.errstate(over="ignore"):
        vertex = xp.where(bends, pull / (2.0 * xp.where(bends, square, 1.0)), high)
        distance = xp.sqrt(xp.where(falls, pull * pull - 4.0 * square * below, 1.0)) - pull
        root = -2.0 * below / xp.where(distance > 0.0, distance, 1.0)
    u = xp.where(falls, root, vertex)
    return 1.0 / xp.clip(u, 1.0, high)


def _published_scan(
    s: NDArray[Any], energy: NDArray[Any], drop_rate: float, eta: float, prob: float
) -> NDArray[np.float64]:
    """The scan on row sums, each operation in float32 and rounded to float16, as in PyTorch.

    A scalar factor or divisor stays float32; a scalar summand is rounded to float16 first.
    """

    def half(x: NDArray[Any]) -> NDArray[Any]:
        return x.astype(np.float16).astype(np.float32)

    number = np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        total, power = half(s), half(energy)
        weighted = half(number(eta**2 * float(phi(drop_rate))) * power)
        bound = half(np.asarray(math.log(2.0 / (1.0 - prob)), np.float32))
        best = np.full(s.shape, number(PUBLISHED_WORST))
        q_of_row = np.full(s.shape, 1.0 - drop_rate)
        stopped = np.zeros(s.shape, bool)
        first = max(1, int((1.0 - drop_rate) * PUBLISHED_STEP))  # the authors' starts at 0 above 0.999
        for step in range(first, PUBLISHED_STEP - 1):
            q = step * 0.001
            mean = half(number(eta) * half(number(1.0 - (1.0 - drop_rate) / q) * total))
            spread = half(half(weighted / number(4.0 * q**2)) + bound)
            value = np.abs(half(mean + spread))
            better, worse = value <= best, value >= best
            best, q_of_row = np.where(better, value, best), np.where(better, q, q_of_row)
            stopped |= worse
            if stopped.mean() >= PUBLISHED_SHARE:
                break
    return q_of_row

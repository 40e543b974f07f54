"""All methods: what the command line, the advisor and the experiments read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from darex_jax.methods.dare import dare
from darex_jax.methods.magnitude import magnitude
from darex_jax.methods.sign import sign
from darex_jax.methods.sign_svd import sign_svd
from darex_jax.methods.structured import structured
from darex_jax.methods.svd import svd
from darex_jax.methods.wanda import wanda


class Method(NamedTuple):
    """A way to prune.

    Attributes:
      prune: `(delta, budget, evidence, **options) -> parts`.
      what: for people, one clause.
      random: takes a `key`.
      divides: takes a `q`.
      needs: fields of `Evidence` that it reads.
      leafwise: gives a leaf the same parts alone as among others, so that models are streamed.
    """

    prune: Callable[..., Any]
    what: str
    random: bool = False
    divides: bool = False
    needs: tuple[str, ...] = ()
    leafwise: bool = True


METHODS = {
    "dare": Method(dare, "random survivors, divided by q; no place is stored", random=True, divides=True),
    "magnitude": Method(magnitude, "the largest entries of each parameter"),
    "wanda": Method(
        wanda, "the entries of the largest influence on a layer's outputs", needs=("input_norms",)
    ),
    "structured": Method(structured, "random input features, divided by q", True, True, leafwise=False),
    "svd": Method(svd, "low-rank factors", leafwise=False),
    "sign": Method(sign, "the sign of every entry and a scale", leafwise=False),
    "sign-svd": Method(sign_svd, "signs, then low-rank factors of the rest", leafwise=False),
}

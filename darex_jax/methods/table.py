"""Registry of all methods, for the command line, `darex recommend` and the experiments.

Methods are imported lazily: a method's module, and JAX with it, when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A way to prune, `darex_jax.methods.MODULE.MODULE`.

    Attributes:
      what: a one-clause description for users.
      random: takes a `key`.
      divides: takes a `q`.
      quantises: takes `bits`.
      needs: fields of `Evidence` that it reads.
      leafwise: a leaf's parts do not depend on other leaves, so that models can be streamed.
      bits: default bits per value; None is bfloat16.
    """

    module: str
    what: str
    random: bool = False
    divides: bool = False
    quantises: bool = True
    needs: tuple[str, ...] = ()
    leafwise: bool = True
    bits: int | None = None

    @property
    def trains(self) -> bool:
        return "train" in self.needs

    def needs_with(self, support: str | None) -> tuple[str, ...]:
        """The fields of `Evidence` that it reads with this support (of `distilled`)."""
        return self.needs + (("curvature",) if support == "allocated" else ())

    @property
    def prune(self) -> Callable[..., Any]:
        """`(delta, budget, evidence, **options) -> parts`."""
        return getattr(import_module(f"darex_jax.methods.{self.module}"), self.module)


METHODS = {
    "dare": Method("dare", "random survivors divided by q, no indices stored", random=True, divides=True),
    "magnitude": Method("magnitude", "the largest entries of each parameter"),
    "wanda": Method("wanda", "entries with most influence on a layer's outputs", needs=("input_norms",)),
    "resolved": Method(
        "resolved", "the entries of wanda, with values refitted by least squares", needs=("second_moments",)
    ),
    "structured": Method("structured", "random input features divided by q", True, True, leafwise=False),
    "svd": Method("svd", "low-rank factors", leafwise=False),
    "allocated": Method(
        "allocated",
        "a low rank, entries or columns of each matrix, by error reduction per byte",
        needs=("curvature",),
        leafwise=False,
        bits=4,
    ),
    "distilled": Method(
        "distilled",
        "low-rank factors and vectors, trained on the fine-tuned model's outputs",
        random=True,
        needs=("linear_layers", "train"),
        leafwise=False,
        bits=4,
    ),
    "sign": Method("sign", "the sign of every entry and a scale", quantises=False, leafwise=False),
    "sign-svd": Method("sign_svd", "signs, then low-rank factors of the residual", leafwise=False),
}

"""All methods: what the command line, the advisor and the experiments read.

Importing it is quick: a method's own module, and JAX with it, is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A way to prune, `darex_jax.methods.MODULE.MODULE`.

    Attributes:
      what: for people, one clause.
      random: takes a `key`.
      divides: takes a `q`.
      quantises: takes `bits`.
      needs: fields of `Evidence` that it reads.
      leafwise: gives a leaf the same parts alone as among others, so that models are streamed.
      bits: of values where nothing is said; None is bfloat16.
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
        """What it reads of `Evidence` with this support, of a method that has several."""
        return self.needs + (("curvature",) if support == "allocated" else ())

    @property
    def prune(self) -> Callable[..., Any]:
        """`(delta, budget, evidence, **options) -> parts`."""
        return getattr(import_module(f"darex_jax.methods.{self.module}"), self.module)


METHODS = {
    "dare": Method("dare", "random survivors divided by q, no place stored", random=True, divides=True),
    "magnitude": Method("magnitude", "the largest entries of each parameter"),
    "wanda": Method("wanda", "entries with most influence on a layer's outputs", needs=("input_norms",)),
    "resolved": Method(
        "resolved", "the entries of wanda, their values solved anew", needs=("second_moments",)
    ),
    "structured": Method("structured", "random input features divided by q", True, True, leafwise=False),
    "svd": Method("svd", "low-rank factors", leafwise=False),
    "allocated": Method(
        "allocated",
        "of each matrix a low rank, entries or columns, whichever explains most",
        needs=("curvature",),
        leafwise=False,
        bits=4,
    ),
    "distilled": Method(
        "distilled",
        "low-rank factors and vectors, trained on the fine-tuned model's outputs",
        random=True,
        needs=("input_norms", "train"),
        leafwise=False,
        bits=4,
    ),
    "sign": Method("sign", "the sign of every entry and a scale", quantises=False, leafwise=False),
    "sign-svd": Method("sign_svd", "signs, then low-rank factors of the rest", leafwise=False),
}

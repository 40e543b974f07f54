"""All ways to merge: what the command line and `merge` read.

Importing it is quick: JAX is imported when a way's function is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

RANDOM = ("key", "drop_rate", "q")


class Merge(NamedTuple):
    """A way to merge.

    Attributes:
      what: for people, one clause.
      of_each: the function of `darex_jax.merging.thin` that says what of each delta takes part.
      elects: where signs disagree, only the majority's entries take part, and their mean is taken.
      takes: the options of that function.
    """

    what: str
    of_each: str
    elects: bool = False
    takes: tuple[str, ...] = ()

    @property
    def thin(self) -> Callable[..., Any]:
        """`(delta, **options) -> delta`."""
        return getattr(import_module("darex_jax.merging.thin"), self.of_each)


MERGES = {
    "linear": Merge("the weighted sum (task arithmetic)", "whole"),
    "ties": Merge("the largest entries, signs elected", "largest", True, ("drop_rate",)),
    "dare-linear": Merge("random survivors, summed", "random", False, RANDOM),
    "dare-ties": Merge("random survivors, signs elected", "random", True, RANDOM),
    "breadcrumbs": Merge(
        "neither the largest nor the smallest entries, summed", "middle", False, ("drop_rate", "outliers")
    ),
    "della": Merge(
        "random survivors, larger entries more often, signs elected", "ranked", True, (*RANDOM, "window")
    ),
}

"""Registry of merging methods, for the command line and `merge`.

Lazy: JAX is imported when a method's function is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

RANDOM = ("key", "drop_rate", "q")


class Merge(NamedTuple):
    """A merging method.

    Attributes:
      what: a one-clause description for users.
      of_each: the function of `darex_jax.merging.thin` that sparsifies each delta.
      elects: whether entries that agree with the elected (majority) sign are averaged, and others ignored.
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
    "task-arithmetic": Merge("the weighted sum", "whole"),
    "linear": Merge("another name of task-arithmetic", "whole"),
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

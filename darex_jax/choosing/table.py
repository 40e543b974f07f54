"""All ways to choose q: what the command line, `choose_q` and the pictures read.

Importing it is quick: a way's own module, and JAX with it, is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

CALIBRATION_SIZE = 50  # sentences that output changes are measured on, as the authors take for encoders
SCOPES = {"model": "one q for the model", "layer": "one q a layer"}


class Way(NamedTuple):
    """A way to choose q, `darex_jax.choosing.PLACE`.

    Attributes:
      place: module and function.
      what: for people, one clause.
      limit: at most so many examples, where nothing else is said; None takes all.
      masks: so many, where nothing else is said; 0: it looks at none.
      one_mask: takes no more than one.
      held_out: its examples are held-out ones, not those that train.
      labels: looks at their labels, so that it asks for a task.
      scopes: those of `SCOPES` that it knows, its own first.
      searches: walks a grid.
      whole_delta: looks at it, not at pruned models alone.
      learns: by gradient, in epochs, from some examples, the others held out.
    """

    place: str
    what: str
    limit: int | None = CALIBRATION_SIZE
    masks: int = 4
    one_mask: bool = False
    held_out: bool = False
    labels: bool = False
    scopes: tuple[str, ...] = ("model", "layer")
    searches: bool = False
    whole_delta: bool = False
    learns: bool = False

    @property
    def find(self) -> Callable[..., dict[str, Any]]:
        """`(pair, material, choice, inputs, on_value) -> found`.

        inputs: digests of `base_weights`, `fine_weights` and `data`. found: its part of the q file, with "q".
        """
        module, _, name = self.place.partition(".")
        return getattr(import_module(f"darex_jax.choosing.{module}"), name)


WAYS = {
    "labels": Way(
        "searched.by_labels", "the metric on held-out examples of --task (q_v)",
        limit=None, masks=1, held_out=True, labels=True, searches=True,
    ),
    "predictions": Way(
        "searched.by_predictions", "agreement with the fine-tuned model's predictions",
        limit=500, masks=1, held_out=True, searches=True,
    ),
    "outputs": Way("searched.by_outputs", "the output change (q_e)", searches=True),
    "learned": Way(
        "learned.by_gradient", "the output change, by gradient",
        limit=200, masks=1, one_mask=True, scopes=("layer",), whole_delta=True, learns=True,
    ),
    "two-point": Way(
        "two_point.by_two_points", "the squared output change, solved from two of its values",
        scopes=("model",),
    ),
    "closed-form": Way(
        "closed_form.by_closed_form", "the squared error of linear layers' outputs, solved",
        masks=0, whole_delta=True,
    ),
}  # fmt: skip


def curve_axis(objective: str, scope: str) -> str:
    """What a curve of the q file runs over: "epoch", "eta" or "q"."""
    if WAYS[objective].learns:
        return "epoch"
    return "eta" if scope == "layer" else "q"

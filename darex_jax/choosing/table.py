"""Registry of the ways to choose q, for the command line, `choose_q` and the plots.

Lazy: a way's module, and JAX with it, is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

CALIBRATION_SIZE = 50  # examples for output changes, as the authors use for encoders
SCOPES = {"model": "one q for the model", "layer": "one q per layer"}


class Way(NamedTuple):
    """A way to choose q, `darex_jax.choosing.PLACE`.

    Attributes:
      place: module and function.
      what: a one-clause description for users.
      limit: default maximum number of examples; None is all.
      masks: default number of masks; 0 if it uses none.
      one_mask: supports only one mask.
      split: of the examples: train or validation.
      labels: uses labels, so that it needs a task.
      scopes: the keys of `SCOPES` that it supports, the default first.
      searches: searches over a grid.
      whole_delta: needs the whole delta, not only pruned models.
      learns: trains by gradient, in epochs, on some of the examples; the others are held out.
    """

    place: str
    what: str
    limit: int | None = CALIBRATION_SIZE
    masks: int = 4
    one_mask: bool = False
    split: str = "train"
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
        limit=None, masks=1, split="validation", labels=True, searches=True,
    ),
    "predictions": Way(
        "searched.by_predictions", "agreement with the fine-tuned model's predictions",
        limit=500, masks=1, split="validation", searches=True,
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
    """The x axis of a curve in the q file: "epoch", "eta" or "q"."""
    if WAYS[objective].learns:
        return "epoch"
    return "eta" if scope == "layer" else "q"

"""What a person says of how q is chosen, and what is said back where examples do not tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from darex_jax.q.analytic import Rule

LEARNING_RATE = 1e-2

OnValue = Callable[[float, float], None]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a person said of how q is chosen.

    Attributes:
      objective: a way of `WAYS`, or "auto": labels where a task is named, else predictions, or for an encoder
        that predicts no classes two-point (by layer, outputs).
        labels: the metric on held-out examples (q_v), the only one that looks at labels; it asks for a task.
        predictions: agreement with the fine-tuned model's own predictions on held-out examples.
        outputs: the output change (q_e). learned: the same by gradient, of each layer.
        closed-form: the least expected squared error of linear layers' outputs. two-point: that of the
        model's output, from the changes of the base and of DARE.
      scope: "model", or "layer": Algorithm 3 for what is searched; not for two-point.
      rule: how Algorithm 3 minimises, see `analytic_q`: "exact" is what it says and moves q to near 1/2,
        "published" is what the paper's numbers come from.
      masks: how many, of the seeds from `seed` on; None is what the way's entry in `WAYS` says.
      grid: low, high and step of the authors' walk; None is a wider grid, which is visited whole.
      statistics: a file for the statistics of the layers' inputs: read where it exists, else written.
      learning_rate: with learned, see `learn_q`.
      checkpoints: a folder where learning goes on after a stop; each of several has its place in it.
      one_copy: hold one copy of the model and the survivors, see `OneCopy`; for one q, of ways that do not
        look at the whole delta. The same q, in a third of the memory.
      include, exclude: patterns of the parameters that are pruned, see `choose_scope`.
      ignore_config_fields: of the fine-tuned model's, see `read_model_config`.
    """

    objective: str = "auto"
    scope: str = "model"
    rule: Rule = "published"
    masks: int | None = None
    grid: tuple[float, float, float] | None = None
    statistics: Path | None = None
    learning_rate: float = LEARNING_RATE
    checkpoints: Path | None = None
    one_copy: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ignore_config_fields: tuple[str, ...] = ()
    seed: int = 0


def untold(why: str, kept: str = "q stays at DARE's 1 - drop rate") -> str:
    """The warning where examples do not tell one q from another."""
    return f"{why}: these examples do not tell one q from another, and {kept}"

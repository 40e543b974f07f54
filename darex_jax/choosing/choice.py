"""The user's settings for choosing q, and the warning for uninformative examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from darex_jax.q.analytic import Rule

LEARNING_RATE = 1e-2

OnValue = Callable[[float, float], None]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The user's settings for choosing q.

    Attributes:
      objective: a key of `WAYS`, or "auto": labels if a task is given, else predictions, or two-point (per
        layer: outputs) for an encoder that predicts no classes.
        labels: the metric on held-out examples (q_v), the only one that uses labels; needs a task.
        predictions: agreement with the fine-tuned model's own predictions on held-out examples.
        outputs: the output change (q_e). learned: the same by gradient, per layer.
        closed-form: the least expected squared error of linear layers' outputs. two-point: that of the
        model's outputs, from the changes of the base and of DARE.
      scope: "model", or "layer" (for searches: Algorithm 3); not for two-point.
      rule: how Algorithm 3 minimises, see `analytic_q`: "exact" is the algorithm as stated, which moves q to
        near 1/2, "published" reproduces the code behind the paper's numbers.
      masks: number of masks, with seeds from `seed` on; None is the default in `WAYS`.
      grid: low, high and step of the authors' walk; None is a wider grid, visited completely.
      statistics: a file for the statistics of the layers' inputs: read if it exists, else written.
      learning_rate: for learned, see `learn_q`.
      checkpoints: a folder from which learning resumes; each training has its own subfolder.
      one_copy: hold one copy of the model and the survivors, see `OneCopy`; for scope "model" and ways that
        do not need the whole delta. The same q, in less than half of the memory.
      include, exclude: patterns of the parameters that are pruned, see `choose_scope`.
      ignore_config_fields: for the fine-tuned model, see `read_model_config`.
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


def uninformative(why: str, kept: str = "q stays at DARE's 1 - drop rate") -> str:
    """The warning if the examples do not distinguish values of q."""
    return f"{why}: these examples do not tell one q from another, and {kept}"

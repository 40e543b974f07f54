"""DAREx-q: choosing the one q by which survivors are divided, by labels (q_v) or by output change (q_e).

q is an argument of compiled functions here: a sweep over q compiles nothing anew.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from darex_jax.core.delta import compute_delta, drop
from darex_jax.core.mask import random_mask
from darex_jax.core.scope import Scope, choose_scope
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation.classification import predict, pruned_params
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.match import match_checkpoints
from darex_jax.files.model import load_model
from darex_jax.models import Model
from darex_jax.q.search import SearchResult, search_q, trimmed_mean
from darex_jax.tasks import Task
from darex_jax.tasks.batching import Encoded, evaluation_batches

Params = dict[str, Any]
Objective = Literal["labels", "outputs"]
CALIBRATION_SIZE = 50  # sentences the output change is measured on, as the authors take for encoders
MASK_SEEDS = (0, 1, 2, 3)


def load_pair(
    base: str | os.PathLike[str], fine: str | os.PathLike[str], scope: Scope | None = None
) -> tuple[Model, Params, Params]:
    """A fine-tuned model and what pruning needs of its base.

    Returns: the fine-tuned model and its params; the base's values of the parameters in scope, a nested dict
      with the fine-tuned names.
    Raises: ValueError if the two do not fit together.
    """
    model, params = load_model(fine)
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        match = match_checkpoints(b, f, scope or choose_scope(f.config.get("model_type")))
        match.raise_if_faulty()
        if match.extra_rows:
            raise ValueError(f"extra vocabulary rows ({', '.join(match.extra_rows)}) are not searched over.")
        named = {name: b.tensors[match.base_names[name]].read() for name in match.pruned}
    return model, params, unflatten_names({name: jax.numpy.asarray(leaf) for name, leaf in named.items()})


def split_in_scope(fine: Params, base: Params) -> tuple[Params, Params]:
    """The point a search starts from, and the delta that is pruned.

    Args: fine: all parameters; base: those in scope, the same names.
    Returns: `fine` with the base's values where the base has any (a fresh head stays fine-tuned); the float32
      delta of the parameters in scope.
    """
    fine_named, base_named = flatten_names(fine), flatten_names(base)
    in_scope = unflatten_names({name: fine_named[name] for name in base_named})
    return unflatten_names(fine_named | base_named), compute_delta(in_scope, base)


def masked_deltas(delta: Params, drop_rate: float, seeds: Sequence[int] = MASK_SEEDS) -> list[Params]:
    """The delta with its dropped entries at zero, not rescaled, for the mask of each seed."""
    return [drop(random_mask(jax.random.key(seed), delta, drop_rate), delta) for seed in seeds]


def find_q(
    model: Model,
    fine: Params,
    start: Params,
    masked: Sequence[Params],
    drop_rate: float,
    *,
    objective: Objective,
    task: Task,
    examples: Encoded,
    on_value: Callable[[float, float], None] = lambda q, value: None,
) -> SearchResult:
    """Algorithm 2 with the task's metric (`labels`, q_v) or the output change (`outputs`, q_e) as objective.

    Args:
      start, masked: from `split_in_scope` and `masked_deltas`, one tree a mask. `labels` uses the mean of the
        metric over the masks given, `outputs` the mean without the farthest.
      examples: what the objective is measured on: validation data for `labels`; for `outputs` any text, whose
        labels are not looked at and of which the first `CALIBRATION_SIZE` are used.
      on_value: called with every (q, value) as it is found.
    Returns: the search; its curve has the metric, or the mean absolute change of the last hidden state.
    Source: DAREx, arXiv:2410.09344, Algorithm 2.
    """
    if objective == "labels":
        batches = evaluation_batches(examples)

        def value_at(q: float) -> float:
            metrics = [
                task.metric(predict(model, pruned_params(start, m, q), batches), examples.labels)
                for m in masked
            ]
            return float(np.mean(metrics))

    else:
        batches = evaluation_batches(examples, batch_size=min(CALIBRATION_SIZE, len(examples)))[:1]
        reference = reference_outputs(model, fine, batches)

        def value_at(q: float) -> float:
            return trimmed_mean(
                [output_change(model, pruned_params(start, m, q), batches, reference) for m in masked]
            )

    def observed(q: float) -> float:
        value = value_at(q)
        on_value(q, value)
        return value

    return search_q(observed, *search_grid(drop_rate), maximise=objective == "labels")


def search_grid(drop_rate: float) -> tuple[float, float, float]:
    """(low, high, step) of the coarse grid: from DARE's 1 - p upwards, to ten times it or to 1/2."""
    density = round(1.0 - drop_rate, 12)
    if density >= 0.05:
        return density, max(density, min(5 * density, 1.0)), density / 2
    return density, 10 * density, density

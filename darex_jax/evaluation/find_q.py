"""DAREx-q: choosing what survivors are divided by, one q for the model or one for each layer.

q is an argument of compiled functions here: a sweep over values and masks compiles nothing anew.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.delta import compute_delta
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import Scope, choose_scope
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation.calibration import InputStatistics
from darex_jax.evaluation.classification import pruned_params
from darex_jax.evaluation.objectives import Objective
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.match import match_checkpoints
from darex_jax.files.model import load_model
from darex_jax.models import Model
from darex_jax.q.analytic import Rule
from darex_jax.q.closed_form import two_point_q
from darex_jax.q.per_layer import layer_q, row_sums, spread_q
from darex_jax.q.search import SearchResult, geometric_grid, search_q
from darex_jax.tasks.batching import Batch

Params = dict[str, Any]
Q = float | Mapping[str, float]
PrunedModel = Callable[[Q], Params]  # from q to the params of a model pruned with one mask
CALIBRATION_SIZE = 50  # sentences that output changes are measured on, as the authors take for encoders
MASK_SEEDS = (0, 1, 2, 3)
WORSE = 1.1  # times the change without a delta: what few texts and masks do not explain
ETAS = (2**-5, 2**5)  # of Algorithm 3: what its search begins and ends with


def load_pair(
    base: str | os.PathLike[str],
    fine: str | os.PathLike[str],
    scope: Scope | None = None,
    ignore_config_fields: Collection[str] = (),
) -> tuple[Model, Params, Params]:
    """A fine-tuned model and what pruning needs of its base.

    Both in the dtypes of their files, but float16 as float32: a small q leaves float16's range, and XLA's CPU
    backend does not run all of a float16 model. A base that is narrower than its fine-tune is widened.

    Returns: the fine-tuned model and its params; the base's values of the parameters in scope, a nested dict
      with the fine-tuned names.
    Raises: ValueError if the two do not fit together.
    """
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        match = match_checkpoints(b, f, scope or choose_scope(f.config.get("model_type")))
        match.raise_if_faulty()
        extra = [name for name in match.pruned if name in match.extra_rows]
        if extra:
            raise DarexError(f"extra vocabulary rows ({', '.join(extra)}) are not searched over.")
        half = any(tensor.info.dtype == np.float16 for tensor in f.tensors.values())
        model, params = load_model(
            fine, dtype=np.float32 if half else None, ignore_config_fields=ignore_config_fields
        )
        named = {name: b.tensors[match.base_names[name]].read() for name in match.pruned}
    loaded = flatten_names(params)
    wide = {name: jnp.asarray(x, jnp.promote_types(x.dtype, loaded[name].dtype)) for name, x in named.items()}
    return model, params, unflatten_names(wide)


def split_in_scope(fine: Params, base: Params) -> tuple[Params, Params]:
    """The point a search starts from, and the delta that is pruned.

    Args: fine: all parameters; base: those in scope, the same names.
    Returns: `fine` with the base's values where the base has any (a fresh head stays fine-tuned); the float32
      delta of the parameters in scope.
    """
    fine_named, base_named = flatten_names(fine), flatten_names(base)
    in_scope = unflatten_names({name: fine_named[name] for name in base_named})
    return unflatten_names(fine_named | base_named), compute_delta(in_scope, base)


def pruned_models(
    start: Params, delta: Params, drop_rate: float, seeds: Sequence[int] = MASK_SEEDS
) -> list[PrunedModel]:
    """For the mask of each seed, the params of the pruned model as a function of q: see `pruned_params`.

    Args: start, delta: from `split_in_scope`.
    """
    return [partial(pruned_params, start, delta, jax.random.key(seed), drop_rate) for seed in seeds]


def scored(score: Callable[[Params], float], models: Sequence[PrunedModel], q: Q) -> dict[str, Any]:
    """What `score` says of the models pruned with each mask: `scores`, their `mean`, their sample `std`."""
    scores = [score(model(q)) for model in models]
    return {"mean": float(np.mean(scores)), "std": float(np.std(scores, ddof=1)), "scores": scores}


def same(q: float) -> Q:
    """The q of a search over q itself."""
    return q


def find_q(
    objective: Objective,
    models: Sequence[PrunedModel],
    grid: Sequence[float],
    *,
    q_of: Callable[[float], Q] = same,
    search: Callable[..., SearchResult] = search_q,
    on_value: Callable[[float, float], None] = lambda point, value: None,
) -> SearchResult:
    """A search over one number: q itself, or Algorithm 3's eta.

    Args:
      models: from `pruned_models`, one a mask.
      grid: what `search` takes: a coarse grid, `q_grid(drop_rate)` say, or the bounds of `authors_walk`.
      q_of: from the number searched to q, one or a dict with one for every name of the delta.
      search: `search_q` or `authors_walk`.
      on_value: called with every (number, value) as it is found.
    Source: DAREx, arXiv:2410.09344, Algorithm 2.
    """

    def value_at(point: float) -> float:
        q = q_of(point)
        value = objective.over_masks([objective.measure(model(q)) for model in models])
        on_value(point, value)
        return value

    return search(value_at, grid, maximise=objective.maximise)


def q_grid(drop_rate: float) -> list[float]:
    """The coarse grid for one q: from DARE's 1 - p to 1 in steps of a factor of the square root of 2."""
    return geometric_grid(round(1.0 - drop_rate, 12), 1.0)


def eta_grid() -> list[float]:
    """The coarse grid for eta: powers of 2."""
    return geometric_grid(*ETAS, 2.0)


def layer_rule(
    statistics: Mapping[str, InputStatistics], delta: Params, drop_rate: float, rule: Rule
) -> Callable[[float], dict[str, float]]:
    """Algorithm 3: from eta to one q for every name in `delta`.

    A layer's q is the mean of its rows'; see `spread_q` for the rest.

    Args: statistics: from `input_statistics`.
    """
    deltas = flatten_names(delta)
    means = {name: seen.mean for name, seen in statistics.items() if name in deltas}
    pairs = row_sums(deltas, means).items()
    sums = {name: (np.asarray(total), np.asarray(energy)) for name, (total, energy) in pairs}
    return lambda eta: spread_q(layer_q(sums, drop_rate, eta, rule), deltas)


def two_point(
    model: Model,
    fine: Params,
    start: Params,
    models: Sequence[PrunedModel],
    batches: Sequence[Batch],
    drop_rate: float,
    *,
    on_value: Callable[[float, float], None] = lambda q, change: None,
) -> tuple[float, list[tuple[float, float]]]:
    """`two_point_q` from the squared output change of the base and of DARE: no label, no search.

    Outputs cannot move without limit, so that DARE's change says too little of a large delta. What comes out
    is therefore measured, and while it is worse than no delta at all, the next q follows from it: at least
    twice as large, up to the first that is 1 or more. So it does where outputs are not finite.

    Args:
      start, models: from `split_in_scope` and `pruned_models`.
      on_value: called with every q and its change as it is found.
    Returns: q, the last one visited; the q visited, with their changes over the masks: infinity (no delta),
      1 - p, ... Where the base gives the fine-tuned model's outputs there is nothing to solve: q is 1 - p.
    Raises: ValueError if the outputs of base or fine-tuned model are not finite, or at no q those of the
      pruned model.
    """
    reference = reference_outputs(model, fine, batches)

    def change(params: Params) -> float:
        return output_change(model, params, batches, reference, squared=True)

    without = change(start)
    visited = [(math.inf, without)]
    if not math.isfinite(without):
        raise DarexError(
            "the outputs of the base or of the fine-tuned model are not finite on these examples."
        )
    q = density = round(1.0 - drop_rate, 12)
    if without == 0.0:
        return density, visited
    while True:
        error = float(np.mean([change(pruned(q)) for pruned in models]))
        visited.append((q, error))
        on_value(q, error)
        solved = len(visited) > 2 and error <= WORSE * without
        if solved or q >= 1.0:
            break
        q = two_point_q(without, error, drop_rate, q) if math.isfinite(error) else 2.0 * q
    if not math.isfinite(error):
        raise DarexError(f"the pruned model's outputs are finite at none of the q up to {q:.4g}.")
    return q, visited

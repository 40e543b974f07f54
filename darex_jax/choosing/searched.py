"""Searches for q, or for Algorithm 3's eta, by labels, the model's predictions or its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from darex_jax.choosing.choice import Choice, OnValue, uninformative
from darex_jax.choosing.one_copy import AnyPair
from darex_jax.choosing.pair import Pair, Params, PrunedModel, Q, dare_q
from darex_jax.core.tree import flatten_names
from darex_jax.evaluation.calibration import (
    InputStatistics,
    input_statistics,
    load_statistics,
    save_statistics,
)
from darex_jax.evaluation.objectives import (
    Objective,
    answer_objective,
    label_objective,
    output_objective,
    prediction_objective,
)
from darex_jax.q.analytic import Rule
from darex_jax.q.per_layer import layer_q, row_sums, spread_q
from darex_jax.q.search import SearchResult, authors_walk, geometric_grid, search_q
from darex_jax.tasks.batching import Batch
from darex_jax.tasks.source import Material
from darex_jax.tasks.table import share_of_right

ETAS = (2**-5, 2**5)  # bounds of the search over Algorithm 3's eta


def by_labels(
    pair: AnyPair, material: Material, choice: Choice, inputs: Mapping[str, str], on_value: OnValue
) -> dict[str, Any]:
    """The metric on labelled examples, or for decoders the share of correct answer tokens: q_v."""
    batches, task = material.batches(), material.task
    if task is None:
        goal = answer_objective(pair.model, batches, share_of_right(material.metric or "token_accuracy"))
    else:
        goal = label_objective(pair.model, task, batches)
    return _best(goal, pair, batches, choice, inputs, on_value)


def by_predictions(
    pair: AnyPair, material: Material, choice: Choice, inputs: Mapping[str, str], on_value: OnValue
) -> dict[str, Any]:
    """Agreement with the fine-tuned model's own predictions."""
    batches, task = material.batches(), material.task
    goal = prediction_objective(pair.model, pair.params, batches, None if task is None else task.metric)
    return _best(goal, pair, batches, choice, inputs, on_value)


def by_outputs(
    pair: AnyPair, material: Material, choice: Choice, inputs: Mapping[str, str], on_value: OnValue
) -> dict[str, Any]:
    """The output change: q_e."""
    batches = material.batches()
    goal = output_objective(pair.model, pair.params, batches)
    return _best(goal, pair, batches, choice, inputs, on_value)


def _best(
    goal: Objective,
    pair: AnyPair,
    batches: Sequence[Batch],
    choice: Choice,
    inputs: Mapping[str, str],
    on_value: OnValue,
) -> dict[str, Any]:
    """The result of a search; DARE's q if it was uninformative, unless some outputs were not finite."""
    layers = choice.scope == "layer"
    q_of: Callable[[float], Q] = same
    if layers:
        assert isinstance(pair, Pair), "one q per layer needs the whole delta"
        made_from = {"model": inputs["fine_weights"], "data": inputs["data"]}
        statistics = _statistics(pair, batches, choice, made_from)
        q_of = layer_rule(statistics, pair.delta, pair.drop_rate, choice.rule)
    rule = {"rule": choice.rule} if layers else {}
    found: dict[str, Any] = {"examples": goal.examples, "labels": goal.labels}
    dare = pair.dare(choice.scope)
    if goal.blind is not None:
        return found | {"q": dare, "warning": uninformative(goal.blind), "evaluations": 0} | rule
    points = eta_grid() if layers else q_grid(pair.drop_rate)
    search = search_q if choice.grid is None else authors_walk
    result = find_q(goal, pair.models, choice.grid or points, q_of=q_of, search=search, on_value=on_value)
    found |= {
        "q": q_of(result.q), "value": result.value, "value_name": goal.name,
        "plateau": list(result.plateau), "curve": [list(point) for point in result.curve],
    }  # fmt: skip
    if result.flat and all(math.isfinite(value) for _, value in result.curve):
        found |= {"q": dare, "warning": uninformative(f"the {goal.name} is the same at every point")}
    else:
        found |= {"eta": result.q} if layers else {}
        if result.flat:
            kept = "the smallest with finite outputs is kept"
            found["warning"] = uninformative(f"the {goal.name} is the same wherever it is finite", kept)
    return found | {"evaluations": len(result.curve) * len(pair.seeds)} | rule


def _statistics(
    pair: Pair, batches: Sequence[Batch], choice: Choice, made_from: Mapping[str, str]
) -> dict[str, InputStatistics]:
    file = choice.statistics
    if file is not None and file.exists():
        return load_statistics(file, made_from)
    statistics = input_statistics(pair.model, pair.params, batches)
    if file is not None:
        save_statistics(file, statistics, made_from)
    return statistics


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
    on_value: OnValue = lambda point, value: None,
) -> SearchResult:
    """A search over one number: q itself, or Algorithm 3's eta.

    Args:
      models: of a `Pair`, one per mask.
      grid: the grid argument of `search`: a coarse grid such as `q_grid(drop_rate)`, or the bounds of
        `authors_walk`.
      q_of: searched number -> q, a number or a dict with one for every name of the delta.
      search: `search_q` or `authors_walk`.
      on_value: called with every (number, value) when it is computed.
    Source: DAREx, arXiv:2410.09344, Algorithm 2.
    """

    def value_at(point: float) -> float:
        q = q_of(point)
        value = objective.over_masks([objective.measure(model(q)) for model in models])
        on_value(point, value)
        return value

    return search(value_at, grid, maximise=objective.maximise)


def q_grid(drop_rate: float) -> list[float]:
    """The coarse grid for q: from DARE's 1 - p to 1 by factors of the square root of 2."""
    return geometric_grid(dare_q(drop_rate), 1.0)


def eta_grid() -> list[float]:
    """The coarse grid for eta: powers of 2."""
    return geometric_grid(*ETAS, 2.0)


def layer_rule(
    statistics: Mapping[str, InputStatistics], delta: Params, drop_rate: float, rule: Rule
) -> Callable[[float], dict[str, float]]:
    """Algorithm 3: from eta to one q for every name in `delta`.

    A layer's q is the mean over its rows; see `spread_q` for other parameters.

    Args: statistics: from `input_statistics`.
    """
    deltas = flatten_names(delta)
    means = {name: layer.mean for name, layer in statistics.items() if name in deltas}
    pairs = row_sums(deltas, means).items()
    sums = {name: (np.asarray(total), np.asarray(energy)) for name, (total, energy) in pairs}
    return lambda eta: spread_q(layer_q(sums, drop_rate, eta, rule), deltas)

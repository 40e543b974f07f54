"""The way that solves: the squared output change of the base and of DARE say where it is least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from darex_jax.choosing.choice import Choice, OnValue, untold
from darex_jax.choosing.one_copy import AnyPair
from darex_jax.choosing.pair import Params
from darex_jax.core.errors import DarexError
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.q.closed_form import two_point_q
from darex_jax.tasks.batching import Batch, row_count
from darex_jax.tasks.source import Material

WORSE = 1.1  # times the change without a delta: what few texts and masks do not explain


def by_two_points(
    pair: AnyPair, material: Material, choice: Choice, inputs: Mapping[str, str], on_value: OnValue
) -> dict[str, Any]:
    """The least squared output change, from two measurements and those that check them."""
    batches = material.batches()
    q, visited = two_point(pair, batches, on_value)
    found = {
        "q": q, "change_without_delta": visited[0][1], "changes": [list(point) for point in visited[1:]],
        "evaluations": 1 + len(pair.seeds) * len(visited[1:]), "examples": row_count(batches),
    }  # fmt: skip
    if len(visited) == 1:
        found["warning"] = untold("the base gives the fine-tuned model's outputs")
    return found


def two_point(
    pair: AnyPair, batches: Sequence[Batch], on_value: OnValue = lambda q, change: None
) -> tuple[float, list[tuple[float, float]]]:
    """`two_point_q` from the squared output change of the base and of DARE: no label, no search.

    Outputs cannot move without limit, so that DARE's change says too little of a large delta. What comes out
    is therefore measured, and while it is worse than no delta at all, the next q follows from it: at least
    twice as large, up to the first that is 1 or more. So it does where outputs are not finite.

    Args: on_value: called with every q and its change as it is found.
    Returns: q, the last one visited; the q visited, with their changes over the masks: infinity (no delta),
      1 - p, ... Where the base gives the fine-tuned model's outputs there is nothing to solve: q is 1 - p.
    Raises: ValueError if the outputs of base or fine-tuned model are not finite, or at no q those of the
      pruned model.
    """
    reference = reference_outputs(pair.model, pair.params, batches)

    def change(params: Params) -> float:
        return output_change(pair.model, params, batches, reference, squared=True)

    without = change(pair.start)
    visited = [(math.inf, without)]
    if not math.isfinite(without):
        raise DarexError(
            "the outputs of the base or of the fine-tuned model are not finite on these examples."
        )
    q = pair.density
    if without == 0.0:
        return q, visited
    models = pair.models
    while True:
        error = float(np.mean([change(pruned(q)) for pruned in models]))
        visited.append((q, error))
        on_value(q, error)
        solved = len(visited) > 2 and error <= WORSE * without
        if solved or q >= 1.0:
            break
        q = two_point_q(without, error, pair.drop_rate, q) if math.isfinite(error) else 2.0 * q
    if not math.isfinite(error):
        raise DarexError(f"the pruned model's outputs are finite at none of the q up to {q:.4g}.")
    return q, visited

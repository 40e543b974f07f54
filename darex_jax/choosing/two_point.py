"""Solves for the q of least squared output change, from the changes of the base and of DARE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from darex_jax.choosing.choice import Choice, OnValue, uninformative
from darex_jax.choosing.one_copy import AnyPair
from darex_jax.choosing.pair import Params
from darex_jax.core.errors import DarexError
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.q.closed_form import two_point_q
from darex_jax.tasks.batching import Batch, row_count
from darex_jax.tasks.source import Material

WORSE = 1.1  # times the change without a delta; more is not explained by few texts and masks


def by_two_points(
    pair: AnyPair, material: Material, choice: Choice, inputs: Mapping[str, str], on_value: OnValue
) -> dict[str, Any]:
    """The q of least squared output change, from two measurements and checks of the result."""
    batches = material.batches()
    q, visited = two_point(pair, batches, on_value)
    found = {
        "q": q, "change_without_delta": visited[0][1], "changes": [list(point) for point in visited[1:]],
        "evaluations": 1 + len(pair.seeds) * len(visited[1:]), "examples": row_count(batches),
    }  # fmt: skip
    if len(visited) == 1:
        found["warning"] = uninformative("the base gives the fine-tuned model's outputs")
    return found


def two_point(
    pair: AnyPair, batches: Sequence[Batch], on_value: OnValue = lambda q, change: None
) -> tuple[float, list[tuple[float, float]]]:
    """`two_point_q` from the squared output change of the base and of DARE, without labels or search.

    Since outputs are bounded, DARE's change underestimates the effect of a large delta. The result is
    therefore evaluated, and while it is worse than no delta, the next q is computed from it: at least twice
    as large, up to the first one of 1 or more. The same applies while outputs are not finite.

    Args: on_value: called with every q and its change when it is computed.
    Returns: q, the last one visited; the visited q with their changes over the masks: infinity (no delta), 1
      - p, ... If the base already gives the fine-tuned model's outputs, q is 1 - p.
    Raises: ValueError if the outputs of the base or the fine-tuned model are not finite, or those of the
      pruned model at all visited q.
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

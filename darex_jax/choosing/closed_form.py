"""q in closed form from the inputs of linear layers, without masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from darex_jax.choosing.choice import Choice, OnValue, uninformative
from darex_jax.choosing.pair import Pair
from darex_jax.core.tree import flatten_names
from darex_jax.evaluation.calibration import squared_influences
from darex_jax.q.closed_form import closed_form
from darex_jax.q.per_layer import spread_q
from darex_jax.tasks.batching import row_count
from darex_jax.tasks.source import Material


def by_closed_form(
    pair: Pair, material: Material, choice: Choice, inputs: Mapping[str, str], on_value: OnValue
) -> dict[str, Any]:
    """The least expected squared error of linear layers' outputs."""
    batches = material.batches()
    form = closed_form(squared_influences(pair.model, pair.params, pair.delta, batches), pair.drop_rate)
    found: dict[str, Any] = {"layers": form.layers, "evaluations": 1, "examples": row_count(batches)}
    if not 1.0 - pair.drop_rate < form.q < math.inf:
        warning = uninformative("the delta changes no layer's output")
        return found | {"q": pair.dare(choice.scope), "warning": warning}
    by_layer = choice.scope == "layer"
    return found | {"q": spread_q(form.layers, flatten_names(pair.delta)) if by_layer else form.q}

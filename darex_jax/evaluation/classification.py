"""A classifier over batches: its logits, and its metric on a task; and the model that pruning makes.

Everything is compiled once per model and batch shape; parameters, hence q, are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from darex_jax.core.delta import apply_delta, prune
from darex_jax.core.errors import DarexError
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.tasks import Task
from darex_jax.tasks.batching import EVALUATION_ROWS, Batch, Encoded, evaluation_batches, model_inputs

Params = Any  # nested dict of float arrays, as `load_params` returns it
Model = Callable[..., Any]  # pure function of (params, input_ids, attention_mask, token_type_ids)


@partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: Params, batch: Batch) -> jax.Array:
    logits = model(params, **batch).logits
    if logits is None:
        raise DarexError("the model has no classifier; fine-tune it first (darex train).")
    return logits


def predict(model: Model, params: Params, batches: Sequence[Batch]) -> NDArray:
    """The logits of every real row, [N, num_labels] float32, in the order of the data set."""
    pending = [_logits(model, params, model_inputs(batch)) for batch in batches]
    rows = [batch["index"][batch["weight"] > 0] for batch in batches]
    logits = [np.asarray(x, np.float32)[b["weight"] > 0] for x, b in zip(pending, batches, strict=True)]
    return np.concatenate(logits)[np.argsort(np.concatenate(rows))]


def evaluate(
    model: Model, params: Params, examples: Encoded, task: Task, batch_size: int | None = None
) -> dict[str, Any]:
    """The task's metric on `examples`.

    Returns: {"metric": float, "metric_name": str, "n": int}.
    Raises: ValueError if the model's output is not finite.
    """
    logits = predict(model, params, evaluation_batches(examples, batch_size or EVALUATION_ROWS))
    metric = task.metric(logits, examples.labels)
    return {"metric": metric, "metric_name": task.metric_name, "n": len(examples)}


@partial(jax.jit, static_argnames="drop_rate")
def pruned_params(params: Params, delta: Params, key: jax.Array, drop_rate: float, q: Any) -> Params:
    """`params + prune(key, delta, drop_rate, q)`: the pruned model.

    The mask is drawn on the way, and no copy of the delta is made for it: a delta of the model's size is all
    that a search over q and masks holds. Key and q are traced: it compiles this once a drop rate, and the
    model not again.

    Args:
      params: full tree; the base's value where the delta is pruned, the fine-tune's where it is kept (head).
      delta: tree with a subset of the names of `params`.
      key, drop_rate: as in `darex_jax.prune`.
      q: a number, or a dict with one number per dotted name of `delta`.
    Returns: a tree like `params`; sums are taken in float32 and stored in the dtype of `params`.
    """
    leaves = flatten_names(params)
    base = unflatten_names({name: leaves[name] for name in flatten_names(delta)})
    pruned = apply_delta(base, prune(key, delta, drop_rate, q))
    return unflatten_names(leaves | flatten_names(pruned))

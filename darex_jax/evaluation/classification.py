"""Classifier logits and task metrics over batches; pruned parameters as a function of q.

Everything is compiled once per model and batch shape; parameters, hence q, are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from darex_jax.core.delta import apply_delta, drop, rescale
from darex_jax.core.errors import DarexError
from darex_jax.core.mask import survivors, traced_threshold
from darex_jax.core.tree import flatten_names, map_named, stacked_leaf_keys
from darex_jax.tasks import Task
from darex_jax.tasks.batching import EVALUATION_ROWS, Batch, Encoded, evaluation_batches, model_inputs

Params = Any  # nested dict of float arrays, as `load_params` returns it
Model = Callable[..., Any]  # pure function of (params, input_ids, attention_mask, token_type_ids)


@partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: Params, batch: Batch) -> jax.Array:
    logits = model(params, **batch).logits
    if logits is None:
        raise DarexError("the model has no classification head; fine-tune it first (darex train).")
    return logits


def predict(model: Model, params: Params, batches: Sequence[Batch]) -> NDArray[Any]:
    """The logits of all rows but padding, [N, num_labels] float32, in the order of the data set."""
    pending = [_logits(model, params, model_inputs(batch)) for batch in batches]
    rows = [batch["index"][batch["weight"] > 0] for batch in batches]
    logits = [np.asarray(x, np.float32)[b["weight"] > 0] for x, b in zip(pending, batches, strict=True)]
    return np.concatenate(logits)[np.argsort(np.concatenate(rows))]


def agreement(logits: NDArray[Any], reference: NDArray[Any]) -> float:
    """The share of equal predictions; with one output the correlation of scores, NaN if either is constant.

    Args: logits, reference: [N, outputs], of the same shape.
    """
    if reference.shape[-1] > 1:
        return float(np.mean(logits.argmax(-1) == reference.argmax(-1)))
    if np.std(logits) == 0 or np.std(reference) == 0:
        return float("nan")
    return float(np.corrcoef(logits[:, 0], reference[:, 0])[0, 1])


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


def pruned_params(params: Params, delta: Params, key: jax.Array, drop_rate: float, q: Any) -> Params:
    """`params + prune(key, delta, drop_rate, q)`: the pruned model.

    Masks are generated leaf by leaf and not stored: beside the result, a search over q and masks holds one
    delta. Key, rate and q are traced, so that one program per shape is compiled, and the model is not
    recompiled.

    Args:
      params: full tree; the base's values for pruned parameters, the fine-tuned values for others (head).
      delta: tree with a subset of the names of `params`.
      key, drop_rate: as in `darex_jax.prune`.
      q: a number, or a dict with one number per dotted name of `delta`.
    Returns: a tree like `params`; sums are taken in float32 and stored in the dtype of `params`.
    Raises: ValueError for a name without q.
    """
    deltas = flatten_names(delta)
    threshold = traced_threshold(drop_rate)
    words: Any = jax.random.key_data(stacked_leaf_keys(key, deltas))
    if not isinstance(words, jax.core.Tracer):
        words = np.asarray(words)  # slicing hundreds of keys on the device would be slower than the masks
    own_key = dict(zip(deltas, words, strict=True))
    by_name = q if isinstance(q, Mapping) else dict.fromkeys(deltas, q)
    if missing := sorted(deltas.keys() - by_name.keys()):
        raise DarexError(f"q has no entry for {', '.join(missing)}.")

    def pruned(name: str, leaf: jax.Array) -> jax.Array:
        if name not in deltas:
            return leaf
        return _pruned_leaf(leaf, deltas[name], own_key[name], *threshold, _float32(by_name[name]))

    return map_named(pruned, params)


def _float32(q: Any) -> Any:
    return q if isinstance(q, jax.Array) else np.float32(q)  # may be traced


@jax.jit
def _pruned_leaf(
    leaf: jax.Array,
    delta: jax.Array,
    key_words: jax.Array,
    below: jax.Array,
    all_kept: jax.Array,
    q: jax.Array,
) -> jax.Array:
    key = jax.random.wrap_key_data(key_words, impl="threefry2x32")
    kept = survivors(key, delta.shape, below, all_kept)
    return apply_delta(leaf, rescale(drop(kept, delta), jnp.asarray(q, jnp.float32)))

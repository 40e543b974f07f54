"""Outputs of a model over batches: its metric on a task, and how far pruning moved its hidden states.

Everything is compiled once per model and batch shape; parameters, hence q, are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from darex_jax.core.delta import apply_delta, rescale
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.tasks import Task
from darex_jax.tasks.batching import Batch, Encoded, evaluation_batches

Params = Any  # nested dict of float arrays, as `load_params` returns it
Model = Callable[..., Any]  # pure function of (params, input_ids, attention_mask, token_type_ids)


@partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: Params, batch: Batch) -> jax.Array:
    logits = model(params, **batch).logits
    if logits is None:
        raise ValueError("the model has no classifier; fine-tune it first (darex train).")
    return logits


@partial(jax.jit, static_argnums=0)
def _hidden(model: Model, params: Params, batch: Batch) -> jax.Array:
    out = model(params, **batch)
    return out.last_hidden_state if out.head_hidden is None else out.head_hidden


@jax.jit
def _absolute_difference(a: jax.Array, b: jax.Array, real: jax.Array) -> jax.Array:
    difference = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).mean(axis=-1)
    return jnp.stack([jnp.sum(difference * real), jnp.sum(real)])


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def predict(model: Model, params: Params, batches: Sequence[Batch]) -> NDArray:
    """The logits of every real row, [N, num_labels] float32, in the order of the data set."""
    pending = [_logits(model, params, _inputs(batch)) for batch in batches]
    rows = [batch["index"][batch["weight"] > 0] for batch in batches]
    logits = [np.asarray(x, np.float32)[b["weight"] > 0] for x, b in zip(pending, batches, strict=True)]
    return np.concatenate(logits)[np.argsort(np.concatenate(rows))]


def evaluate(
    model: Model, params: Params, examples: Encoded, task: Task, batch_size: int = 64
) -> dict[str, Any]:
    """The task's metric on `examples`.

    Returns: {"metric": float, "metric_name": str, "n": int}.
    Raises: ValueError if the model's output is not finite.
    """
    logits = predict(model, params, evaluation_batches(examples, batch_size))
    metric = task.metric(logits, examples.labels)
    return {"metric": metric, "metric_name": task.metric_name, "n": len(examples)}


@jax.jit
def pruned_params(params: Params, masked_delta: Params, q: Any) -> Params:
    """`params + masked_delta / q`: the pruned model, for a delta that was masked but not rescaled.

    q is a traced argument: a search over q compiles this once, and the model not again.

    Args:
      params: full tree; the base's value where the delta is pruned, the fine-tune's where it is kept (head).
      masked_delta: tree with a subset of the names of `params`, zero where the mask dropped.
      q: a number, or a dict with one number per dotted name of `masked_delta`.
    Returns: a tree like `params`; sums are taken in float32 and stored in the dtype of `params`.
    """
    leaves = flatten_names(params)
    base = unflatten_names({name: leaves[name] for name in flatten_names(masked_delta)})
    return unflatten_names(leaves | flatten_names(apply_delta(base, rescale(masked_delta, q))))


def hidden_states(model: Model, params: Params, batches: Sequence[Batch]) -> list[jax.Array]:
    """What `output_change` compares, of every batch.

    Returns: the last hidden states [B, T, D]; of a RoBERTa with a head, its dense layer's outputs [B, D].
    """
    return [_hidden(model, params, _inputs(batch)) for batch in batches]


def output_change(
    model: Model, params: Params, batches: Sequence[Batch], reference: Sequence[jax.Array]
) -> float:
    """Mean absolute difference of the hidden states from `reference`, over real tokens (no padding).

    Source: the output change of DAREx for encoders (arXiv:2410.09344), which q_e minimises.
    """
    sums = []
    for here, there, batch in zip(hidden_states(model, params, batches), reference, batches, strict=True):
        per_token = batch["attention_mask"] * batch["weight"][:, None]
        real = per_token if here.ndim == 3 else batch["weight"]
        sums.append(_absolute_difference(here, there, real))
    total, tokens = np.sum(np.asarray(sums, np.float64), axis=0)
    return float(total / tokens)

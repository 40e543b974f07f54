"""How far pruning moved a model's outputs: what q_e minimises, and what needs no label.

Encoders: the mean absolute difference of the hidden states, or the squared one. Decoders: the mean squared
difference of the logits at the fine-tuned model's five likeliest tokens. All is compiled once per model and
batch shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.models import DecoderConfig, EncoderOutput, Model
from darex_jax.models.logits import of_logits
from darex_jax.tasks.batching import Batch, model_inputs, real_parts

Params = Any  # nested dict of float arrays, as `load_params` returns it
Reference = Any  # of one batch
TOP = 5  # tokens of a decoder that are looked at


def reference_outputs(model: Model, params: Params, batches: Sequence[Batch]) -> list[Reference]:
    """What `output_change` measures from, of every batch: the fine-tuned model's outputs.

    Returns: for an encoder the last hidden states [B, T, D], with RoBERTa's head its dense layer's outputs
      [B, D]; for a decoder the `TOP` largest logits [B, T, TOP] and whose they are.
    """
    return [_reference(model, params, batch) for batch in batches]


def output_change(
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    references: Sequence[Reference],
    *,
    squared: bool = False,
) -> float:
    """The mean change over real tokens (behind RoBERTa's head: rows); no padding.

    Args: batches: with what the model takes, and a `weight` of 0 for rows that do not count; references: from
      `reference_outputs`, of the same batches; squared: of an encoder, too, the squared difference.
    Source: the output change of DAREx (arXiv:2410.09344), which q_e minimises.
    """
    pairs = zip(batches, references, strict=True)
    sums = [output_change_sums(model, squared, params, batch, reference) for batch, reference in pairs]
    total, tokens = np.sum(np.asarray(sums, np.float64), axis=0)
    return float(total / tokens)


@partial(jax.jit, static_argnums=0)
def _reference(model: Model, params: Params, batch: Batch) -> Reference:
    if isinstance(model.config, DecoderConfig):
        return of_logits(lambda logits: jax.lax.top_k(logits, TOP), model, params, model_inputs(batch))
    return _hidden(model(params, **model_inputs(batch)))


@partial(jax.jit, static_argnums=(0, 1))
def output_change_sums(
    model: Model, squared: bool, params: Params, batch: Batch, reference: Reference
) -> jax.Array:
    """Of one batch: the sum of the change over real tokens, and their number; it has a gradient."""
    if isinstance(model.config, DecoderConfig):

        def of(logits: jax.Array, largest: jax.Array, whose: jax.Array) -> jax.Array:
            return jnp.square(jnp.take_along_axis(logits, whose, axis=-1) - largest).mean(axis=-1)

        change = of_logits(of, model, params, model_inputs(batch), *reference)
    else:
        difference = _hidden(model(params, **model_inputs(batch))) - reference
        change = (jnp.square(difference) if squared else jnp.abs(difference)).mean(axis=-1)
    rows, tokens = real_parts(batch)
    real = rows if change.ndim == 1 else tokens
    return jnp.stack([jnp.sum(change * real), jnp.sum(real)])


def _hidden(out: EncoderOutput) -> jax.Array:
    return (out.last_hidden_state if out.head_hidden is None else out.head_hidden).astype(jnp.float32)

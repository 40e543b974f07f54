"""The output change caused by pruning, which q_e minimises; needs no labels.

Encoders: the mean absolute difference of the hidden states, or the squared one. Decoders: the mean squared
difference of the logits at the fine-tuned model's five likeliest tokens. Everything is compiled once per
model and batch shape.
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
TOP = 5  # tokens per position that are compared for decoders


def reference_outputs(model: Model, params: Params, batches: Sequence[Batch]) -> list[Reference]:
    """The fine-tuned model's outputs per batch, the references of `output_change`.

    Returns: for an encoder the last hidden states [B, T, D], with RoBERTa's head its dense layer's outputs
      [B, D]; for a decoder the `TOP` largest logits [B, T, TOP] and their indices.
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
    """The mean change over tokens without padding (for RoBERTa's head: over rows).

    Args: batches: with the model's inputs, and a `weight` of 0 for padding rows; references: from
      `reference_outputs`, of the same batches; squared: for encoders as well, the squared difference.
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
    """The sum of the change over a batch's tokens without padding, and their number; differentiable."""
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

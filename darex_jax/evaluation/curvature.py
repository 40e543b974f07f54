"""Diagonal Gauss-Newton curvature per parameter: squared gradients over calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import combine, flatten_names
from darex_jax.evaluation.calibration import summed
from darex_jax.models import DecoderConfig, Model
from darex_jax.models.logits import of_logits
from darex_jax.tasks.batching import Batch, model_inputs, real_parts

Params = Any  # nested dict of float arrays, as `load_params` returns it


def curvature(
    model: Model, params: Params, names: Iterable[str], batches: Iterable[Batch], key: jax.Array
) -> dict[str, float]:
    """The mean diagonal of the Gauss-Newton matrix G of each parameter, summed over the examples.

    A small change e of the parameters changes the outputs by a divergence of e^T G e / 2. G's diagonal is the
    expected square of the gradient of log p(y) for labels y sampled from the model; they are independent, so
    the expected square of a batch's gradient is the sum over its examples. For a score, and for hidden states
    without a head, the divergence is half the squared difference.

    Args:
      names: dotted, of parameters in `params`.
      batches: one gradient each; padding, and rows whose `weight` is 0, are excluded.
      key: scalar typed key for sampling labels, folded with the batch index.
    Raises: DarexError without a batch, or for a name that `params` lacks.
    Source: labels sampled from the model, arXiv:1905.12558.
    """
    known = flatten_names(params)
    if unknown := sorted(set(names) - known.keys()):
        raise DarexError(f"there is no parameter '{unknown[0]}'.")
    chosen = {name: known[name] for name in sorted(set(names))}
    total = summed(
        _squares(model, params, chosen, batch, jax.random.fold_in(key, number))
        for number, batch in enumerate(batches)
    )
    return {name: float(mean) for name, mean in total.items()}


@partial(jax.jit, static_argnums=0)
def _squares(
    model: Model, params: Params, chosen: Mapping[str, Any], batch: Batch, key: jax.Array
) -> dict[str, jax.Array]:
    def pulled(chosen: Mapping[str, Any]) -> jax.Array:
        return _drawn(model, combine(params, chosen), batch, key)

    gradients = jax.grad(pulled)(chosen)
    return jax.tree.map(lambda gradient: jnp.mean(jnp.square(gradient.astype(jnp.float32))), gradients)


def _drawn(model: Model, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """The differentiated value: log p of sampled labels, or a score or hidden states times random signs."""
    inputs = model_inputs(batch)
    rows, real = real_parts(batch)
    if isinstance(model.config, DecoderConfig):

        def of(logits: jax.Array, place: jax.Array) -> jax.Array:
            draw = jax.vmap(jax.vmap(lambda z, i: jax.random.categorical(jax.random.fold_in(key, i), z)))
            return _log_probability(logits, draw(logits, place))

        places = jnp.arange(real.size, dtype=jnp.int32).reshape(real.shape)
        return jnp.sum(of_logits(of, model, params, inputs, places) * real)
    out = model(params, **inputs)
    if out.logits is None:
        hidden = out.last_hidden_state.astype(jnp.float32)
        return jnp.sum(hidden * jax.random.rademacher(key, hidden.shape, jnp.float32) * real[..., None])
    logits = out.logits.astype(jnp.float32)
    if logits.shape[-1] == 1:
        return jnp.sum(logits[:, 0] * jax.random.rademacher(key, rows.shape, jnp.float32) * rows)
    return jnp.sum(_log_probability(logits, jax.random.categorical(key, logits)) * rows)


def _log_probability(logits: jax.Array, drawn: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)
    return chosen[..., 0]

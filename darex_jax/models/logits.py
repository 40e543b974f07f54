"""Functions of a decoder's logits, computed in chunks of positions to save memory."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from darex_jax.core.errors import DarexError
from darex_jax.models import Model

Array = jax.Array
CHUNK_ENTRIES = 1 << 26  # logits in memory at a time: 256 MiB of float32


def of_logits(
    function: Callable[..., Any],
    model: Callable[..., Any],
    params: Any,
    inputs: Mapping[str, Any],
    *along: Array,
) -> Any:
    """`function(logits, *along)`, computed for a chunk of positions at a time, without the full [B, T, V].

    A chunk has all rows, so that a batch sharded over rows stays sharded. Its logits are recomputed for the
    gradient, which therefore needs no more memory. A single chunk needs no loop. Under jit the model's own
    logits are unused and not computed.

    Args:
      function: from float32 logits [B, C, V] and `along` [B, C, ...] to a tree of arrays [B, C, ...], each
        position's depending on its own logits only.
      model: a `Model` with a language-model head, or any function whose result has `.logits`, which are then
        used whole.
      inputs: keyword arguments of the model.
      along: arrays [B, T, ...].
    Returns: what `function` returns, [B, T, ...].
    Raises: ValueError for a decoder without a head.
    """
    out = model(params, **inputs)
    if out.logits is None:
        raise DarexError("this decoder has no lm_head, so it has no logits.")
    rows, length, vocabulary = out.logits.shape
    chunks = -(-length // max(1, CHUNK_ENTRIES // (rows * vocabulary)))
    if chunks == 1 or not isinstance(model, Model):
        return function(out.logits.astype(jnp.float32), *along)
    size = -(-length // chunks)

    def split(x: Array) -> Array:  # B T ... -> chunks B C ..., padded with zeros
        filled = jnp.pad(x, [(0, 0), (0, chunks * size - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(filled.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)

    def joined(y: Array) -> Array:  # chunks B C ... -> B T ...
        return jnp.moveaxis(y, 0, 1).reshape(rows, chunks * size, *y.shape[3:])[:, :length]

    def of_chunk(chunk: tuple[Array, ...]) -> Any:
        hidden, *beside = chunk
        return function(model.module(params).logits(hidden).astype(jnp.float32), *beside)

    pieces = tuple(split(jnp.asarray(x)) for x in (out.last_hidden_state, *along))
    return jax.tree.map(joined, jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), pieces))

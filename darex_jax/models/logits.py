"""Numbers made of a decoder's logits, without all logits in memory at once."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from darex_jax.core.errors import DarexError
from darex_jax.models import Model

Array = jax.Array
CHUNK_ENTRIES = 1 << 26  # logits that are there at a time: 256 MiB of float32


def of_logits(
    function: Callable[..., Any],
    model: Callable[..., Any],
    params: Any,
    inputs: Mapping[str, Any],
    *along: Array,
) -> Any:
    """`function(logits, *along)`, computed for some positions at a time: [B, T, V] is never made whole.

    A chunk has all rows, so that a batch that is sharded over them stays so. Its logits are computed again
    for the gradient, which therefore takes no more memory than they do. Where one chunk is all, there is no
    loop. Inside a compiled function the model's own logits, being unused, are not computed.

    Args:
      function: from float32 logits [B, C, V] and `along` [B, C, ...] to a tree of arrays [B, C, ...], each
        position's from its own logits alone.
      model: a `Model` with a language head; of any other function with `.logits` they are taken whole.
      inputs: what it is called with.
      along: arrays [B, T, ...].
    Returns: what `function` returns, [B, T, ...].
    Raises: ValueError for a decoder without a head.
    """
    out = model(params, **inputs)
    if out.logits is None:
        raise DarexError("this decoder has no lm_head: there are no logits to look at.")
    rows, length, vocabulary = out.logits.shape
    chunks = -(-length // max(1, CHUNK_ENTRIES // (rows * vocabulary)))
    if chunks == 1 or not isinstance(model, Model):
        return function(out.logits.astype(jnp.float32), *along)
    size = -(-length // chunks)

    def split(x: Array) -> Array:  # B T ... -> chunks B C ..., filled up with zeros
        filled = jnp.pad(x, [(0, 0), (0, chunks * size - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(filled.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)

    def joined(y: Array) -> Array:  # chunks B C ... -> B T ...
        return jnp.moveaxis(y, 0, 1).reshape(rows, chunks * size, *y.shape[3:])[:, :length]

    def of_chunk(chunk: tuple[Array, ...]) -> Any:
        hidden, *beside = chunk
        return function(model.module(params).logits(hidden).astype(jnp.float32), *beside)

    pieces = tuple(split(jnp.asarray(x)) for x in (out.last_hidden_state, *along))
    return jax.tree.map(joined, jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), pieces))

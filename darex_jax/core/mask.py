"""The random mask: which entries of a leaf survive. It never changes: golden digests in the tests pin it.

The definition, with typed Threefry keys and `jax_threefry_partitionable=True`:

    jax.random.bits(leaf_key(key, name), shape, jnp.uint32) < round((1 - drop_rate) * 2**32)

Any computation that gives the same bits is allowed. Accelerators run that line; on a CPU the unrolled
Threefry in `threefry.py` gives the same bits several times faster.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from darex_jax.core.threefry import keep_threshold, threefry2x32
from darex_jax.core.tree import PyTree, flatten_names, leaf_keys, map_named, shape_of

# The two chunk lengths for which a streamed mask is compiled: a tensor is covered with as few as possible.
STREAM_CHUNKS = (1 << 20, 1 << 15)


def random_mask(key: jax.Array, tree: PyTree, drop_rate: float) -> PyTree:
    """Boolean tree, True where the entry survives, independently with probability 1 - drop_rate.

    Args:
      key: scalar typed Threefry key.
      tree: arrays or `jax.ShapeDtypeStruct`s; only names and shapes matter, the dtype does not.
      drop_rate: Python float in [0, 1).
    Returns: a tree of bool arrays of the same shapes, sharded like the leaves.
    Raises: ValueError for a drop_rate out of range, TypeError for a key of another type.
    Source: DARE, arXiv:2311.03099, section 3. Unlike published code, the rate is compared as a
      32-bit integer, so that the share of survivors does not depend on the leaf's dtype.
    """
    threshold = traced_threshold(drop_rate)
    keys = leaf_keys(key, flatten_names(tree))

    def leaf_mask(name: str, leaf: Any) -> jax.Array:
        shape, own_key = shape_of(name, leaf), keys[name]
        if isinstance(own_key, jax.core.Tracer):  # traced into the caller's program, whose options apply
            return _traced_survivors(own_key, shape, *threshold)
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        platform = next(iter(sharding.device_set)).platform if sharding else jax.default_backend()
        return _compiled_mask(shape, sharding, platform)(own_key, *threshold)

    return map_named(leaf_mask, tree)


def traced_threshold(drop_rate: float) -> tuple[np.uint32, np.bool_]:
    """The threshold as two arguments of a compiled function: 2**32 (keep all) does not fit in 32 bits."""
    threshold = keep_threshold(drop_rate)
    return np.uint32(threshold & 0xFFFFFFFF), np.bool_(threshold == 2**32)


def survivors(
    leaf_key: jax.Array, shape: tuple[int, ...], below: ArrayLike, all_kept: ArrayLike
) -> jax.Array:
    """The mask of one leaf, bool[shape], for use inside jit; it partitions under any sharding."""
    return (_bits(leaf_key, shape) < below) | all_kept


# Jitted so that it is compiled as one unit also under vmap or shard_map without jit.
_traced_survivors = jax.jit(survivors, static_argnums=1, inline=True)


def stream_mask(leaf_key_data: np.ndarray, start: int, length: int, threshold: int) -> np.ndarray:
    """Entries [start, start + length) of a leaf's flattened mask, on the host.

    Args:
      leaf_key_data: uint32[2], the data of the leaf's key.
      length: any; computed in chunks of `STREAM_CHUNKS`.
      threshold: from `keep_threshold`.
    Returns: bool[length].
    """
    if threshold == 2**32:
        return np.ones(length, bool)
    pieces = []
    while length > 0:
        size = STREAM_CHUNKS[0] if length > 4 * STREAM_CHUNKS[1] else STREAM_CHUNKS[1]
        counter = np.uint32(start >> 32), np.uint32(start & 0xFFFFFFFF)
        mask_from = _compiled_stream_mask(size, jax.default_backend())
        piece = np.asarray(mask_from(leaf_key_data, *counter, np.uint32(threshold)))
        pieces.append(piece[: min(size, length)])
        start, length = start + size, length - size
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def survivor_chunks(
    leaf_key_data: np.ndarray, size: int, threshold: int, length: int = STREAM_CHUNKS[0]
) -> Iterator[tuple[int, np.ndarray]]:
    """A flattened mask of `size` entries in chunks of `length`: `(start, survivors' indices in it)`.

    Args: leaf_key_data, threshold: as for `stream_mask`.
    """
    for start in range(0, size, length):
        yield start, np.flatnonzero(stream_mask(leaf_key_data, start, min(length, size - start), threshold))


def survivor_indices(leaf_key_data: np.ndarray, size: int, threshold: int) -> np.ndarray:
    """The flat indices of all survivors, rising, int64; on the host. Args: as for `survivor_chunks`."""
    found = [start + kept for start, kept in survivor_chunks(leaf_key_data, size, threshold)]
    return np.concatenate(found) if found else np.empty(0, np.int64)


@cache
def compiler_options(platform: str) -> dict[str, Any] | None:
    """Compiler options for masks on a platform; they change the speed, not the bits.

    On a CPU, 512-bit vectors where XLA prefers 256: a fifth faster with AVX-512, no slower without.
    """
    options = {"xla_cpu_prefer_vector_width": 512}
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(np.uint32(0)).compile()
    except Exception:  # an XLA flag: versions without it fail in different ways
        return None
    return options


@cache
def _compiled_stream_mask(size: int, platform: str) -> Callable[..., jax.Array]:
    def mask_from(key: jax.Array, high: jax.Array, low: jax.Array, below: jax.Array) -> jax.Array:
        index = lax.iota(jnp.uint32, size)
        wrapped = low + index
        high = high + (wrapped < low).astype(jnp.uint32)
        first, second = threefry2x32(key, high, wrapped)
        return (first ^ second) < below

    return jax.jit(mask_from, compiler_options=compiler_options(platform))


@cache
def _compiled_mask(shape: tuple[int, ...], sharding: Any, platform: str) -> Callable[..., jax.Array]:
    return jax.jit(
        lambda key, *threshold: survivors(key, shape, *threshold),
        out_shardings=sharding,
        compiler_options=compiler_options(platform),
    )


def _bits(leaf_key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    with jax.threefry_partitionable(True):  # part of the definition, whatever the caller's setting
        if np.prod(shape, dtype=np.float64) >= 2**32:
            return jax.random.bits(leaf_key, shape, jnp.uint32)
        return lax.platform_dependent(
            cpu=lambda: _written_out_bits(jax.random.key_data(leaf_key), shape),
            default=lambda: jax.random.bits(leaf_key, shape, jnp.uint32),
        )


def _written_out_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):  # one iota per axis, so that sharded axes stay sharded
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
        stride *= shape[axis]
    first, second = threefry2x32(key, jnp.zeros(shape, jnp.uint32), index)
    return first ^ second

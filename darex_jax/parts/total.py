"""The delta of one parameter as a sum of parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.parts.columns import Columns
from darex_jax.parts.dense import Dense
from darex_jax.parts.low_rank import LowRank
from darex_jax.parts.random import Random
from darex_jax.parts.sign import Sign
from darex_jax.parts.sparse import Sparse
from darex_jax.parts.values import Shape, Values

Part = Random | Sparse | Columns | LowRank | Sign | Dense
PARTS = {part.kind: part for part in (Random, Sparse, Columns, LowRank, Sign, Dense)}


def values_of(part: Part) -> dict[str, Values]:
    """The `Values` of a part by field name; the scales of a `Sign` are none of them."""
    return {f.name: x for f in fields(part) if isinstance(x := getattr(part, f.name), Values)}


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["shape"])
@dataclass(frozen=True)
class Parts:
    """`parts[0] + parts[1] + ...`, in float32 and in this order; an empty sum is zero.

    A leaf of a delta, which `apply_delta` accepts in place of an array.

    Attributes: parts: of one parameter; shape: its shape.
    """

    parts: tuple[Part, ...]
    shape: Shape

    def map(self, function: Callable[[Any], Part]) -> Parts:
        """Applies `function` to each part."""
        return Parts(tuple(map(function, self.parts)), self.shape)

    def to_dense(self) -> jax.Array:
        """float32 [shape]."""
        total = jnp.zeros(self.shape, jnp.float32)
        for part in self.parts:
            total = total + part.to_dense()
        return total

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ to_dense().T`, [..., in] -> [..., out], by each part's own matmul."""
        total = jnp.zeros((*x.shape[:-1], self.shape[0]), jnp.float32)
        for part in self.parts:
            total = total + part.matmul(x)
        return total

    def chunks(self, length: int) -> Iterator[tuple[np.ndarray | slice, np.ndarray]]:
        """Per chunk of `length` entries: the indices of those that may be nonzero, and their float32 values.

        On the host. This defines the bits that restoring a file gives.
        """
        size = int(np.prod(self.shape, dtype=np.int64))
        if len(self.parts) == 1:
            yield from self.parts[0].chunks(length)
            return
        streams: list[Iterator[Any]] = [part.chunks(length) for part in self.parts]
        for start in range(0, size, length):
            total = np.zeros(min(length, size - start), np.float32)
            for stream in streams:
                index, numbers = next(stream)
                total[index] += numbers
            yield slice(None), total
        for stream in streams:  # run each part's checks at its end
            next(stream, None)

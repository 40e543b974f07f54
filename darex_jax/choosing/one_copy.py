"""Choosing q in the memory of one model: survivors are added to the base in place, and removed again.

A `Pair` holds the delta of every parameter in float32 and a model for each q. A `OneCopy` holds one working
copy and the survivors of each mask, 10 bytes each with a bfloat16 base: at 0.99 at most 0.15 bytes per
parameter.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.choosing.pair import MASK_SEEDS, Pair, Params, PrunedModel, Q, base_leaf, dare_q, load_fine
from darex_jax.core.delta import apply_delta, compute_delta, rescale
from darex_jax.core.errors import DarexError
from darex_jax.core.mask import survivor_indices
from darex_jax.core.scope import Scope
from darex_jax.core.threefry import keep_threshold
from darex_jax.core.tree import flatten_names, seed_key, stacked_leaf_keys, unflatten_names
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.models import Model
from darex_jax.parts.mixed import rounded_up


class _Survivors(NamedTuple):
    """Survivors of one mask in one parameter: indices [S], float32 deltas [S], base values there [S].

    S is rounded up, so that few programs are compiled; padding indices are out of range.
    """

    places: jax.Array
    delta: jax.Array
    base: jax.Array


@dataclass
class OneCopy:
    """A replacement of `Pair` for ways that choose one q for the model, in the memory of one model.

    It first holds the fine-tuned `params`. `start` and `models` replace them by the base, one parameter at a
    time, and invalidate `params`. Their results share memory: each model invalidates the previous one.

    Attributes: model, drop_rate, seeds: as of a `Pair`.
    """

    model: Model
    drop_rate: float
    seeds: Sequence[int]
    _base: Path
    _in_scope: Mapping[str, str]  # fine-tuned name -> base name of pruned parameters
    _leaves: dict[str, jax.Array]
    _masks: list[dict[str, _Survivors]] = field(default_factory=list)  # empty while params are fine-tuned
    _written: int | None = None  # index of the mask applied to the working copy

    @property
    def density(self) -> float:
        """DARE's q."""
        return dare_q(self.drop_rate)

    def dare(self, scope: str) -> Q:
        """DARE's q."""
        return self.density

    @property
    def params(self) -> Params:
        """The fine-tuned model's parameters, until the base's replace them."""
        if self._masks:
            raise RuntimeError("the fine-tuned parameters have been replaced by the base's")
        return unflatten_names(self._leaves)

    @property
    def start(self) -> Params:
        """The base's parameters, completed by those that only the fine-tuned model has."""
        self._take_out()
        return unflatten_names(self._leaves)

    @property
    def models(self) -> list[PrunedModel]:
        """As `Pair.models`: for each mask the params of the pruned model as a function of q."""
        return [partial(self._put_in, mask) for mask in range(len(self.seeds))]

    def _put_in(self, mask: int, q: Q) -> Params:
        if isinstance(q, Mapping):
            raise DarexError("one copy of the model supports only one q for all layers.")
        if self._written != mask:
            self._take_out()
        for name, own in self._masks[mask].items():
            self._leaves[name] = _pruned(self._leaves[name], *own, np.float32(q))
        self._written = mask
        return unflatten_names(self._leaves)

    def _take_out(self) -> None:
        if not self._masks:
            self._become_base()
        if self._written is not None:
            for name, own in self._masks[self._written].items():
                self._leaves[name] = _written(self._leaves[name], own.places, own.base)
        self._written = None

    def _become_base(self) -> None:
        """Replaces the fine-tuned parameters by the base's, keeping the survivors of each mask."""
        masks: list[dict[str, _Survivors]] = [{} for _ in self.seeds]
        keys = [
            dict(zip(self._in_scope, np.asarray(jax.random.key_data(stacked)), strict=True))
            for stacked in (stacked_leaf_keys(seed_key(seed), self._in_scope) for seed in self.seeds)
        ]
        threshold = keep_threshold(self.drop_rate)
        with Checkpoint(self._base) as b:
            for name, stored in self._in_scope.items():
                base = base_leaf(b, stored, self._leaves[name].dtype)
                delta = compute_delta(self._leaves[name], base)
                for own, key in zip(masks, keys, strict=True):
                    places = survivor_indices(key[name], base.size, threshold)
                    own[name] = _survivors(places, np.asarray(delta), np.asarray(base))
                self._leaves[name] = base
        self._masks = masks


AnyPair = Pair | OneCopy


def open_one_copy(
    base: str | os.PathLike[str],
    fine: str | os.PathLike[str],
    drop_rate: float,
    seeds: Sequence[int] = MASK_SEEDS,
    scope: Scope | None = None,
    ignore_config_fields: Collection[str] = (),
) -> OneCopy:
    """Reads the fine-tuned model of a pair; the base is read when first used.

    Raises: ValueError if the two do not match.
    """
    model, params, in_scope = load_fine(base, fine, scope, ignore_config_fields)
    return OneCopy(model, drop_rate, seeds, Path(base), in_scope, flatten_names(params))


def _survivors(places: np.ndarray, delta: np.ndarray, base: np.ndarray) -> _Survivors:
    count = rounded_up(len(places))
    if base.size + count > 2**32:
        raise DarexError("one copy of the model does not support parameters of more than 2**32 entries.")
    filled = np.zeros((2, count), np.float32)
    filled[0, : len(places)], filled[1, : len(places)] = delta.reshape(-1)[places], base.reshape(-1)[places]
    behind = np.arange(base.size, base.size + count - len(places))
    where = np.concatenate([places, behind]).astype(np.uint32)
    return _Survivors(jnp.asarray(where), jnp.asarray(filled[0]), jnp.asarray(filled[1], base.dtype))


@partial(jax.jit, donate_argnums=0)
def _written(leaf: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    flat = leaf.reshape(-1).at[places]
    return flat.set(values, mode="drop", unique_indices=True, indices_are_sorted=True).reshape(leaf.shape)


@partial(jax.jit, donate_argnums=0)
def _pruned(leaf: jax.Array, places: jax.Array, delta: jax.Array, base: jax.Array, q: Any) -> jax.Array:
    return _written(leaf, places, apply_delta(base, rescale(delta, jnp.asarray(q, jnp.float32))))

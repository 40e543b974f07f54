"""`DeltaBank`: a base and any number of artifacts made from it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import blake3
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from darex_jax.core.delta import apply_delta
from darex_jax.core.errors import DarexError, FileError
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.files.artifact import MOST_VERIFIED_ENTRIES, DeltaFile
from darex_jax.files.safetensors import DTYPES, as_bytes
from darex_jax.models import BertConfig, Model, Params, build_model, read_model_config
from darex_jax.parts.dense import Dense
from darex_jax.parts.mixed import Mixed, Stack, rounded_up, stack_parts
from darex_jax.parts.sparse import Sparse
from darex_jax.parts.total import Parts
from darex_jax.parts.values import Values

Array = jax.Array


@dataclass(frozen=True)
class _Held:
    """A delta in the bank: its model, and by the model's names what is pruned and what is kept whole."""

    model: Model
    parts: dict[str, Parts]
    kept: dict[str, np.ndarray]


class DeltaBank:
    """One base in memory and many deltas on it, each in the size of its parts.

        bank = DeltaBank(*load_model("base"))
        bank.add("sst2", "sst2.safetensors")
        params = bank.activate("sst2")               # one delta for all rows
        logits = bank.model_of("sst2")(params, input_ids).logits
        params = bank.mixed(["sst2", "mrpc", None])  # a delta for each row; None is the base alone
        logits = bank.model(params, input_ids).logits

    The base's arrays are never changed. Sums are float32's, so an entry of a low rank or of signs may differ
    in its last bits from what `darex apply` writes; sparse ones are the same bits.
    """

    def __init__(self, model: Model, base: Params):
        """Args: model, base: from `load_model`, in the dtypes of their files or wider; sharded or not."""
        self._base_model = model
        self._base: dict[str, Array] = flatten_names(base)
        self._digests: dict[tuple[str, str], str] = {}
        self._held: dict[str, _Held] = {}
        self._stacks: dict[str, Stack] | None = None  # made when first needed after a change
        self._params: dict[str, Array] = {}  # the base by the names of a fine-tune, filled up with zeros
        self._working: dict[str, Array] | None = None
        self._active = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the deltas, in the order in which they were added."""
        return tuple(self._held)

    def nbytes(self, name: str) -> int:
        """The bytes that a delta takes here: its parts and what it keeps whole."""
        held = self._found(name)
        leaves = [*jax.tree.leaves(held.parts), *held.kept.values()]
        return sum(np.asarray(leaf).nbytes for leaf in leaves)

    def add(self, name: str, path: str | os.PathLike[str], *, max_entries: int | None = None) -> None:
        """Reads an artifact made from this base.

        Args: name: what it is called here; one of that name is replaced. max_entries: as for `load_delta`.
        Raises: FileError for a damaged file, or a base that is another; ValueError for a model that does not
          go with the others in the bank.
        """
        with DeltaFile(path) as file:
            if file.names("rows"):
                raise FileError(
                    f"{path}: has extra rows for {', '.join(file.names('rows'))}, which no bank takes; "
                    "restore the model with darex apply."
                )
            file.check_entries(max_entries, MOST_VERIFIED_ENTRIES)
            config = file.config() or self._base_model.config.to_hf()
            model, shapes = build_model(read_model_config(config))
            base_names = {own: self._base_name(file.base_name(own)) for own in shapes}
            self._check_base(file)
            if unknown := sorted(file.recipe.parameters.keys() - shapes.keys()):
                raise FileError(f"{path}: was made from another base; this one has no '{unknown[0]}'.")
            parts = {own: file.parts(own) for own in file.recipe.parameters}
            kept = {own: file.read(f"dense/{own}") for own in file.names("dense") if own in shapes}
            file.check_data()
        missing = sorted(n for n in shapes if base_names[n] not in self._base and n not in kept)
        wrong = sorted(n for n in parts if parts[n].shape != shapes[n])
        wrong += sorted(n for n in kept if kept[n].shape != shapes[n])
        if missing or wrong:
            fault = f"{missing[0]} is in neither of the two" if missing else f"{wrong[0]} has another shape"
            raise FileError(f"{path}: does not fit this base and its config: {fault}.")
        others = {n: held for n, held in self._held.items() if n != name}
        for other, held in others.items():
            if _body(held.model) != _body(model):
                raise DarexError(f"{path}: is a model of another config than '{other}' in this bank.")
        self._held[name] = _Held(model, parts, kept)
        self._changed()

    def remove(self, name: str) -> None:
        """Forgets a delta. Raises: ValueError for a name that is not here."""
        self._found(name)
        del self._held[name]
        self._changed()

    @property
    def model(self) -> Model:
        """The model that runs `mixed`'s trees. Its head is as large as the largest, rounded up; a row's
        logits beyond its own labels are -inf."""
        models = [held.model for held in self._held.values()]
        if not models:
            return self._base_model
        config = models[0].config
        if not isinstance(config, BertConfig) or config.headless:
            return models[0]
        labels = rounded_up(max(m.config.num_labels for m in models))  # type: ignore[union-attr]
        return build_model(dataclasses.replace(config, num_labels=labels))[0]

    def model_of(self, name: str) -> Model:
        """The model that runs `activate(name)`."""
        return self._found(name).model

    def activate(self, name: str | None) -> dict[str, Any]:
        """The parameters of the base with a delta in; None: of the base alone.

        Only what the delta before and this one change is written, into buffers that the bank keeps: the
        parameters that the last call gave are void then, copy what shall stay.

        Returns: a nested dict of the names and shapes of `model_of(name)`.
        Raises: ValueError for a name that is not here.
        """
        held, number = (None, 0) if name is None else (self._found(name), 1 + self.names.index(name))
        stacks = {n: s for n, s in self._all_stacks().items() if n not in self._heads()}
        base = {n: self._params[n] for n in stacks}
        if self._working is None:
            self._working, self._active = jax.tree.map(jnp.copy, base), 0
        self._working = _switched(self._working, base, stacks, self._active, number)
        self._active = number
        if held is None:
            own = {theirs: n for n in self._params if (theirs := self._base_name(n)) in self._base}
            return unflatten_names(self._base | {t: self._working[n] for t, n in own.items() if n in stacks})
        heads = {n: self._whole(held, n) for n in self._heads()}
        return unflatten_names({**self._params, **self._working, **jax.tree.map(jnp.asarray, heads)})

    def mixed(self, names: Sequence[str | None]) -> dict[str, Any]:
        """Parameters for `model` on a batch whose row i belongs to the delta names[i]; None is the base.

        Every matrix product is the base's for all rows and, added to it, that of each row's own parts; no
        dense delta is made. What is compiled depends on how many rows there are, not on their deltas; another
        delta compiles nothing while its parts fit the rounded sizes of those that are there.

        Returns: a nested dict whose leaves are arrays where no delta in the bank has anything, else `Mixed`.
        Raises: ValueError for a name that is not here.
        """
        number: dict[str | None, int] = {None: 0}
        number |= {name: i + 1 for i, name in enumerate(self.names)}
        if unknown := [name for name in names if name not in number]:
            self._found(unknown[0])
        stacks = self._all_stacks()
        numbers = self._everywhere(np.asarray([number[name] for name in names], np.int32))
        leaves = {
            name: Mixed(leaf, stacks[name], numbers) if name in stacks else leaf
            for name, leaf in self._params.items()
        }
        return unflatten_names(leaves)

    def _found(self, name: Any) -> _Held:
        if name not in self._held:
            known = ", ".join(self._held) or "none"
            raise DarexError(f"there is no delta '{name}' in the bank; there are: {known}.")
        return self._held[name]

    def _changed(self) -> None:
        self._stacks, self._working = None, None

    def _base_name(self, name: str) -> str:
        """What a parameter of a base's file is called in the base that was loaded, which may be its body."""
        family = f"{self._base_model.config.model_type}."
        return name if name in self._base else name.removeprefix(family)

    def _check_base(self, file: DeltaFile) -> None:
        """Whether the tensors that the delta was made from are those of this base, as far as it has them."""
        for stated, entry in file.recipe.base.items():
            name = self._base_name(stated)
            if name not in self._base:
                continue
            key = (name, entry["dtype"])
            if key not in self._digests:
                array = np.ascontiguousarray(np.asarray(self._base[name]).astype(DTYPES[entry["dtype"]]))
                self._digests[key] = blake3.blake3(as_bytes(array)).hexdigest()
            if list(self._base[name].shape) != entry["shape"] or not self._digests[key].startswith(
                entry["blake3"]
            ):
                raise FileError(f"{file.path}: was made from another base; '{stated}' is not this one's.")

    def _heads(self) -> set[str]:
        """The parameters that the base has not, or in another shape: every delta brings its own."""
        return {n for n, leaf in self._params.items() if self._of_base(n, leaf.shape) is None}

    def _of_base(self, name: str, shape: tuple[int, ...]) -> Array | None:
        leaf = self._base.get(self._base_name(name))
        return leaf if leaf is not None and leaf.shape == shape else None

    def _whole(self, held: _Held | None, name: str) -> np.ndarray:
        """A parameter of a fine-tune that is no delta on this base's."""
        if held is not None and name in held.kept:
            return held.kept[name]
        return np.asarray(self._base[self._base_name(name)])

    def _all_stacks(self) -> dict[str, Stack]:
        if self._stacks is None:
            shapes = build_model(self.model.config, **dict(self.model.options))[1]
            dtype = next(iter(self._base.values())).dtype
            self._params = {}
            for name, shape in shapes.items():
                leaf = self._of_base(name, shape)
                self._params[name] = self._everywhere(np.zeros(shape, dtype)) if leaf is None else leaf
            heads, found = self._heads(), {}
            for name, shape in shapes.items():
                if name in heads:
                    of = [self._head(held, name, shape) for held in (None, *self._held.values())]
                else:
                    of = [None, *(self._delta(held, name) for held in self._held.values())]
                if any(parts is not None for parts in of):
                    found[name] = jax.tree.map(self._everywhere, stack_parts(of))
            self._stacks = found
        return self._stacks

    def _delta(self, held: _Held, name: str) -> Parts | None:
        if name not in held.kept:
            return held.parts.get(name)
        own = held.kept[name].astype(np.float32)
        return _dense(own - np.asarray(self._params[name]).astype(np.float32))

    def _head(self, held: _Held | None, name: str, shape: tuple[int, ...]) -> Parts | None:
        """A whole head, filled up to the largest; None is the base, which may have none."""
        if held is None and self._base_name(name) not in self._base:
            return None
        own = self._whole(held, name).astype(np.float32)
        filled = np.full(shape, -np.inf if len(shape) == 1 else 0.0, np.float32)
        filled[tuple(map(slice, own.shape))] = own
        return _dense(filled)

    def _everywhere(self, array: Any) -> Array:
        """On every device of the base."""
        sharding = next(iter(self._base.values())).sharding
        if isinstance(sharding, NamedSharding):
            return jax.device_put(array, NamedSharding(sharding.mesh, PartitionSpec()))
        return jnp.asarray(array)


def _dense(array: np.ndarray) -> Parts:
    return Parts((Dense(Values(array), np.float32(1), array.shape),), array.shape)


def _body(model: Model) -> Any:
    """What models of one bank share: all but the number of labels."""
    config = model.config
    return dataclasses.replace(config, num_labels=2) if isinstance(config, BertConfig) else config


@partial(jax.jit, donate_argnums=0, keep_unused=True)
def _switched(
    working: dict[str, Array], base: Mapping[str, Array], stacks: Mapping[str, Stack], before: Any, now: Any
) -> dict[str, Array]:
    """`working` with one delta taken out and another put in."""

    def switch(leaf: Array, base: Array, stack: Stack) -> Array:
        if len(stack.parts) != 1 or not isinstance(stack.parts[0], Sparse):
            return apply_delta(base, stack.delta(now))
        part, places = stack.parts[0], stack.places[0]
        positions, flat = jnp.asarray(part.positions), base.reshape(-1)
        old, new = positions[places[before]], positions[places[now]]
        kept = flat.at[new].get(mode="clip")
        sums = apply_delta(kept, part.values.numbers[places[now]])
        put: dict[str, Any] = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
        restored = leaf.reshape(-1).at[old].set(flat.at[old].get(mode="clip"), **put)
        return restored.at[new].set(sums, **put).reshape(base.shape)

    return {name: switch(leaf, base[name], stacks[name]) for name, leaf in working.items()}

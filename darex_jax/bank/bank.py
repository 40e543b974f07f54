"""`DeltaBank`: a base and any number of artifacts made from it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
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
from darex_jax.core.scope import HEAD, OPTIONAL
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.safetensors import DTYPES, as_bytes
from darex_jax.models import BertConfig, EncoderConfig, Model, Params, build_model, read_model_config
from darex_jax.parts.dense import Dense
from darex_jax.parts.mixed import Mixed, Stack, rounded_up, stack_parts, written_out
from darex_jax.parts.sparse import Sparse
from darex_jax.parts.total import Parts
from darex_jax.parts.values import Values

Array = jax.Array
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Held:
    """A delta in the bank: its model, and by parameter name the shapes, pruned parts and kept arrays."""

    model: Model
    shapes: dict[str, Shape]
    parts: dict[str, Parts]
    kept: dict[str, np.ndarray]


class DeltaBank:
    """One base in memory and many deltas of it, stored as compact parts.

        bank = DeltaBank(*load_model("base"))
        bank.add("sst2", "sst2.safetensors")
        params = bank.activate("sst2")               # one delta for all rows
        logits = bank.model_of("sst2")(params, input_ids).logits
        params = bank.mixed(["sst2", "mrpc", None])  # a delta for each row; None is the base alone
        logits = bank.model(params, input_ids).logits

    The base's arrays are never changed. Sums are float32, rounded to the base's dtype: for a float32 base,
    low-rank and sign parts may differ in the last bits from what `darex apply` writes; sparse parts give the
    same bits, and so do parameters that a delta keeps whole, but for `mixed`, which adds their difference.
    """

    def __init__(self, model: Model, base: Params):
        """Args: model, base: from `load_model`, in the files' dtypes or wider; sharded or not."""
        self._base_model = model
        self._base: dict[str, Array] = {name: jnp.asarray(x) for name, x in flatten_names(base).items()}
        self._digests: dict[tuple[str, str], str] = {}
        self._held: dict[str, _Held] = {}
        self._stacks: dict[str, Stack] | None = None  # built lazily after each change
        self._params: dict[str, Array] = {}  # the base by fine-tuned names, padded with zeros
        self._heads: set[str] = set()  # names that every delta stores whole
        self._working: dict[str, Array] | None = None
        self._active = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the deltas, in the order in which they were added."""
        return tuple(self._held)

    def nbytes(self, name: str) -> int:
        """The bytes of a delta as read: parts, indices of random masks, parameters kept whole.

        The stacked copies for `mixed` are extra: float32, padded to the largest in the bank.
        """
        held = self._found(name)
        leaves = [*jax.tree.leaves(held.parts), *held.kept.values()]
        return sum(np.asarray(leaf).nbytes for leaf in leaves)

    def add(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        ignore_config_fields: Collection[str] = (),
    ) -> None:
        """Reads an artifact made from this base, which confirms its shapes before anything is made of them.

        Args: name: its name in the bank; an existing one is replaced. ignore_config_fields: as for
          `load_model`.
        Raises: FileError for a damaged file, another base, or a base in a narrower dtype than the restored
          one; ValueError for a model that is incompatible with the others in the bank.
        """
        with DeltaFile(path) as file:
            if file.names("rows"):
                raise _unfit(path, f"has extra rows for {', '.join(file.names('rows'))}")
            try:
                model, shapes = self._model_of(file, ignore_config_fields)
                self._check_base(file)
                self._check_names(file, shapes)
                parts = {own: written_out(file.parts(own)) for own in file.recipe.parameters}
            except FileError:
                raise
            except DarexError as error:
                raise FileError(f"{path}: {error}") from error
            kept = {own: file.read(f"dense/{own}") for own in file.names("dense") if own in shapes}
            file.check_data()
        self._check_shapes(path, shapes, parts, kept)
        for other, held in self._held.items():
            if other != name and (fields := _differing(held.model, model)):
                raise DarexError(f"{path}: its config differs from that of '{other}' in {', '.join(fields)}.")
        self._held[name] = _Held(model, shapes, parts, kept)
        self._changed()

    def remove(self, name: str) -> None:
        """Removes a delta. Raises: ValueError for an unknown name."""
        self._found(name)
        del self._held[name]
        self._changed()

    @property
    def model(self) -> Model:
        """The model for `mixed`, whose head has the size of the largest, rounded up.

        A row's logits beyond its own labels are -inf.
        """
        models = [held.model for held in self._held.values()] or [self._base_model]
        config = models[0].config
        if not isinstance(config, EncoderConfig) or config.headless:
            return models[0]
        own = self._base_model.config
        with_heads = [m.config for m in models] + ([] if getattr(own, "headless", True) else [own])
        labels = max(int(c.num_labels) for c in with_heads if isinstance(c, EncoderConfig))
        widest = dataclasses.replace(config, num_labels=rounded_up(labels))
        return build_model(widest, **dict(models[0].options))[0]

    def model_of(self, name: str) -> Model:
        """The model for `activate(name)`."""
        return self._found(name).model

    def activate(self, name: str | None) -> dict[str, Any]:
        """The parameters of the base plus a delta; None is the base alone.

        Only parameters that the previous delta or this one changes are written, into the bank's own buffers:
        the parameters returned by the previous call become invalid, so copy those that you keep.

        Returns: a nested dict with the names and shapes of `model_of(name)`.
        Raises: ValueError for an unknown name.
        """
        held, number = (None, 0) if name is None else (self._found(name), 1 + self.names.index(name))
        stacks = {n: s for n, s in self._all_stacks().items() if n not in self._heads}
        base = {n: self._params[n] for n in stacks}
        if self._working is None:
            self._working, self._active = jax.tree.map(jnp.copy, base), 0
        self._working = _switched(self._working, base, stacks, self._active, number)
        self._active = number
        if held is None:
            return unflatten_names(self._base | {self._base_name(n): x for n, x in self._working.items()})
        heads = {n: jnp.asarray(self._whole(held, n)) for n in self._heads}
        kept = {n: self._kept(n, held.kept[n]) for n in self._working.keys() & held.kept.keys()}
        return unflatten_names({**self._params, **self._working, **kept, **heads})

    def mixed(self, names: Sequence[str | None]) -> dict[str, Any]:
        """Parameters for `model` on a batch whose row i uses the delta names[i]; None is the base.

        Every matrix product is the base's for all rows plus each row's own parts; low-rank, column and sign
        parts are not made dense. Compilation depends on the number of rows, not on their deltas; adding a
        delta recompiles only if its parts exceed the padded sizes.

        Returns: a nested dict whose leaves are arrays if no delta in the bank changes them, else `Mixed`.
        Raises: ValueError for an unknown name.
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

    # Checks of an added delta.

    def _model_of(self, file: DeltaFile, ignored: Collection[str]) -> tuple[Model, dict[str, Shape]]:
        config = read_model_config(file.config() or self._base_model.config.to_hf(), ignored)
        headless = isinstance(config, BertConfig) and config.headless  # their pooler may be missing
        stored = {*self._base, *file.names("dense")}
        no_pooler = headless and not any(OPTIONAL.search(name) for name in stored)
        return build_model(config, **({"pooler": False} if no_pooler else {}))

    def _base_name(self, name: str) -> str:
        """A parameter's name in the loaded base, which may be the body only, or have a head."""
        for prefix in (f"{self._base_model.config.model_type}.", "model."):
            for other in (name, name.removeprefix(prefix), prefix + name):
                if other in self._base:
                    return other
        return name

    def _check_base(self, file: DeltaFile) -> None:
        """Checks that the delta's base tensors are those of this base, as far as they are loaded."""
        for stated, entry in file.recipe.base.items():
            name = self._base_name(stated)
            if name not in self._base:
                continue
            leaf, key = self._base[name], (name, entry["dtype"])
            if key not in self._digests:
                array = np.ascontiguousarray(np.asarray(leaf).astype(DTYPES[entry["dtype"]]))
                self._digests[key] = blake3.blake3(as_bytes(array)).hexdigest()
            if list(leaf.shape) != entry["shape"] or not self._digests[key].startswith(entry["blake3"]):
                raise DarexError(f"was made from another base: '{stated}' differs.")

    def _check_names(self, file: DeltaFile, shapes: Mapping[str, Shape]) -> None:
        """Checks that the pruned parameters exist in the model and in the base."""
        for own, entry in file.recipe.parameters.items():
            name = self._base_name(own)
            if own not in shapes or name not in self._base:
                raise DarexError(f"was made from another base: this one has no '{own}'.")
            if name != self._base_name(file.base_name(own)):
                raise DarexError(f"'{own}' was made from '{file.base_name(own)}', not from '{name}'.")
            leaf = self._base[name]
            if list(leaf.shape) != entry["shape"]:
                raise DarexError(f"was made from another base: '{own}' is {list(leaf.shape)} in this one.")
            restored = DTYPES[entry["dtype"]] if "dtype" in entry else leaf.dtype
            if jnp.promote_types(leaf.dtype, restored) != leaf.dtype:
                raise DarexError(
                    f"'{own}' is restored in {restored}, the base was loaded in {leaf.dtype}, in which a "
                    f"small delta is lost: load the base in {restored}."
                )

    def _check_shapes(
        self,
        path: Any,
        shapes: Mapping[str, Shape],
        parts: Mapping[str, Parts],
        kept: Mapping[str, np.ndarray],
    ) -> None:
        for own, shape in shapes.items():
            leaf = self._base.get(self._base_name(own))
            brought = kept[own].shape if own in kept else parts[own].shape if own in parts else None
            if brought is not None and brought != shape:
                raise FileError(f"{path}: does not match its config: '{own}' has the shape {list(brought)}.")
            if leaf is not None and leaf.shape == shape:
                continue
            if own not in kept:
                raise FileError(f"{path}: does not match this base and its config: '{own}' is in neither.")
            if not (_is_classifier(own) or OPTIONAL.search(own)):
                there = "lacks" if leaf is None else f"has as {list(leaf.shape)}"
                raise _unfit(path, f"has '{own}' of shape {list(shape)}, which the base {there}")

    # Building parameters.

    def _found(self, name: Any) -> _Held:
        if name not in self._held:
            known = ", ".join(self._held) or "none"
            raise DarexError(f"there is no delta '{name}' in the bank, which has: {known}.")
        return self._held[name]

    def _changed(self) -> None:
        self._stacks, self._working = None, None

    def _all_stacks(self) -> dict[str, Stack]:
        if self._stacks is not None:
            return self._stacks
        model, held = self.model, list(self._held.values())
        shapes = build_model(model.config, **dict(model.options))[1]
        dtype = next(iter(self._base.values())).dtype
        self._params, self._heads, found = {}, set(), {}
        for name, shape in shapes.items():
            leaf = self._base.get(self._base_name(name))
            if leaf is None or leaf.shape != shape or any(h.shapes[name] != shape for h in held):
                self._heads.add(name)
                self._params[name] = self._everywhere(np.zeros(shape, dtype))
                of = [self._head(each, name, shape) for each in (None, *held)]
            else:
                self._params[name] = leaf
                of = [None, *(self._delta(each, name) for each in held)]
            if any(parts is not None for parts in of):
                found[name] = jax.tree.map(self._everywhere, stack_parts(of))
        self._stacks = found
        return found

    def _kept(self, name: str, own: np.ndarray) -> Array:
        """A parameter that a delta keeps whole, in its dtype or the base's wider one, where the base's is."""
        leaf = self._params[name]
        return jax.device_put(own.astype(jnp.promote_types(leaf.dtype, own.dtype)), leaf.sharding)

    def _delta(self, held: _Held, name: str) -> Parts | None:
        if name not in held.kept:
            return held.parts.get(name)
        own = held.kept[name].astype(np.float32)
        return _dense(own - np.asarray(self._params[name]).astype(np.float32))

    def _head(self, held: _Held | None, name: str, shape: Shape) -> Parts | None:
        """A whole head, padded to the largest; None is the base, which may have none."""
        if held is None and self._base_name(name) not in self._base:
            return None
        own = self._whole(held, name).astype(np.float32)
        filled = np.full(shape, -np.inf if len(shape) == 1 else 0.0, np.float32)
        filled[tuple(map(slice, own.shape))] = own
        return _dense(filled)

    def _whole(self, held: _Held | None, name: str) -> np.ndarray:
        """A parameter of a fine-tuned model, or of the base."""
        if held is not None and name in held.kept:
            return held.kept[name]
        leaf = self._base[self._base_name(name)]
        if held is not None and name in held.parts:
            leaf = apply_delta(leaf, held.parts[name].to_dense())
        return np.asarray(leaf)

    def _everywhere(self, array: Any) -> Array:
        """Replicates an array over the base's devices."""
        sharding = next(iter(self._base.values())).sharding
        if isinstance(sharding, NamedSharding):
            return jax.device_put(array, NamedSharding(sharding.mesh, PartitionSpec()))
        return jnp.asarray(array)


def _dense(array: np.ndarray) -> Parts:
    return Parts((Dense(Values(array), np.float32(1), array.shape),), array.shape)


def _is_classifier(name: str) -> bool:
    return bool(HEAD.search(name)) and not name.startswith("lm_head")


def _unfit(path: Any, what: str) -> FileError:
    return FileError(f"{path}: {what}, which a bank does not support; restore the model with darex apply.")


def _differing(one: Model, other: Model) -> list[str]:
    """The config fields in which two models of a bank differ, except labels."""
    if type(one.config) is not type(other.config):
        return ["model_type"]
    if one.options != other.options:
        return [name for name, _ in one.options] or [name for name, _ in other.options]
    pairs = [(f.name, getattr(one.config, f.name), getattr(other.config, f.name))
             for f in dataclasses.fields(one.config) if f.compare and f.name != "num_labels"]  # fmt: skip
    return [name for name, a, b in pairs if a != b]


@partial(jax.jit, donate_argnums=0, keep_unused=True)
def _switched(
    working: dict[str, Array], base: Mapping[str, Array], stacks: Mapping[str, Stack], before: Any, now: Any
) -> dict[str, Array]:
    """`working` with one delta replaced by another."""

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

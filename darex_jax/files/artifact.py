"""The delta artifact: one safetensors file that holds a pruned delta without a single index.

Tensors, by the prefix of their names:
  values/NAME   the survivors of parameter NAME, in index order: delta before rescaling, fine-tune's dtype
  dense/NAME    a whole parameter as the fine-tune has it (task head; changed parameters out of scope)
  rows/NAME     the rows NAME has beyond the base's (a larger vocabulary)
  file/NAME     a companion file (config.json, ...) that differs from the base's, as bytes
The metadata entry `darex` is a JSON object; `Recipe` says what is in it. The mask follows from the key,
so the values' places need not be stored: see `darex_jax.core.mask` for its definition.
"""

import json
import math
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import blake3
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.threefry import keep_threshold, numpy_leaf_key
from darex_jax.files.checkpoint import COMPANIONS
from darex_jax.files.safetensors import (
    DTYPE_NAMES,
    DTYPES,
    FileError,
    SafetensorsFile,
    as_bytes,
    element_count,
    write_tensors,
)

FORMAT = 1
METADATA = "darex"
KINDS = ("values", "dense", "rows", "file")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a delta was made: everything but the numbers, as JSON in the file's metadata.

    key: the two words of the Threefry key (`jax.random.key(seed)` is (0, seed)).
    parameters: name -> {"shape": of the mask, "q": divisor of the survivors}, for every pruned parameter.
    base: fingerprint; name -> {"dtype", "shape", "blake3"} of every tensor, by the base's own names.
    base_names: fine-tuned name -> the base's, where they differ.
    base_only: tensors of the base that the fine-tune does not have (another head).
    inexact: how many stored values are not the exact difference, being rounded to the fine-tune's dtype.
    data_blake3: digest of all tensors in file order: of each its `tensor_line`, then its data.
    """

    format: int
    method: str
    drop_rate: float
    key: tuple[int, int]
    scope: str
    parameters: dict[str, dict[str, Any]]
    base: dict[str, dict[str, Any]]
    base_names: dict[str, str]
    base_only: list[str]
    inexact: int
    nonfinite: int
    versions: dict[str, str]
    data_blake3: str

    def to_metadata(self) -> dict[str, str]:
        """The metadata of the file, closed by a digest of the recipe itself."""
        text = canonical_json(asdict(self))
        return {METADATA: text, "blake3": blake3.blake3(text.encode()).hexdigest()}


def tensor_line(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What goes into the digest of the data before a tensor's bytes, so that no name or shape can change."""
    return f"{name} {DTYPE_NAMES[dtype]} {list(shape)}\n".encode()


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


class DeltaFile(SafetensorsFile):
    """An open artifact: the tensors of its file and its `recipe`, both checked against each other.

    Raises: FileError if the file is damaged, is no artifact, is of a newer format, or contradicts itself.
    """

    def __init__(self, path: Any):
        super().__init__(path)
        try:
            self.recipe = self._read_recipe()
            self._check_tensors()
        except BaseException:
            self.close()
            raise

    def _read_recipe(self) -> Recipe:
        text = self.metadata.get(METADATA)
        if text is None:
            raise FileError(f"{self.path}: a safetensors file, but not a delta made by darex.")
        if not text.isascii() or blake3.blake3(text.encode()).hexdigest() != self.metadata.get("blake3"):
            raise FileError(f"{self.path}: damaged (the metadata does not have its digest).")
        try:
            table = json.loads(text)
            if table["format"] != FORMAT:
                raise FileError(
                    f"{self.path}: format {table['format']}, this version reads {FORMAT}; update darex_jax."
                )
            recipe = Recipe(**{f.name: table[f.name] for f in fields(Recipe)})
            _check_recipe(recipe)
        except FileError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise FileError(f"{self.path}: damaged metadata ({error}).") from error
        return recipe

    def _check_tensors(self) -> None:
        stored = {kind: self.names(kind) for kind in KINDS}
        unknown = self.tensors.keys() - {f"{kind}/{name}" for kind in KINDS for name in stored[kind]}
        if unknown:
            raise FileError(f"{self.path}: unknown tensor '{min(unknown)}'.")
        if set(stored["values"]) != self.recipe.parameters.keys():
            raise FileError(f"{self.path}: the stored values are not those the recipe names.")
        for name, entry in self.recipe.parameters.items():
            info, size = self.tensors[f"values/{name}"], element_count(tuple(entry["shape"]))
            base = self.recipe.base.get(self.base_name(name))
            rows = self.tensors.get(f"rows/{name}")
            if base is None or list(base["shape"]) != list(entry["shape"]):
                raise FileError(f"{self.path}: parameter '{name}' has no base of its shape.")
            # Ten standard deviations: no mask is that far off, and a file cannot claim a shape much larger
            # than its values, which whoever restores it would have to make room for.
            expected = size * self.threshold() / 2**32
            if len(info.shape) != 1 or abs(info.size - expected) > 40 + 10 * math.sqrt(expected):
                raise FileError(
                    f"{self.path}: parameter '{name}' stores values of shape {list(info.shape)}, "
                    f"a mask of {size} entries has about {round(expected)} survivors."
                )
            if info.dtype.kind not in "fV":  # bfloat16 is of kind V
                raise FileError(f"{self.path}: the values of '{name}' are {info.dtype}, not floating.")
            shape = entry["shape"]
            if rows is not None and not (len(rows.shape) == len(shape) == 2 and rows.shape[1] == shape[1]):
                raise FileError(f"{self.path}: the extra rows of '{name}' do not fit it.")
        named = {*self.recipe.parameters, *stored["dense"], *self.recipe.base_names}
        if len({self.base_name(name) for name in named}) < len(named):
            raise FileError(f"{self.path}: two parameters are made from one of the base's.")
        if both := self.recipe.parameters.keys() & set(stored["dense"]):
            raise FileError(f"{self.path}: '{min(both)}' is stored twice, pruned and whole.")
        if set(stored["rows"]) - self.recipe.parameters.keys():
            raise FileError(f"{self.path}: extra rows of a parameter that is not there.")
        for name in stored["file"]:
            if name not in COMPANIONS or self.tensors[f"file/{name}"].dtype != np.uint8:
                raise FileError(f"{self.path}: '{name}' is not a companion file of a model.")

    def names(self, kind: str) -> list[str]:
        """The parameters (or files) stored in this way."""
        prefix = kind + "/"
        return [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]

    def base_name(self, name: str) -> str:
        return self.recipe.base_names.get(name, name)

    def config(self) -> dict[str, Any]:
        """The fine-tune's config.json; {} where it is the base's."""
        if "config.json" not in self.names("file"):
            return {}
        try:
            content = json.loads(self.read("file/config.json").tobytes())
        except (ValueError, RecursionError) as error:
            raise FileError(f"{self.path}: damaged (its config.json: {error}).") from error
        if not isinstance(content, dict):
            raise FileError(f"{self.path}: damaged (its config.json is no object).")
        return content

    def check_data(self) -> None:
        """Reads all tensors. Raises: FileError if they do not have the digest that the recipe gives them."""
        digest = blake3.blake3()
        for name, info in self.tensors.items():
            digest.update(tensor_line(name, info.dtype, info.shape))
            for chunk in self.chunks(info):
                digest.update(as_bytes(chunk))
        if digest.hexdigest() != self.recipe.data_blake3:
            raise FileError(f"{self.path}: damaged (the tensors do not have their digest).")

    def threshold(self) -> int:
        return keep_threshold(self.recipe.drop_rate)


def _check_recipe(recipe: Recipe) -> None:
    """Every field's type and range. Whoever forges a recipe can also forge its digest.

    Raises: ValueError, or what Python raises where an entry is missing or of another type.
    """
    if type(recipe.drop_rate) not in (int, float):
        raise DarexError("drop_rate is not a number")
    keep_threshold(recipe.drop_rate)
    first, second = recipe.key
    if not (_is_natural(first, 2**32) and _is_natural(second, 2**32)):
        raise DarexError("the key is not two uint32")
    for name, entry in recipe.parameters.items():
        if not _is_shape(entry["shape"]):
            raise DarexError(f"shape of '{name}'")
        if not is_q(entry["q"]):
            raise DarexError(f"q of '{name}'")
    for name, entry in recipe.base.items():
        if not (entry["dtype"] in DTYPES and _is_shape(entry["shape"])):
            raise DarexError(f"shape of '{name}' in the base")
        if len(bytes.fromhex(entry["blake3"])) != 32:
            raise DarexError(f"fingerprint of '{name}'")
    texts = [recipe.method, recipe.scope, recipe.data_blake3, *recipe.base_only]
    for table in (recipe.base_names, recipe.versions):
        texts += [*table.keys(), *table.values()]
    if not (isinstance(recipe.base_only, list) and all(isinstance(text, str) for text in texts)):
        raise DarexError("a number or a list where a text belongs")
    if not (_is_natural(recipe.inexact, 2**63) and _is_natural(recipe.nonfinite, 2**63)):
        raise DarexError("a count that is none")


def _is_natural(value: Any, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def _is_shape(value: Any) -> bool:
    natural = isinstance(value, list) and len(value) <= 32 and all(_is_natural(n, 2**48) for n in value)
    return natural and math.prod(filter(None, value)) < 2**48


def is_q(value: Any) -> bool:
    """Whether survivors can be divided by it: a number that, like its reciprocal, is a normal float32."""
    number = np.asarray(value)
    return number.shape == () and number.dtype.kind in "iuf" and 2.0**-126 <= float(number) <= 2.0**126


def resolve_q(q: float | Mapping[str, float] | None, drop_rate: float, names: list[str]) -> dict[str, float]:
    """`{name: q}`; None is DARE's 1 - drop_rate. Raises: ValueError for a q that is missing or no divisor."""
    if q is None:
        q = 1.0 - drop_rate
    by_name = {name: q.get(name) if isinstance(q, Mapping) else q for name in names}
    for name, value in by_name.items():
        if value is None:
            raise DarexError(f"there is no q for '{name}'.")
        if not is_q(value):
            raise DarexError(f"q of '{name}' must be a positive number that float32 holds, got {value}.")
    return {name: float(value) for name, value in by_name.items() if value is not None}


def versions(*more: str) -> dict[str, str]:
    """Of Python, of what a mask or a value could depend on, and of `more` packages where installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("darex_jax", "jax", "jaxlib", "numpy", *more):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def save_delta(
    path: str | os.PathLike[str],
    key: Any,
    delta: Any,
    drop_rate: float,
    q: Any = None,
    *,
    base: Any,
) -> Recipe:
    """Prunes a delta and writes the artifact, whole or not at all; `darex apply` and `load_delta` read it.

    Args:
      key: scalar typed Threefry key.
      delta: tree of floating arrays, not yet pruned; values are stored in its leaves' dtypes.
      drop_rate, q: as in `prune`; q a number, or one per leaf as a tree or a dict by name.
      base: the tree the delta belongs to, fingerprinted; the names and shapes of `delta`, and maybe more.
    Raises: ValueError for arguments out of range or a delta that does not fit its base.
    """
    import jax

    from darex_jax.core.tree import check_key, flatten_names

    check_key(key)
    words = np.asarray(jax.random.key_data(key))
    threshold = keep_threshold(drop_rate)
    deltas = {name: np.asarray(leaf) for name, leaf in flatten_names(delta).items()}
    bases = {name: np.asarray(leaf) for name, leaf in flatten_names(base).items()}
    for name, leaf in deltas.items():
        if name not in bases or bases[name].shape != leaf.shape:
            raise DarexError(f"'{name}' of the delta has no base of its shape {list(leaf.shape)}.")
    by_name = flatten_names(q) if isinstance(q, Mapping) else q
    q_by_name = resolve_q(by_name, drop_rate, list(deltas))
    tensors = {}
    for name in sorted(deltas, key=lambda n: (-deltas[n].dtype.itemsize, n)):
        kept = survivor_indices(words, name, deltas[name].size, threshold)
        tensors[f"values/{name}"] = deltas[name].reshape(-1)[kept]
    digest = blake3.blake3()
    for name in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)):  # the order in the file
        digest.update(tensor_line(name, tensors[name].dtype, tensors[name].shape))
        digest.update(as_bytes(tensors[name]))
    recipe = Recipe(
        format=FORMAT,
        method="dare" if q is None else "darex-q",
        drop_rate=float(drop_rate),
        key=(int(words[0]), int(words[1])),
        scope="the delta's own leaves",
        parameters={name: {"shape": list(leaf.shape), "q": q_by_name[name]} for name, leaf in deltas.items()},
        base={
            name: {
                "dtype": DTYPE_NAMES[leaf.dtype],
                "shape": list(leaf.shape),
                "blake3": blake3.blake3(as_bytes(np.ascontiguousarray(leaf))).hexdigest(),
            }
            for name, leaf in bases.items()
        },
        base_names={},
        base_only=[],
        inexact=0,
        nonfinite=0,
        versions=versions(),
        data_blake3=digest.hexdigest(),
    )
    write_tensors(path, tensors, recipe.to_metadata())
    return recipe


def load_delta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The pruned, rescaled delta of an artifact: a nested dict of float32 arrays for `apply_delta`.

    Only the pruned parameters; what the artifact keeps whole (a task head, say) is `load_kept`'s.
    Raises: FileError for a damaged file, or one with extra vocabulary rows (`darex apply` restores those).
    """
    import jax.numpy as jnp

    from darex_jax.core.tree import unflatten_names

    named = {}
    with DeltaFile(path) as file:
        file.check_data()
        if file.names("rows"):
            raise FileError(f"{path}: has extra rows for {file.names('rows')}; restore it with darex apply.")
        for name, entry in file.recipe.parameters.items():
            dense = np.zeros(element_count(tuple(entry["shape"])), np.float32)
            kept = survivor_indices(np.array(file.recipe.key, np.uint32), name, dense.size, file.threshold())
            values = file.read(f"values/{name}").astype(np.float32)
            if len(values) != len(kept):
                raise FileError(f"{path}: '{name}' stores {len(values)} values for {len(kept)} survivors.")
            dense[kept] = values * (np.float32(1.0) / np.float32(entry["q"]))
            named[name] = jnp.asarray(dense.reshape(entry["shape"]))
    return unflatten_names(named)


def load_kept(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters an artifact keeps whole, as the fine-tune has them: a nested dict of NumPy arrays."""
    from darex_jax.core.tree import unflatten_names

    with DeltaFile(path) as file:
        file.check_data()
        return unflatten_names({name: file.read(f"dense/{name}") for name in file.names("dense")})


def survivor_indices(key_words: np.ndarray, name: str, size: int, threshold: int) -> np.ndarray:
    """The indices of a parameter's survivors in its flattened layout, ascending."""
    from darex_jax.core.mask import STREAM_CHUNKS, stream_mask
    from darex_jax.core.tree import name_words

    leaf_key = numpy_leaf_key(tuple(int(w) for w in key_words), name_words(name))
    chunk = STREAM_CHUNKS[0]
    pieces = [
        start + np.flatnonzero(stream_mask(leaf_key, start, min(chunk, size - start), threshold))
        for start in range(0, size, chunk)
    ]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

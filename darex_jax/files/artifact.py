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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import blake3
import numpy as np

from darex_jax.core.errors import DarexError, DarexWarning
from darex_jax.core.threefry import keep_threshold, numpy_leaf_key
from darex_jax.files.checkpoint import COMPANIONS
from darex_jax.files.safetensors import (
    CHUNK,
    DTYPE_NAMES,
    DTYPES,
    MAX_NAME,
    FileError,
    SafetensorsFile,
    as_bytes,
    element_count,
    write_tensors,
)

FORMAT = 1
METADATA = "darex"
KINDS = ("values", "dense", "rows", "file")
# What a file may claim that is read without its base. The file's own size counts too: of 10,000 entries one
# survivor of two bytes is as thin as an honest file gets.
ENTRIES_PER_BYTE = 2**13
MOST_DENSE_ENTRIES = 2**31  # 8 GiB in float32


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a delta was made: everything but the numbers, as JSON in the file's metadata.

    key: the two words of the Threefry key (`jax.random.key(seed)` is (0, seed)).
    parameters: name -> {"shape": of the mask, "q": divisor of the survivors, "dtype": of the restored
      parameter}, for every pruned one. Older files have no dtype: it is the base's.
    base: fingerprint; name -> {"dtype", "shape", "blake3"} of every tensor, by the base's own names.
    base_names: fine-tuned name -> the base's, where they differ.
    base_only: tensors of the base that the fine-tune does not have (another head).
    inexact: how many stored values are not the exact difference, being rounded to the fine-tune's dtype.
    data_blake3: digest of all tensors in file order: of each its `tensor_line`, then its data.
    base_files: BLAKE3 of the base's companion files that the restored model takes over, by name. None where
      nothing is known of them: in older files, and where the base was a tree.
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
    base_files: dict[str, str] | None = None

    def digest(self) -> str:
        """BLAKE3 of all that a restored model follows from: two artifacts that have one restore one model.

        What only tells of the making (versions, counts, the method's name) is no part of it.
        """
        aside = ("method", "inexact", "nonfinite", "versions")
        meaning = {k: v for k, v in asdict(self).items() if k not in aside and v is not None}
        return blake3.blake3(canonical_json(meaning).encode()).hexdigest()

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
        self._handed_out: dict[str, str] = {}  # tensor -> BLAKE3 of the bytes that `stream` gave
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
        except (ValueError, RecursionError) as error:
            raise FileError(f"{self.path}: damaged metadata (it is no JSON).") from error
        version = table.get("format") if isinstance(table, dict) else None
        if type(version) is int and version > FORMAT:
            raise FileError(
                f"{self.path}: format {version!s:.20}, this version reads {FORMAT}; update darex_jax."
            )
        try:
            return _recipe_from(table)
        except DarexError as error:
            raise FileError(f"{self.path}: damaged metadata ({error}).") from error

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
            dtype = entry.get("dtype", base["dtype"])
            if dtype != base["dtype"] and DTYPES[dtype].kind not in "fV":  # bfloat16 is of kind V
                raise FileError(
                    f"{self.path}: parameter '{name}' would be restored in {dtype}, not floating."
                )
            # Ten standard deviations: no mask is that far off, and a file cannot claim a shape much larger
            # than its values, which whoever restores it would have to make room for.
            expected = size * self.threshold() / 2**32
            if len(info.shape) != 1 or abs(info.size - expected) > 40 + 10 * math.sqrt(expected):
                raise FileError(
                    f"{self.path}: parameter '{name}' stores values of shape {list(info.shape)}, "
                    f"a mask of {size} entries has about {round(expected)} survivors."
                )
            if info.dtype.kind not in "fV":
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
            raise FileError(f"{self.path}: damaged (its config.json is no JSON).") from error
        if not isinstance(content, dict):
            raise FileError(f"{self.path}: damaged (its config.json is no object).")
        return content

    def read(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        return self.stream(name)(info.size).reshape(info.shape)

    def stream(self, name: str) -> Callable[[int], np.ndarray]:
        """A tensor once through: each call gives the next so many elements, 1-D and fresh.

        The bytes are digested as they are handed out; `check_data` holds them against the recipe.
        """
        info, digest, start = self.tensors[name], blake3.blake3(), 0

        def take(count: int) -> np.ndarray:
            nonlocal start
            values = np.empty(count, info.dtype)
            self.read_into(info, start, values)
            digest.update(as_bytes(values))
            start += count
            if start == info.size:
                now = digest.hexdigest()
                if self._handed_out.setdefault(name, now) != now:
                    raise FileError(f"{self.path}: changed while it was read.")
            return values

        return take

    def survivors(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A parameter's survivors, a stretch of `safetensors.CHUNK` entries of its mask after the other.

        Yields: (kept, values): places in the stretch, ascending, and float32 values divided by q.
        Raises: FileError if there are more values, or fewer, than survivors.
        """
        from darex_jax.core.mask import stream_mask
        from darex_jax.core.tree import name_words

        entry, stored = self.recipe.parameters[name], self.tensors[f"values/{name}"].size
        leaf_key = numpy_leaf_key(self.recipe.key, name_words(name))
        scale = np.float32(1.0) / np.float32(entry["q"])
        size, take, used = element_count(tuple(entry["shape"])), self.stream(f"values/{name}"), 0
        for start in range(0, size, CHUNK):
            kept = np.flatnonzero(stream_mask(leaf_key, start, min(CHUNK, size - start), self.threshold()))
            used += len(kept)
            if used > stored:
                raise FileError(f"{self.path}: '{name}' has fewer values than its mask has survivors.")
            with np.errstate(invalid="ignore", over="ignore"):
                yield kept, take(len(kept)).astype(np.float32) * scale
        if used != stored:
            raise FileError(f"{self.path}: '{name}' has more values than its mask has survivors.")

    def check_data(self) -> None:
        """Reads all tensors. To be called when everything is read that will be used.

        Raises: FileError if they do not have the digest that the recipe gives them, or if what was read
          before was something else: the file changed in between.
        """
        digest, changed = blake3.blake3(), False
        for name, info in self.tensors.items():
            digest.update(tensor_line(name, info.dtype, info.shape))
            own = blake3.blake3() if name in self._handed_out else None
            for chunk in self.chunks(info):
                digest.update(as_bytes(chunk))
                if own is not None:
                    own.update(as_bytes(chunk))
            changed |= own is not None and own.hexdigest() != self._handed_out[name]
        if digest.hexdigest() != self.recipe.data_blake3:
            raise FileError(f"{self.path}: damaged (the tensors do not have their digest).")
        if changed:
            raise FileError(f"{self.path}: changed while it was read.")

    def check_entries(self, max_entries: int | None, default: int) -> None:
        """To be called before work is done for all entries of the masks, and no base confirms the shapes.

        Args: max_entries: allowed; None is `default`, and no more than the file's size makes likely.
        Raises: FileError if the recipe claims more.
        """
        claimed = sum(element_count(tuple(entry["shape"])) for entry in self.recipe.parameters.values())
        size = os.fstat(self._file).st_size
        most = min(default, ENTRIES_PER_BYTE * size) if max_entries is None else max_entries
        if claimed > most:
            raise FileError(
                f"{self.path}: claims {claimed:,} entries in a file of {size:,} bytes; without the base only "
                f"{most:,} are believed. max_entries={claimed} (--max-entries) allows them."
            )

    def threshold(self) -> int:
        return keep_threshold(self.recipe.drop_rate)


def _recipe_from(table: Any) -> Recipe:
    """A recipe out of JSON, the type and range of everything looked at: who forges it forges its digest, too.

    Raises: DarexError saying what is wrong.
    """
    checks: dict[str, Callable[[Any], bool]] = {
        "format": lambda version: type(version) is int and version == FORMAT,
        "method": _is_text,
        "drop_rate": lambda rate: type(rate) in (int, float) and 0 <= rate < 1,
        "key": lambda key: (
            isinstance(key, list) and len(key) == 2 and all(_is_natural(w, 2**32) for w in key)
        ),
        "scope": _is_text,
        "parameters": _is_table,
        "base": _is_table,
        "base_names": _is_table_of(_is_name),
        "base_only": lambda names: isinstance(names, list) and all(map(_is_name, names)),
        "inexact": lambda count: _is_natural(count, 2**63),
        "nonfinite": lambda count: _is_natural(count, 2**63),
        "versions": _is_table_of(_is_text),
        "data_blake3": _is_digest,
        "base_files": lambda files: files is None or _is_table_of(_is_digest)(files),
    }
    if not isinstance(table, dict):
        raise DarexError("it is no table")
    for name, valid in checks.items():
        if name not in table and name != "base_files":
            raise DarexError(f"it has no {name}")
        if not valid(table.get(name)):
            raise DarexError(f"{name} is not what it should be")
    for name, entry in table["parameters"].items():
        if not (_is_name(name) and isinstance(entry, dict)):
            raise DarexError(f"a parameter {name!r:.60}")
        if not _is_shape(entry.get("shape")):
            raise DarexError(f"shape of '{name}'")
        if not (type(entry.get("q")) in (int, float) and is_q(entry["q"])):
            raise DarexError(f"q of '{name}'")
        if "dtype" in entry and not _is_dtype(entry["dtype"]):
            raise DarexError(f"dtype of '{name}'")
    for name, entry in table["base"].items():
        if not (_is_name(name) and isinstance(entry, dict)):
            raise DarexError(f"a tensor {name!r:.60} in the base")
        if not (_is_dtype(entry.get("dtype")) and _is_shape(entry.get("shape"))):
            raise DarexError(f"dtype or shape of '{name}' in the base")
        if not _is_digest(entry.get("blake3")):
            raise DarexError(f"fingerprint of '{name}'")
    recipe: dict[str, Any] = {f.name: table.get(f.name) for f in fields(Recipe)}
    recipe["key"] = tuple(table["key"])
    for part, known in (("parameters", ("shape", "q", "dtype")), ("base", ("dtype", "shape", "blake3"))):
        # What else stands there was not looked at, and is not carried along.
        recipe[part] = {n: {k: entry[k] for k in known if k in entry} for n, entry in table[part].items()}
    return Recipe(**recipe)


def _is_natural(value: Any, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in DTYPES


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_table_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda table: (
        isinstance(table, dict) and all(map(_is_text, table)) and all(map(valid, table.values()))
    )


def _is_shape(value: Any) -> bool:
    natural = isinstance(value, list) and len(value) <= 32 and all(_is_natural(n, 2**48) for n in value)
    return natural and math.prod(filter(None, value)) < 2**48


def is_q(value: Any) -> bool:
    """Whether survivors can be divided by it: a number that, like its reciprocal, is a normal float32."""
    if isinstance(value, list | tuple):
        return False
    number = np.asarray(value)
    return number.shape == () and number.dtype.kind in "iuf" and 2.0**-126 <= float(number) <= 2.0**126


def resolve_q(
    q: float | Mapping[str, Any] | None, drop_rate: float, names: list[str], unused: Iterable[str] = ()
) -> dict[str, float]:
    """`{name: q}` for every name; None is DARE's 1 - drop_rate.

    Args: unused: names that a q may have, too: of parameters that are not pruned.
    Raises: ValueError for a q that is missing, fits no name, or is no divisor.
    """
    if q is None:
        q = 1.0 - drop_rate
    by_name = q if isinstance(q, Mapping) else dict.fromkeys(names, q)
    missing = [name for name in names if name not in by_name]
    unknown = sorted(by_name.keys() - set(names) - set(unused))
    if missing or unknown:
        faults = [f"there is no q for '{name}'" for name in missing[:4]]
        faults += [f"there is no parameter for the q of {name!r:.80}" for name in unknown[:4]]
        raise DarexError("; ".join(faults) + ".")
    for name in names:
        if not is_q(by_name[name]):
            raise DarexError(
                f"q of '{name}' must be a positive number that float32 holds, got {by_name[name]}."
            )
    return {name: float(by_name[name]) for name in names}


def warn_of_little(
    drop_rate: float, q: Mapping[str, float], *, same: bool, survivors: int, stacklevel: int = 3
) -> None:
    """Warns where an artifact is made as asked and hardly as meant.

    Args:
      same: the two models are equal in all that is pruned.
      survivors: how many there are.
    """
    texts = []
    if same:
        texts.append("every delta is zero: in what is pruned the fine-tuned model is the base.")
    if keep_threshold(drop_rate) == 0:
        texts.append(
            f"a drop rate of {drop_rate} keeps nothing: 1 - drop rate is less than masks resolve, 2**-33."
        )
    elif not survivors:
        texts.append(f"nothing survived the drop rate of {drop_rate}; the delta holds no values.")
    small = [name for name in q if q[name] < (1.0 - drop_rate) * (1 - 1e-6)]
    if small:
        texts.append(
            f"q = {q[small[0]]:g} of '{small[0]}' is below 1 - drop rate = {1.0 - drop_rate:g}: survivors "
            "become larger than DARE's rescaling makes them."
        )
    for text in texts:
        warnings.warn(text, DarexWarning, stacklevel=stacklevel)


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
        The restored parameters have its dtypes, as after `apply_delta`.
    Raises: ValueError for arguments out of range, or a delta or a q that do not fit.
    """
    import jax

    from darex_jax.core.tree import check_key, flatten_names

    check_key(key)
    words = np.asarray(jax.random.key_data(key))
    threshold = keep_threshold(drop_rate)
    deltas = {name: np.asarray(leaf) for name, leaf in flatten_names(delta).items()}
    bases = {name: np.asarray(leaf) for name, leaf in flatten_names(base).items()}
    for name, leaf in bases.items():
        if not _is_name(f"values/{name}"):
            raise DarexError(f"{name[:80]!a} is not a name that a parameter can have in a file.")
        if leaf.dtype not in DTYPE_NAMES:
            raise DarexError(f"'{name}' of the base is {leaf.dtype}, which an artifact cannot hold.")
    for name, leaf in deltas.items():
        if name not in bases or bases[name].shape != leaf.shape:
            raise DarexError(f"'{name}' of the delta has no base of its shape {list(leaf.shape)}.")
        if leaf.dtype not in DTYPE_NAMES or leaf.dtype.kind not in "fV":  # bfloat16 is of kind V
            raise DarexError(
                f"'{name}' of the delta holds {leaf.dtype}: only floating parameters are pruned."
            )
    named_q = None if q is None else flatten_names(q)
    by_name = named_q[""] if named_q is not None and list(named_q) == [""] else named_q  # a single number
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
        parameters={
            name: {"shape": list(leaf.shape), "q": q_by_name[name], "dtype": DTYPE_NAMES[bases[name].dtype]}
            for name, leaf in deltas.items()
        },
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
        nonfinite=sum(_count_nonfinite(tree[name]) for tree in (deltas, bases) for name in deltas),
        versions=versions(),
        data_blake3=digest.hexdigest(),
    )
    write_tensors(path, tensors, recipe.to_metadata())
    same = not any(np.any(leaf) for leaf in deltas.values())
    warn_of_little(drop_rate, q_by_name, same=same, survivors=sum(x.size for x in tensors.values()))
    return recipe


def _count_nonfinite(array: np.ndarray) -> int:
    return int(np.count_nonzero(~np.isfinite(array)))


def load_delta(path: str | os.PathLike[str], *, max_entries: int | None = None) -> dict[str, Any]:
    """The pruned, rescaled delta of an artifact: a nested dict of float32 arrays for `apply_delta`.

    Only the pruned parameters; what the artifact keeps whole (a task head, say) is `load_kept`'s. Besides the
    result one parameter's worth is held.

    Args: max_entries: how many the result may have. None: 2**31, and no more than 8,192 for each byte of the
      file, so that a small file cannot fill the memory.
    Raises: FileError for a damaged file, one that claims more entries, or one with extra vocabulary rows
      (`darex apply` restores those).
    """
    import jax.numpy as jnp

    from darex_jax.core.tree import unflatten_names

    named = {}
    with DeltaFile(path) as file:
        if file.names("rows"):
            raise FileError(
                f"{path}: has extra rows for {', '.join(file.names('rows'))}; restore it with darex apply."
            )
        file.check_entries(max_entries, MOST_DENSE_ENTRIES)
        for name, entry in file.recipe.parameters.items():
            dense = np.zeros(element_count(tuple(entry["shape"])), np.float32)
            for i, (kept, values) in enumerate(file.survivors(name)):
                dense[i * CHUNK : (i + 1) * CHUNK][kept] = values
            named[name] = jnp.asarray(dense.reshape(entry["shape"]))
        file.check_data()
    return unflatten_names(named)


def load_kept(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters an artifact keeps whole, as the fine-tune has them: a nested dict of NumPy arrays."""
    from darex_jax.core.tree import unflatten_names

    with DeltaFile(path) as file:
        named = {name: file.read(f"dense/{name}") for name in file.names("dense")}
        file.check_data()
        return unflatten_names(named)


def survivor_indices(key_words: np.ndarray, name: str, size: int, threshold: int) -> np.ndarray:
    """The indices of a parameter's survivors in its flattened layout, ascending."""
    from darex_jax.core.mask import stream_mask
    from darex_jax.core.tree import name_words

    leaf_key = numpy_leaf_key(tuple(int(w) for w in key_words), name_words(name))
    pieces = [
        start + np.flatnonzero(stream_mask(leaf_key, start, min(CHUNK, size - start), threshold))
        for start in range(0, size, CHUNK)
    ]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

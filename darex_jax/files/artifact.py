"""The delta artifact: a safetensors file with a pruned delta, and its reader.

Tensors of both formats, by name prefix:
  dense/NAME    a whole parameter of the fine-tuned model (task head; changed parameters out of scope)
  rows/NAME     rows of NAME beyond the base's (a larger vocabulary)
  file/NAME     a companion file (config.json, ...) that differs from the base's, as bytes
Format 1, for unquantised DARE and DAREx-q, has a `Recipe` as JSON in the metadata entry `darex`, and
  values/NAME   the survivors of parameter NAME, in index order: delta before rescaling, fine-tune's dtype
The mask is recomputed from the key, so no indices are stored: see `darex_jax.core.mask` for its definition.
Format 2, a sum of parts for each parameter, has
  parts         blocks of coded parts, see `darex_jax.files.blocks`
  recipe        the `Recipe`: zstandard-compressed JSON
"""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any

import blake3
import numpy as np

from darex_jax.core.errors import DarexError, FileError
from darex_jax.core.mask import survivor_chunks
from darex_jax.core.threefry import keep_threshold, numpy_leaf_key
from darex_jax.core.tree import name_words, working_dtype
from darex_jax.files.blocks import unpack
from darex_jax.files.checkpoint import COMPANIONS
from darex_jax.files.coding import decompress
from darex_jax.files.recipe import (
    FORMATS,
    METADATA,
    Recipe,
    recipe_from,
    tensor_line,
)
from darex_jax.files.safetensors import (
    CHUNK,
    DTYPES,
    MAX_HEADER,
    SafetensorsFile,
    as_bytes,
    element_count,
)
from darex_jax.parts.random import Random
from darex_jax.parts.total import Parts
from darex_jax.parts.values import Values

KINDS = ("values", "dense", "rows", "file")
PARTS, RECIPE = "parts", "recipe"  # the tensors of format 2
BLOCKS_HELD = 4  # decoded blocks that are cached
# Limits on the claims of a file that is read without its base. The file's size is a limit as well: genuine
# files have at least about one two-byte survivor in 10,000 entries.
ENTRIES_PER_BYTE = 2**13
MOST_DENSE_ENTRIES = 2**31  # 8 GiB in float32
MOST_VERIFIED_ENTRIES = 2**36  # some minutes' work


class DeltaFile(SafetensorsFile):
    """An open artifact: its tensors and its `recipe`, checked against each other.

    Raises: FileError if the file is damaged, is not an artifact, has a newer format, or is inconsistent.
    """

    def __init__(self, path: Any):
        super().__init__(path)
        self._handed_out: dict[str, str] = {}  # tensor -> BLAKE3 of the bytes that `stream` returned
        self._blocks: OrderedDict[int, dict[str, Parts]] = OrderedDict()  # most recently decoded
        self._lock = Lock()
        self.base_digests: dict[str, str] = {}  # of the base's tensors read so far
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
        version = self._json(text).get("format")
        if type(version) is int and version > max(FORMATS):
            raise FileError(
                f"{self.path}: format {version!s:.20}, this version reads up to {max(FORMATS)}; "
                "update darex_jax."
            )
        if version == 2:
            text = self._compressed_recipe()
        if not text.isascii() or blake3.blake3(text.encode()).hexdigest() != self.metadata.get("blake3"):
            raise FileError(f"{self.path}: damaged (the metadata does not match its digest).")
        table = self._json(text)
        if table.get("format") != version:
            raise FileError(f"{self.path}: damaged metadata (two formats).")
        try:
            return recipe_from(table)
        except DarexError as error:
            raise FileError(f"{self.path}: damaged metadata ({error}).") from error

    def _json(self, text: str) -> dict[str, Any]:
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileError(f"{self.path}: damaged metadata (it is not JSON).") from error
        return table if isinstance(table, dict) else {}

    def _compressed_recipe(self) -> str:
        info = self.tensors.get(RECIPE)
        if info is None or info.dtype != np.uint8:
            raise FileError(f"{self.path}: damaged metadata (the recipe is missing).")
        try:
            return decompress(self.read(RECIPE).tobytes(), MAX_HEADER).decode()
        except (FileError, UnicodeDecodeError) as error:
            raise FileError(f"{self.path}: damaged metadata (it cannot be decompressed).") from error

    def _check_tensors(self) -> None:
        stored = {kind: self.names(kind) for kind in KINDS}
        own = {PARTS, RECIPE} if self.recipe.format == 2 else set()
        unknown = self.tensors.keys() - own - {f"{kind}/{name}" for kind in KINDS for name in stored[kind]}
        if unknown or own - self.tensors.keys():
            name = min(unknown or own - self.tensors.keys())
            raise FileError(f"{self.path}: {'unknown' if unknown else 'missing'} tensor '{name}'.")
        if set(stored["values"]) != (set() if own else self.recipe.parameters.keys()):
            raise FileError(f"{self.path}: the stored values are not those listed in the recipe.")
        if own:
            claimed, info = sum(block["bytes"] for block in self.recipe.blocks or ()), self.tensors[PARTS]
            if info.dtype != np.uint8 or len(info.shape) != 1 or info.size != claimed:
                raise FileError(f"{self.path}: the parts do not have the length stated in the recipe.")
        for name, entry in self.recipe.parameters.items():
            size = element_count(tuple(entry["shape"]))
            base = self.recipe.base.get(self.base_name(name))
            rows = self.tensors.get(f"rows/{name}")
            if base is None or list(base["shape"]) != list(entry["shape"]):
                raise FileError(f"{self.path}: parameter '{name}' has no base parameter of the same shape.")
            dtype = entry.get("dtype", base["dtype"])
            if dtype != base["dtype"] and DTYPES[dtype].kind not in "fV":  # bfloat16 is of kind V
                raise FileError(
                    f"{self.path}: parameter '{name}' would be restored in {dtype}, not floating."
                )
            shape = entry["shape"]
            if rows is not None and not (len(rows.shape) == len(shape) == 2 and rows.shape[1] == shape[1]):
                raise FileError(f"{self.path}: the extra rows of '{name}' do not match its shape.")
            if self.recipe.format == 2:
                continue
            # Ten standard deviations, more than any mask deviates: a file cannot claim a shape much larger
            # than its values, for which a reader would have to allocate memory.
            info, expected = self.tensors[f"values/{name}"], size * self.threshold() / 2**32
            if len(info.shape) != 1 or abs(info.size - expected) > 40 + 10 * math.sqrt(expected):
                raise FileError(
                    f"{self.path}: parameter '{name}' stores values of shape {list(info.shape)}, "
                    f"a mask of {size} entries has about {round(expected)} survivors."
                )
            if info.dtype.kind not in "fV":
                raise FileError(f"{self.path}: the values of '{name}' are {info.dtype}, not floating.")
        named = {*self.recipe.parameters, *stored["dense"], *self.recipe.base_names}
        if len({self.base_name(name) for name in named}) < len(named):
            raise FileError(f"{self.path}: two parameters have the same base parameter.")
        if both := self.recipe.parameters.keys() & set(stored["dense"]):
            raise FileError(f"{self.path}: '{min(both)}' is stored twice, pruned and whole.")
        if set(stored["rows"]) - self.recipe.parameters.keys():
            raise FileError(f"{self.path}: extra rows of a parameter that it does not have.")
        for name in stored["file"]:
            if name not in COMPANIONS or self.tensors[f"file/{name}"].dtype != np.uint8:
                raise FileError(f"{self.path}: '{name}' is not a companion file of a model.")

    def names(self, kind: str) -> list[str]:
        """The names of the parameters (or files) of this kind."""
        prefix = kind + "/"
        return [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]

    def base_name(self, name: str) -> str:
        return self.recipe.base_names.get(name, name)

    def config(self) -> dict[str, Any]:
        """The fine-tuned model's config.json; {} if it is the base's."""
        if "config.json" not in self.names("file"):
            return {}
        try:
            content = json.loads(self.read("file/config.json").tobytes())
        except (ValueError, RecursionError) as error:
            raise FileError(f"{self.path}: damaged (its config.json is not JSON).") from error
        if not isinstance(content, dict):
            raise FileError(f"{self.path}: damaged (its config.json is not an object).")
        return content

    def read(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        return self.stream(name)(info.size).reshape(info.shape)

    def stream(self, name: str) -> Callable[[int], np.ndarray]:
        """Reads a tensor sequentially: each call returns a new 1-D array of the next `count` elements.

        The bytes are hashed as they are read; `check_data` compares the digests with the recipe.
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

    def chunks_of(self, name: str) -> Iterator[tuple[np.ndarray | slice, np.ndarray]]:
        """A pruned parameter's delta in chunks of `safetensors.CHUNK` entries.

        Yields: the indices of entries of the chunk that may be nonzero, and their values, `delta_dtype`.
        Raises: FileError if the stored data do not match the parameter, e.g. the mask's number of survivors.
        """
        if self.recipe.format == 1:
            yield from self._survivors(name)
            return
        try:
            with np.errstate(invalid="ignore", over="ignore"):
                yield from self.parts(name).chunks(CHUNK)
        except FileError:
            raise
        except DarexError as error:
            raise FileError(f"{self.path}: '{name}': {error}.") from error

    def dense(self, name: str) -> np.ndarray:
        """A pruned parameter's whole delta, `delta_dtype`. Raises: as `chunks_of`."""
        shape = tuple(self.recipe.parameters[name]["shape"])
        flat = np.zeros(element_count(shape), self.delta_dtype(name))
        for i, (kept, values) in enumerate(self.chunks_of(name)):
            flat[i * CHUNK : (i + 1) * CHUNK][kept] = values
        return flat.reshape(shape)

    def delta_dtype(self, name: str) -> Any:
        """The dtype of a pruned parameter's delta: float64 if format 1 stores float64, else float32."""
        return working_dtype(self.tensors[f"values/{name}"].dtype) if self.recipe.format == 1 else np.float32

    def parts(self, name: str) -> Parts:
        """A pruned parameter's parts, on the host; their arithmetic is float32.

        Raises: FileError for a damaged block.
        """
        if self.recipe.format == 1:
            entry, values = self.recipe.parameters[name], self.read(f"values/{name}")
            key = numpy_leaf_key(self.recipe.key, name_words(name))
            q, shape = np.asarray(np.float32(entry["q"])), tuple(entry["shape"])
            assert self.recipe.drop_rate is not None
            return Parts((Random(Values(values), key, q, self.recipe.drop_rate, shape),), shape)
        with self._lock:
            for number, block in enumerate(self.recipe.blocks or ()):
                if name in block["parameters"]:
                    if number not in self._blocks:
                        self._blocks[number] = self._unpacked(number)
                    self._blocks.move_to_end(number)
                    while len(self._blocks) > BLOCKS_HELD:
                        self._blocks.popitem(last=False)
                    return self._blocks[number][name]
        raise KeyError(name)

    def _unpacked(self, number: int) -> dict[str, Parts]:
        """Decodes a block, after checking the digest of its bytes."""
        blocks = self.recipe.blocks or []
        block, start = blocks[number], sum(before["bytes"] for before in blocks[:number])
        data = np.empty(block["bytes"], np.uint8)
        self.read_into(self.tensors[PARTS], start, data)
        if blake3.blake3(as_bytes(data)).hexdigest() != block["blake3"]:
            raise FileError(f"{self.path}: damaged (block {number} of its parts).")
        shapes = {name: tuple(entry["shape"]) for name, entry in self.recipe.parameters.items()}
        try:
            return unpack(block, data.tobytes(), shapes, self.recipe.key)
        except DarexError as error:
            raise FileError(f"{self.path}: damaged block {number} of its parts ({error!s:.200}).") from error
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FileError(
                f"{self.path}: damaged block {number} of its parts (it is inconsistent)."
            ) from error

    def _survivors(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`chunks_of` for format 1, holding one chunk at a time."""
        entry, stored = self.recipe.parameters[name], self.tensors[f"values/{name}"].size
        leaf_key = numpy_leaf_key(self.recipe.key, name_words(name))
        dtype = self.delta_dtype(name)
        scale = dtype(1.0) / dtype(entry["q"])
        size, take, used = element_count(tuple(entry["shape"])), self.stream(f"values/{name}"), 0
        for _, kept in survivor_chunks(leaf_key, size, self.threshold(), CHUNK):
            used += len(kept)
            if used > stored:
                raise FileError(f"{self.path}: '{name}' has fewer values than its mask has survivors.")
            with np.errstate(invalid="ignore", over="ignore"):
                yield kept, take(len(kept)).astype(dtype) * scale
        if used != stored:
            raise FileError(f"{self.path}: '{name}' has more values than its mask has survivors.")

    def check_data(self) -> None:
        """Verifies the digest of all tensors. Call it after everything that will be used has been read.

        Raises: FileError if the digest is not the recipe's, or if what was read before was different: the
          file changed in between.
        """
        digest, changed = blake3.blake3(), False
        for name, info in self.tensors.items():
            if name == RECIPE and self.recipe.format == 2:  # has its own digest, and contains this one
                continue
            digest.update(tensor_line(name, info.dtype, info.shape))
            own = blake3.blake3() if name in self._handed_out else None
            for chunk in self.chunks(info):
                digest.update(as_bytes(chunk))
                if own is not None:
                    own.update(as_bytes(chunk))
            changed |= own is not None and own.hexdigest() != self._handed_out[name]
        if digest.hexdigest() != self.recipe.data_blake3:
            raise FileError(f"{self.path}: damaged (the tensors do not match their digest).")
        if changed:
            raise FileError(f"{self.path}: changed while it was read.")

    @property
    def entries(self) -> int:
        """Of all pruned parameters, as the recipe claims."""
        return sum(element_count(tuple(entry["shape"])) for entry in self.recipe.parameters.values())

    def check_entries(self, max_entries: int | None, default: int, remedy: str | None = None) -> None:
        """Limits the claimed entries before work on all of them, when no base confirms the shapes.

        Args: max_entries: the limit; None is `default`, or less in proportion to the file's size.
          remedy: what an error says to do instead of raising that limit.
        Raises: FileError if the recipe claims more.
        """
        claimed = self.entries
        size = os.fstat(self._file).st_size
        most = min(default, ENTRIES_PER_BYTE * size) if max_entries is None else max_entries
        if claimed > most:
            raise FileError(
                f"{self.path}: claims {claimed:,} entries in a file of {size:,} bytes; without the base "
                f"at most {most:,} are accepted. "
                f"{remedy or f'max_entries={claimed} (--max-entries) allows them'}."
            )

    def threshold(self) -> int:
        """The threshold of the masks of format 1."""
        assert self.recipe.drop_rate is not None
        return keep_threshold(self.recipe.drop_rate)


def load_delta(
    path: str | os.PathLike[str], *, parts: bool = False, max_entries: int | None = None
) -> dict[str, Any]:
    """The pruned, rescaled delta of an artifact: a nested dict of float32 arrays for `apply_delta`.

    With JAX's x64 enabled, float64 values give a float64 delta.

    Only the pruned parameters are returned; for those that the artifact keeps whole (a task head) see
    `load_kept`. Besides the result, memory for one parameter is needed.

    Args:
      parts: return every parameter as a compact `Parts`.
      max_entries: most entries of the result. None: 2**31 (with parts 2**36), and at most 8,192 for each byte
        of the file, so that a small file cannot fill the memory.
    Raises: FileError for a damaged file, one that claims more entries, or one with extra vocabulary rows
      (`darex apply` restores those).
    """
    import jax
    import jax.numpy as jnp

    from darex_jax.core.tree import unflatten_names

    named: dict[str, Any] = {}
    with DeltaFile(path) as file:
        if file.names("rows"):
            raise FileError(
                f"{path}: has extra rows for {', '.join(file.names('rows'))}; restore it with darex apply."
            )
        file.check_entries(max_entries, MOST_VERIFIED_ENTRIES if parts else MOST_DENSE_ENTRIES)
        for name in file.recipe.parameters:
            whole = None if parts else file.dense(name)
            named[name] = jax.tree.map(
                jnp.asarray, _checked(path, file.parts(name)) if whole is None else whole
            )
        file.check_data()
    return unflatten_names(named)


def _checked(path: str | os.PathLike[str], parts: Parts) -> Parts:
    """The same parts. Raises: FileError for a random one with fewer or more values than its mask keeps."""
    for part in parts.parts:
        if isinstance(part, Random):
            try:
                part.check_count()
            except DarexError as error:
                raise FileError(f"{path}: damaged: {error}.") from error
    return parts


def load_kept(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters that an artifact keeps whole: a nested dict of NumPy arrays."""
    from darex_jax.core.tree import unflatten_names

    with DeltaFile(path) as file:
        named = {name: file.read(f"dense/{name}") for name in file.names("dense")}
        file.check_data()
        return unflatten_names(named)

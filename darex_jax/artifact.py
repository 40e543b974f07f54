"""The delta artifact: one safetensors file that holds a pruned delta without a single index.

Tensors, by the prefix of their names:
  values/NAME   the survivors of parameter NAME, in index order: delta before rescaling, fine-tune's dtype
  dense/NAME    a whole parameter as the fine-tune has it (task head; changed parameters out of scope)
  rows/NAME     the rows NAME has beyond the base's (a larger vocabulary)
  file/NAME     a companion file (config.json, ...) that differs from the base's, as bytes
The metadata entry `darex` is a JSON object; `Recipe` says what is in it. The mask follows from the key,
so the values' places need not be stored: see `darex_jax.mask` for its definition.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import blake3
import numpy as np

from darex_jax.checkpoint import COMPANIONS
from darex_jax.safetensors_io import DTYPES, FileError, SafetensorsFile, element_count
from darex_jax.threefry import keep_threshold

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
    data_blake3: digest of all tensor data in file order.
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
        if blake3.blake3(text.encode()).hexdigest() != self.metadata.get("blake3"):
            raise FileError(f"{self.path}: damaged (the metadata does not have its digest).")
        try:
            table = json.loads(text)
            if table["format"] != FORMAT:
                raise FileError(
                    f"{self.path}: format {table['format']}, this version reads {FORMAT}; update darex_jax."
                )
            recipe = Recipe(**{f.name: table[f.name] for f in fields(Recipe)})
            keep_threshold(recipe.drop_rate)
            first, second = recipe.key
            if not (0 <= first < 2**32 and 0 <= second < 2**32):
                raise ValueError("the key is not two uint32")
            for name, entry in recipe.parameters.items():
                shape = entry["shape"]
                if not all(isinstance(n, int) and 0 <= n < 2**48 for n in shape):
                    raise ValueError(f"shape of '{name}'")
                if not (0.0 < float(entry["q"]) < float("inf")):
                    raise ValueError(f"q of '{name}'")
            for name, entry in recipe.base.items():
                if entry["dtype"] not in DTYPES or len(bytes.fromhex(entry["blake3"])) != 32:
                    raise ValueError(f"fingerprint of '{name}'")
        except FileError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
            info = self.tensors[f"values/{name}"]
            base = self.recipe.base.get(self.base_name(name))
            rows = self.tensors.get(f"rows/{name}")
            if base is None or list(base["shape"]) != list(entry["shape"]):
                raise FileError(f"{self.path}: parameter '{name}' has no base of its shape.")
            if len(info.shape) != 1 or info.size > element_count(tuple(entry["shape"])):
                raise FileError(f"{self.path}: parameter '{name}' has more survivors than entries.")
            if rows is not None and list(rows.shape[1:]) != list(entry["shape"])[1:]:
                raise FileError(f"{self.path}: the extra rows of '{name}' do not fit it.")
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

    def threshold(self) -> int:
        return keep_threshold(self.recipe.drop_rate)


def resolve_q(q: float | Mapping[str, float] | None, drop_rate: float, names: list[str]) -> dict[str, float]:
    """`{name: q}`; None is DARE's 1 - drop_rate. Raises: ValueError for a q missing or not positive."""
    if q is None:
        q = 1.0 - drop_rate
    table = {name: q.get(name, float("nan")) for name in names} if isinstance(q, Mapping) else None
    by_name = table if table is not None else {name: float(q) for name in names}  # type: ignore[arg-type]
    for name, value in by_name.items():
        if not 0.0 < float(value) < float("inf"):
            raise ValueError(f"q of '{name}' must be a positive number, got {value}.")
    return {name: float(value) for name, value in by_name.items()}

"""The recipe of an artifact: how a delta was made, and from which base."""

import json
import math
import platform
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import blake3
import numpy as np

from darex_jax.core.divisor import is_q
from darex_jax.core.errors import DarexError, DarexWarning
from darex_jax.core.threefry import keep_threshold
from darex_jax.files.safetensors import DTYPE_NAMES, DTYPES, MAX_NAME

FORMATS = (1, 2)
CUT = 16  # hexadecimal digits per fingerprint in format 2, enough to find the tensor that differs
METADATA = "darex"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a delta was made: everything but the values, as JSON.

    In format 1 it is the metadata of the file. In format 2, to keep files small, it is a compressed tensor,
    and fingerprints are cut to 16 digits beside one full digest over all of them.

    key: the two words of the Threefry key (`jax.random.key(seed)` is (0, seed)).
    drop_rate: of the masks in format 1; in format 2 every random part has its own.
    parameters: name -> {"shape": of the base, "dtype": of the restored parameter} for every pruned parameter,
      in format 1 with "q", the divisor of the survivors. Without a dtype (older files) it is the base's.
    base: fingerprint: base name -> {"dtype", "shape", "blake3"} of every tensor.
    base_names: fine-tuned name -> base name, if they differ.
    base_only: tensors of the base that the fine-tuned model lacks (another head).
    inexact: number of stored values that are not exact differences, because they are rounded to the
      fine-tuned dtype; 0 in format 2, see `counted`.
    data_blake3: digest of all tensors in file order: the `tensor_line` of each, then its data.
    base_files: BLAKE3 of the base's companion files that the restored model inherits, by name. None if
      unknown: in older files, or if the base was a tree.
    Format 2 only:
    budget: the method's budget, {"drop_rate"} or {"bytes_per_parameter"}; options: its other options;
      evidence: digests of its calibration data, by name.
    blocks: the coded parts, {"bytes", "blake3", "parameters", "streams"} each, see `files.blocks`.
    base_blake3: over all full fingerprints of the base, see `fingerprint`.
    """

    format: int
    method: str
    drop_rate: float | None
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
    budget: dict[str, float] | None = None
    options: dict[str, Any] | None = None
    evidence: dict[str, str] | None = None
    blocks: list[dict[str, Any]] | None = None
    base_blake3: str | None = None

    @property
    def counted(self) -> int | None:
        """`inexact`; None in format 2, where values are what a method makes of the differences."""
        return self.inexact if self.format == 1 else None

    def digest(self) -> str:
        """BLAKE3 of everything that determines the restored model: equal digests restore equal models.

        Provenance (versions, counts, the method's name) is not included.
        """
        aside = ("method", "inexact", "nonfinite", "versions", "budget", "options", "evidence")
        meaning = {k: v for k, v in asdict(self).items() if k not in aside and v is not None}
        return blake3.blake3(canonical_json(meaning).encode()).hexdigest()

    def to_json(self) -> str:
        table = asdict(self)
        return canonical_json({k: v for k, v in table.items() if v is not None or k not in FORMAT_2})

    def to_metadata(self) -> dict[str, str]:
        """The metadata of the file: the recipe, or only the format in format 2, and the recipe's digest."""
        text = self.to_json()
        stated = text if self.format == 1 else canonical_json({"format": self.format})
        return {METADATA: stated, "blake3": blake3.blake3(text.encode()).hexdigest()}


FORMAT_2 = ("budget", "options", "evidence", "blocks", "base_blake3")


def fingerprint(base: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest over the dtype, shape and full BLAKE3 of every tensor of a base, by name."""
    digest = blake3.blake3()
    for name, entry in sorted(base.items()):
        digest.update(canonical_json([name, entry["dtype"], entry["shape"], entry["blake3"]]).encode())
    return digest.hexdigest()


def tensor_line(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The line hashed before a tensor's bytes, so that names and shapes are covered by the digest."""
    return f"{name} {DTYPE_NAMES[dtype]} {list(shape)}\n".encode()


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def recipe_from(table: Any) -> Recipe:
    """Parses a recipe from JSON, checking all types and ranges: a digest does not protect against forgery.

    Raises: DarexError saying what is wrong.
    """
    if not isinstance(table, dict):
        raise DarexError("it is not an object")
    first = table.get("format") == 1
    checks: dict[str, Callable[[Any], bool]] = {
        "format": lambda version: type(version) is int and version in FORMATS,
        "method": _is_text,
        "drop_rate": lambda rate: (
            (first and type(rate) in (int, float) and 0 <= rate < 1) or (not first and rate is None)
        ),
        "key": lambda key: (
            isinstance(key, list) and len(key) == 2 and all(_is_natural(w, 2**32) for w in key)
        ),
        "scope": _is_text,
        "parameters": _is_table,
        "base": _is_table,
        "base_names": _is_table_of(is_name),
        "base_only": lambda names: isinstance(names, list) and all(map(is_name, names)),
        "inexact": lambda count: _is_natural(count, 2**63),
        "nonfinite": lambda count: _is_natural(count, 2**63),
        "versions": _is_table_of(_is_text),
        "data_blake3": _is_digest,
        "base_files": lambda files: files is None or _is_table_of(_is_digest)(files),
    }
    if not first:
        checks |= {
            "budget": _is_table_of(_is_flat),
            "options": _is_table_of(_is_flat),
            "evidence": _is_table_of(_is_text),
            "blocks": lambda blocks: isinstance(blocks, list) and all(map(_is_block, blocks)),
            "base_blake3": _is_digest,
        }
    for name, valid in checks.items():
        if name not in table and name != "base_files":
            raise DarexError(f"'{name}' is missing")
        if not valid(table.get(name)):
            raise DarexError(f"'{name}' is invalid")
    for name, entry in table["parameters"].items():
        if not (is_name(name) and isinstance(entry, dict)):
            raise DarexError(f"invalid parameter {name!r:.60}")
        if not _is_shape(entry.get("shape")):
            raise DarexError(f"invalid shape of '{name}'")
        if first and not (type(entry.get("q")) in (int, float) and is_q(entry["q"])):
            raise DarexError(f"invalid q of '{name}'")
        if "dtype" in entry and not _is_dtype(entry["dtype"]):
            raise DarexError(f"invalid dtype of '{name}'")
    for name, entry in table["base"].items():
        if not (is_name(name) and isinstance(entry, dict)):
            raise DarexError(f"invalid tensor {name!r:.60} in the base")
        if not (_is_dtype(entry.get("dtype")) and _is_shape(entry.get("shape"))):
            raise DarexError(f"invalid dtype or shape of '{name}' in the base")
        if not _is_digest(entry.get("blake3"), 64 if first else CUT):
            raise DarexError(f"invalid fingerprint of '{name}'")
    named = [name for block in table.get("blocks") or () for name in block["parameters"]]
    if not first and (len(named) != len(set(named)) or set(named) != table["parameters"].keys()):
        raise DarexError("its blocks and its list of parameters differ")
    recipe: dict[str, Any] = {
        f.name: table.get(f.name) for f in fields(Recipe) if not first or f.name not in FORMAT_2
    }
    recipe["key"] = tuple(table["key"])
    for part, known in (("parameters", ("shape", "q", "dtype")), ("base", ("dtype", "shape", "blake3"))):
        # Other entries were not checked and are dropped.
        recipe[part] = {n: {k: entry[k] for k in known if k in entry} for n, entry in table[part].items()}
    return Recipe(**recipe)


def _is_flat(value: Any) -> bool:
    """Whether an option is a number, a text, nothing, or a list or table of those."""
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return not any(isinstance(each, list | dict) for each in inner)
    return True


def _is_natural(value: Any, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in DTYPES


def _is_digest(value: Any, digits: int = 64) -> bool:
    return isinstance(value, str) and len(value) == digits and set(value) <= set("0123456789abcdef")


def _is_block(value: Any) -> bool:
    """Checks a block's structure; its parameters and streams are checked when they are decoded."""
    if not (
        isinstance(value, dict) and _is_natural(value.get("bytes"), 2**48) and _is_digest(value.get("blake3"))
    ):
        return False
    parameters, streams = value.get("parameters"), value.get("streams")
    if not (isinstance(parameters, dict) and isinstance(streams, list)):
        return False
    for stream in streams:
        if not (isinstance(stream, list) and len(stream) == 5 and all(map(_is_text, stream[:3]))):
            return False
        if not all(_is_natural(number, 2**48) for number in stream[3:]):
            return False
    return all(isinstance(parts, list) and all(map(_is_part, parts)) for parts in parameters.values())


def _is_part(value: Any) -> bool:
    if not (
        isinstance(value, dict) and _is_text(value.get("kind")) and isinstance(value.get("counts"), dict)
    ):
        return False
    return all(
        isinstance(entry, list) and len(entry) == 2 and _is_text(entry[0]) and _is_natural(entry[1], 2**48)
        for entry in value["counts"].values()
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_table_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda table: (
        isinstance(table, dict) and all(map(_is_text, table)) and all(map(valid, table.values()))
    )


def _is_shape(value: Any) -> bool:
    natural = isinstance(value, list) and len(value) <= 32 and all(_is_natural(n, 2**48) for n in value)
    return natural and math.prod(filter(None, value)) < 2**48


def warn_of_little(
    drop_rate: float, q: Mapping[str, float], *, same: bool, survivors: int, stacklevel: int = 3
) -> None:
    """Warns about artifacts that are valid but probably not intended.

    Args:
      same: the models are equal in all pruned parameters.
      survivors: the number of survivors.
    """
    texts = []
    if same:
        texts.append("every delta is zero: in what is pruned the fine-tuned model is the base.")
    if keep_threshold(drop_rate) == 0:
        texts.append(
            f"a drop rate of {drop_rate} keeps nothing: 1 - drop rate is below the masks' resolution, 2**-33."
        )
    elif not survivors:
        texts.append(f"nothing survived the drop rate of {drop_rate}; the delta holds no values.")
    small = [name for name in q if q[name] < (1.0 - drop_rate) * (1 - 1e-6)]
    if small:
        texts.append(
            f"q = {q[small[0]]:g} of '{small[0]}' is below 1 - drop rate = {1.0 - drop_rate:g}: survivors "
            "become larger than with DARE's rescaling."
        )
    for text in texts:
        warnings.warn(text, DarexWarning, stacklevel=stacklevel)


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, the packages that masks and values could depend on, and `more` if installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("darex_jax", "jax", "jaxlib", "numpy", *more):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found

"""Encoding of parts: consecutive parameters share coded streams, which keeps the overhead of small ones low.

A block holds whole parameters. Arrays of one kind (the indices of sparse parts, their bfloat16 values, ...)
are concatenated over all parameters of a block and coded as one stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from darex_jax.core.errors import DarexError, FileError
from darex_jax.core.threefry import numpy_leaf_key
from darex_jax.core.tree import name_words
from darex_jax.files.coding import Stream, decode, encode, from_gaps, to_gaps
from darex_jax.files.safetensors import DTYPE_NAMES
from darex_jax.parts.random import Random
from darex_jax.parts.total import PARTS, Part, Parts

BLOCK_NUMBERS = 1 << 20  # stored numbers per block, about
RISING = ("positions", "columns")
INTEGERS = ("int8", "int4", "int2", "int1")
MOST_PARTS = 16  # of one parameter


def numbers_in(parts: Parts) -> int:
    """How many numbers a parameter's parts store."""
    return sum(int(x.size) for part in parts.parts for x in part.arrays().values())


def pack(block: Mapping[str, Parts]) -> tuple[dict[str, Any], bytes]:
    """A block's entry in the recipe, and its bytes.

    The entry: `parameters`, name -> the kind and fields of each part and the `counts` of its arrays;
    `streams`, [group, coder, dtype, count, bytes] each, in the order of their bytes. Arrays of one group
    share a stream.
    """
    groups: dict[str, list[np.ndarray]] = {}
    parameters: dict[str, list[dict[str, Any]]] = {}
    for name, parts in block.items():
        parameters[name] = []
        for part in parts.parts:
            arrays = part.arrays()
            for array, x in arrays.items():
                gaps = to_gaps(x) if array in RISING else x
                groups.setdefault(_group(part.kind, array, DTYPE_NAMES[x.dtype]), []).append(gaps)
            counts = {array: [DTYPE_NAMES[x.dtype], int(x.size)] for array, x in arrays.items()}
            parameters[name].append({"kind": part.kind, **part.fields(), "counts": counts})
    coded = {group: encode(np.concatenate(arrays), _bits(group)) for group, arrays in groups.items()}
    streams = [[group, s.coder, s.dtype, s.size, len(s.data)] for group, s in coded.items()]
    return {"parameters": parameters, "streams": streams}, b"".join(s.data for s in coded.values())


def unpack(
    entry: Mapping[str, Any], data: bytes, shapes: Mapping[str, tuple[int, ...]], key: tuple[int, int]
) -> dict[str, Parts]:
    """Decodes the parameters of a block made by `pack`; entry and data are not trusted.

    Args: shapes: of the parameters, already checked to fit in memory; key: of the masks.
    Raises: FileError for inconsistent data.
    """
    room = sum(int(np.prod(shapes[name], dtype=np.int64)) + sum(shapes[name]) for name in entry["parameters"])
    arrays, start = {}, 0
    for group, coder, dtype, count, length in entry["streams"]:
        if type(length) is not int or not 0 <= length <= len(data) - start or count > MOST_PARTS * (room + 1):
            raise FileError("a stream is longer than its block, or than its parameters allow")
        arrays[group] = decode(Stream(coder, dtype, count, data[start : start + length]), _bits(group))
        start += length
    if start != len(data):
        raise FileError("a block has unused bytes")
    used = dict.fromkeys(arrays, 0)
    found = {}
    for name, described in entry["parameters"].items():
        parts: list[Part] = []
        if len(described) > MOST_PARTS:
            raise FileError(f"'{name}' has more than {MOST_PARTS} parts")
        for fields in described:
            own = {}
            for array, (dtype, count) in fields["counts"].items():
                group = _group(fields["kind"], array, dtype)
                own[array] = arrays[group][used[group] :][:count]
                used[group] += count
                if own[array].size != count or count < 0:
                    raise FileError(f"'{name}' has more numbers than its block")
                if array in RISING:
                    own[array] = from_gaps(own[array])
            more = (numpy_leaf_key(key, name_words(name)),) if fields["kind"] == Random.kind else ()
            try:
                parts.append(PARTS[fields["kind"]].read(fields, own, shapes[name], *more))
            except DarexError as error:
                raise FileError(f"'{name}': {error}") from error
        found[name] = Parts(tuple(parts), shapes[name])
    if any(used[group] != x.size for group, x in arrays.items()):
        raise FileError("a stream has unused numbers")
    return found


def _group(kind: str, array: str, dtype: str) -> str:
    return f"{kind} {array} {dtype}"


def _bits(group: str) -> int | None:
    """Bits of a group: 4 for `sparse int4 I8`, None for floats."""
    name = group.split(" ")[1].rpartition(".")[2]
    return int(name.removeprefix("int")) if name in INTEGERS else None

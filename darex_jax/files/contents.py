"""Summary of an artifact: its contents and the sizes of its components."""

import os
from collections import Counter
from typing import Any

from darex_jax.files.artifact import KINDS, RECIPE, DeltaFile
from darex_jax.files.safetensors import DTYPES


def contents(file: DeltaFile) -> dict[str, Any]:
    """The contents of an artifact and the sizes of its components, JSON-serialisable; see `darex inspect`.

    `survivors` counts the stored numbers, indices and scales included, before entropy coding; sizes are on
    disk.
    """
    recipe, size = file.recipe, os.fstat(file._file).st_size
    bytes_of = {
        kind: sum(i.nbytes for n, i in file.tensors.items() if n.startswith(kind + "/")) for kind in KINDS
    }
    q, parts_of, stored = set(), Counter[str](), 0
    if recipe.format == 1:
        q |= {entry["q"] for entry in recipe.parameters.values()}
        stored = sum(file.tensors[f"values/{name}"].size for name in recipe.parameters)
        parts_of["random"] = len(recipe.parameters)
    for block in recipe.blocks or ():
        for group, *_, length in block["streams"]:
            kind, array, _ = group.split(" ") if group.count(" ") == 2 else (group, "", "")
            name = f"{kind} {array}".strip()
            bytes_of[name] = bytes_of.get(name, 0) + length
        for part in (part for parts in block["parameters"].values() for part in parts):
            parts_of[part["kind"]] += 1
            stored += sum(count for _, count in part["counts"].values())
            q |= {part["q"]} if type(part.get("q")) in (int, float) else set()
    if recipe.format == 2:
        bytes_of["recipe"] = file.tensors[RECIPE].nbytes
    bytes_of["header"] = size - sum(info.nbytes for info in file.tensors.values())
    made_with: dict[str, Any] = {**(recipe.budget or {}), **(recipe.options or {})}
    if recipe.drop_rate is not None:
        made_with["drop_rate"] = recipe.drop_rate
    return {
        "format": recipe.format, "method": recipe.method, "made_with": made_with,
        "drop_rate": made_with.get("drop_rate"), "key": list(recipe.key), "scope": recipe.scope,
        "parameters": len(recipe.parameters), "entries": file.entries, "parts": dict(parts_of),
        "survivors": stored, "q": sorted(q), "evidence": recipe.evidence or {},
        "dtypes": sorted({DTYPES[e["dtype"]].name for e in recipe.parameters.values() if "dtype" in e}),
        "dense": file.names("dense"), "extra_rows": file.names("rows"), "files": file.names("file"),
        "inexact": recipe.counted, "nonfinite": recipe.nonfinite, "bytes": size,
        "bytes_by_kind": {name: count for name, count in bytes_of.items() if count},
        "bytes_per_parameter": size / max(1, file.entries), "versions": recipe.versions,
        "data_blake3": recipe.data_blake3, "digest": recipe.digest(),
    }  # fmt: skip

"""Reads and writes Orbax checkpoints in pieces.

They store zarr arrays, in an OCDBT database or one folder each, which tensorstore reads; `_METADATA` has the
tree structure. A parameter's name is its path in the tree joined by dots, without the `.value` that Flax NNX
adds; kernels keep their layout, usually `[in, out]`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from darex_jax.core.errors import FileError, first_line
from darex_jax.files.safetensors import (
    CHUNK,
    DTYPE_NAMES,
    SafetensorsFile,
    TensorFile,
    TensorInfo,
    element_count,
)

METADATA = "_METADATA"
ITEMS = ("default", "state", "params", "item", "model")  # possible item names in a step's folder
CACHE = 128 << 20  # bytes of cached decoded chunks, so that no chunk is decoded twice
PARAMS = "params"  # default branch of a train state
# Largest ratio of an array to the checkpoint's files, and bytes that any may have: tensorstore allocates what
# it claims, and ends the process where it cannot.
MOST, FREE = 1 << 10, 1 << 26


def find_orbax(path: Path) -> Path | None:
    """The array folder of an orbax checkpoint: `path`, an item in it, or that of its newest step."""
    if not path.is_dir():
        return None
    steps = sorted((int(entry.name), entry) for entry in path.iterdir() if entry.name.isdigit())
    places = [path, *(path / item for item in ITEMS)]
    if steps:
        newest = steps[-1][1]
        places += [newest, *(newest / item for item in ITEMS)]
    return next((place for place in places if (place / METADATA).is_file()), None)


class OrbaxFile(TensorFile):
    """A tree's arrays, opened lazily.

    Args:
      path: a folder that `find_orbax` found.
      subtree: path of the branch to read, joined by dots; None is `params` if that exists.
    Raises: FileError for a damaged checkpoint, or one without this branch.
    """

    def __init__(self, path: Path, subtree: str | None = None) -> None:
        import tensorstore

        self.path, self.metadata = path.resolve(), {}
        try:
            layout = json.loads((path / METADATA).read_text())
            found = _arrays(layout["tree_metadata"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise _unreadable(path, error) from error
        if subtree is None and any(name.startswith(f"{PARAMS}.") for name in found):
            subtree = PARAMS
        prefix = f"{subtree}." if subtree else ""
        chosen = [name for name in found if name.startswith(prefix)]
        if not chosen:
            branches = ", ".join(dict.fromkeys(name.split(".")[0] for name in found)) or "nothing"
            raise FileError(f"{path}: has no array under {subtree!r}; it has {branches} (--params PATH).")
        driver = "zarr3" if layout.get("use_zarr3") else "zarr"
        database = (path / "manifest.ocdbt").exists()
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE}})

        def opened(name: str) -> Any:
            spec = _spec(self.path, name, driver, database)
            return tensorstore.open(spec, open=True, read=True, context=context)

        try:
            waiting = {name: opened(name) for name in chosen}
        except ValueError as error:
            raise _unreadable(path, error) from error
        self._arrays: list[Any] = []
        self.tensors = {}
        for stored, array in waiting.items():
            name = stored.removeprefix(prefix).removesuffix(".value")
            if name in self.tensors:
                raise FileError(f"{path}: two arrays are called '{name}'.")
            try:
                found_array = array.result()
                dtype = np.dtype(found_array.dtype.numpy_dtype)
            except (ValueError, TypeError, OSError) as error:
                raise FileError(f"{path}: '{stored}' cannot be read ({first_line(error)}).") from error
            if dtype not in DTYPE_NAMES:
                raise FileError(f"{path}: '{name}' has the unsupported dtype {dtype}.")
            self.tensors[name] = TensorInfo(dtype, tuple(found_array.shape), len(self._arrays))
            self._arrays.append(found_array)
        claims = {name: self._claim(info) for name, info in self.tensors.items()}
        name = max(claims, key=lambda name: claims[name])
        if claims[name] > FREE:
            size = sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
            if claims[name] > FREE + MOST * size:
                text = f"'{name}' claims {claims[name]:,} bytes, its files have {size:,} in all."
                raise FileError(f"{path}: {text}")

    def _claim(self, info: TensorInfo) -> int:
        """The bytes of an array, or of one of its chunks if that is more."""
        chunk = tuple(self._arrays[info.offset].chunk_layout.read_chunk.shape or ())
        return max(info.nbytes, element_count(chunk) * info.dtype.itemsize)

    def chunks(self, info: TensorInfo) -> Iterator[np.ndarray]:
        """As `SafetensorsFile.chunks`, whatever is stored; reads the rows of one stored chunk at a time, so
        that it is decoded once."""
        layout = self._arrays[info.offset].chunk_layout.read_chunk.shape
        rows = layout[0] if info.shape else 1
        chunk = np.empty(min(CHUNK, info.size), info.dtype)
        filled = 0
        for first in range(0, info.shape[0] if info.shape else 1, rows):
            index = (slice(first, min(first + rows, info.shape[0])),) if info.shape else ()
            flat, start = self._read(info, index).reshape(-1), 0
            while start < len(flat):
                taken = min(len(flat) - start, len(chunk) - filled)
                chunk[filled : filled + taken] = flat[start : start + taken]
                start, filled = start + taken, filled + taken
                if filled == len(chunk):
                    yield chunk
                    filled = 0
        if filled:
            yield chunk[:filled]

    def read_into(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        """As `SafetensorsFile.read_into`; reads whole rows and selects the requested entries."""
        if not info.shape:
            out[:] = self._read(info, ())
            return
        row = element_count(info.shape[1:])
        first, stop = start // row, -(-(start + len(out)) // row)
        rows = self._read(info, (slice(first, stop),)).reshape(-1)
        out[:] = rows[start - first * row :][: len(out)]

    def read_part(self, info: TensorInfo, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of an array, one slice per axis; a new array."""
        return self._read(info, index)

    def _read(self, info: TensorInfo, index: tuple[slice, ...]) -> np.ndarray:
        array = self._arrays[info.offset]
        try:
            return np.asarray((array[index] if index else array).read().result())
        except (ValueError, OSError) as error:
            name = next(name for name, own in self.tensors.items() if own is info)
            raise FileError(f"{self.path}: '{name}' cannot be read ({first_line(error)}).") from error

    def close(self) -> None:
        self._arrays.clear()


def _unreadable(path: Any, error: BaseException) -> FileError:
    return FileError(f"{path}: cannot be read as an orbax checkpoint ({first_line(error)}).")


def _arrays(tree: Mapping[str, Any]) -> list[str]:
    """The stored names of arrays: their tree paths joined by dots. Numbers and strings are skipped."""
    found = []
    for leaf in tree.values():
        if "array" in str(leaf["value_metadata"]["value_type"]).lower():
            keys = [str(key["key"]) for key in leaf["key_metadata"]]
            if any(key in ("", ".", "..") or "/" in key or not key.isprintable() for key in keys):
                raise ValueError(f"it has an array called {'.'.join(keys)!a:.80}")
            found.append(".".join(keys))
    return found


def _spec(folder: Path, stored: str, driver: str, database: bool) -> dict[str, Any]:
    """The tensorstore spec of an array; a missing chunk is an error, not zeros."""
    if database:
        base = {"driver": "file", "path": f"{folder}/"}
        store: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{stored}/"}
    else:
        store = {"driver": "file", "path": f"{folder}/{stored}/"}
    return {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}


def write_orbax(folder: Path, weights: list[Path]) -> None:
    """Converts safetensors files to an orbax checkpoint in the existing `folder`.

    The files are memory-mapped: only what orbax is writing is in memory.
    """
    import orbax.checkpoint

    from darex_jax.core.tree import unflatten_names

    tensors: dict[str, np.ndarray] = {}
    for file in weights:
        with SafetensorsFile(file) as opened:
            if empty := next((name for name, info in opened.tensors.items() if not info.size), None):
                raise FileError(f"'{empty}' is empty, which orbax cannot store: write safetensors instead.")
            tensors |= {name: _mapped(file, info) for name, info in opened.tensors.items()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        whole = Path(scratch).resolve() / "checkpoint"
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(whole, unflatten_names(tensors))
        for entry in whole.iterdir():
            os.rename(entry, folder / entry.name)


def _mapped(file: Path, info: TensorInfo) -> np.ndarray:
    mapped = np.memmap(file, np.uint8, "r", info.offset, (info.nbytes,))
    return mapped.view(info.dtype).reshape(info.shape)

"""Reads and writes safetensors files in chunks, without holding whole tensors in memory.

The format is compatible with the `safetensors` library in both directions. Headers are not trusted: every
claim is checked against the file before memory is allocated.
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from darex_jax.core.errors import DarexError, FileError
from darex_jax.files.atomic import atomic_file
from darex_jax.files.paths import open_file

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 20  # elements of a tensor per chunk
MAX_HEADER = 100_000_000  # the safetensors library's own limit
MAX_NAME = 500  # characters; every dot is a level of nesting, and PyTrees are traversed recursively


@dataclass(frozen=True)
class TensorInfo:
    """The position of a tensor: `offset` is in bytes from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return element_count(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def element_count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


class TensorFile(ABC):
    """A file of named tensors that can be read in chunks.

    Attributes: path: of the file; tensors: their infos by name; metadata: stored strings.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @abstractmethod
    def read_into(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fills `out` (1-D, contiguous, the tensor's dtype) with elements [start, start + len(out))."""

    @abstractmethod
    def read_part(self, info: TensorInfo, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, one slice per axis, as a new array; no other byte is read.

        Args: index: NumPy slices with step 1.
        """

    @abstractmethod
    def close(self) -> None: ...

    def chunks(self, info: TensorInfo) -> Iterator[np.ndarray]:
        """A tensor's elements in 1-D chunks of at most `CHUNK`; the array is reused."""
        buffer = np.empty(min(info.size, CHUNK), info.dtype)
        for start in range(0, info.size, CHUNK):
            chunk = buffer[: min(CHUNK, info.size - start)]
            self.read_into(info, start, chunk)
            yield chunk

    def read(self, name: str) -> np.ndarray:
        """One whole tensor, a new array."""
        info = self.tensors[name]
        out = np.empty(info.size, info.dtype)
        self.read_into(info, 0, out)
        return out.reshape(info.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SafetensorsFile(TensorFile):
    """One open safetensors file: `tensors` by name, `metadata`, and reads of any range of a tensor.

    Raises: FileError if the file is damaged, truncated, or its header is inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = open_file(self.path)
        try:
            self.tensors, self.metadata = _read_header(self._file, self.path)
        except BaseException:
            os.close(self._file)
            raise

    def read_into(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        view = as_bytes(out)
        position = info.offset + start * info.dtype.itemsize
        while len(view):
            try:
                count = os.preadv(self._file, [view], position)
            except OSError as error:
                raise FileError(f"{self.path}: {error.strerror}.") from error
            if count == 0:
                raise FileError(f"{self.path}: the file became shorter while it was read.")
            view, position = view[count:], position + count

    def read_part(self, info: TensorInfo, index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(length)[part] for length, part in zip(info.shape, index, strict=True)]
        shape = tuple(len(r) for r in ranges)
        # Each of these runs is contiguous in the file: they start after the last sliced axis.
        cut = max((axis for axis in range(len(shape)) if shape[axis] < info.shape[axis]), default=0)
        out = np.empty(shape, info.dtype)
        runs = out.reshape(element_count(shape[:cut]), element_count(shape[cut:]))
        strides = [element_count(info.shape[axis + 1 :]) for axis in range(len(shape))]
        first = sum(r.start * stride for r, stride in zip(ranges, strides, strict=True))
        for run, place in zip(runs, np.ndindex(shape[:cut]), strict=True):
            start = first + sum(i * stride for i, stride in zip(place, strides[:cut], strict=True))
            self.read_into(info, start, run)
        return out

    def close(self) -> None:
        os.close(self._file)


def _read_header(file: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    file_size = os.fstat(file).st_size
    prefix = os.pread(file, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER, file_size - 8):
        raise FileError(f"{path}: not a safetensors file, or cut off inside its header.")
    try:
        header = json.loads(os.pread(file, length, 8).decode(), object_pairs_hook=_without_duplicates)
    except DarexError as error:
        raise FileError(f"{path}: damaged header ({error}).") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: damaged header (it is not JSON).") from error
    if not isinstance(header, dict):
        raise FileError(f"{path}: damaged header (it is not an object).")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: damaged header (__metadata__ is not text).")
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise FileError(f"{path}: tensor '{name}' overlaps another or leaves a gap.")
        end += info.nbytes
    if end != file_size:
        kind = "cut off" if end > file_size else "longer than its header says"
        raise FileError(f"{path}: the file is {kind}: {file_size} bytes, {end} declared.")
    return tensors, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise DarexError(f"duplicate name {name!r}")
    return table


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def natural(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63

    if len(name) > MAX_NAME or not name.isprintable():
        raise FileError(f"{path}: damaged header (invalid tensor name {name[:80]!a}).")
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise FileError(f"{path}: damaged header (invalid entry of tensor '{name}').")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and len(shape) <= 32 and all(map(natural, shape))):
        raise FileError(f"{path}: damaged header (invalid shape of tensor '{name}').")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(natural, offsets))):
        raise FileError(f"{path}: damaged header (invalid offsets of tensor '{name}').")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise FileError(f"{path}: tensor '{name}' has the unsupported dtype {entry['dtype']!r}.")
    info = TensorInfo(DTYPES[entry["dtype"]], tuple(shape), data_start + offsets[0])
    # Without the zeros: an empty tensor may have large axes as well.
    if math.prod(filter(None, shape)) * info.dtype.itemsize >= 2**63:
        raise FileError(f"{path}: damaged header (invalid shape of tensor '{name}').")
    if info.nbytes != offsets[1] - offsets[0]:
        raise FileError(f"{path}: damaged header (the size of tensor '{name}' does not match its shape).")
    return info


def encode_header(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str], length: int = 0
) -> bytes:
    """The header of a file with these tensors in this order.

    Args: length: pad to this many bytes in all.
    Raises: ValueError for a tensor with the format's reserved name; RuntimeError if `length` is too short.
    """
    if "__metadata__" in tensors:
        raise DarexError("'__metadata__' is a reserved name in safetensors files; rename the tensor.")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = element_count(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    padded = max(length - 8, -(-len(text) // 8) * 8)
    if 0 < length < 8 + padded:
        raise RuntimeError(f"a header of {8 + padded} bytes has {length} reserved for it")
    return padded.to_bytes(8, "little") + text.ljust(padded)


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return memoryview(array.reshape(-1).view(np.uint8).data)


def write_at(file: int, data: bytes | memoryview | np.ndarray, position: int) -> int:
    """Writes all of `data` at `position`; returns the position after it."""
    view = as_bytes(data) if isinstance(data, np.ndarray) else memoryview(data)
    while len(view):
        count = os.pwrite(file, view, position)
        view, position = view[count:], position + count
    return position


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named NumPy or JAX arrays atomically, copying one at a time to the host.

    The widest dtypes come first, so that every tensor is aligned.
    """
    ordered = {n: tensors[n] for n in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))}
    header = encode_header({n: (a.dtype, a.shape) for n, a in ordered.items()}, metadata or {})
    with atomic_file(path) as file:
        position = write_at(file, header, 0)
        for array in ordered.values():  # no variable keeps the host copy alive while the next one is made
            position = write_at(file, on_host(array), position)


def on_host(array: Any) -> np.ndarray:
    """A NumPy or JAX array as a contiguous NumPy array without other references."""
    # A sharded JAX array caches its host copy; a temporary copy of the array frees the cache with it.
    return np.ascontiguousarray(array if isinstance(array, np.ndarray) else np.asarray(array.copy()))

"""Lossless coding of arrays: pcodec for numbers, zstandard for bytes, raw if that is shorter.

Input is not trusted: the declared number of values is checked against its use and limits the output of a
decoder before it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from darex_jax.core.errors import FileError
from darex_jax.files.safetensors import DTYPE_NAMES, DTYPES, as_bytes

LEVEL = 8  # of pcodec, its default
ZSTD_LEVEL = 19
MOST = 64  # largest compression ratio, so that a reader's memory stays in proportion to the file
SAMPLE = 1 << 16  # bytes that are test-compressed
FREE = 1 << 12  # bytes that any stream may decode to, whatever its size
SKIPPABLE = 0x184D2A50.to_bytes(4, "little")  # zstandard's mark of a frame that decoders pass over

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Stream(NamedTuple):
    """One array in a file.

    Attributes:
      coder: a key of `CODERS`.
      dtype: a safetensors dtype name: F32, BF16, U32, I8, ...
      size: number of values.
      data: the coded bytes.
    """

    coder: str
    dtype: str
    size: int
    data: bytes


def coder_versions() -> dict[str, str]:
    """The versions of the coders, for a file's metadata."""
    from importlib.metadata import version

    return {name: version(name) for name in ("pcodec", "zstandard")}


def compress(data: bytes) -> bytes:
    """One zstandard frame; where a reader would refuse its ratio, a skippable frame of zeros behind it."""
    import zstandard  # imported here and below: format 1 needs no coder

    frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data)
    if _bounded(len(data), len(frame)):
        return frame
    missing = max(0, -(-(len(data) - FREE) // MOST) - len(frame) - 8)
    return frame + SKIPPABLE + missing.to_bytes(4, "little") + bytes(missing)


def decompress(data: bytes, most: int | None = None) -> bytes:
    """The inverse of `compress`. Raises: FileError for an invalid frame, or one longer than `most`."""
    import zstandard

    try:
        size = zstandard.get_frame_parameters(data).content_size
        if not _bounded(size, len(data)) or (most is not None and size > most):
            raise FileError(f"a frame of {len(data)} bytes claims to hold {size}")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise FileError("a damaged frame") from error


def encode(array: np.ndarray, bits: int | None = None) -> Stream:
    """Encodes a flat array with the coder that gives the shortest result.

    Args: bits: of int8 values with magnitude up to 2^(bits-1) - 1 (1 bit: -1 and 1), which can be packed.
    """
    array = np.ascontiguousarray(array)
    candidates = {"raw": bytes(as_bytes(array))}
    if bits is not None and bits < 8:
        candidates["packed"] = _pack(array, bits)
    if array.dtype == np.uint8:
        sample = candidates["raw"][:SAMPLE]
        if len(compress(sample)) < len(sample):  # signs are practically random, which is slow to find out
            candidates["zstd"] = compress(candidates["raw"])
    elif array.size and bits != 1:
        from pcodec import ChunkConfig, standalone

        config = ChunkConfig(compression_level=LEVEL)
        candidates["pco"] = standalone.simple_compress(_as_coded(array), config)
    allowed = {c: data for c, data in candidates.items() if c == "raw" or _bounded(array.nbytes, len(data))}
    coder = min(allowed, key=lambda c: (len(allowed[c]), c != "raw"))
    return Stream(coder, DTYPE_NAMES[array.dtype], array.size, allowed[coder])


def decode(stream: Stream, bits: int | None = None) -> np.ndarray:
    """Decodes an untrusted stream to a flat array of its dtype.

    Raises: FileError if it does not match its declaration.
    """
    dtype = DTYPES.get(stream.dtype)
    if dtype is None or stream.coder not in CODERS:
        raise FileError(
            f"a stream has an unknown dtype or coder ({stream.dtype!r:.40}, {stream.coder!r:.40})"
        )
    if type(stream.size) is not int or stream.size < 0:
        raise FileError("a stream's number of values is not a valid count")
    nbytes = stream.size * dtype.itemsize
    if stream.coder != "raw" and not _bounded(nbytes, len(stream.data)):
        raise FileError(f"a stream of {len(stream.data)} bytes claims to hold {nbytes}")
    try:
        found = CODERS[stream.coder](stream.data, dtype, stream.size, bits)
    except (KeyboardInterrupt, SystemExit, FileError):
        raise
    except BaseException as error:  # a panic in a coder is not an Exception
        raise FileError(f"a damaged stream ({type(error).__name__})") from error
    if found.size != stream.size or found.dtype != dtype:
        raise FileError("a stream ends early")
    return found


def _bounded(decoded: int, coded: int) -> bool:
    return decoded <= FREE + MOST * coded


def _raw(data: bytes, dtype: np.dtype, count: int, bits: int | None) -> np.ndarray:
    if len(data) != count * dtype.itemsize:
        raise FileError("a stream does not have its declared length")
    return np.frombuffer(data, dtype)


def _zstd(data: bytes, dtype: np.dtype, count: int, bits: int | None) -> np.ndarray:
    if dtype != np.uint8:
        raise FileError("zstandard is used for bytes only")
    return np.frombuffer(decompress(data), np.uint8)


def _pco(data: bytes, dtype: np.dtype, count: int, bits: int | None) -> np.ndarray:
    numbers = _expand(data, _coded_dtype(dtype), count)
    if dtype == BFLOAT16:
        return ((numbers >> np.uint16(1)) | (numbers << np.uint16(15))).view(dtype)
    if dtype == np.int8:
        if numbers.size and not (numbers.min() >= -128 and numbers.max() <= 127):
            raise FileError("an integer does not fit in 8 bits")
        return numbers.astype(np.int8)
    return numbers


def _packed(data: bytes, dtype: np.dtype, count: int, bits: int | None) -> np.ndarray:
    if dtype != np.int8 or bits not in (1, 2, 4) or len(data) != -(-count * bits // 8):
        raise FileError("packed integers do not have their declared length")
    flat = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * bits]
    numbers = np.zeros(count, np.int8)
    for i in range(bits):
        numbers |= (flat[i::bits] << i).astype(np.int8)
    return (2 * numbers - 1 if bits == 1 else numbers - (2 ** (bits - 1) - 1)).astype(np.int8)


CODERS: dict[str, Callable[[bytes, np.dtype, int, int | None], np.ndarray]] = {
    "raw": _raw,
    "zstd": _zstd,
    "pco": _pco,
    "packed": _packed,
}


def _expand(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    from pcodec import standalone

    numbers = np.empty(count, dtype)
    if count:
        progress = standalone.simple_decompress_into(data, numbers)
        if not progress.finished or progress.n_processed != count:
            raise FileError("a stream does not have its declared length")
    return numbers


def _coded_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype passed to pcodec, which has no bfloat16 and, by default, no 8 bits."""
    return {BFLOAT16: np.dtype(np.uint16), np.dtype(np.int8): np.dtype(np.int16)}.get(dtype, dtype)


def _as_coded(array: np.ndarray) -> np.ndarray:
    if array.dtype == BFLOAT16:  # rotated, so that the exponent comes first and the sign last
        word = array.view(np.uint16)
        return (word << np.uint16(1)) | (word >> np.uint16(15))
    return array.astype(_coded_dtype(array.dtype))


def to_gaps(positions: np.ndarray) -> np.ndarray:
    """Strictly increasing unsigned integers as gaps: the first one, then differences minus 1."""
    gaps = positions.copy()
    gaps[1:] -= positions[:-1] + positions.dtype.type(1)
    return gaps


def from_gaps(gaps: np.ndarray) -> np.ndarray:
    """The inverse of `to_gaps`. Raises: FileError if the positions overflow their dtype."""
    if gaps.dtype.kind != "u":
        raise FileError("positions are not unsigned integers")
    positions = np.cumsum(gaps, dtype=np.uint64) + np.arange(gaps.size, dtype=np.uint64)
    if positions.size and (
        positions[-1] > np.iinfo(gaps.dtype).max or (positions[1:] <= positions[:-1]).any()
    ):
        raise FileError("positions are not increasing")
    return positions.astype(gaps.dtype)


def _pack(integers: np.ndarray, bits: int) -> bytes:
    codes = ((integers + 1) // 2 if bits == 1 else integers + (2 ** (bits - 1) - 1)).astype(np.uint8)
    planes = [(codes >> i) & 1 for i in range(bits)]
    return np.packbits(np.stack(planes, axis=1).reshape(-1), bitorder="little").tobytes()

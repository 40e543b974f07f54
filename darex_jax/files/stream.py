"""What pruning and restoring share: work on every core in order, a chunk of a tensor at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import blake3
import numpy as np

from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint, StoredTensor
from darex_jax.files.safetensors import FileError, SafetensorsFile, as_bytes

Progress = Callable[[int], None]  # called with the number of bytes that are done
Item = TypeVar("Item")
Result = TypeVar("Result")


def keep_inputs(out: str | os.PathLike[str], *inputs: Checkpoint | DeltaFile | SafetensorsFile) -> None:
    """Raises: FileError if writing `out` would replace an input, or a file of one."""
    target = Path(out).resolve()
    beside = Path(out).parent.resolve() / Path(out).name  # what is replaced, if `out` is a link
    for read in inputs:
        source = read.path.resolve()
        weights = read.files if isinstance(read, Checkpoint) else ()
        is_input = target == source or target in source.parents
        is_part = beside.parent == source and (beside.suffix != ".safetensors" or beside.name in weights)
        if is_input or (is_part and beside.exists()):
            raise FileError(f"{out}: writing this would replace {read.path}; choose another place.")


def tensor_digest(tensor: StoredTensor, progress: Progress) -> str:
    """BLAKE3 of a tensor's bytes."""
    digest = blake3.blake3()
    for chunk in tensor.chunks():
        digest.update(as_bytes(chunk))
        progress(chunk.nbytes)
    return digest.hexdigest()


def count_nonfinite(values: np.ndarray) -> int:
    """How many entries of a 1-D float array are NaN or infinite."""
    if values.dtype.itemsize == 2:  # by their bits: NumPy has no fast path for half precision
        exponent = np.uint16(0x7C00 if values.dtype == np.float16 else 0x7F80)
        return int(np.count_nonzero((values.view(np.uint16) & exponent) == exponent))
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(values, values)):  # one pass, no temporary; may overflow, never misses
            return 0
    return int(np.count_nonzero(~np.isfinite(values)))


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`pool.map` that keeps only a few results in memory at a time.

    A failure cancels what has not begun and waits for what has: when this ends, no thread works on.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * (os.cpu_count() or 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)

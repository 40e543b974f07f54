"""Streaming helpers of pruning and restoring: ordered parallel work on chunks of tensors."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import Full, Queue
from threading import Event
from typing import TypeVar

import blake3
import numpy as np

from darex_jax.core.errors import FileError
from darex_jax.core.tree import working_dtype
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import COMPANIONS, INDEX, SINGLE, Checkpoint, StoredTensor
from darex_jax.files.orbax import METADATA
from darex_jax.files.safetensors import SafetensorsFile, as_bytes

Progress = Callable[[int], None]  # called with the number of bytes processed
WAITING = 32  # buffered results per item; as chunks of tensors 128 MB of float32
Item = TypeVar("Item")
Result = TypeVar("Result")


def keep_inputs(
    out: str | os.PathLike[str], *inputs: Checkpoint | DeltaFile | SafetensorsFile | Path
) -> None:
    """Raises: FileError if writing `out` would replace an input or a file of one, or be read in its place."""
    target = Path(out).resolve()
    beside = Path(out).parent.resolve() / Path(out).name  # the link itself is replaced, if `out` is one
    for read in inputs:
        path = read if isinstance(read, Path) else read.path
        source = path.resolve()
        weights = read.files if isinstance(read, Checkpoint) else ()
        is_input = target == source or target in source.parents
        is_part = beside.parent == source and (beside.suffix != ".safetensors" or beside.name in weights)
        is_read = beside.parent == source and beside.name in (SINGLE, INDEX, METADATA, *COMPANIONS)
        if is_input or is_read or (is_part and beside.exists()):
            raise FileError(f"{out}: writing this would replace {path}; choose another path.")


def tensor_digest(tensor: StoredTensor, progress: Progress) -> str:
    """BLAKE3 of a tensor's bytes."""
    digest = blake3.blake3()
    for chunk in tensor.chunks():
        digest.update(as_bytes(chunk))
        progress(chunk.nbytes)
    return digest.hexdigest()


def count_nonfinite(values: np.ndarray) -> int:
    """How many entries of a 1-D float array are NaN or infinite."""
    if values.dtype.itemsize == 2:  # by bits: NumPy has no fast path for half precision
        exponent = np.uint16(0x7C00 if values.dtype == np.float16 else 0x7F80)
        return int(np.count_nonzero((values.view(np.uint16) & exponent) == exponent))
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(values, values)):  # one pass, no temporary; may overflow, never misses
            return 0
    return int(np.count_nonzero(~np.isfinite(values)))


def difference(fine: np.ndarray, base: np.ndarray) -> np.ndarray:
    """`fine - base`, float32, or float64 if either is."""
    dtype = working_dtype(fine.dtype, base.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        return fine.astype(dtype) - base.astype(dtype)


def in_order(
    pool: ThreadPoolExecutor, make: Callable[[Item], Iterator[Result]], items: Iterable[Item]
) -> Generator[tuple[Item, Iterator[Result]]]:
    """Runs one generator per item on the pool and yields their results in the order of the items.

    The number of buffered results is bounded: generators that are too far ahead block. Consume all results of
    an item before the next item, and close this iterator before the pool, which would otherwise wait for
    blocked generators.

    Args: make: item -> generator of results, which may not be None.
    """
    ahead = 2 * (os.cpu_count() or 1)
    room = max(1, WAITING // ahead)
    abandoned = Event()

    def put(results: Queue[Result | None], result: Result | None) -> None:
        while not abandoned.is_set():
            try:
                return results.put(result, timeout=0.1)
            except Full:
                pass

    def run(item: Item, results: Queue[Result | None]) -> None:
        try:
            for result in make(item):
                put(results, result)
                if abandoned.is_set():
                    return
        finally:
            put(results, None)

    def take(future: Future[None], results: Queue[Result | None]) -> Iterator[Result]:
        while (result := results.get()) is not None:
            yield result
        future.result()  # re-raises the generator's exception

    waiting: deque[tuple[Item, Future[None], Queue[Result | None]]] = deque()
    try:
        for item in items:
            results: Queue[Result | None] = Queue(room)
            waiting.append((item, pool.submit(run, item, results), results))
            if len(waiting) > ahead:
                item, future, results = waiting.popleft()
                yield item, take(future, results)
        while waiting:
            item, future, results = waiting.popleft()
            yield item, take(future, results)
    finally:
        abandoned.set()
        for _, future, _ in waiting:
            future.cancel()
        wait([future for _, future, _ in waiting])


def run_all(pool: ThreadPoolExecutor, function: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Runs a function on every item; no thread is still working when this returns or raises."""
    futures = [pool.submit(function, item) for item in items]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)

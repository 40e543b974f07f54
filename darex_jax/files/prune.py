"""Prune checkpoints without loading them: a chunk of a tensor at a time, on every core.

Both models are read once, but for a changed parameter out of scope, which is read again as it is copied. JAX
computes the masks; nothing else of it is used.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import blake3
import numpy as np

from darex_jax.core.errors import DarexWarning
from darex_jax.core.mask import STREAM_CHUNKS, stream_mask
from darex_jax.core.scope import Scope
from darex_jax.core.threefry import keep_threshold, numpy_leaf_key
from darex_jax.core.tree import name_words
from darex_jax.files.artifact import FORMAT, Recipe, resolve_q, tensor_line, versions, warn_of_little
from darex_jax.files.checkpoint import Checkpoint, StoredTensor, companion_files
from darex_jax.files.match import Match, match_checkpoints
from darex_jax.files.safetensors import (
    DTYPE_NAMES,
    FileError,
    as_bytes,
    atomic_file,
    element_count,
    encode_header,
    write_at,
)
from darex_jax.files.stream import Progress, count_nonfinite, in_order, keep_inputs, tensor_digest

CHUNK = STREAM_CHUNKS[0]
READ_BACK = 1 << 22  # bytes


@dataclass(frozen=True)
class PruneSummary:
    """What `prune_checkpoints` wrote."""

    recipe: Recipe
    match: Match
    survivors: int
    pruned_size: int
    file_bytes: int


@dataclass(frozen=True)
class _Seen:
    """What was noticed while the chunks of one tensor of an artifact were made; it comes after the last.

    stored: False where the base has the same bits, so that nothing is to be stored.
    changed: whether the fine-tuned model has other numbers than the base.
    """

    inexact: int = 0
    nonfinite: int = 0
    base_digest: str | None = None
    stored: bool = True
    changed: bool = True


def prune_checkpoints(
    base: Checkpoint,
    fine: Checkpoint,
    out: str | os.PathLike[str],
    *,
    key: tuple[int, int],
    drop_rate: float,
    scope: Scope,
    q: float | Mapping[str, float] | None = None,
    scope_text: str = "default",
    allow_nonfinite: bool = False,
    progress: Progress = lambda _: None,
) -> PruneSummary:
    """DARE / DAREx-q on two checkpoints: writes the artifact `out`, whole or not at all.

    Args:
      key: the two words of a Threefry key, `jax.random.key_data(key)`; (0, seed) for a seed.
      q: divisor of the survivors, a number or one by name; None is 1 - drop_rate.
    Raises: FileError if the models do not fit together, are damaged, or hold NaN or infinity (unless
      allowed); ValueError for a drop_rate or q out of range, or names of q that no parameter has.
    Warns: DarexWarning where the models differ in a way that is seldom meant, every delta is zero, nothing
      survives, or a q is below 1 - drop_rate.
    Source: DARE, arXiv:2311.03099; DAREx, arXiv:2410.09344.
    """
    keep_inputs(out, base, fine)
    match = match_checkpoints(base, fine, scope)
    match.raise_if_faulty()
    threshold = keep_threshold(drop_rate)
    q_by_name = resolve_q(q, drop_rate, match.pruned, unused=fine.tensors)

    # Widest dtype first: so every tensor of the file is aligned. Files last: they are bytes.
    work = [("values", name) for name in match.pruned]
    work += [("rows", name) for name in match.extra_rows if name in match.pruned]
    work += [("dense", name) for name in (*match.dense, *match.buffers)]
    work.sort(key=lambda item: -fine.tensors[item[1]].info.dtype.itemsize)
    files, base_files = _companions(base.path, fine.path)
    paired = set(match.base_names.values())
    base_only = [name for name in base.tensors if name not in paired]

    def make(item: tuple[str, str]) -> Iterator[np.ndarray | _Seen]:
        kind, name = item
        tensor = fine.tensors[name]
        stored = base.tensors.get(match.base_names.get(name, ""))
        if kind == "values":
            assert stored is not None
            leaf_key = numpy_leaf_key(key, name_words(name))
            return _pruned_values(leaf_key, threshold, stored, tensor, progress)
        if kind == "rows":
            return _last_rows(tensor, match.extra_rows[name])
        return _dense_values(stored, tensor, progress)

    def fingerprint_only(name: str) -> tuple[str, str]:
        return name, tensor_digest(base.tensors[name], progress)

    digests: dict[str, str] = {}
    inexact = nonfinite = survivor_count = 0
    changed = False
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    data_digest = blake3.blake3()

    def recipe() -> Recipe:
        return Recipe(
            format=FORMAT,
            method="dare" if q is None else "darex-q",
            drop_rate=float(drop_rate),
            key=key,
            scope=scope_text,
            parameters={
                name: {
                    "shape": list(base.tensors[match.base_names[name]].info.shape),
                    "q": q_by_name[name],
                    "dtype": DTYPE_NAMES[fine.tensors[name].info.dtype],
                }
                for name in match.pruned
            },
            base={
                name: {
                    "dtype": DTYPE_NAMES[tensor.info.dtype],
                    "shape": list(tensor.info.shape),
                    "blake3": digests.get(name, "0" * 64),
                }
                for name, tensor in base.tensors.items()
            },
            base_names={name: b for name, b in match.base_names.items() if name != b},
            base_only=base_only,
            inexact=inexact,
            nonfinite=nonfinite,
            versions=versions(),
            data_blake3=data_digest.hexdigest(),
            base_files=base_files,
        )

    # How many survive is known only at the end, but no header is longer than this one.
    longest = {
        f"{kind}/{name}": (fine.tensors[name].info.dtype, fine.tensors[name].info.shape)
        for kind, name in work
    }
    longest |= {f"file/{name}": (np.dtype(np.uint8), (len(content),)) for name, content in files.items()}
    longest_recipe = replace(recipe(), inexact=2**62, nonfinite=2**62)
    header_bytes = len(encode_header(longest, longest_recipe.to_metadata()))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, atomic_file(out) as file:
        position = header_bytes

        def stored_from(start: int, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
            """Notes and digests a tensor once it is written: its line, which comes first, tells its size."""
            tensors[name] = (dtype, shape)
            data_digest.update(tensor_line(name, dtype, shape))
            for at in range(start, position, READ_BACK):
                data_digest.update(os.pread(file, min(READ_BACK, position - at), at))

        with closing(in_order(pool, make, work)) as results:
            for (kind, name), parts in results:
                start, seen, info = position, _Seen(), fine.tensors[name].info
                for part in parts:
                    if isinstance(part, _Seen):
                        seen = part
                    else:
                        position = write_at(file, part, position)
                inexact += seen.inexact
                nonfinite += seen.nonfinite
                if seen.base_digest is not None:
                    digests[match.base_names[name]] = seen.base_digest
                if seen.nonfinite and not allow_nonfinite:
                    raise FileError(
                        f"'{name}' holds {seen.nonfinite} NaN or infinite entries in one of the two models; "
                        "--allow-nonfinite carries them along."
                    )
                shape = info.shape
                if kind == "values":
                    shape = ((position - start) // info.dtype.itemsize,)
                    survivor_count += shape[0]
                    changed |= seen.changed
                elif kind == "rows":
                    shape = (match.extra_rows[name], *shape[1:])
                if seen.stored:
                    stored_from(start, f"{kind}/{name}", info.dtype, shape)
        for name, content in files.items():
            start, position = position, write_at(file, content, position)
            stored_from(start, f"file/{name}", np.dtype(np.uint8), (len(content),))
        digests.update(pool.map(fingerprint_only, base_only))
        final = recipe()
        write_at(file, encode_header(tensors, final.to_metadata(), header_bytes), 0)
    for text in match.warnings:
        warnings.warn(text, DarexWarning, stacklevel=2)
    warn_of_little(drop_rate, q_by_name, same=not changed, survivors=survivor_count)
    pruned_size = sum(element_count(tuple(entry["shape"])) for entry in final.parameters.values())
    return PruneSummary(final, match, survivor_count, pruned_size, position)


def _pruned_values(
    leaf_key: np.ndarray, threshold: int, base: StoredTensor, fine: StoredTensor, progress: Progress
) -> Iterator[np.ndarray | _Seen]:
    """The survivors of one parameter, in index order; the base is fingerprinted in the same pass."""
    size, digest = base.info.size, blake3.blake3()
    inexact, nonfinite, changed = 0, 0, False
    base_buffer = np.empty(min(size, CHUNK), base.info.dtype)
    fine_buffer = np.empty(min(size, CHUNK), fine.info.dtype)
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        b, f = base_buffer[:length], fine_buffer[:length]
        base.file.read_into(base.info, start, b)
        fine.file.read_into(fine.info, start, f)
        digest.update(as_bytes(b))
        nonfinite += count_nonfinite(b) + count_nonfinite(f)
        changed = changed or not _same_numbers(b, f)
        kept = np.flatnonzero(stream_mask(leaf_key, start, length, threshold))
        kept_base, kept_fine = b[kept], f[kept]
        with np.errstate(invalid="ignore", over="ignore"):
            difference = kept_fine.astype(np.float32) - kept_base.astype(np.float32)
            stored = difference.astype(fine.info.dtype)
            exact = stored.astype(np.float64), kept_fine.astype(np.float64), kept_base.astype(np.float64)
            # Both ways round: in one of them alone a small operand can vanish in the rounding.
            inexact += int(
                np.count_nonzero((exact[0] + exact[2] != exact[1]) | (exact[1] - exact[0] != exact[2]))
            )
        yield stored
        progress(b.nbytes + f.nbytes)
    yield _Seen(inexact, nonfinite, digest.hexdigest(), changed=changed)


def _same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype == b.dtype:
        return np.array_equal(a.view(np.uint8), b.view(np.uint8))
    return np.array_equal(a.astype(np.float32), b.astype(np.float32))


def _last_rows(fine: StoredTensor, rows: int) -> Iterator[np.ndarray | _Seen]:
    """The last rows of a matrix, flat."""
    first = element_count(fine.info.shape[1:]) * (fine.info.shape[0] - rows)
    nonfinite = 0
    for start in range(first, fine.info.size, CHUNK):
        chunk = np.empty(min(CHUNK, fine.info.size - start), fine.info.dtype)
        fine.file.read_into(fine.info, start, chunk)
        nonfinite += count_nonfinite(chunk)
        yield chunk
    yield _Seen(nonfinite=nonfinite)


def _dense_values(
    base: StoredTensor | None, fine: StoredTensor, progress: Progress
) -> Iterator[np.ndarray | _Seen]:
    """A parameter out of scope: whole if its bits are not the base's, else not at all."""
    nonfinite, digest = 0, blake3.blake3()
    twin = base is not None and (base.info.dtype, base.info.shape) == (fine.info.dtype, fine.info.shape)
    base_chunks = base.chunks() if base is not None and twin else None
    same = twin
    for chunk in fine.chunks():
        nonfinite += count_nonfinite(chunk) if fine.floating else 0
        progress(chunk.nbytes)
        if base_chunks is not None:
            original = next(base_chunks)
            digest.update(as_bytes(original))
            same = same and np.array_equal(original.view(np.uint8), chunk.view(np.uint8))
            progress(original.nbytes)
    if not same:
        for chunk in fine.chunks():
            yield chunk.copy()  # the next one is read into the same memory
    base_digest = None
    if base is not None:
        base_digest = digest.hexdigest() if twin else tensor_digest(base, progress)
    yield _Seen(nonfinite=nonfinite, base_digest=base_digest, stored=not same)


def _companions(base: Path, fine: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The fine-tune's configuration and tokenizer files that the base does not have alike, and the digests of
    the others of the base, which the restored model takes over."""
    ours = {file.name: file.read_bytes() for file in companion_files(base)}
    theirs = {file.name: file.read_bytes() for file in companion_files(fine)}
    changed = {name: content for name, content in theirs.items() if ours.get(name) != content}
    taken = {
        name: blake3.blake3(content).hexdigest() for name, content in ours.items() if name not in changed
    }
    return changed, taken

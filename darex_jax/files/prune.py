"""Prune checkpoints without loading them: a chunk of a tensor at a time, on every core.

Both models are read once, but for a changed parameter out of scope, which is read again as it is copied. JAX
computes the masks; nothing else of it is used.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import blake3
import numpy as np

from darex_jax.core.mask import STREAM_CHUNKS, stream_mask
from darex_jax.core.scope import Scope
from darex_jax.core.threefry import keep_threshold, numpy_leaf_key
from darex_jax.core.tree import name_words
from darex_jax.files.artifact import FORMAT, Recipe, resolve_q, tensor_line, versions
from darex_jax.files.atomic import atomic_file
from darex_jax.files.checkpoint import Checkpoint, StoredTensor, companion_files
from darex_jax.files.match import Match, match_checkpoints
from darex_jax.files.paths import read_bytes
from darex_jax.files.safetensors import (
    DTYPE_NAMES,
    FileError,
    as_bytes,
    element_count,
    encode_header,
    write_at,
)
from darex_jax.files.stream import Progress, count_nonfinite, in_order, keep_inputs, tensor_digest

CHUNK = STREAM_CHUNKS[0]


@dataclass(frozen=True)
class PruneSummary:
    """What `prune_checkpoints` wrote."""

    recipe: Recipe
    match: Match
    survivors: int
    pruned_size: int
    file_bytes: int


@dataclass(frozen=True)
class _Piece:
    """One tensor of an artifact, and what was noticed on the way.

    `data` is ready, or still a stored tensor to be copied; None where the base has the same bits.
    """

    name: str
    data: np.ndarray | StoredTensor | None
    inexact: int = 0
    nonfinite: int = 0
    base_digest: str | None = None


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
      allowed); ValueError for a drop_rate or q out of range.
    Source: DARE, arXiv:2311.03099; DAREx, arXiv:2410.09344.
    """
    keep_inputs(out, base, fine)
    match = match_checkpoints(base, fine, scope)
    match.raise_if_faulty()
    threshold = keep_threshold(drop_rate)
    q_by_name = resolve_q(q, drop_rate, match.pruned)

    # Widest dtype first: so every tensor of the file is aligned. Files last: they are bytes.
    work = [("values", name) for name in match.pruned]
    work += [("rows", name) for name in match.extra_rows if name in match.pruned]
    work += [("dense", name) for name in (*match.dense, *match.buffers)]
    work.sort(key=lambda item: -fine.tensors[item[1]].info.dtype.itemsize)
    files = _changed_companions(base.path, fine.path)
    base_only = [name for name in base.tensors if name not in set(match.base_names.values())]

    def make(item: tuple[str, str]) -> _Piece:
        kind, name = item
        tensor = fine.tensors[name]
        stored = base.tensors.get(match.base_names.get(name, ""))
        if kind == "values":
            assert stored is not None
            leaf_key = numpy_leaf_key(key, name_words(name))
            return _pruned_values(name, leaf_key, threshold, stored, tensor, progress)
        if kind == "rows":
            first = element_count(tensor.info.shape[1:]) * (tensor.info.shape[0] - match.extra_rows[name])
            rows = np.empty(tensor.info.size - first, tensor.info.dtype)
            tensor.file.read_into(tensor.info, first, rows)
            return _Piece(f"rows/{name}", rows.reshape(match.extra_rows[name], -1))
        return _dense_values(name, stored, tensor, progress)

    def fingerprint_only(name: str) -> tuple[str, str]:
        return name, tensor_digest(base.tensors[name], progress)

    digests: dict[str, str] = {}
    inexact = nonfinite = survivor_count = 0
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
                name: {"shape": list(base.tensors[match.base_names[name]].info.shape), "q": q_by_name[name]}
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

        def append(name: str, data: np.ndarray | StoredTensor) -> int:
            info, chunks = (data.info, data.chunks()) if isinstance(data, StoredTensor) else (data, (data,))
            tensors[name] = (info.dtype, info.shape)
            data_digest.update(tensor_line(name, info.dtype, info.shape))
            end = position
            for chunk in chunks:
                data_digest.update(as_bytes(chunk))
                end = write_at(file, chunk, end)
            return end

        for piece in in_order(pool, make, work):
            inexact += piece.inexact
            nonfinite += piece.nonfinite
            kind, name = piece.name.split("/", 1)
            if piece.base_digest is not None:
                digests[match.base_names[name]] = piece.base_digest
            if piece.nonfinite and not allow_nonfinite:
                raise FileError(
                    f"'{name}' holds {piece.nonfinite} NaN or infinite entries in one of the two models; "
                    "--allow-nonfinite carries them along."
                )
            if piece.data is not None:
                position = append(piece.name, piece.data)
                survivor_count += tensors[piece.name][1][0] if kind == "values" else 0
        for name, content in files.items():
            position = append(f"file/{name}", np.frombuffer(content, np.uint8))
        digests.update(in_order(pool, fingerprint_only, base_only))
        final = recipe()
        write_at(file, encode_header(tensors, final.to_metadata(), header_bytes), 0)
    pruned_size = sum(element_count(tuple(entry["shape"])) for entry in final.parameters.values())
    return PruneSummary(final, match, survivor_count, pruned_size, position)


def _pruned_values(
    name: str,
    leaf_key: np.ndarray,
    threshold: int,
    base: StoredTensor,
    fine: StoredTensor,
    progress: Progress,
) -> _Piece:
    """The survivors of one parameter, in index order; the base is fingerprinted in the same pass."""
    size, digest = base.info.size, blake3.blake3()
    values, inexact, nonfinite = [], 0, 0
    base_buffer = np.empty(min(size, CHUNK), base.info.dtype)
    fine_buffer = np.empty(min(size, CHUNK), fine.info.dtype)
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        b, f = base_buffer[:length], fine_buffer[:length]
        base.file.read_into(base.info, start, b)
        fine.file.read_into(fine.info, start, f)
        digest.update(as_bytes(b))
        nonfinite += count_nonfinite(b) + count_nonfinite(f)
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
        values.append(stored)
        progress(b.nbytes + f.nbytes)
    data = np.concatenate(values) if values else np.empty(0, fine.info.dtype)
    return _Piece(f"values/{name}", data, inexact, nonfinite, digest.hexdigest())


def _dense_values(name: str, base: StoredTensor | None, fine: StoredTensor, progress: Progress) -> _Piece:
    """A parameter out of scope: to be copied whole if its bits are not the base's."""
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
    data = None if same else fine
    if base is None:
        return _Piece(f"dense/{name}", data, nonfinite=nonfinite)
    base_digest = digest.hexdigest() if twin else tensor_digest(base, progress)
    return _Piece(f"dense/{name}", data, nonfinite=nonfinite, base_digest=base_digest)


def _changed_companions(base: Path, fine: Path) -> dict[str, bytes]:
    """The fine-tune's configuration and tokenizer files that the base does not have alike."""
    if not fine.is_dir():
        return {}
    changed = {}
    for file in companion_files(fine):
        content, twin = read_bytes(file), base / file.name
        if not (twin.exists() and read_bytes(twin) == content):
            changed[file.name] = content
    return changed

"""Prunes checkpoints without loading them: one chunk of a tensor at a time, on all cores.

Both models are read once, except that changed parameters out of scope are read again when they are copied.
JAX is used for DARE's masks only. Other methods get the delta of one parameter at a time, or all deltas if
they compare parameters with each other.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from darex_jax.core.divisor import resolve_q
from darex_jax.core.errors import DarexWarning, FileError
from darex_jax.core.mask import stream_mask
from darex_jax.core.scope import Scope
from darex_jax.core.threefry import keep_threshold, numpy_leaf_key
from darex_jax.core.tree import name_words, working_dtype
from darex_jax.files.artifact import PARTS, RECIPE
from darex_jax.files.atomic import atomic_file
from darex_jax.files.blocks import BLOCK_NUMBERS, numbers_in, pack
from darex_jax.files.checkpoint import Checkpoint, StoredTensor, companion_contents, with_inherited
from darex_jax.files.coding import coder_versions, compress
from darex_jax.files.match import Match, match_checkpoints
from darex_jax.files.recipe import (
    CUT,
    Recipe,
    fingerprint,
    is_name,
    tensor_line,
    versions,
    warn_of_little,
)
from darex_jax.files.safetensors import (
    CHUNK,
    DTYPE_NAMES,
    MAX_HEADER,
    as_bytes,
    element_count,
    encode_header,
    write_at,
)
from darex_jax.files.stream import Progress, count_nonfinite, difference, in_order, keep_inputs, tensor_digest
from darex_jax.parts.total import Parts

READ_BACK = 1 << 22  # bytes


@dataclass(frozen=True)
class Job:
    """The inputs and output of a pruning run, for all methods.

    Attributes:
      base, fine: the open checkpoints.
      out: path of the artifact, written atomically.
      scope: which parameters are pruned; scope_text: its description in the artifact.
      allow_nonfinite: keep NaN and infinity instead of refusing them.
      rename: fine-tuned name -> base name, see `match_checkpoints`.
      progress: called with the number of bytes read.
    """

    base: Checkpoint
    fine: Checkpoint
    out: str | os.PathLike[str]
    scope: Scope
    scope_text: str = "default"
    allow_nonfinite: bool = False
    progress: Progress = lambda _: None
    rename: Callable[[str], str] | None = None

    def match(self) -> Match:
        """Pairs the parameters. Raises: FileError if the models do not match."""
        match = match_checkpoints(self.base, self.fine, self.scope, self.rename)
        match.raise_if_faulty()
        return match


@dataclass(frozen=True)
class PruneSummary:
    """Summary of a written artifact. survivors: of DARE; for other methods the stored numbers."""

    recipe: Recipe
    match: Match
    survivors: int
    pruned_size: int
    file_bytes: int


@dataclass(frozen=True)
class _Statistics:
    """Statistics collected while one tensor of an artifact is made; yielded after the last chunk.

    stored: False if the base has the same bits, so that nothing is stored.
    changed: whether the values differ from the base's.
    """

    inexact: int = 0
    nonfinite: int = 0
    base_digest: str | None = None
    stored: bool = True
    changed: bool = True


@dataclass
class _Written:
    """The state of an artifact while it is written."""

    digests: dict[str, str] = field(default_factory=dict)  # of the base's tensors
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    inexact: int = 0
    nonfinite: int = 0
    survivors: int = 0
    changed: bool = False
    data_blake3: str = "0" * 64


Piece = np.ndarray | Parts | _Statistics


def prune_checkpoints(
    job: Job, *, key: tuple[int, int], drop_rate: float, q: float | Mapping[str, float] | None = None
) -> PruneSummary:
    """DARE / DAREx-q on two checkpoints: writes the artifact in format 1.

    Args:
      key: the two words of a Threefry key, `jax.random.key_data(key)`; (0, seed) for a seed.
      q: divisor of the survivors, a number or one by name; None is 1 - drop_rate.
    Raises: FileError if the models do not match, are damaged, or have NaN or infinity (unless allowed);
      ValueError for a drop_rate or q out of range, or names of q that no parameter has.
    Warns: DarexWarning if the models differ in an unusual way, every delta is zero, nothing survives, or a q
      is below 1 - drop_rate.
    Source: DARE, arXiv:2311.03099; DAREx, arXiv:2410.09344.
    """
    keep_inputs(job.out, job.base, job.fine)
    match = job.match()
    threshold = keep_threshold(drop_rate)
    q_by_name = resolve_q(q, drop_rate, match.pruned, unused=job.fine.tensors)

    def make(name: str) -> Iterator[Piece]:
        stored, leaf_key = job.base.tensors[match.base_names[name]], numpy_leaf_key(key, name_words(name))
        return _pruned_values(leaf_key, threshold, stored, job.fine.tensors[name], job.progress)

    def recipe(common: dict[str, Any], written: _Written) -> Recipe:
        parameters = {name: entry | {"q": q_by_name[name]} for name, entry in common["parameters"].items()}
        method = "dare" if q is None else "darex-q"
        own = {"format": 1, "method": method, "drop_rate": float(drop_rate), "parameters": parameters}
        return Recipe(**(common | own | {"key": key, "scope": job.scope_text}))

    recipe_of, written, size = _write(job, match, "values", make, recipe)
    warn_of_little(drop_rate, q_by_name, same=not written.changed, survivors=written.survivors)
    return _summary(recipe_of, match, written, size)


def prune_parts(
    job: Job,
    make_parts: Callable[[dict[str, np.ndarray]], dict[str, Parts]],
    *,
    leafwise: bool,
    made_by: Mapping[str, Any],
) -> PruneSummary:
    """Any method on two checkpoints: writes the artifact in format 2.

    Args:
      make_parts: float32 deltas by name -> their parts.
      leafwise: whether it can be called with one delta at a time; otherwise all are held in memory.
      made_by: `method`, `key` (from which random masks are recomputed), `budget`, `options` and `evidence` of
        the file's `Recipe`.
    Raises, Warns: as `prune_checkpoints`.
    """
    keep_inputs(job.out, job.base, job.fine)
    match = job.match()

    def delta_of(name: str) -> tuple[np.ndarray, _Statistics]:
        found = _delta(job.base.tensors[match.base_names[name]], job.fine.tensors[name], job.progress)
        _check_finite(job, name, found[1])
        return found

    together: dict[str, Parts] = {}
    noticed: dict[str, _Statistics] = {}
    if not leafwise:
        deltas = {}
        for name in match.pruned:
            deltas[name], noticed[name] = delta_of(name)
        together = make_parts(deltas)
        del deltas

    def make(name: str) -> Iterator[Piece]:
        if leafwise:
            delta, statistics = delta_of(name)
            yield make_parts({name: delta})[name]
            yield statistics
        else:
            yield together[name]
            yield noticed[name]

    def recipe(common: dict[str, Any], written: _Written) -> Recipe:
        whole = common["base"]
        cut = {name: entry | {"blake3": entry["blake3"][:CUT]} for name, entry in whole.items()}
        own = {
            "format": 2, "drop_rate": None, "scope": job.scope_text, "base": cut,
            "blocks": written.blocks, "base_blake3": fingerprint(whole),
            "versions": common["versions"] | coder_versions(),
        }  # fmt: skip
        return Recipe(**(common | own), **made_by)

    recipe_of, written, size = _write(job, match, PARTS, make, recipe)
    if not written.changed:
        text = "every delta is zero: the two models are equal in all pruned parameters."
        warnings.warn(text, DarexWarning, stacklevel=2)
    return _summary(recipe_of, match, written, size)


def _summary(recipe: Recipe, match: Match, written: _Written, file_bytes: int) -> PruneSummary:
    for text in match.warnings:
        warnings.warn(text, DarexWarning, stacklevel=3)
    pruned_size = sum(element_count(tuple(entry["shape"])) for entry in recipe.parameters.values())
    return PruneSummary(recipe, match, written.survivors, pruned_size, file_bytes)


def _write(
    job: Job,
    match: Match,
    pruned_kind: str,
    make_pruned: Callable[[str], Iterator[Piece]],
    make_recipe: Callable[[dict[str, Any], _Written], Recipe],
) -> tuple[Recipe, _Written, int]:
    """Writes an artifact: pruned parameters from `make_pruned`, all others whole if they changed.

    Returns: its recipe, statistics, and the file size.
    """
    base, fine, progress = job.base, job.fine, job.progress
    # Widest dtype first, so that every tensor is aligned. Coded parts and files (bytes) come last.
    work = [("rows", name) for name in match.extra_rows if name in match.pruned]
    work += [("dense", name) for name in (*match.dense, *match.buffers)]
    work += [(pruned_kind, name) for name in match.pruned] if pruned_kind != PARTS else []
    work.sort(key=lambda item: -fine.tensors[item[1]].info.dtype.itemsize)
    restored = sorted(match.pruned, key=lambda name: (-fine.tensors[name].info.dtype.itemsize, name))
    work += [(PARTS, name) for name in restored] if pruned_kind == PARTS else []
    files, base_files = _companions(base.path, fine.path)
    paired = set(match.base_names.values())
    base_only = [name for name in base.tensors if name not in paired]
    written = _Written()

    def make(item: tuple[str, str]) -> Iterator[Piece]:
        kind, name = item
        if kind == pruned_kind:
            return make_pruned(name)
        if kind == "rows":
            return _last_rows(fine.tensors[name], match.extra_rows[name])
        return _dense_values(base.tensors.get(match.base_names.get(name, "")), fine.tensors[name], progress)

    def fingerprint_only(name: str) -> tuple[str, str]:
        return name, tensor_digest(base.tensors[name], progress)

    def recipe() -> Recipe:
        common = {
            "parameters": {
                name: {
                    "shape": list(base.tensors[match.base_names[name]].info.shape),
                    "dtype": DTYPE_NAMES[fine.tensors[name].info.dtype],
                }
                for name in match.pruned
            },
            "base": {
                name: {
                    "dtype": DTYPE_NAMES[tensor.info.dtype],
                    "shape": list(tensor.info.shape),
                    "blake3": written.digests.get(name, "0" * 64),
                }
                for name, tensor in base.tensors.items()
            },
            "base_names": {name: b for name, b in match.base_names.items() if name != b},
            "base_only": base_only, "inexact": written.inexact, "nonfinite": written.nonfinite,
            "versions": versions(), "data_blake3": written.data_blake3, "base_files": base_files,
        }  # fmt: skip
        return make_recipe(common, written)

    # The number of stored values is known only at the end; this is the longest possible header.
    longest = {
        f"{kind}/{name}": (fine.tensors[name].info.dtype, fine.tensors[name].info.shape or (1,))
        for kind, name in work
        if kind != PARTS
    }
    longest |= {f"file/{name}": (np.dtype(np.uint8), (len(content),)) for name, content in files.items()}
    if pruned_kind == PARTS:
        longest |= {name: (np.dtype(np.uint8), (2**48,)) for name in (PARTS, RECIPE)}
    if invalid := next((name for name in longest if not is_name(name)), None):
        raise FileError(f"{invalid[:80]!a} is not a valid tensor name in a file.")
    most = replace(recipe(), inexact=2**62, nonfinite=2**62)
    header_bytes = len(_checked(encode_header(longest, most.to_metadata())))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, atomic_file(job.out) as file:
        position, data_digest = header_bytes, blake3.blake3()
        block: dict[str, Parts] = {}
        parts_start: int | None = None

        def stored_from(start: int, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
            """Registers and hashes a tensor after it is written: its line, hashed first, contains its
            size."""
            written.tensors[name] = (dtype, shape)
            data_digest.update(tensor_line(name, dtype, shape))
            for at in range(start, position, READ_BACK):
                data_digest.update(os.pread(file, min(READ_BACK, position - at), at))

        def write_block() -> int:
            entry, data = pack(block)
            digest = blake3.blake3(data).hexdigest()
            written.blocks.append(entry | {"bytes": len(data), "blake3": digest})
            block.clear()
            return write_at(file, data, position)

        with closing(in_order(pool, make, work)) as results:
            for (kind, name), pieces in results:
                start, statistics, info = position, _Statistics(), fine.tensors[name].info
                parts_start = position if kind == PARTS and parts_start is None else parts_start
                for piece in pieces:
                    if isinstance(piece, _Statistics):
                        statistics = piece
                    elif isinstance(piece, Parts):
                        block[name] = piece
                    else:
                        position = write_at(file, piece, position)
                written.inexact += statistics.inexact
                written.nonfinite += statistics.nonfinite
                if statistics.base_digest is not None:
                    written.digests[match.base_names[name]] = statistics.base_digest
                _check_finite(job, name, statistics)
                if kind == PARTS:
                    written.survivors += numbers_in(block[name])
                    written.changed |= statistics.changed
                    if sum(map(numbers_in, block.values())) >= BLOCK_NUMBERS:
                        position = write_block()
                    continue
                shape = info.shape
                if kind == "values":
                    shape = ((position - start) // info.dtype.itemsize,)
                    written.survivors += shape[0]
                    written.changed |= statistics.changed
                elif kind == "rows":
                    shape = (match.extra_rows[name], *shape[1:])
                if statistics.stored:
                    stored_from(start, f"{kind}/{name}", info.dtype, shape)
        if block:
            position = write_block()
        if parts_start is not None:
            stored_from(parts_start, PARTS, np.dtype(np.uint8), (position - parts_start,))
        for name, content in files.items():
            start, position = position, write_at(file, content, position)
            stored_from(start, f"file/{name}", np.dtype(np.uint8), (len(content),))
        written.digests.update(pool.map(fingerprint_only, base_only))
        written.data_blake3 = data_digest.hexdigest()
        final = recipe()
        if final.format == 2:
            data = compress(_checked(final.to_json().encode()))
            written.tensors[RECIPE] = (np.dtype(np.uint8), (len(data),))
            position = write_at(file, data, position)
        write_at(file, encode_header(written.tensors, final.to_metadata(), header_bytes), 0)
    return final, written, position


def _check_finite(job: Job, name: str, statistics: _Statistics) -> None:
    if statistics.nonfinite and not job.allow_nonfinite:
        raise FileError(
            f"'{name}' has {statistics.nonfinite} NaN or infinite entries in one of the models; "
            "darex prune --allow-nonfinite keeps them."
        )


def _checked(text: bytes) -> bytes:
    """Raises: FileError for a header or a recipe longer than readers take."""
    if len(text) > MAX_HEADER:
        raise FileError(
            f"the models have too many tensors for one artifact: its list of them has {len(text):,} bytes."
        )
    return text


class _Pair:
    """Reads a parameter of both models in chunks and collects statistics."""

    def __init__(self, base: StoredTensor, fine: StoredTensor, progress: Progress):
        self._base, self._fine, self._progress = base, fine, progress
        self._digest, self._nonfinite, self._changed = blake3.blake3(), 0, False

    def stretches(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """`(start, base entries, fine-tuned entries)` per chunk; the arrays are reused."""
        start = 0
        # Both are cut at the same entries; the fine-tuned model may have more rows.
        for b, longer in zip(self._base.chunks(), self._fine.chunks(), strict=False):
            f = longer[: len(b)]
            self._digest.update(as_bytes(b))
            self._nonfinite += count_nonfinite(b) + count_nonfinite(f)
            self._changed = self._changed or not _same_numbers(b, f)
            yield start, b, f
            start += len(b)
            self._progress(b.nbytes + f.nbytes)

    def statistics(self, inexact: int = 0) -> _Statistics:
        return _Statistics(inexact, self._nonfinite, self._digest.hexdigest(), changed=self._changed)


def _delta(base: StoredTensor, fine: StoredTensor, progress: Progress) -> tuple[np.ndarray, _Statistics]:
    """`fine - base` for the rows that both have, rounded once to float32, and statistics."""
    pair, delta = _Pair(base, fine, progress), np.empty(base.info.size, np.float32)
    for start, b, f in pair.stretches():
        with np.errstate(invalid="ignore", over="ignore"):
            delta[start : start + len(b)] = difference(f, b)
    return delta.reshape(base.info.shape), pair.statistics()


def _pruned_values(
    leaf_key: np.ndarray, threshold: int, base: StoredTensor, fine: StoredTensor, progress: Progress
) -> Iterator[np.ndarray | _Statistics]:
    """The survivors of one parameter, in index order; hashes the base in the same pass."""
    pair, inexact = _Pair(base, fine, progress), 0
    for start, b, f in pair.stretches():
        kept = np.flatnonzero(stream_mask(leaf_key, start, len(b), threshold))
        kept_base, kept_fine = b[kept], f[kept]
        with np.errstate(invalid="ignore", over="ignore"):
            stored = difference(kept_fine, kept_base).astype(fine.info.dtype)
            exact = stored.astype(np.float64), kept_fine.astype(np.float64), kept_base.astype(np.float64)
            # Checked in both directions: in one alone a small operand can vanish in the rounding.
            inexact += int(
                np.count_nonzero((exact[0] + exact[2] != exact[1]) | (exact[1] - exact[0] != exact[2]))
            )
        yield stored
    yield pair.statistics(inexact)


def _same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype == b.dtype:
        return np.array_equal(a.view(np.uint8), b.view(np.uint8))
    dtype = working_dtype(a.dtype, b.dtype)
    return np.array_equal(a.astype(dtype), b.astype(dtype))


def _last_rows(fine: StoredTensor, rows: int) -> Iterator[np.ndarray | _Statistics]:
    """The last rows of a matrix, flat."""
    first = element_count(fine.info.shape[1:]) * (fine.info.shape[0] - rows)
    nonfinite = 0
    for start in range(first, fine.info.size, CHUNK):
        chunk = np.empty(min(CHUNK, fine.info.size - start), fine.info.dtype)
        fine.file.read_into(fine.info, start, chunk)
        nonfinite += count_nonfinite(chunk)
        yield chunk
    yield _Statistics(nonfinite=nonfinite)


def _dense_values(
    base: StoredTensor | None, fine: StoredTensor, progress: Progress
) -> Iterator[np.ndarray | _Statistics]:
    """A parameter out of scope: whole if its bits differ from the base's, else nothing."""
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
            yield chunk.copy()  # the buffer is reused for the next chunk
    base_digest = None
    if base is not None:
        base_digest = digest.hexdigest() if twin else tensor_digest(base, progress)
    yield _Statistics(nonfinite=nonfinite, base_digest=base_digest, stored=not same)


def _companions(base: Path, fine: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The companion files of the fine-tuned model that differ from the base's, and digests of those that the
    restored model takes from the base."""
    ours = companion_contents(base)
    whole = with_inherited(companion_contents(fine), ours)
    changed = {name: content for name, content in whole.items() if ours.get(name) != content}
    taken = {
        name: blake3.blake3(whole[name]).hexdigest() for name in ours if name in whole.keys() - changed.keys()
    }
    return changed, taken

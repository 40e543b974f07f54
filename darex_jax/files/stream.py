"""Prune, apply and verify checkpoints without loading them: a chunk of a tensor at a time, on every core.

Every byte of both models is read once. JAX computes the masks; nothing else of it is used.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import blake3
import numpy as np

from darex_jax.core.mask import STREAM_CHUNKS, stream_mask
from darex_jax.core.scope import Scope
from darex_jax.core.threefry import keep_threshold, numpy_leaf_key
from darex_jax.core.tree import name_words
from darex_jax.files.artifact import FORMAT, DeltaFile, Recipe, resolve_q, tensor_line, versions
from darex_jax.files.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    StoredTensor,
    atomic_directory,
    companion_files,
)
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

CHUNK = STREAM_CHUNKS[0]
Progress = Callable[[int], None]  # called with the number of bytes that are done
Layout = dict[str, dict[str, tuple[np.dtype, tuple[int, ...]]]]  # file -> name -> (dtype, shape)
Item = TypeVar("Item")
Result = TypeVar("Result")


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
    _keep_inputs(out, base, fine)
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
        return name, _digest(base.tensors[name], progress)

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

        for piece in _in_order(pool, make, work):
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
        digests.update(_in_order(pool, fingerprint_only, base_only))
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
    base_digest = digest.hexdigest() if twin else _digest(base, progress)
    return _Piece(f"dense/{name}", data, nonfinite=nonfinite, base_digest=base_digest)


def _digest(tensor: StoredTensor, progress: Progress) -> str:
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


def apply_artifact(
    base: Checkpoint,
    delta: DeltaFile,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> int:
    """`base + delta` as a complete Hugging Face directory, sharded like the base. Returns the bytes written.

    The directory appears whole or not at all; it is not forced to the disk, since base and delta restore it.

    Raises: FileError if the base is not the one the delta was made from (the first tensor that differs is
      named), or if the artifact is damaged.
    """
    _keep_inputs(out, base, delta)
    _check_same_tensors(base, delta)
    outputs = restored_layout(base, delta)
    with atomic_directory(out, overwrite) as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        restore_companions(base.path, delta, folder)
        total = 0
        data_check = pool.submit(delta.check_data)
        for file_name, tensors in outputs.items():
            header = encode_header(tensors, {"format": "pt"})
            offsets, position = {}, len(header)
            for name, (dtype, shape) in tensors.items():
                offsets[name] = position
                position += element_count(shape) * dtype.itemsize
            file = os.open(folder / file_name, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                write_at(file, header, 0)

                def write(name: str, file: int = file, offsets: dict[str, int] = offsets) -> None:
                    position = offsets[name]
                    for chunk in _restored_chunks(name, base, delta, progress):
                        position = write_at(file, chunk, position)

                for _ in _in_order(pool, write, tensors):
                    pass
            finally:
                os.close(file)
            total += position - len(header)
        unused = _unused(base, delta, outputs)
        for name, digest in zip(
            unused, pool.map(lambda n: _digest(base.tensors[n], progress), unused), strict=True
        ):
            _check_digest(delta, name, digest)
        data_check.result()
        if len(outputs) > 1:
            weight_map = {name: file_name for file_name, tensors in outputs.items() for name in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def _unused(base: Checkpoint, delta: DeltaFile, layout: Layout) -> list[str]:
    """The base's tensors that no restored parameter is made from."""
    used = {delta.base_name(name) for tensors in layout.values() for name in tensors}
    return [name for name in base.tensors if name not in used]


def restored_layout(base: Checkpoint, delta: DeltaFile) -> Layout:
    """`{file: {name: (dtype, shape)}}` of the restored model, every file as the base has it."""
    renamed = {b: name for name, b in delta.recipe.base_names.items()}
    dense, pruned = set(delta.names("dense")), delta.recipe.parameters
    layout: Layout = {}
    for source, file in base.files.items():
        file_name = SINGLE if base.path.is_file() else source
        layout[file_name] = {}
        for base_name, tensor in base.tensors.items():
            if tensor.file is not file:
                continue
            name = renamed.get(base_name, base_name)
            shape = tensor.info.shape
            if name in dense:
                info = delta.tensors[f"dense/{name}"]
                layout[file_name][name] = (info.dtype, info.shape)
            elif name in pruned:
                rows = delta.tensors.get(f"rows/{name}")
                more = rows.shape[0] if rows is not None else 0
                layout[file_name][name] = (
                    tensor.info.dtype,
                    (shape[0] + more, *shape[1:]) if shape else shape,
                )
            elif base_name not in delta.recipe.base_only:
                layout[file_name][name] = (tensor.info.dtype, shape)
    placed = {name for tensors in layout.values() for name in tensors}
    last = list(layout)[-1]
    for name in sorted(dense - placed):
        info = delta.tensors[f"dense/{name}"]
        layout[last][name] = (info.dtype, info.shape)
    return {
        file_name: dict(sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
        for file_name, tensors in layout.items()
        if tensors
    }


def restore_companions(base: Path, delta: DeltaFile, folder: Path) -> None:
    """Writes the restored model's companion files: the base's, and over them those the delta carries."""
    for source in companion_files(base):
        (folder / source.name).write_bytes(source.read_bytes())
    for name in delta.names("file"):
        (folder / name).write_bytes(delta.read(f"file/{name}").tobytes())


def _keep_inputs(out: str | os.PathLike[str], *inputs: Checkpoint | DeltaFile) -> None:
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


def restored_params(base: Checkpoint, delta: DeltaFile) -> Iterator[tuple[str, np.ndarray]]:
    """`base + delta` in memory, one parameter at a time: the very bits that `apply_artifact` writes.

    Yields: (name, array), a fresh array each, in the base's dtypes and layouts.
    Raises: FileError as `apply_artifact`; what was yielded before is then not to be used.
    """
    _check_same_tensors(base, delta)
    layout = restored_layout(base, delta)
    for tensors in layout.values():
        for name, (dtype, shape) in tensors.items():
            array, start = np.empty(element_count(shape), dtype), 0
            for chunk in _restored_chunks(name, base, delta, lambda _: None):
                array[start : start + chunk.size] = chunk
                start += chunk.size
            yield name, array.reshape(shape)
    for name in _unused(base, delta, layout):
        _check_digest(delta, name, _digest(base.tensors[name], lambda _: None))
    delta.check_data()


def _restored_chunks(
    name: str, base: Checkpoint, delta: DeltaFile, progress: Progress
) -> Iterator[np.ndarray]:
    """One parameter of the restored model in pieces; the base's tensor is checked on the way."""
    base_name = delta.base_name(name)
    stored = base.tensors.get(base_name)
    if stored is not None and base_name in delta.recipe.base:
        digest = blake3.blake3()
        pruned = name in delta.recipe.parameters
        dense = f"dense/{name}" in delta.tensors
        chunks = _summed_chunks(name, stored, delta, digest) if pruned else _hashed_chunks(stored, digest)
        for chunk in chunks:
            progress(2 * chunk.nbytes)
            if not dense:
                yield chunk
        _check_digest(delta, base_name, digest.hexdigest())
    for kind in ("dense", "rows"):
        if info := delta.tensors.get(f"{kind}/{name}"):
            for chunk in delta.chunks(info):
                yield chunk.astype(stored.info.dtype) if kind == "rows" and stored is not None else chunk


def _hashed_chunks(stored: StoredTensor, digest: Any) -> Iterator[np.ndarray]:
    for chunk in stored.chunks():
        digest.update(as_bytes(chunk))
        yield chunk


def _summed_chunks(name: str, stored: StoredTensor, delta: DeltaFile, digest: Any) -> Iterator[np.ndarray]:
    """base + values / q, chunk by chunk: the same float32 arithmetic as `prune` then `apply_delta`."""
    info = delta.tensors[f"values/{name}"]
    leaf_key = numpy_leaf_key(delta.recipe.key, name_words(name))
    scale = np.float32(1.0) / np.float32(delta.recipe.parameters[name]["q"])
    start = used = 0
    for chunk in _hashed_chunks(stored, digest):
        kept = np.flatnonzero(stream_mask(leaf_key, start, len(chunk), delta.threshold()))
        if used + len(kept) > info.size:
            raise FileError(f"{delta.path}: '{name}' has fewer values than its mask has survivors.")
        values = np.empty(len(kept), info.dtype)
        delta.read_into(info, used, values)
        with np.errstate(invalid="ignore", over="ignore"):
            pruned = values.astype(np.float32) * scale
            kept_base = chunk[kept]
            total = (kept_base.astype(np.float32) + pruned).astype(chunk.dtype)
        if not delta.recipe.nonfinite and count_nonfinite(total):
            q = delta.recipe.parameters[name]["q"]
            raise FileError(
                f"'{name}' does not fit {chunk.dtype} once its delta is divided by q = {q:g}; prune with a "
                "larger --q, or models in a wider dtype."
            )
        chunk[kept] = np.where(pruned == 0, kept_base, total)
        start, used = start + len(chunk), used + len(kept)
        yield chunk
    if used != info.size:
        raise FileError(f"{delta.path}: '{name}' has more values than its mask has survivors.")


def _check_same_tensors(base: Checkpoint, delta: DeltaFile) -> None:
    """The cheap part of the fingerprint, before any weight is read."""
    for name, entry in delta.recipe.base.items():
        stored = base.tensors.get(name)
        if stored is None:
            raise FileError(f"{base.path} is not the base of {delta.path}: it has no '{name}'.")
        found = DTYPE_NAMES[stored.info.dtype], list(stored.info.shape)
        if found != (entry["dtype"], list(entry["shape"])):
            raise FileError(
                f"{base.path} is not the base of {delta.path}: '{name}' is {found[0]} {found[1]}, "
                f"the delta was made from {entry['dtype']} {entry['shape']}."
            )
    for name in base.tensors:
        if name not in delta.recipe.base:
            raise FileError(
                f"{base.path} is not the base of {delta.path}: '{name}' is not in the delta's base."
            )


def _check_digest(delta: DeltaFile, base_name: str, digest: str) -> None:
    if delta.recipe.base[base_name]["blake3"] != digest:
        raise FileError(
            f"this is not the base that {delta.path} was made from: '{base_name}' holds other numbers."
        )


def verify_artifact(
    delta: DeltaFile, base: Checkpoint | None = None, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Digests, the mask again from its key, and with `base` its fingerprint.

    Returns: what was checked. Raises: FileError naming the first thing that is wrong.
    """
    delta.check_data()
    threshold, entries = delta.threshold(), 0
    for name, entry in delta.recipe.parameters.items():
        size = element_count(tuple(entry["shape"]))
        leaf_key = numpy_leaf_key(delta.recipe.key, name_words(name))
        count = sum(
            int(np.count_nonzero(stream_mask(leaf_key, start, min(CHUNK, size - start), threshold)))
            for start in range(0, size, CHUNK)
        )
        stored = delta.tensors[f"values/{name}"].size
        if count != stored:
            raise FileError(f"{delta.path}: '{name}' stores {stored} values, its mask has {count} survivors.")
        entries += size
        progress(size)
    if base is not None:
        _check_same_tensors(base, delta)
        for name in delta.recipe.base:
            _check_digest(delta, name, _digest(base.tensors[name], lambda _: None))
    return {
        "digest": "ok",
        "mask": f"ok, {len(delta.recipe.parameters)} parameters, {entries} entries",
        "base": "ok" if base is not None else "not checked (give --base)",
    }


def _changed_companions(base: Path, fine: Path) -> dict[str, bytes]:
    """The fine-tune's configuration and tokenizer files that the base does not have alike."""
    if not fine.is_dir():
        return {}
    changed = {}
    for file in companion_files(fine):
        content, twin = file.read_bytes(), base / file.name
        if not (twin.is_file() and twin.read_bytes() == content):
            changed[file.name] = content
    return changed


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`pool.map` that keeps only a few results in memory at a time; a failure cancels what has not begun."""
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

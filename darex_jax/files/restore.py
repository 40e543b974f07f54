"""Restore a model from its base and an artifact, on disk or in memory, and verify an artifact.

A chunk of a tensor at a time, on every core; the base's tensors are checked as they pass.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from darex_jax.core.mask import STREAM_CHUNKS, stream_mask
from darex_jax.core.threefry import numpy_leaf_key
from darex_jax.core.tree import name_words
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.atomic import atomic_directory
from darex_jax.files.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    StoredTensor,
    companion_files,
)
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
Layout = dict[str, dict[str, tuple[np.dtype, tuple[int, ...]]]]  # file -> name -> (dtype, shape)


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
    keep_inputs(out, base, delta)
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

                for _ in in_order(pool, write, tensors):
                    pass
            finally:
                os.close(file)
            total += position - len(header)
        unused = _unused(base, delta, outputs)
        for name, digest in zip(
            unused, pool.map(lambda n: tensor_digest(base.tensors[n], progress), unused), strict=True
        ):
            _check_digest(delta, name, digest)
        data_check.result()
        if outputs.keys() != {SINGLE}:  # a file of another name is found by an index alone
            weight_map = {name: file_name for file_name, tensors in outputs.items() for name in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


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
        _check_digest(delta, name, tensor_digest(base.tensors[name], lambda _: None))
    delta.check_data()


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
        (folder / source.name).write_bytes(read_bytes(source))
    for name in delta.names("file"):
        (folder / name).write_bytes(delta.read(f"file/{name}").tobytes())


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
            _check_digest(delta, name, tensor_digest(base.tensors[name], lambda _: None))
    return {
        "digest": "ok",
        "mask": f"ok, {len(delta.recipe.parameters)} parameters, {entries} entries",
        "base": "ok" if base is not None else "not checked (give --base)",
    }


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


def _unused(base: Checkpoint, delta: DeltaFile, layout: Layout) -> list[str]:
    """The base's tensors that no restored parameter is made from."""
    used = {delta.base_name(name) for tensors in layout.values() for name in tensors}
    return [name for name in base.tensors if name not in used]


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

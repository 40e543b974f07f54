"""Restores a model from its base and an artifact, on disk or in memory; verifies artifacts.

One chunk of a tensor at a time, on all cores; the base's tensors are verified while they are read.
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from darex_jax.core.errors import DarexError, DarexWarning, FileError
from darex_jax.core.tree import working_dtype
from darex_jax.files.artifact import MOST_VERIFIED_ENTRIES, DeltaFile
from darex_jax.files.atomic import atomic_directory
from darex_jax.files.card import CARD, hub_name, model_card
from darex_jax.files.checkpoint import (
    COMPANIONS,
    INDEX,
    SINGLE,
    Checkpoint,
    StoredTensor,
    companion_files,
    inherited,
    takes_deltas,
)
from darex_jax.files.contents import contents
from darex_jax.files.orbax import write_orbax
from darex_jax.files.paths import read_bytes
from darex_jax.files.recipe import fingerprint
from darex_jax.files.safetensors import (
    CHUNK,
    DTYPE_NAMES,
    DTYPES,
    as_bytes,
    element_count,
    encode_header,
    write_at,
)
from darex_jax.files.stream import Progress, count_nonfinite, keep_inputs, run_all, tensor_digest

FLOATS = ("float64", "float32", "float16", "bfloat16")
Layout = dict[str, dict[str, tuple[np.dtype, tuple[int, ...]]]]  # file -> name -> (dtype, shape)


def apply_artifact(
    base: Checkpoint,
    delta: DeltaFile,
    out: str | os.PathLike[str],
    *,
    dtype: Any = None,
    overwrite: bool = False,
    allow_changed_files: bool = False,
    orbax: bool | None = None,
    progress: Progress = lambda _: None,
) -> int:
    """Writes `base + delta` as a complete Hugging Face directory, sharded like the base. Returns the bytes
    written.

    The directory is written atomically, without fsync, since base and delta can restore it. It is made from
    exactly the bytes that were verified against the recipe's digests.

    Args:
      dtype: of all floating parameters. None: that of the fine-tuned model for each (the base's if the delta
        does not state it). A dtype in config.json becomes that of most written entries.
      allow_changed_files: use the base's configuration and tokenizer files even if they have changed.
      orbax: write an orbax checkpoint beside the other files; None is the base's format. This temporarily
        needs disk space for the weights twice.
    Raises: FileError if the base is not the delta's (naming the first tensor or file that differs), or if the
      artifact is damaged or changes meanwhile; ValueError for an invalid dtype.
    Warns: DarexWarning if the base's files are not recorded, or changed ones are allowed.
    """
    keep_inputs(out, base, delta)
    check_base_tensors(base, delta)
    outputs = restored_layout(base, delta, dtype)
    with atomic_directory(out, overwrite) as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        restore_companions(base.path, delta, folder, allow_changed_files=allow_changed_files)
        for file_name, tensors in outputs.items():
            header = encode_header(tensors, {"format": "pt"})
            offsets, position = {}, len(header)
            for name, (stored_as, shape) in tensors.items():
                offsets[name] = position
                position += element_count(shape) * stored_as.itemsize
            file = os.open(folder / file_name, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                write_at(file, header, 0)

                def write(item: tuple[str, np.dtype, int], file: int = file) -> None:
                    name, stored_as, position = item
                    for chunk in _restored_chunks(name, base, delta, stored_as, progress):
                        position = write_at(file, chunk, position)

                run_all(pool, write, [(name, tensors[name][0], offsets[name]) for name in tensors])
            finally:
                os.close(file)
        unused = _unused(base, delta, outputs)
        for name, digest in zip(
            unused, pool.map(lambda n: tensor_digest(base.tensors[n], progress), unused), strict=True
        ):
            check_digest(delta, name, digest)
        check_fingerprint(base, delta)
        delta.check_data()
        own_config = "config.json" in delta.names("file")
        config, source = (delta.config(), delta.path) if own_config else (base.config, base.path)
        name_dtype(folder, config, outputs, source)
        card = model_card(contents(delta), "transformers", base_model=hub_name(base.path))
        (folder / CARD).write_text(card, encoding="utf-8")
        if base.is_orbax if orbax is None else orbax:
            files = [folder / file_name for file_name in outputs]
            write_orbax(folder, files)
            for file_path in files:
                file_path.unlink()
        else:
            write_index(folder, outputs)
    return layout_bytes(outputs)


def restored_params(
    base: Checkpoint, delta: DeltaFile, dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """`base + delta` in memory, one parameter at a time, bit for bit as `apply_artifact` writes it.

    Yields: (name, array), new arrays in the base's layouts.
    Raises: FileError as `apply_artifact`; arrays yielded before must then not be used. Companion files are
      not checked: see `check_companions`.
    """
    check_base_tensors(base, delta)
    layout = restored_layout(base, delta, dtype)
    for tensors in layout.values():
        for name, (own_dtype, shape) in tensors.items():
            array, start = np.empty(element_count(shape), own_dtype), 0
            for chunk in _restored_chunks(name, base, delta, own_dtype, lambda _: None):
                array[start : start + chunk.size] = chunk
                start += chunk.size
            yield name, array.reshape(shape)
    for name in _unused(base, delta, layout):
        check_digest(delta, name, tensor_digest(base.tensors[name], lambda _: None))
    check_fingerprint(base, delta)
    delta.check_data()


def restored_tensor(name: str, base: Checkpoint, delta: DeltaFile, dtype: np.dtype) -> np.ndarray:
    """One parameter of the restored model, flat. Raises: FileError if the base's differs."""
    return np.concatenate(list(_restored_chunks(name, base, delta, dtype, lambda _: None)))


def restored_layout(base: Checkpoint, delta: DeltaFile, dtype: Any = None) -> Layout:
    """`{file: {name: (dtype, shape)}}` of the restored model, with the base's files.

    Args: dtype: of all floating parameters, as for `apply_artifact`.
    """
    requested = floating_dtype(dtype)

    def choose(stored: np.dtype) -> np.dtype:
        return requested if requested is not None and takes_deltas(stored) else stored

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
                layout[file_name][name] = (choose(info.dtype), info.shape)
            elif name in pruned:
                rows = delta.tensors.get(f"rows/{name}")
                more = rows.shape[0] if rows is not None else 0
                stated = pruned[name].get("dtype")
                layout[file_name][name] = (
                    choose(DTYPES[stated] if stated else tensor.info.dtype),
                    (shape[0] + more, *shape[1:]) if shape else shape,
                )
            elif base_name not in delta.recipe.base_only:
                layout[file_name][name] = (choose(tensor.info.dtype), shape)
    placed = {name for tensors in layout.values() for name in tensors}
    last = list(layout)[-1]
    for name in sorted(dense - placed):
        info = delta.tensors[f"dense/{name}"]
        layout[last][name] = (choose(info.dtype), info.shape)
    return {
        file_name: dict(sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
        for file_name, tensors in layout.items()
        if tensors
    }


def floating_dtype(dtype: Any) -> np.dtype | None:
    """The requested dtype, or None. Raises: ValueError if parameters cannot be stored in it."""
    requested = None if dtype is None else np.dtype(dtype)
    if requested is not None and (requested not in DTYPE_NAMES or not takes_deltas(requested)):
        raise DarexError(f"dtype must be floating, of 16 bits or more, got {requested}.")
    return requested


def check_companions(base: Path, delta: DeltaFile, *, allow_changed_files: bool = False) -> None:
    """Checks that the companion files inherited from the base are those that the delta was made with.

    Raises: FileError naming the first one that differs, unless that is allowed.
    Warns: DarexWarning if the delta does not record them, or differences are allowed.
    """
    _taken(base, delta, allow_changed_files)


def restore_companions(
    base: Path, delta: DeltaFile, folder: Path, *, allow_changed_files: bool = False
) -> None:
    """Writes the restored model's companion files: the base's, checked, overridden by the delta's own.

    Raises: as `check_companions`. The delta's own are verified by `delta.check_data` only.
    """
    for name, content in read_companions(base, delta, allow_changed_files=allow_changed_files).items():
        (folder / name).write_bytes(content)


def read_companions(base: Path, delta: DeltaFile, *, allow_changed_files: bool = False) -> dict[str, bytes]:
    """`restore_companions` in memory: contents by file name."""
    own = {name: delta.read(f"file/{name}").tobytes() for name in delta.names("file")}
    return _taken(base, delta, allow_changed_files) | own


def _taken(base: Path, delta: DeltaFile, allow_changed_files: bool) -> dict[str, bytes]:
    """The files taken from the base, by name; checked as in `check_companions`.

    A file that the base has and the fine-tuned model did not is not among them, unless it is of a kind that
    neither had when the delta was made: the base is then another directory than it was.
    """
    own, stated = set(delta.names("file")), delta.recipe.base_files
    found = {file.name: read_bytes(file) for file in companion_files(base) if file.name not in own}
    if stated is None:
        if found:
            text = (
                f"{delta.path}: does not record the base's {', '.join(found)}; "
                f"{'they are' if len(found) > 1 else 'it is'} used without a check."
            )
            warnings.warn(text, DarexWarning, stacklevel=4)
        return found
    missed = inherited(own | stated.keys())  # a kind of file that neither model had
    found = {name: content for name, content in found.items() if name in stated or name in missed}
    for name in COMPANIONS:
        digest = blake3.blake3(found[name]).hexdigest() if name in found else None
        if name in own or digest == stated.get(name):
            continue
        if name not in found:
            what = "is missing; it existed"
        else:
            what = "was different" if name in stated else "did not exist"
        fault = f"{base / name}, which the restored model inherits, {what} when {delta.path} was made"
        if not allow_changed_files:
            raise FileError(f"{fault}; --allow-changed-files (allow_changed_files=True) ignores that.")
        warnings.warn(f"{fault}: allowed.", DarexWarning, stacklevel=4)
    return found


def layout_bytes(layout: Layout) -> int:
    """Size of all tensors in bytes."""
    return sum(dtype.itemsize * element_count(shape) for t in layout.values() for dtype, shape in t.values())


def write_index(folder: Path, layout: Layout) -> None:
    """Writes the index of a sharded model; a single file with the usual name needs none."""
    if layout.keys() == {SINGLE}:
        return
    weight_map = {name: file_name for file_name, tensors in layout.items() for name in tensors}
    index = {"metadata": {"total_size": layout_bytes(layout)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def name_dtype(folder: Path, config: Mapping[str, Any], layout: Layout, source: Path) -> None:
    """Updates a dtype in config.json to that of most floating entries.

    Args: folder: of the model that is written; config: its current config.json; layout: its tensors; source:
      the model that config.json came from, for errors.
    Raises: FileError for a config that is nested too deeply.
    """
    entries: Counter[str] = Counter()
    for tensors in layout.values():
        for dtype, shape in tensors.values():
            entries[dtype.name] += element_count(shape) if takes_deltas(dtype) else 0
    [(name, count)] = entries.most_common(1) or [("", 0)]
    stale = [k for k in ("dtype", "torch_dtype") if config.get(k) in FLOATS and config[k] != name]
    if count and stale:
        try:
            text = json.dumps({**config, **dict.fromkeys(stale, name)}, indent=2)
        except RecursionError as error:  # the writer recurses deeper than the reader
            raise FileError(f"{source}: its config.json is nested too deeply.") from error
        (folder / "config.json").write_text(text + "\n")


def verify_artifact(
    delta: DeltaFile,
    base: Checkpoint | None = None,
    progress: Progress = lambda _: None,
    *,
    allow_changed_files: bool = False,
    max_entries: int | None = None,
) -> dict[str, Any]:
    """Verifies digests, recomputes the masks from the key, and with `base` checks its fingerprint.

    Args:
      progress: called with the bytes of restored entries, in float32, and of the base.
      allow_changed_files: as for `apply_artifact`.
      max_entries: most entries of all masks if there is no base to confirm the shapes. None: 2**36, and at
        most 8,192 for each byte of the file, so that a small file cannot take days to verify.
    Returns: the checks and their results. Raises: FileError naming the first problem.
    Warns: as `check_companions`.
    """
    if base is None:
        delta.check_entries(max_entries, MOST_VERIFIED_ENTRIES)
    else:
        check_base_tensors(base, delta)
        check_companions(base.path, delta, allow_changed_files=allow_changed_files)
    delta.check_data()
    entries = 0
    for name, entry in delta.recipe.parameters.items():
        for _ in delta.chunks_of(name):
            pass
        entries += (size := element_count(tuple(entry["shape"])))
        progress(4 * size)
    if base is not None:
        for name in delta.recipe.base:
            check_digest(delta, name, tensor_digest(base.tensors[name], progress))
        check_fingerprint(base, delta)
    return {
        "digest": "ok",
        "mask": f"ok, {len(delta.recipe.parameters)} parameters, {entries} entries",
        "base": "ok" if base is not None else "not checked (pass --base)",
    }


def _restored_chunks(
    name: str, base: Checkpoint, delta: DeltaFile, dtype: np.dtype, progress: Progress
) -> Iterator[np.ndarray]:
    """One parameter of the restored model in chunks; verifies the base's tensor while reading it."""
    base_name = delta.base_name(name)
    stored = base.tensors.get(base_name)
    if stored is not None and base_name in delta.recipe.base:
        digest = blake3.blake3()
        dense = f"dense/{name}" in delta.tensors
        chunks = _hashed_chunks(stored, digest, progress)
        if name in delta.recipe.parameters:
            chunks = _summed_chunks(name, chunks, delta, dtype)
        for chunk in chunks:
            if not dense:
                yield _cast(name, chunk, dtype)
        check_digest(delta, base_name, digest.hexdigest())
    for kind in ("dense", "rows"):
        if info := delta.tensors.get(f"{kind}/{name}"):
            take = delta.stream(f"{kind}/{name}")
            for start in range(0, info.size, CHUNK):
                yield _cast(name, take(min(CHUNK, info.size - start)), dtype)


def _hashed_chunks(stored: StoredTensor, digest: Any, progress: Progress) -> Iterator[np.ndarray]:
    for chunk in stored.chunks():
        digest.update(as_bytes(chunk))
        progress(2 * chunk.nbytes)
        yield chunk


def _summed_chunks(
    name: str, chunks: Iterator[np.ndarray], delta: DeltaFile, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """base + values / q in chunks: the same arithmetic as `prune` followed by `apply_delta`."""
    for chunk, (kept, pruned) in zip(chunks, delta.chunks_of(name), strict=True):
        kept_base = chunk[kept]
        with np.errstate(invalid="ignore", over="ignore"):
            total = (kept_base.astype(working_dtype(chunk.dtype, pruned.dtype)) + pruned).astype(dtype)
        if not delta.recipe.nonfinite and dtype.kind in "fV" and count_nonfinite(total):
            q = delta.recipe.parameters[name].get("q")
            raise _does_not_fit(
                name, dtype, f"its delta is divided by q = {q:g}" if q else "its delta is added"
            )
        restored = _cast(name, chunk, dtype)
        restored[kept] = np.where(pruned == 0, restored[kept], total)
        yield restored


def _cast(name: str, chunk: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts a chunk. Raises: FileError if a finite number becomes infinite."""
    if chunk.dtype == dtype:
        return chunk
    with np.errstate(invalid="ignore", over="ignore"):
        cast = chunk.astype(dtype)
    if dtype.kind in "fV" and chunk.dtype.kind in "fV" and count_nonfinite(cast) > count_nonfinite(chunk):
        raise _does_not_fit(name, dtype, f"it is rounded from {chunk.dtype}")
    return cast


def _does_not_fit(name: str, dtype: np.dtype, when: str) -> FileError:
    return FileError(
        f"'{name}' overflows {dtype} when {when}; apply with a wider --dtype, or prune with a larger --q."
    )


def _unused(base: Checkpoint, delta: DeltaFile, layout: Layout) -> list[str]:
    """The base's tensors that are not used for any restored parameter."""
    used = {delta.base_name(name) for tensors in layout.values() for name in tensors}
    return [name for name in base.tensors if name not in used]


def check_base_tensors(base: Checkpoint, delta: DeltaFile) -> None:
    """Checks the names, shapes and dtypes of the fingerprint, before any weight is read."""
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


def check_digest(delta: DeltaFile, base_name: str, digest: str) -> None:
    """Raises: FileError if the digest of a base tensor differs from the recipe's."""
    stated = delta.recipe.base[base_name]["blake3"]
    delta.base_digests[base_name] = digest
    if stated != digest[: len(stated)]:
        raise FileError(
            f"this is not the base that {delta.path} was made from: '{base_name}' has other values."
        )


def check_fingerprint(base: Checkpoint, delta: DeltaFile) -> None:
    """Checks the full fingerprint, since format 2 stores tensors' digests cut."""
    whole = {n: entry | {"blake3": delta.base_digests[n]} for n, entry in delta.recipe.base.items()}
    if delta.recipe.base_blake3 not in (None, fingerprint(whole)):
        raise FileError(f"{base.path} is not the base of {delta.path}: its fingerprint differs.")

"""Merges several deltas into a base on disk, one parameter at a time; heads are held in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import jax
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import working_dtype
from darex_jax.files.atomic import atomic_directory
from darex_jax.files.card import CARD, hub_name, merged_card
from darex_jax.files.checkpoint import SINGLE, Checkpoint
from darex_jax.files.given import Given, open_given
from darex_jax.files.restore import Layout, floating_dtype, layout_bytes, name_dtype, write_index
from darex_jax.files.safetensors import as_bytes, encode_header, write_at, write_tensors
from darex_jax.files.stream import Progress, count_nonfinite, keep_inputs, tensor_digest
from darex_jax.merging.merge import merge


class Merged(NamedTuple):
    """The directories written (one, or one per head), the number of parameters changed by a delta, and the
    bytes of the parameters, counting a shared body once."""

    directories: list[Path]
    changed: int
    bytes: int


def merge_files(
    base: str | os.PathLike[str],
    deltas: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    method: str,
    *,
    dtype: Any = None,
    allow_changed_files: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
    **options: Any,
) -> Merged:
    """Writes `base + merge(deltas)` as a Hugging Face directory, or one per delta if heads differ.

    Parameters that the base and all deltas have in the same shape are merged, with masks by the first delta's
    names; all others, such as a head, keep their values of each fine-tuned model. If those differ, `out` has
    one folder per delta, named after its path, and the merged body is hard-linked if the file system supports
    it.

    Args:
      base: Hugging Face directory.
      deltas: artifacts of `darex prune`, fine-tuned directories, adapters in PEFT's format, of this base.
      method, options: as for `merge`.
      dtype: of all floating parameters; None is the widest of the fine-tuned models' for each.
      allow_changed_files: for artifacts, use the base's files even if they have changed.
      overwrite: replace `out` if it is a single model directory.
    Raises: FileError for a delta of another base, or a damaged one; ValueError as `merge`, or for a result
      that is not finite.
    """
    requested = floating_dtype(dtype)
    with ExitStack() as stack:
        opened = stack.enter_context(Checkpoint(base))
        given = [
            stack.enter_context(open_given(Path(path), opened, allow_changed_files=allow_changed_files))
            for path in deltas
        ]
        if not given:
            raise DarexError("merge needs at least one delta, got none.")
        keep_inputs(out, opened, *(each.path for each in given))
        shared = [
            name
            for name, tensor in opened.tensors.items()
            if not tensor.floating or all(name in each.names for each in given)
        ]
        wide = any(tensor.info.dtype == np.float64 for tensor in opened.tensors.values())
        wide = wide or any(each.dtype(name) == np.float64 for each in given for name in each.names)
        stack.enter_context(jax.enable_x64(True) if wide else nullcontext())
        heads = [_head(each, opened, shared, requested) for each in given]
        apart = len({_digest(each, shared, head) for each, head in zip(given, heads, strict=True)}) > 1
        with atomic_directory(out, overwrite) as folder:
            places = [folder / name for name in _names(deltas)] if apart else [folder]
            bodies: dict[tuple[str, ...], tuple[Path, bool, Layout]] = {}
            size, changed = 0, 0
            for place, each, head in zip(places, given, heads, strict=False):
                place.mkdir(exist_ok=True)
                naming = tuple(each.names.get(name, name) for name in shared)
                if naming in bodies:
                    first, with_head, body = bodies[naming]
                    for source in body:
                        linked = _file_name(opened, source, with_head)
                        _link(first / linked, place / _file_name(opened, source, bool(head)))
                else:
                    renamed = dict(zip(shared, naming, strict=True))
                    body, changed = _write_body(
                        place, opened, given, renamed, method, requested, options, bool(head), progress
                    )
                    bodies[naming] = place, bool(head), body
                    size += layout_bytes(body)
                named = {_file_name(opened, source, bool(head)): own for source, own in body.items()}
                size += _write_rest(place, each, head, named)
            for name in opened.tensors.keys() - set(shared):
                digest = tensor_digest(opened.tensors[name], progress)
                for each in given:
                    each.see(name, digest)
            for each in given:
                each.finish()
            called = [each.path.name for each in given]
            card = merged_card(method, called, options, base_model=hub_name(opened.path))
            for place in places:
                (place / CARD).write_text(card, encoding="utf-8")
        return Merged([Path(out) / place.relative_to(folder) for place in places], changed, size)


def _head(
    each: Given, base: Checkpoint, shared: Sequence[str], requested: np.dtype | None
) -> dict[str, np.ndarray]:
    """A delta's own parameters (not merged), by its own names, in the requested dtype."""
    head = dict(each.head)
    for name in each.names.keys() - set(shared):
        values = base.tensors[name].read()
        own = each.whole(name)
        if own is None:
            delta = each.read(name, values)
            own = values if delta is None else _sum(values, delta).astype(each.dtype(name))
        head[each.names[name]] = own
    return {own: _cast(own, x, requested or x.dtype) for own, x in sorted(head.items())}


def _write_body(
    folder: Path,
    base: Checkpoint,
    given: Sequence[Given],
    renamed: Mapping[str, str],
    method: str,
    requested: np.dtype | None,
    options: Mapping[str, Any],
    with_head: bool,
    progress: Progress,
) -> tuple[Layout, int]:
    """Args: renamed: base name -> name to write, of the parameters to write.

    Returns: the layouts by the base's file names; the number of parameters changed.
    """
    body: Layout = {}
    changed = 0
    for source, file in base.files.items():
        names = [name for name in renamed if base.tensors[name].file is file]
        if not names:
            continue
        dtypes = {name: _dtype(name, base, given, requested) for name in names}
        names.sort(key=lambda name: (-dtypes[name].itemsize, renamed[name]))
        body[source] = {renamed[n]: (dtypes[n], base.tensors[n].info.shape) for n in names}
        header = encode_header(body[source], {"format": "pt"})
        position = len(header)
        path = folder / _file_name(base, source, with_head)
        out = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            write_at(out, header, 0)
            for name in names:
                values, moved = _merged(name, base, given, method, options)
                changed += moved
                position = write_at(out, _cast(renamed[name], values, dtypes[name], moved), position)
                progress(values.nbytes)
        finally:
            os.close(out)
    return body, changed


def _file_name(base: Checkpoint, source: str, with_head: bool) -> str:
    """A body's file: readers take `SINGLE` for the whole model, so not beside a head."""
    return source if len(base.files) > 1 else "model-body.safetensors" if with_head else SINGLE


def _merged(
    name: str, base: Checkpoint, given: Sequence[Given], method: str, options: Mapping[str, Any]
) -> tuple[np.ndarray, bool]:
    """A parameter with the deltas merged into it, and whether any of them changes it."""
    values = base.tensors[name].read()
    digest = blake3.blake3(as_bytes(values)).hexdigest()
    for each in given:
        each.see(name, digest)
    if not base.tensors[name].floating:
        return values, False
    found = [each.read(name, values) for each in given]
    if all(delta is None for delta in found):
        return values, False
    for each, delta in zip(given, found, strict=True):
        if delta is not None and count_nonfinite(delta.reshape(-1)):
            raise DarexError(f"{each.path}: '{name}' differs from the base by NaN or infinity.")
    nothing = np.zeros(values.shape, np.float32)
    own = given[0].names[name]
    trees = [{own: nothing if delta is None else delta} for delta in found]
    with np.errstate(over="ignore", invalid="ignore"):
        merged = np.asarray(merge(trees, method, **options)[own])
    return _sum(values, merged), True


def _sum(values: np.ndarray, delta: np.ndarray) -> np.ndarray:
    dtype = working_dtype(values.dtype, delta.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values.astype(dtype) + delta.astype(dtype))  # of scalars too


def _cast(name: str, values: np.ndarray, dtype: np.dtype, moved: bool = False) -> np.ndarray:
    """Casts a parameter. Raises: ValueError if a delta or the cast made an entry infinite or NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.asarray(values.astype(dtype))
    before = 0 if moved or values.dtype.kind not in "fV" else count_nonfinite(values.reshape(-1))
    if dtype.kind in "fV" and count_nonfinite(cast.reshape(-1)) > before:
        raise DarexError(f"'{name}' would hold infinity or NaN in {dtype}; merge with smaller weights.")
    return cast


def _dtype(name: str, base: Checkpoint, given: Sequence[Given], requested: np.dtype | None) -> np.dtype:
    if not base.tensors[name].floating:
        return base.tensors[name].info.dtype
    return requested or reduce(np.promote_types, (each.dtype(name) for each in given))


def _write_rest(folder: Path, each: Given, head: Mapping[str, np.ndarray], body: Layout) -> int:
    """Writes the head, index and companion files of a directory. Returns: the bytes of the head."""
    for name, content in each.companions.items():
        (folder / name).write_bytes(content)
    layout = dict(body)
    if head:
        file_name = "model-head.safetensors"
        while file_name in layout:  # the base itself may be a merged model
            file_name = f"own-{file_name}"
        write_tensors(folder / file_name, dict(head), {"format": "pt"})
        layout[file_name] = {name: (x.dtype, x.shape) for name, x in head.items()}
    name_dtype(folder, each.config, layout, each.path)
    write_index(folder, layout)
    return sum(x.nbytes for x in head.values())


def _digest(each: Given, shared: Sequence[str], head: Mapping[str, np.ndarray]) -> str:
    """Digest of what differs between directories: the names of the body, and the head."""
    digest = blake3.blake3(json.dumps([each.names.get(name) for name in shared]).encode())
    for name, x in head.items():
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(as_bytes(np.ascontiguousarray(x)))
    return digest.hexdigest()


def _names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A name for each delta: the last path component that is not the same for all."""
    steps = [[Path(p).name if Path(p).is_dir() else Path(p).stem for p in (q, *q.parents)]
             for q in (Path(path).resolve() for path in paths)]  # fmt: skip
    for level in zip(*steps, strict=False):
        if len(set(level)) == len(level) and all(level):
            return list(level)
    return [f"{i}-{own[0]}" for i, own in enumerate(steps)]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system does not support links
        shutil.copyfile(source, target)

"""A base with several deltas merged into it, on disk: one parameter of each in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError, FileError
from darex_jax.files.atomic import atomic_directory
from darex_jax.files.checkpoint import INDEX, SINGLE, Checkpoint, read_config
from darex_jax.files.given import Given, open_given
from darex_jax.files.restore import Layout, name_dtype
from darex_jax.files.safetensors import as_bytes, element_count, encode_header, write_at, write_tensors
from darex_jax.files.stream import Progress, count_nonfinite, keep_inputs
from darex_jax.merging.merge import merge

BODY, HEAD = "model-body.safetensors", "model-head.safetensors"


class Merged(NamedTuple):
    """What was written: the directories (one, or one for each head), how many parameters a delta changed,
    and the bytes of the parameters, a shared body once."""

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
    overwrite: bool = False,
    progress: Progress = lambda _: None,
    **options: Any,
) -> Merged:
    """Writes `base + merge(deltas)` as a Hugging Face directory, or one for each where heads differ.

    Masks are those of the first delta's names. With heads that differ `out` has a folder for each delta,
    called by what its path is called, in which the merged body is one and the same file where links can be.

    Args:
      base: Hugging Face directory.
      deltas: artifacts of `darex prune`, fine-tuned directories, adapters in PEFT's format, of this base.
      method, options: as `merge` takes them.
      dtype: of all floating parameters; None is for each the widest that a fine-tuned model has it in.
      overwrite: replace what `out` holds, where it is one directory.
    Raises: FileError for what is no delta of this base, or is damaged; ValueError as `merge`, or for a
      result that is not finite.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(Checkpoint(base))
        given = [stack.enter_context(open_given(Path(path), opened)) for path in deltas]
        keep_inputs(out, opened)
        if not given:
            raise DarexError("there are no deltas to merge.")
        for path in deltas:
            if Path(out).resolve() == Path(path).resolve():
                raise FileError(f"{out}: writing this would replace {path}; choose another place.")
        apart = len({_digest(each.head) for each in given}) > 1
        with atomic_directory(out, overwrite) as folder:
            firsts = [folder / name for name in _names(deltas)] if apart else [folder]
            for place in firsts[1:] if apart else []:
                place.mkdir()
            firsts[0].mkdir(exist_ok=True)
            with_head = bool(given[0].head) or apart
            body, changed = _write_body(firsts[0], opened, given, method, dtype, options, with_head, progress)
            size = _bytes(body)
            for each in given:
                each.finish()
            for place, each in zip(firsts, given, strict=False):
                for file_name in body if place != firsts[0] else ():
                    _link(firsts[0] / file_name, place / file_name)
                size += _write_rest(place, each, body, dtype)
    directories = [Path(out) / place.relative_to(folder) for place in firsts]
    return Merged(directories, changed, size)


def _write_body(
    folder: Path,
    base: Checkpoint,
    given: Sequence[Given],
    method: str,
    dtype: Any,
    options: Mapping[str, Any],
    with_head: bool,
    progress: Progress,
) -> tuple[Layout, int]:
    """Returns: which file holds what, by the first delta's names; how many parameters changed."""
    renamed = {name: given[0].names.get(name, _renamed(name, given[0])) for name in base.tensors}
    body: Layout = {}
    changed = 0
    for source, file in base.files.items():
        file_name = BODY if len(base.files) == 1 and with_head else SINGLE if len(base.files) == 1 else source
        names = [name for name, tensor in base.tensors.items() if tensor.file is file]
        layout = {renamed[n]: (_dtype(n, base, given, dtype), base.tensors[n].info.shape) for n in names}
        order = dict(sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
        body[file_name] = order
        by_own = {renamed[name]: name for name in names}
        header = encode_header(order, {"format": "pt"})
        position = len(header)
        out = os.open(folder / file_name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            write_at(out, header, 0)
            for own, (stored_as, _) in order.items():
                values, moved = _merged(by_own[own], own, base, given, method, options)
                changed += moved
                with np.errstate(over="ignore", invalid="ignore"):
                    cast = values.astype(stored_as)
                if cast.dtype.kind in "fV" and count_nonfinite(cast.reshape(-1)):
                    raise DarexError(f"'{own}' would hold infinity or NaN; merge with smaller weights.")
                position = write_at(out, cast, position)
                progress(values.nbytes)
        finally:
            os.close(out)
    return body, changed


def _merged(
    name: str,
    own: str,
    base: Checkpoint,
    given: Sequence[Given],
    method: str,
    options: Mapping[str, Any],
) -> tuple[np.ndarray, bool]:
    """A parameter with the deltas in it, and whether any of them changes it."""
    values = base.tensors[name].read()
    digest = blake3.blake3(as_bytes(values)).hexdigest()
    for each in given:
        each.see(name, digest)
    if not base.tensors[name].floating:
        return values, False
    found = [each.read(name, values) if name in each.names else None for each in given]
    if all(delta is None for delta in found):
        return values, False
    nothing = np.zeros(values.shape, np.float32)
    trees = [{own: nothing if delta is None else delta} for delta in found]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values, np.float32) + np.asarray(merge(trees, method, **options)[own]), True


def _dtype(name: str, base: Checkpoint, given: Sequence[Given], dtype: Any) -> np.dtype:
    stored = base.tensors[name].info.dtype
    if not base.tensors[name].floating:
        return stored
    if dtype is not None:
        return np.dtype(dtype)
    wanted = [each.dtype(name, stored) for each in given if name in each.names]
    return np.dtype(jnp.result_type(*wanted)) if wanted else stored


def _renamed(name: str, first: Given) -> str:
    """A base name as the first delta would have it: most of its names begin with one prefix more, or less."""
    known, own = next(iter(first.names.items()), ("", ""))
    if own.endswith(known):
        return own[: len(own) - len(known)] + name
    return name.removeprefix(known[: len(known) - len(own)])


def _write_rest(folder: Path, each: Given, body: Layout, dtype: Any) -> int:
    """Head, index and companion files of a directory. Returns: the bytes of the head."""
    for name, content in each.companions.items():
        (folder / name).write_bytes(content)
    head = {
        name: x if dtype is None or x.dtype.kind not in "fV" else x.astype(dtype)
        for name, x in each.head.items()
    }
    layout = dict(body)
    if head:
        write_tensors(folder / HEAD, head, {"format": "pt"})
        layout[HEAD] = {name: (x.dtype, x.shape) for name, x in head.items()}
    name_dtype(folder, read_config(folder), layout)
    if layout.keys() != {SINGLE}:
        weight_map = {name: file_name for file_name, tensors in layout.items() for name in tensors}
        index = {"metadata": {"total_size": _bytes(layout)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return sum(x.nbytes for x in head.values())


def _bytes(layout: Layout) -> int:
    return sum(dtype.itemsize * element_count(shape) for t in layout.values() for dtype, shape in t.values())


def _digest(head: Mapping[str, np.ndarray]) -> str:
    digest = blake3.blake3()
    for name, x in sorted(head.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(as_bytes(np.ascontiguousarray(x)))
    return digest.hexdigest()


def _names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What each delta is called: the last step of its path that is not the same for all."""
    steps = [[Path(p).name if Path(p).is_dir() else Path(p).stem for p in (q, *q.parents)]
             for q in (Path(path).resolve() for path in paths)]  # fmt: skip
    for level in zip(*steps, strict=False):
        if len(set(level)) == len(level) and all(level):
            return list(level)
    return [f"{i}-{own[0]}" for i, own in enumerate(steps)]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)

"""One delta of a base, however it is given: an artifact, a fine-tuned directory, an adapter in PEFT's format.

Parameters go by the base's names here; a head, which the base has not, by its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from darex_jax.core.errors import FileError
from darex_jax.core.lora import FACTORS, adapter_delta, adapter_factors
from darex_jax.core.tree import flatten_names
from darex_jax.files.adapter import CONFIG, load_adapter
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint, companion_files
from darex_jax.files.match import PREFIXES, match_checkpoints
from darex_jax.files.paths import read_bytes
from darex_jax.files.restore import check_base_tensors, check_digest, check_fingerprint, read_companions
from darex_jax.files.safetensors import CHUNK, DTYPES


class Given(NamedTuple):
    """A delta that is read one parameter at a time.

    Attributes:
      path: where it lies.
      names: of every base parameter that it may change, the name in the fine-tuned model.
      read: a base name and the base's values -> the delta, float32 [shape]; None where nothing changes.
      head: what the base has not, by its own name.
      dtype: a base name and the base's dtype -> that of the fine-tuned model.
      companions: configuration and tokenizer files of the fine-tuned model, by name.
      see: to be called with every base name and the digest of its bytes, and finish once all are read: then
        it is known that this is the base, and that nothing is damaged. Raises: FileError.
    """

    path: Path
    names: Mapping[str, str]
    read: Callable[[str, np.ndarray], np.ndarray | None]
    head: Mapping[str, np.ndarray]
    dtype: Callable[[str, np.dtype], np.dtype]
    companions: Mapping[str, bytes]
    see: Callable[[str, str], None] = lambda name, digest: None
    finish: Callable[[], None] = lambda: None


@contextmanager
def open_given(path: Path, base: Checkpoint) -> Iterator[Given]:
    """Opens what is at `path`. Raises: FileError, in one line, if it is no delta of this base."""
    if path.is_dir() and (path / CONFIG).exists():
        yield _adapter(path, base)
    elif path.is_dir():
        with Checkpoint(path) as fine:
            yield _directory(path, base, fine)
    else:
        with DeltaFile(path) as file:
            yield _artifact(path, base, file)


def _directory(path: Path, base: Checkpoint, fine: Checkpoint) -> Given:
    match = match_checkpoints(base, fine, lambda name: True)
    match.raise_if_faulty()
    if match.extra_rows:
        raise _larger(path, list(match.extra_rows))
    own = {match.base_names[name]: name for name in match.pruned}

    def read(name: str, values: np.ndarray) -> np.ndarray | None:
        moved = fine.tensors[own[name]].read()
        return _difference(moved, values)

    head = {name: fine.tensors[name].read() for name in match.dense if name not in match.base_names}
    companions = {file.name: read_bytes(file) for file in companion_files(path)}
    return Given(path, own, read, head, lambda name, _: fine.tensors[own[name]].info.dtype, companions)


def _artifact(path: Path, base: Checkpoint, file: DeltaFile) -> Given:
    check_base_tensors(base, file)
    if file.names("rows"):
        raise _larger(path, file.names("rows"))
    dense = {file.base_name(name): name for name in file.names("dense")}
    pruned = {file.base_name(name): name for name in file.recipe.parameters}
    twins = {name for name in dense if name in base.tensors and base.tensors[name].floating}

    def read(name: str, values: np.ndarray) -> np.ndarray | None:
        if name in pruned:
            flat = np.zeros(values.size, np.float32)
            for i, (kept, numbers) in enumerate(file.chunks_of(pruned[name])):
                flat[i * CHUNK : (i + 1) * CHUNK][kept] = numbers
            return flat.reshape(values.shape)
        return _difference(file.read(f"dense/{dense[name]}"), values)

    def dtype(name: str, of_base: np.dtype) -> np.dtype:
        if name in pruned:
            stated = file.recipe.parameters[pruned[name]].get("dtype")
            return DTYPES[stated] if stated else of_base
        return file.tensors[f"dense/{dense[name]}"].dtype

    def finish() -> None:
        check_fingerprint(base, file)
        file.check_data()

    own = pruned | {name: dense[name] for name in twins}
    head = {name: file.read(f"dense/{name}") for b, name in dense.items() if b not in twins}
    return Given(path, own, read, head, dtype, read_companions(base.path, file),
                 lambda name, digest: check_digest(file, name, digest), finish)  # fmt: skip


def _adapter(path: Path, base: Checkpoint) -> Given:
    config, factors_tree, dense_tree = load_adapter(path)
    factors, scales = adapter_factors(factors_tree), config.scales(factors_tree)
    whole = {name: np.asarray(x) for name, x in flatten_names(dense_tree).items()}

    def in_base(name: str) -> str:
        found = [name, *(name.removeprefix(p) for p in PREFIXES), *(p + name for p in PREFIXES)]
        return next((each for each in found if each in base.tensors), name)

    layers = {in_base(f"{layer}.weight"): layer for layer in factors}
    own = {name: f"{layer}.weight" for name, layer in layers.items()}
    twins = {in_base(name): name for name in whole if in_base(name) in base.tensors}
    lost = sorted(own[name] for name in layers if name not in base.tensors)
    if lost:
        raise FileError(f"{path}: '{lost[0]}' is not in {base.path}.")

    def read(name: str, values: np.ndarray) -> np.ndarray | None:
        if name in twins:
            return _difference(whole[twins[name]], values)
        layer = layers[name]
        pieces = {f"{layer}.{factor}": x for factor, x in zip(FACTORS, factors[layer], strict=True)}
        (delta,) = flatten_names(adapter_delta(pieces, scales)).values()
        if np.shape(delta) != values.shape:
            raise FileError(
                f"{path}: '{own[name]}' is {list(np.shape(delta))}, {list(values.shape)} in the base."
            )
        return np.asarray(delta, np.float32)

    head = {name: x for name, x in whole.items() if in_base(name) not in base.tensors}
    companions = {file.name: read_bytes(file) for file in companion_files(base.path)}
    return Given(path, own | twins, read, head, lambda _, of_base: of_base, companions)


def _difference(moved: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    if moved.dtype == values.dtype and np.array_equal(moved.view(np.uint8), values.view(np.uint8)):
        return None
    return moved.astype(np.float32) - values.astype(np.float32)


def _larger(path: Path, names: list[str]) -> FileError:
    return FileError(f"{path}: has extra rows of {', '.join(names)}, which other deltas have not.")

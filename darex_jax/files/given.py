"""A common interface to deltas given as an artifact, a fine-tuned directory or a PEFT adapter.

Parameters have the base's names; a head that the base lacks or has in another shape keeps its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from darex_jax.core.errors import DarexWarning, FileError
from darex_jax.core.lora import FACTORS, adapter_delta, adapter_factors
from darex_jax.core.scope import HEAD, OPTIONAL, TIED, UNUSED, is_tied
from darex_jax.core.tree import flatten_names
from darex_jax.files.adapter import CONFIG, load_adapter
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import (
    Checkpoint,
    companion_contents,
    read_config,
    takes_deltas,
    with_inherited,
)
from darex_jax.files.match import match_checkpoints
from darex_jax.files.restore import check_base_tensors, check_digest, check_fingerprint, read_companions
from darex_jax.files.safetensors import DTYPES, as_bytes
from darex_jax.files.stream import difference, tensor_digest


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Given:
    """A delta that is read one parameter at a time.

    Attributes:
      path: its path.
      names: base name -> fine-tuned name, for every base parameter that it has in the base's shape.
      read: (base name, base values) -> the delta, [shape], or None if nothing changes.
      whole: base name -> the fine-tuned values, where they are stored; None where only a delta is.
      dtype: base name -> the dtype in the fine-tuned model.
      companions: configuration and tokenizer files of the fine-tuned model, by name; config: its config.json.
      head: parameters that the base lacks or has in another shape, by their own names.
      see: call it with every base name and the digest of its bytes, and `finish` once all are read: they
        verify the base and the delta. Raises: FileError.
    """

    path: Path
    names: Mapping[str, str]
    read: Callable[[str, np.ndarray], np.ndarray | None]
    whole: Callable[[str], np.ndarray | None]
    dtype: Callable[[str], np.dtype]
    companions: Mapping[str, bytes]
    config: Mapping[str, Any]
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    see: Callable[[str, str], None] = _nothing
    finish: Callable[[], None] = _nothing


@contextmanager
def open_given(path: Path, base: Checkpoint, *, allow_changed_files: bool = False) -> Iterator[Given]:
    """Opens a delta of any kind.

    Args: allow_changed_files: for an artifact, use the base's files even if they have changed.
    Raises: FileError, in one line, if it is not a delta of this base.
    """
    if path.is_dir() and (path / CONFIG).exists():
        yield _adapter(path, base)
    elif path.is_dir():
        with Checkpoint(path) as fine:
            yield _directory(path, base, fine)
    else:
        with DeltaFile(path) as file:
            yield _artifact(path, base, file, read_companions(
                base.path, file, allow_changed_files=allow_changed_files
            ))  # fmt: skip


def _directory(path: Path, base: Checkpoint, fine: Checkpoint) -> Given:
    match = match_checkpoints(base, fine, lambda name: True)
    if match.faults:
        raise FileError(f"{path} does not match {base.path}: {' '.join(match.faults[:3])}")
    for text in match.warnings:
        warnings.warn(f"{path}: {text}", DarexWarning, stacklevel=4)
    if match.extra_rows:
        raise _larger(path, next(iter(match.extra_rows)))
    for name in match.buffers:
        if name in match.base_names and len(fine.tensors[name].info.shape) > 1:
            pair = fine.tensors[name], base.tensors[match.base_names[name]]
            if len({tensor_digest(tensor, _nothing) for tensor in pair}) > 1:
                raise _whole_numbers(path, name)
    own = {match.base_names[name]: name for name in match.pruned if not _is_idle(name, fine.config)}
    apart = [name for name in match.dense if not _is_idle(name, fine.config)]
    return Given(
        path=path,
        names=own,
        read=lambda name, values: _moved(fine.tensors[own[name]].read(), values),
        whole=lambda name: fine.tensors[own[name]].read(),
        dtype=lambda name: fine.tensors[own[name]].info.dtype,
        companions=with_inherited(companion_contents(path), companion_contents(base.path)),
        config=fine.config,
        head={name: fine.tensors[name].read() for name in apart if name not in own.values()},
    )


def _artifact(path: Path, base: Checkpoint, file: DeltaFile, companions: Mapping[str, bytes]) -> Given:
    check_base_tensors(base, file)
    if file.names("rows"):
        raise _larger(path, file.names("rows")[0])
    config = file.config() if "config.json" in file.names("file") else base.config
    own, head = {}, {}
    renamed = {b: name for name, b in file.recipe.base_names.items()}
    whole = [name for name in file.names("dense") if not _is_idle(name, config)]
    stored = {name: file.tensors[f"dense/{name}"] for name in whole}
    for name, info in stored.items():
        if not takes_deltas(info.dtype) and len(info.shape) > 1 and file.base_name(name) in base.tensors:
            raise _whole_numbers(path, name)
    for name, tensor in base.tensors.items():
        if tensor.floating and name not in file.recipe.base_only and not _is_idle(name, config):
            own[name] = renamed.get(name, name)
    for b, name in ((file.base_name(name), name) for name in (*file.recipe.parameters, *stored)):
        if name in stored and (b not in base.tensors or base.tensors[b].info.shape != stored[name].shape):
            own.pop(b, None)
            if stored[name].dtype.kind in "fV":
                if not (HEAD.search(name) or OPTIONAL.search(name)):
                    raise _larger(path, name)
                head[name] = file.read(f"dense/{name}")
        elif b in own:
            own[b] = name

    def read(name: str, values: np.ndarray) -> np.ndarray | None:
        if own[name] in file.recipe.parameters:
            return file.dense(own[name])
        return _moved(file.read(f"dense/{own[name]}"), values) if own[name] in stored else None

    def own_values(name: str) -> np.ndarray | None:
        return file.read(f"dense/{own[name]}") if own[name] in stored else None

    def dtype(name: str) -> np.dtype:
        if own[name] in stored:
            return stored[own[name]].dtype
        stated = file.recipe.parameters.get(own[name], {}).get("dtype")
        return DTYPES[stated] if stated else base.tensors[name].info.dtype

    def finish() -> None:
        check_fingerprint(base, file)
        file.check_data()

    return Given(
        path=path, names=own, read=read, whole=own_values, dtype=dtype, companions=companions, config=config,
        head=head, see=lambda name, digest: check_digest(file, name, digest), finish=finish,
    )  # fmt: skip


def _adapter(path: Path, base: Checkpoint) -> Given:
    config, factors_tree, dense_tree = load_adapter(path)
    factors, scales = adapter_factors(factors_tree), config.scales(factors_tree)
    whole = {name: np.asarray(x) for name, x in flatten_names(dense_tree).items()}
    layers = {f"{layer}.weight": layer for layer in factors}
    shapes = {
        name: (factors[layer][1].shape[0], factors[layer][0].shape[1]) for name, layer in layers.items()
    }
    for name, shape in (shapes | {name: x.shape for name, x in whole.items()}).items():
        stored = base.tensors.get(name)
        if stored is None or stored.info.shape != shape:
            what = "lacks" if stored is None else f"has as {list(stored.info.shape)}"
            raise FileError(
                f"{path}: has '{name}' of shape {list(shape)}, which {base.path} {what}: pass the model that "
                "darex merge-adapter makes from it."
            )

    def read(name: str, values: np.ndarray) -> np.ndarray | None:
        delta = _moved(whole[name], values) if name in whole else None
        if name in layers:
            layer = layers[name]
            pieces = {f"{layer}.{factor}": x for factor, x in zip(FACTORS, factors[layer], strict=True)}
            (product,) = flatten_names(adapter_delta(pieces, scales)).values()
            delta = np.asarray(product) if delta is None else delta + np.asarray(product)
        return delta

    return Given(
        path=path,
        names={n: n for n, t in base.tensors.items() if t.floating and not _is_idle(n, base.config)},
        read=read,
        whole=lambda name: whole.get(name) if name not in layers else None,
        dtype=lambda name: base.tensors[name].info.dtype,
        companions=with_inherited(companion_contents(path), companion_contents(base.path)),
        config=read_config(path) or base.config,
    )


def _is_idle(name: str, config: Mapping[str, Any]) -> bool:
    """Whether it is the stored copy of a tied head, or what no model reads."""
    return (name == TIED and is_tied(config)) or bool(UNUSED.search(name))


def _moved(fine: np.ndarray, base: np.ndarray) -> np.ndarray | None:
    if fine.dtype == base.dtype and np.array_equal(as_bytes(fine), as_bytes(base)):
        return None
    return difference(fine, base)


def _larger(path: Path, name: str) -> FileError:
    return FileError(
        f"{path}: '{name}' has another shape than in the base and is not a head, so it cannot be merged."
    )


def _whole_numbers(path: Path, name: str) -> FileError:
    return FileError(
        f"{path}: '{name}' holds other whole numbers (or float8 codes) than the base, for which there are no "
        "deltas to merge: give models that are not quantised."
    )

"""Model directories: safetensors (single or sharded) or an orbax checkpoint, with config and tokenizer files.

Needs neither transformers nor any deep-learning library.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from darex_jax.core.errors import FileError
from darex_jax.core.scope import HEAD
from darex_jax.files.atomic import atomic_directory
from darex_jax.files.orbax import OrbaxFile, find_orbax
from darex_jax.files.paths import check_file, read_bytes, read_text
from darex_jax.files.safetensors import SafetensorsFile, TensorFile, TensorInfo, write_tensors

MANIFEST = "darex_manifest.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIGURATION = ("config.json", "generation_config.json")
PROCESSING = (  # of a tokenizer, and of what reads images, sounds or videos
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "bpe.codes",
    "normalizer.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COMPANIONS = CONFIGURATION + PROCESSING


def takes_deltas(dtype: np.dtype) -> bool:
    """Whether numbers of this dtype are weights: floating, but not float8, which are codes with scales."""
    return dtype.kind in "fV" and dtype.itemsize > 1  # bfloat16 is of kind V


@dataclass(frozen=True)
class StoredTensor:
    """One parameter of a checkpoint: its file, its name there, and its position."""

    file: TensorFile
    stored_name: str
    info: TensorInfo

    def read(self) -> np.ndarray:
        return self.file.read(self.stored_name)

    def chunks(self) -> Iterator[np.ndarray]:
        """See `SafetensorsFile.chunks`."""
        return self.file.chunks(self.info)

    @property
    def floating(self) -> bool:
        """Whether deltas can be computed; what is not is copied unchanged."""
        return takes_deltas(self.info.dtype)


class Checkpoint:
    """A Hugging Face directory (or one safetensors file, or an orbax checkpoint), opened lazily.

    `DIR#PATH` selects the branch at PATH of an orbax checkpoint's tree; the default is the branch `params` if
    it exists, else the whole tree.

    `tensors` maps names to `StoredTensor`s; old names (`LayerNorm.gamma`/`beta`) are renamed to the new ones.
    `config` is config.json as a dict, {} if there is none.
    Raises: FileError if the directory has neither safetensors nor an orbax checkpoint, or an index that does
      not match its files.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.source = Path(path)  # as given, including the branch
        self.path, branch = split_branch(path)
        self.config = read_config(self.path) if self.path.is_dir() else {}
        self.files: dict[str, TensorFile] = {}
        orbax = None if (self.path / SINGLE).exists() else find_orbax(self.path)
        self.is_orbax = orbax is not None
        if branch is not None and orbax is None:
            raise FileError(f"{self.path}: is not an orbax checkpoint; only those have branches (#{branch}).")
        try:
            if orbax is not None:
                self.files[SINGLE] = OrbaxFile(orbax, branch)
                self.tensors = self._collect()
                return
            file_names, listed = _files_and_tensors(self.path)
            for file_name in file_names:
                parent = self.path if self.path.is_dir() else self.path.parent
                self.files[file_name] = SafetensorsFile(parent / file_name)
            self.tensors = self._collect()
            # Files converted shard by shard may lack a tied head that their index still lists.
            lost = [n for n in listed if modern_name(n) not in self.tensors and not HEAD.search(n)]
            if lost:
                raise FileError(f"{self.path / INDEX}: lists '{lost[0]}', which is in none of the files.")
        except BaseException:
            self.close()
            raise

    def _collect(self) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        for file in self.files.values():
            for stored_name, info in file.tensors.items():
                name = modern_name(stored_name)
                if name in tensors:
                    raise FileError(f"{self.path}: parameter '{name}' is stored twice.")
                tensors[name] = StoredTensor(file, stored_name, info)
        return tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the floating tensors, by name."""
        return {name: tensor.info.shape for name, tensor in self.tensors.items() if tensor.floating}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.info.nbytes for tensor in self.tensors.values())

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def split_branch(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Splits `DIR#PATH` into a path and a branch; a path that exists as written has no branch."""
    whole = os.fspath(path)
    folder, mark, branch = whole.rpartition("#")
    if not mark or os.path.lexists(whole):
        return Path(whole), None
    return Path(folder), branch


def modern_name(name: str) -> str:
    """Renames `...LayerNorm.gamma` and `.beta` of old checkpoints to `.weight` and `.bias`."""
    return re.sub(r"LayerNorm\.(gamma|beta)$", _modern, name)


def _modern(match: re.Match[str]) -> str:
    return "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match.group(1)]


def _files_and_tensors(path: Path) -> tuple[list[str], list[str]]:
    """The names of the weight files, and of the tensors listed in an index, if any."""
    if not path.is_dir():
        return [path.name], []
    if (path / SINGLE).exists():
        return [SINGLE], []
    if not (path / INDEX).exists():
        pickled = sorted(p.name for p in path.glob("pytorch_model*.bin"))
        hint = f" It has {pickled[0]}, a pickle, which is never read: convert it." if pickled else ""
        if (path / "adapter_config.json").exists():
            hint = " It is an adapter: darex merge-adapter BASE ADAPTER makes a model of it."
        raise FileError(f"{path}: has neither {SINGLE} nor {INDEX}, and is not an orbax checkpoint.{hint}")
    index = read_json(path / INDEX)
    weight_map = index.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise FileError(f"{path / INDEX}: has no weight_map.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise FileError(f"{path / INDEX}: '{name}' is not the name of a file in that directory.")
    return names, list(weight_map)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises: FileError if it cannot be read or is not one."""
    try:
        content = json.loads(read_text(path))
    except FileError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: {error}.") from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: expected a JSON object.")
    return content


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a Hugging Face directory, {} if there is none."""
    file = split_branch(path)[0] / "config.json"
    return read_json(file) if file.exists() else {}


def companion_files(path: str | os.PathLike[str]) -> list[Path]:
    """The configuration and tokenizer files of a model directory, sorted by name.

    Raises: FileError for one that is not a regular file.
    """
    folder = split_branch(path)[0]
    files = [folder / name for name in COMPANIONS if (folder / name).exists()]
    for file in files:
        check_file(file)
    return files


def companion_contents(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """The contents of `companion_files`, by name."""
    return {file.name: read_bytes(file) for file in companion_files(path)}


def inherited(own: Collection[str]) -> set[str]:
    """The names of companion files that a model takes from its base: those of a kind of which it has none.

    One kind is the configuration, the other all that turns inputs into tokens. A mixture would be neither
    model's: a chat template in a file of its own takes precedence over one in tokenizer_config.json.
    """
    configuration = () if "config.json" in own else CONFIGURATION
    processing = PROCESSING if set(PROCESSING).isdisjoint(own) else ()
    return {*configuration, *processing}


def with_inherited(own: Mapping[str, bytes], base: Mapping[str, bytes]) -> dict[str, bytes]:
    """The contents of a model's companion files, by name, and of those of its base that it takes."""
    return {name: base[name] for name in base.keys() & inherited(own)} | dict(own)


def load_params(path: str | os.PathLike[str], dtype: Any = None, mesh: Any = None) -> dict[str, Any]:
    """Loads a Hugging Face directory, or an orbax checkpoint, as a nested dict of arrays.

    One parameter is read at a time, and with a mesh only the shards of this process's devices. The host never
    holds a second copy of the model: 0.1 GB on top of 1.9 GB of parameters over 8 devices were measured
    (benchmarks/load.py).

    Args:
      path: directory with safetensors, one such file, or an orbax checkpoint, see `Checkpoint`.
      dtype: floating parameters are cast to it; None keeps the checkpoint's. Integers are not cast.
      mesh: from `make_mesh`: every floating parameter is read directly into its `param_sharding`. All
        processes of a mesh must call this. None: the default device.
    Raises: FileError for a missing or damaged file.
    """
    with Checkpoint(path) as checkpoint:
        return read_params(checkpoint.tensors, dtype, mesh)


def read_params(tensors: Mapping[str, StoredTensor], dtype: Any, mesh: Any) -> dict[str, Any]:
    """`load_params` for some tensors of an open checkpoint."""
    from darex_jax.core.tree import unflatten_names

    def read(name: str, tensor: StoredTensor) -> Any:
        if not tensor.floating:  # integer buffers stay NumPy arrays: without x64, jax would narrow them
            return tensor.read()
        part = partial(tensor.file.read_part, tensor.info)
        return on_devices(name, tensor.info.dtype, tensor.info.shape, part, dtype, mesh)

    return unflatten_names({name: read(name, tensor) for name, tensor in tensors.items()})


def on_devices(
    name: str,
    stored: np.dtype,
    shape: tuple[int, ...],
    part: Callable[[tuple[slice, ...]], np.ndarray],
    dtype: Any,
    mesh: Any,
) -> Any:
    """Places a parameter on its devices, in the requested dtype.

    Args:
      stored, shape: its dtype in the file, and its shape.
      part: reads the shard given by one slice per axis; called for this process's shards.
    """
    import jax
    import jax.numpy as jnp

    from darex_jax.core.sharding import param_sharding

    target = jax.dtypes.canonicalize_dtype(stored if dtype is None else dtype)
    if mesh is None:
        array = jnp.asarray(part((slice(None),) * len(shape)), target)
    else:
        array = jax.make_array_from_callback(
            shape,
            param_sharding(mesh, name, shape),
            lambda index: part(index or ()).astype(target, copy=False),
        )
    # Transfers are asynchronous; wait for each, so that host buffers do not pile up.
    return jax.block_until_ready(array)


def save_params(
    path: str | os.PathLike[str],
    params: Any,
    config: Mapping[str, Any] | None = None,
    companions_from: str | os.PathLike[str] | Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face directory that `transformers` loads: model.safetensors and config.json.

    Parameters are copied to the host one at a time.

    Args:
      path: directory, written atomically.
      params: nested dict of arrays, Hugging Face names and layouts; sharded arrays must be on this process's
        devices only.
      config: written as config.json.
      companions_from: directory whose tokenizer and other companion files are copied, or their contents.
      overwrite: replace `path` if it exists.
      manifest: of the run that made the weights; written as darex_manifest.json.
    Raises: FileError if `path` exists and `overwrite` is not set.
    """
    from darex_jax.core.tree import flatten_names

    if companions_from is not None and not isinstance(companions_from, Mapping):
        companions_from = companion_contents(companions_from)
    with atomic_directory(path, overwrite) as folder:
        for name, content in (companions_from or {}).items():
            (folder / name).write_bytes(content)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
        if manifest is not None:
            (folder / MANIFEST).write_text(json.dumps(dict(manifest), indent=2) + "\n")
        write_tensors(folder / SINGLE, flatten_names(params), {"format": "pt"})

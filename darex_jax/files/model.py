"""Loads a Hugging Face directory as a model, optionally with a delta."""

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from darex_jax.core.errors import DarexError
from darex_jax.core.scope import TABLE, TIED, UNUSED
from darex_jax.core.tree import unflatten_names
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import (
    Checkpoint,
    StoredTensor,
    on_devices,
    read_config,
    read_params,
    split_branch,
)
from darex_jax.files.restore import restore_companions, restored_layout, restored_params
from darex_jax.models import BertConfig, Config, DecoderConfig, Model, build_model, read_model_config
from darex_jax.models.encoder import PREFIXES

BODIES = {
    "BertForMaskedLM": "BertModel",
    "BertForPreTraining": "BertModel",
    "RobertaForMaskedLM": "RobertaModel",
    "XLMRobertaForMaskedLM": "XLMRobertaModel",
    "ModernBertForMaskedLM": "ModernBertModel",
}
LAYER = re.compile(r"(?:^|\.)layers?\.([0-9]+)\.")


def load_model(
    path: str | PathLike[str],
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    delta: str | PathLike[str] | None = None,
    allow_changed_files: bool = False,
    ignore_config_fields: Collection[str] = (),
) -> tuple[Model, dict[str, Any]]:
    """Loads a Hugging Face directory: the model named in config.json, and its weights.

    Names, shapes and dtypes are checked before any weight is read. Weights are read as in `load_params`: one
    at a time and, with a mesh, only the shards of this process's devices.

    Args:
      path: folder with config.json and safetensors.
      dtype: cast the weights to this floating dtype; None keeps the file's.
      mesh: from `make_mesh`: the weights get their `param_sharding`. None: the default device.
      delta: an artifact of `darex prune` made from `path`: loads the restored fine-tuned model, bit for bit
        as `darex apply` writes it. Every parameter is then copied through the host whole.
      allow_changed_files: with a delta, use the configuration of `path` even if it has changed.
      ignore_config_fields: see `read_model_config`.
    Returns: the model and its `params`, the nested Hugging Face state dict with `[out, in]` weights.
      Buffers such as `embeddings.position_ids` and the stored copy of a tied head are omitted; a body saved
      without a pooler has none. For a BERT or RoBERTa with a masked-language-model head the body is loaded.
    Raises: ValueError if the family, the head or a config field is not supported, or one error that lists all
      weights that are missing, unexpected, not floating or of another shape; FileError for a damaged file, or
      a delta of another base.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(path))
        if delta is None:
            hf, tensors = _body_of_masked_lm(checkpoint.config, checkpoint.tensors)
            config = _read(path, hf, ignore_config_fields)
            model, names = _fit(path, config, _without_copies(path, config, tensors))
            return model, read_params({name: tensors[name] for name in names}, dtype, mesh)
        file = stack.enter_context(DeltaFile(delta))
        infos = {n: info for part in restored_layout(checkpoint, file).values() for n, info in part.items()}
        with companions(path, delta, allow_changed_files=allow_changed_files) as folder:
            config = _read(path, read_config(folder), ignore_config_fields)
        model, names = _fit(path, config, infos)
        restored = restored_params(checkpoint, file)  # consumed completely: only then is everything verified
        named = {
            name: on_devices(name, array.dtype, array.shape, array.__getitem__, dtype, mesh)
            for name, array in restored
            if name in names
        }
        return model, unflatten_names({name: named[name] for name in names})


@contextmanager
def companions(
    path: str | PathLike[str], delta: str | PathLike[str] | None, *, allow_changed_files: bool = False
) -> Iterator[Path]:
    """Yields a folder with a model's configuration and tokenizer files.

    Args:
      delta: an artifact made from `path`: the files are those of the restored model, the artifact's own
        taking precedence over the base's, in a temporary folder.
      allow_changed_files: use the base's even if they have changed since.
    """
    path = split_branch(path)[0]
    if delta is None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder, DeltaFile(delta) as file:
        restore_companions(path, file, Path(folder), allow_changed_files=allow_changed_files)
        file.check_data()
        yield Path(folder)


def _read(path: Any, hf: Mapping[str, Any], ignored: Collection[str]) -> Config:
    try:
        return read_model_config(hf, ignored)
    except ValueError as error:
        raise DarexError(f"{path}: {error}") from error


def _fit(
    path: Any, config: Config, infos: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
) -> tuple[Model, list[str]]:
    """The model of a config, and the names of its weights among the tensors (dtype, shape)."""
    layers = len({match.group(1) for name in infos if (match := LAYER.search(name))})
    if config.num_hidden_layers > layers:  # fail before tracing layers that do not exist
        raise DarexError(
            f"{path}: its config.json has num_hidden_layers {config.num_hidden_layers}, its weights have "
            f"{layers} layers."
        )
    floats = {name for name, (dtype, _) in infos.items() if dtype.kind in "fV"}  # bfloat16 is of kind V
    if isinstance(config, DecoderConfig):
        unused = [name for name in floats if UNUSED.search(name)]
        floats -= {*unused, *([TIED] if config.tie_word_embeddings else [])}
    headless = isinstance(config, BertConfig) and config.headless  # their pooler may be missing
    no_pooler = headless and not any(name.startswith("pooler.") for name in infos)
    model, shapes = build_model(config, **({"pooler": False} if no_pooler else {}))
    wrong = [f"{name} is missing" for name in shapes.keys() - infos.keys()]
    wrong += [f"{name} is unexpected" for name in floats - shapes.keys()]
    wrong += [f"{name} is {infos[name][0]}, not floating" for name in shapes.keys() & infos.keys() - floats]
    wrong += [
        f"{name} has shape {list(infos[name][1])}, expected {list(shapes[name])}"
        for name in shapes.keys() & floats
        if infos[name][1] != shapes[name]
    ]
    if wrong:
        stated = f"its config.json ({config.architectures[0]})"
        raise DarexError(f"{path} does not match {stated}: {'; '.join(sorted(wrong))}.")
    return model, list(shapes)


def _body_of_masked_lm(
    hf: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[Mapping[str, Any], Mapping[str, StoredTensor]]:
    """Selects the body of a published BERT or RoBERTa, which has a masked-language-model head."""
    stated = hf.get("architectures")
    body = next((body for name, body in BODIES.items() if stated == [name]), None)
    if body is None:
        return hf, tensors
    prefix = f"{PREFIXES.get(str(hf.get('model_type')), hf.get('model_type'))}."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {**hf, "architectures": [body]}, own


def _without_copies(
    path: Any, config: Config, tensors: Mapping[str, StoredTensor]
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The dtype and shape of every tensor except a tied head's copy, which is checked to be equal."""
    head, table = tensors.get(TIED), tensors.get(TABLE)
    tied = isinstance(config, DecoderConfig) and config.tie_word_embeddings
    if tied and head is not None and table is not None and not _same_numbers(head, table):
        raise DarexError(
            f"{path}: lm_head.weight differs from model.embed_tokens.weight, although config.json ties them."
        )
    return {name: (tensor.info.dtype, tensor.info.shape) for name, tensor in tensors.items()}


def _same_numbers(a: StoredTensor, b: StoredTensor) -> bool:
    same_shape = a.info.shape == b.info.shape
    return same_shape and all(np.array_equal(x, y) for x, y in zip(a.chunks(), b.chunks(), strict=True))

"""A Hugging Face directory as a model that runs."""

from os import PathLike
from typing import Any

import numpy as np
from jax.sharding import Mesh

from darex_jax.files.checkpoint import Checkpoint, StoredTensor, read_params
from darex_jax.models import BertConfig, DecoderConfig, Model, build_model, read_model_config

COMPARED = 1 << 20  # entries of a tied head that are compared at a time


def load_model(
    path: str | PathLike[str], dtype: Any = None, mesh: Mesh | None = None
) -> tuple[Model, dict[str, Any]]:
    """Reads a Hugging Face directory: the model that config.json names, and its weights.

    Names, shapes and dtypes are checked before a weight is read; the weights are then read as `load_params`
    reads them, one at a time and, with a mesh, in the parts that this process's devices hold.

    Args:
      path: folder with config.json and safetensors.
      dtype: cast the weights to this floating dtype; None keeps the file's.
      mesh: from `make_mesh`: the weights lie as `param_sharding` says. None: the default device.
    Returns: the model and its `params`, the nested Hugging Face state dict with `[out, in]` weights.
      Buffers such as `embeddings.position_ids` are left out, and so is the stored copy of a tied head; a body
      saved without a pooler has none.
    Raises: ValueError if the family, the head or a config field is not supported, or one error that lists
      every weight that is missing, left over, not floating or of another shape.
    """
    with Checkpoint(path) as checkpoint:
        try:
            config = read_model_config(checkpoint.config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tensors = checkpoint.tensors
        if isinstance(config, DecoderConfig):
            tensors = {name: x for name, x in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
            if config.tie_word_embeddings:
                _drop_tied_head(path, tensors)
        headless = isinstance(config, BertConfig) and config.headless
        no_pooler = headless and not any(name.startswith("pooler.") for name in tensors)
        model, shapes = build_model(config, **({"pooler": False} if no_pooler else {}))
        floats = {name: x for name, x in tensors.items() if x.floating}
        wrong = [f"{name} is missing" for name in shapes.keys() - tensors.keys()]
        wrong += [f"{name} is left over" for name in floats.keys() - shapes.keys()]
        wrong += [
            f"{name} is {tensors[name].info.dtype}, not floating"
            for name in shapes.keys() & tensors.keys() - floats.keys()
        ]
        wrong += [
            f"{name} has shape {list(floats[name].info.shape)}, expected {list(shapes[name])}"
            for name in shapes.keys() & floats.keys()
            if floats[name].info.shape != shapes[name]
        ]
        if wrong:
            stated = f"its config.json ({config.architectures[0]})"
            raise ValueError(f"{path} does not fit {stated}: {'; '.join(sorted(wrong))}.")
        return model, read_params({name: floats[name] for name in shapes}, dtype, mesh)


def _drop_tied_head(path: Any, tensors: dict[str, StoredTensor]) -> None:
    """A tied head is the embedding; a file that stores it again must store the same numbers."""
    head, table = tensors.pop("lm_head.weight", None), tensors.get("model.embed_tokens.weight")
    if head is not None and table is not None and not _same_numbers(head, table):
        raise ValueError(
            f"{path}: lm_head.weight is not model.embed_tokens.weight, though config.json ties the two."
        )


def _same_numbers(a: StoredTensor, b: StoredTensor) -> bool:
    if a.info.shape != b.info.shape:
        return False

    def piece(tensor: StoredTensor, start: int) -> np.ndarray:
        out = np.empty(min(COMPARED, tensor.info.size - start), tensor.info.dtype)
        tensor.file.read_into(tensor.info, start, out)
        return out

    starts = range(0, a.info.size, COMPARED)
    return all(np.array_equal(piece(a, start), piece(b, start)) for start in starts)

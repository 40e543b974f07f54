"""A Hugging Face directory as a model that runs, with or without a delta on top."""

from collections.abc import Iterable
from contextlib import ExitStack
from os import PathLike
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from darex_jax.core.tree import unflatten_names
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint, on_devices
from darex_jax.files.stream import restored_params
from darex_jax.models import BertConfig, Config, DecoderConfig, Model, build_model, read_model_config
from darex_jax.models.sharding import Place, param_sharding


def load_model(
    path: str | PathLike[str],
    dtype: Any = None,
    *,
    delta: str | PathLike[str] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Reads a Hugging Face directory: the model that config.json names, and its weights.

    Args:
      path: folder with config.json and safetensors.
      dtype: cast the weights to this floating dtype; None keeps the file's.
      delta: an artifact of `darex prune` made from `path`; the fine-tuned model that it restores is loaded,
        bit for bit the one that `darex apply` writes.
      mesh: from `make_mesh`; each parameter goes to the devices that the rules for its name give it. The host
        holds one parameter at a time, whatever the model's size.
    Returns: the model and its `params`, the nested Hugging Face state dict with `[out, in]` weights.
      Buffers such as `embeddings.position_ids` are left out, and so is the stored copy of a tied head; a body
      saved without a pooler has none.
    Raises: ValueError if the family, the head or a config field is not supported, or one error that lists
      every weight that is missing, left over, not floating or of another shape; FileError if a file is
      damaged or the delta was made from another base.
    """
    with ExitStack() as stack:
        base = stack.enter_context(Checkpoint(path))
        if delta is None:
            hf = base.config
            named: Iterable[tuple[str, np.ndarray]] = ((n, t.read()) for n, t in base.tensors.items())
        else:
            file = stack.enter_context(DeltaFile(delta))
            hf, named = file.config() or base.config, restored_params(base, file)
        try:
            config = read_model_config(hf)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        params = _read(path, config, named, dtype, None if mesh is None else param_sharding(mesh))
    headless = isinstance(config, BertConfig) and config.headless
    no_pooler = headless and not any(name.startswith("pooler.") for name in params)
    model, shapes = build_model(config, **({"pooler": False} if no_pooler else {}))
    wrong = [f"{name} is missing" for name in shapes.keys() - params.keys()]
    wrong += [
        f"{name} is left over"
        for name in params.keys() - shapes.keys()
        if jnp.issubdtype(params[name].dtype, jnp.floating)  # an integer is a buffer
    ]
    wrong += [
        f"{name} has shape {list(params[name].shape)}, expected {list(shapes[name])}"
        for name in shapes.keys() & params.keys()
        if params[name].shape != shapes[name]
    ]
    wrong += [
        f"{name} is {params[name].dtype}, not floating"
        for name in shapes.keys() & params.keys()
        if not jnp.issubdtype(params[name].dtype, jnp.floating)
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit its config.json ({config.architectures[0]}): {'; '.join(sorted(wrong))}."
        )
    return model, unflatten_names({name: params[name] for name in shapes})


def _read(
    path: Any, config: Config, named: Iterable[tuple[str, np.ndarray]], dtype: Any, place: Place | None
) -> dict[str, Any]:
    """The parameters by name, on their devices; without what a file may hold besides."""
    params: dict[str, Any] = {}
    tied = isinstance(config, DecoderConfig) and config.tie_word_embeddings
    for name, array in named:
        floating = array.dtype.kind in "fV"  # ml_dtypes' bfloat16 is of kind V
        if name.endswith("rotary_emb.inv_freq"):
            continue
        params[name] = on_devices(name, array, dtype if floating else None, place)
    head = params.pop("lm_head.weight", None) if tied else None
    if head is not None and not jnp.array_equal(head, params["model.embed_tokens.weight"]):
        raise ValueError(
            f"{path}: lm_head.weight is not model.embed_tokens.weight, though config.json ties the two."
        )
    return params

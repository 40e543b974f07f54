"""A Hugging Face directory as a model that runs."""

from os import PathLike
from typing import Any

import jax.numpy as jnp

from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.files.checkpoint import load_params, read_config
from darex_jax.models import BertConfig, DecoderConfig, Model, build_model, read_model_config


def load_model(path: str | PathLike[str], dtype: Any = None) -> tuple[Model, dict[str, Any]]:
    """Reads a Hugging Face directory: the model that config.json names, and its weights.

    Args:
      path: folder with config.json and safetensors.
      dtype: cast the weights to this floating dtype; None keeps the file's.
    Returns: the model and its `params`, the nested Hugging Face state dict with `[out, in]` weights.
      Buffers such as `embeddings.position_ids` are left out, and so is the stored copy of a tied head; a body
      saved without a pooler has none.
    Raises: ValueError if the family, the head or a config field is not supported, or one error that lists
      every weight that is missing, left over, not floating or of another shape.
    """
    try:
        config = read_model_config(read_config(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    params = flatten_names(load_params(path, dtype))
    if isinstance(config, DecoderConfig):
        params = {name: x for name, x in params.items() if not name.endswith("rotary_emb.inv_freq")}
        if config.tie_word_embeddings:
            _drop_tied_head(path, params)
    headless = isinstance(config, BertConfig) and config.headless
    no_pooler = headless and not any(name.startswith("pooler.") for name in params)
    model, shapes = build_model(config, **({"pooler": False} if no_pooler else {}))
    floats = {name: x for name, x in params.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    wrong = [f"{name} is missing" for name in shapes.keys() - params.keys()]
    wrong += [f"{name} is left over" for name in floats.keys() - shapes.keys()]
    wrong += [
        f"{name} is {params[name].dtype}, not floating"
        for name in shapes.keys() & params.keys() - floats.keys()
    ]
    wrong += [
        f"{name} has shape {list(floats[name].shape)}, expected {list(shapes[name])}"
        for name in shapes.keys() & floats.keys()
        if floats[name].shape != shapes[name]
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit its config.json ({config.architectures[0]}): {'; '.join(sorted(wrong))}."
        )
    return model, unflatten_names({name: floats[name] for name in shapes})


def _drop_tied_head(path: Any, params: dict[str, Any]) -> None:
    """A tied head is the embedding; a file that stores it again must store the same numbers."""
    head = params.pop("lm_head.weight", None)
    if head is not None and not jnp.array_equal(head, params["model.embed_tokens.weight"]):
        raise ValueError(
            f"{path}: lm_head.weight is not model.embed_tokens.weight, though config.json ties the two."
        )

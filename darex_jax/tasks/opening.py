"""Opens a model with its parameters, tokenizer and end tokens."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any, NamedTuple

from darex_jax.core.errors import DarexError
from darex_jax.files.checkpoint import read_json
from darex_jax.files.model import companions, load_model
from darex_jax.models import Config, Model
from darex_jax.models.config import Token, type_faults
from darex_jax.tasks.batching import load_tokenizer

GENERATION_CONFIG = "generation_config.json"


class Opened(NamedTuple):
    """A model with its parameters and tokenizer.

    Attributes:
      params: its nested Hugging Face state dict.
      tokenizer: a Hugging Face tokenizer.
      ends: its end tokens, from generation_config.json or, without one, the config.
    """

    model: Model
    params: dict[str, Any]
    tokenizer: Any
    ends: int | list[int] | None


def open_model(
    path: str | os.PathLike[str],
    dtype: Any = None,
    *,
    delta: str | os.PathLike[str] | None = None,
    allow_changed_files: bool = False,
    ignore_config_fields: Collection[str] = (),
) -> Opened:
    """Opens a Hugging Face directory, or with an artifact made from it the restored model.

    Config, generation config, tokenizer and parameters are then those of the directory that `darex apply`
    writes, so texts and scores are the same.

    Args, Raises: as `load_model` and `load_tokenizer`.
    """
    model, params = load_model(
        path,
        dtype,
        delta=delta,
        allow_changed_files=allow_changed_files,
        ignore_config_fields=ignore_config_fields,
    )
    ends = text_ends(path, delta, model.config, allow_changed_files=allow_changed_files)
    tokenizer = load_tokenizer(path, delta, allow_changed_files=allow_changed_files)
    return Opened(model, params, tokenizer, ends)


def text_ends(
    path: str | os.PathLike[str],
    delta: str | os.PathLike[str] | None,
    config: Config,
    *,
    allow_changed_files: bool = False,
) -> int | list[int] | None:
    """A model's end tokens, from generation_config.json or, without one, the config.

    Raises: ValueError for invalid values, or a file that has changed since the artifact was made.
    """
    with companions(path, delta, allow_changed_files=allow_changed_files) as folder:
        file = folder / GENERATION_CONFIG
        stated = read_json(file) if file.exists() else {}
    ends = {"eos_token_id": stated.get("eos_token_id", getattr(config, "eos_token_id", None))}
    if wrong := type_faults(ends, {"eos_token_id": Token | list[Token] | None}):
        raise DarexError(f"{path}: {GENERATION_CONFIG}: {wrong[0]}.")
    return ends["eos_token_id"]

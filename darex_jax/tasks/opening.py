"""A model with all that goes with it: parameters, tokenizer, and where its texts end."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from darex_jax.core.errors import DarexError
from darex_jax.files.checkpoint import read_json
from darex_jax.files.model import companions, load_model
from darex_jax.models import Model
from darex_jax.models.config import Token, type_faults
from darex_jax.tasks.batching import load_tokenizer

GENERATION_CONFIG = "generation_config.json"


class Opened(NamedTuple):
    """A model, ready to run.

    Attributes:
      params: its nested Hugging Face state dict.
      tokenizer: of Hugging Face.
      ends: the tokens at which its texts end, as generation_config.json has them or, without one, the config.
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
    """Opens a Hugging Face directory, or with an artifact made from it the model that the two restore.

    Config, generation config, tokenizer and parameters are then those of the directory that `darex apply`
    writes: the same texts and scores come by either way.

    Args, Raises: as `load_model` and `load_tokenizer`.
    """
    model, params = load_model(
        path,
        dtype,
        delta=delta,
        allow_changed_files=allow_changed_files,
        ignore_config_fields=ignore_config_fields,
    )
    with companions(path, delta, allow_changed_files=allow_changed_files) as folder:
        ends = _ends(path, folder, getattr(model.config, "eos_token_id", None))
    tokenizer = load_tokenizer(path, delta, allow_changed_files=allow_changed_files)
    return Opened(model, params, tokenizer, ends)


def _ends(
    path: str | os.PathLike[str], folder: Path, otherwise: int | list[int] | None
) -> int | list[int] | None:
    file = folder / GENERATION_CONFIG
    stated = {"eos_token_id": otherwise, **(read_json(file) if file.exists() else {})}
    kinds = {"eos_token_id": Token | list[Token] | None}
    if wrong := type_faults({name: stated[name] for name in kinds}, kinds):
        raise DarexError(f"{path}: {GENERATION_CONFIG}: {wrong[0]}.")
    return stated["eos_token_id"]

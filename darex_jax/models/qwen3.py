"""Qwen3, dense (Yang et al., arXiv:2505.09388): Qwen2 without biases, with per-head query and key norms."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from darex_jax.models.decoder import CausalLM, Decoder, DecoderConfig, read_decoder_config
from darex_jax.models.qwen2 import WINDOW_FIELDS, read_windows

ARCHITECTURES = {"Qwen3Model": Decoder, "Qwen3ForCausalLM": CausalLM}

FIXED: dict[str, Any] = {"attention_dropout": 0.0, "mlp_bias": False, "is_encoder_decoder": False}


def read_qwen3_config(hf: Mapping[str, Any], ignored: Collection[str] = ()) -> DecoderConfig:
    """Reads the content of a config.json. A missing `head_dim` is 128, as in transformers.

    Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
    """
    config = read_decoder_config(
        "Qwen3",
        {**hf, "head_dim": 128 if hf.get("head_dim") is None else hf["head_dim"]},
        architectures=ARCHITECTURES,
        fixed=FIXED,
        inert=(),
        read=WINDOW_FIELDS,
        ignored=ignored,
    )
    return dataclasses.replace(config, windows=read_windows("Qwen3", hf, config.num_hidden_layers))

"""Mistral (Jiang et al., arXiv:2310.06825) as in transformers: Llama with sliding-window attention."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from darex_jax.models.config import Size, refuse, type_faults
from darex_jax.models.decoder import CausalLM, Decoder, DecoderConfig, read_decoder_config

ARCHITECTURES = {"MistralModel": Decoder, "MistralForCausalLM": CausalLM}

FIXED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "is_encoder_decoder": False,
}


def read_mistral_config(hf: Mapping[str, Any], ignored: Collection[str] = ()) -> DecoderConfig:
    """Reads a config.json. A missing `sliding_window` is 4,096 positions, null is unlimited.

    Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
    """
    window = hf.get("sliding_window", 4096)
    refuse("Mistral", type_faults({"sliding_window": window}, {"sliding_window": Size | None}))
    config = read_decoder_config(
        "Mistral",
        hf,
        architectures=ARCHITECTURES,
        fixed=FIXED,
        inert=(),
        read=("sliding_window",),
        ignored=ignored,
        default_theta=10_000.0,
    )
    windows = () if window is None else (window,) * config.num_hidden_layers
    return dataclasses.replace(config, windows=windows)

"""Llama (Touvron et al., arXiv:2307.09288; Llama 3, arXiv:2407.21783) as transformers computes it."""

from collections.abc import Collection, Mapping
from typing import Any

from darex_jax.models.decoder import CausalLM, Decoder, DecoderConfig, read_decoder_config

ARCHITECTURES = {"LlamaModel": Decoder, "LlamaForCausalLM": CausalLM}

FIXED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
}


def read_llama_config(hf: Mapping[str, Any], ignored: Collection[str] = ()) -> DecoderConfig:
    """Reads a config.json. A missing `rope_theta` is Llama 2's 10,000, as in transformers.

    Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
    """
    return read_decoder_config(
        "Llama",
        hf,
        architectures=ARCHITECTURES,
        fixed=FIXED,
        inert=("is_llama_config", "transformers.js_config"),
        ignored=ignored,
        default_theta=10_000.0,
    )

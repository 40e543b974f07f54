"""Llama (Touvron et al., arXiv:2307.09288; Llama 3, arXiv:2407.21783) as transformers computes it."""

from collections.abc import Mapping
from typing import Any

from darex_jax.models.config import INERT, read_fields, refuse
from darex_jax.models.decoder import CausalLM, Decoder, DecoderConfig, read_rope

ARCHITECTURES = {"LlamaModel": Decoder, "LlamaForCausalLM": CausalLM}

FIXED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
}


def read_llama_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads the content of a config.json. A missing `rope_theta` is Llama 2's 10,000, as in transformers.

    Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
    """
    rope_fields = ("rope_theta", "rope_scaling", "rope_parameters")
    values, notes, wrong = read_fields(
        DecoderConfig,
        hf,
        computed=("rope", "windows", "notes"),
        fixed=FIXED,
        inert={*INERT, *rope_fields, "is_llama_config", "transformers.js_config"},
    )
    rope, rope_faults = read_rope(hf, default_theta=10_000.0)
    refuse("Llama", wrong + rope_faults)
    assert rope is not None
    config = DecoderConfig(**values, rope=rope, notes=notes)
    known = len(config.architectures) == 1 and config.architectures[0] in ARCHITECTURES
    stated = f"architectures is {list(config.architectures)}, supported: {', '.join(ARCHITECTURES)}"
    refuse("Llama", config.faults() + ([] if known else [stated]))
    return config

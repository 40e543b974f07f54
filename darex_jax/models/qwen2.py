"""Qwen2 (Yang et al., arXiv:2407.10671) as transformers computes it: Llama with biases on q, k and v."""

from collections.abc import Mapping
from typing import Any

from darex_jax.models.decoder import CausalLM, Decoder, DecoderConfig, read_decoder_config

ARCHITECTURES = {"Qwen2Model": Decoder, "Qwen2ForCausalLM": CausalLM}

FIXED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "attention_bias": False,  # not a field of Qwen2's: its projections have the biases they have
    "mlp_bias": False,
    "is_encoder_decoder": False,
}
WINDOW_FIELDS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def read_qwen2_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads the content of a config.json.

    Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
    """
    windows, wrong = read_windows(hf)
    if hf.get("use_mrope"):
        wrong.append("use_mrope is True, supported: False")
    return read_decoder_config(
        "Qwen2",
        hf,
        architectures=ARCHITECTURES,
        fixed=FIXED,
        inert=(*WINDOW_FIELDS, "use_mrope"),
        windows=windows,
        wrong=wrong,
    )


def read_windows(hf: Mapping[str, Any]) -> tuple[tuple[int | None, ...], list[str]]:
    """How far back each layer attends; () where every layer sees everything.

    Only with `use_sliding_window` do windows count; then `layer_types` says which layers have one, or, where
    it is absent, all from `max_window_layers` on. Absent fields are 4,096 positions and layer 28, as in
    transformers.
    """
    layers, window = hf.get("num_hidden_layers") or 0, hf.get("sliding_window", 4096)
    if not hf.get("use_sliding_window") or window is None:
        return (), []
    first = hf.get("max_window_layers", 28)
    types = hf.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown or len(types) != layers:
        return (), [f"layer_types is {types!r}, expected {layers} of full_attention, sliding_attention"]
    return tuple(window if kind == "sliding_attention" else None for kind in types), []

"""Qwen2 (Yang et al., arXiv:2407.10671) as transformers computes it: Llama with biases on q, k and v."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from darex_jax.models.config import (
    WHOLE,
    WINDOWED,
    Count,
    Size,
    layer_type_faults,
    refuse,
    type_faults,
)
from darex_jax.models.decoder import CausalLM, Decoder, DecoderConfig, read_decoder_config

ARCHITECTURES = {"Qwen2Model": Decoder, "Qwen2ForCausalLM": CausalLM}

FIXED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "attention_bias": False,  # not a Qwen2 field: its biases are fixed
    "mlp_bias": False,
    "is_encoder_decoder": False,
    "use_mrope": False,
}
WINDOW_FIELDS: dict[str, Any] = {  # their types, if windows are used
    "use_sliding_window": bool | None,
    "sliding_window": Size | None,
    "max_window_layers": Count,
    "layer_types": list[str] | None,
}


def read_qwen2_config(hf: Mapping[str, Any], ignored: Collection[str] = ()) -> DecoderConfig:
    """Reads the content of a config.json.

    Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
    """
    config = read_decoder_config(
        "Qwen2",
        hf,
        architectures=ARCHITECTURES,
        fixed=FIXED,
        inert=(),
        read=WINDOW_FIELDS,
        ignored=ignored,
    )
    return dataclasses.replace(config, windows=read_windows("Qwen2", hf, config.num_hidden_layers))


def read_windows(family: str, hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The attention window of each of `layers` layers; () if no layer has one.

    Windows apply only with `use_sliding_window`, to the layers that `layer_types` lists or, if it is missing,
    to all from `max_window_layers` on. Missing fields are 4,096 positions and layer 28, as in transformers.

    Raises: ValueError for values of another type, or layers of an unknown one.
    """
    if not hf.get("use_sliding_window"):
        return ()
    refuse(family, type_faults({n: hf[n] for n in WINDOW_FIELDS if n in hf}, WINDOW_FIELDS))
    window, first = hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
    if window is None:
        return ()
    types = hf.get("layer_types") or [WINDOWED if i >= first else WHOLE for i in range(layers)]
    refuse(family, layer_type_faults(types, layers))
    return tuple(window if kind == WINDOWED else None for kind in types)

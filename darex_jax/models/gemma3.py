"""Gemma 3's text model (arXiv:2503.19786) as transformers computes it.

Differences from Llama: norms scale by 1 + weight, with two more of them per layer; queries and keys are
normalised per head; embeddings are scaled by the root of their size; local layers with a sliding window and
their own rotary positions alternate with global ones.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from darex_jax.models.config import (
    WHOLE,
    WINDOWED,
    Positive,
    Size,
    layer_type_faults,
    refuse,
    shown,
    type_faults,
)
from darex_jax.models.decoder import (
    Attention,
    CausalLM,
    Decoder,
    DecoderConfig,
    FeedForward,
    Layer,
    Past,
    read_decoder_config,
)
from darex_jax.models.layers import ACTIVATIONS, Embedding, Keys, RMSNorm
from darex_jax.models.rotary import read_rope

Array = jax.Array

FIXED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "is_encoder_decoder": False,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
READ: dict[str, Any] = {  # beside the rotary positions
    "hidden_activation": str | None,
    "query_pre_attn_scalar": Positive | None,
    "sliding_window": Size | None,
    "layer_types": list[str] | None,
    "rope_local_base_freq": Positive | None,
    "sliding_window_pattern": Size | None,
    "_sliding_window_pattern": Size | None,
}


class Norm(RMSNorm):
    """`x / rms(x) * (1 + weight)`, all in float32 at least."""

    offset = 1.0


class ScaledEmbedding(Embedding):
    """Embeddings scaled by the root of their size, which is rounded to the table's dtype."""

    def __call__(self, ids: Array) -> Array:
        x = super().__call__(ids)
        return x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)


class Gemma3Layer(Layer):
    def __init__(self, config: DecoderConfig, *, rngs: Keys):
        self.self_attn = Attention(config, norm=Norm, rngs=rngs)
        self.mlp = FeedForward(config, rngs=rngs)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(size, eps=eps)
        self.post_attention_layernorm = Norm(size, eps=eps)
        self.pre_feedforward_layernorm = Norm(size, eps=eps)
        self.post_feedforward_layernorm = Norm(size, eps=eps)

    def __call__(
        self, x: Array, angles: tuple[Array, Array], mask: Array, past: Past | None
    ) -> tuple[Array, tuple[Array, Array]]:
        y, keys_and_values = self.self_attn(self.input_layernorm(x), angles, mask, past)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y), keys_and_values


class Gemma3Decoder(Decoder):
    layer, embedding, norm_class = Gemma3Layer, ScaledEmbedding, Norm


class Gemma3CausalLM(CausalLM):
    body = Gemma3Decoder


ARCHITECTURES = {"Gemma3TextModel": Gemma3Decoder, "Gemma3ForCausalLM": Gemma3CausalLM}


def read_gemma3_config(hf: Mapping[str, Any], ignored: Collection[str] = ()) -> DecoderConfig:
    """Reads the content of a config.json, as transformers 4 (`rope_theta`, `rope_local_base_freq`,
    `sliding_window_pattern`) or 5 (`rope_parameters` by kind of layer, `layer_types`) writes it.

    Missing fields have transformers' defaults: tied embeddings, a window of 4,096 in all but every sixth
    layer, rope_theta 10,000 there and 1,000,000 elsewhere, queries divided by the root of 256.

    Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
    """
    refuse("Gemma 3", type_faults({name: hf[name] for name in READ if name in hf}, READ))
    by_kind = hf.get("rope_parameters")
    by_kind = by_kind if isinstance(by_kind, dict) and by_kind.keys() & {WHOLE, WINDOWED} else None
    activation = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    if activation not in ACTIVATIONS:
        refuse("Gemma 3", [f"hidden_activation is {shown(activation)}, supported: {', '.join(ACTIVATIONS)}"])
    full = {**hf, "hidden_act": activation}
    full["tie_word_embeddings"] = hf.get("tie_word_embeddings", True)
    full["head_dim"] = 256 if hf.get("head_dim") is None else hf["head_dim"]
    if by_kind is not None:
        full["rope_parameters"] = by_kind.get(WHOLE)
    config = read_decoder_config(
        "Gemma 3",
        full,
        architectures=ARCHITECTURES,
        fixed=FIXED,
        inert=("cache_implementation",),
        read={name for name in READ if not name.startswith("_")},
        ignored=ignored,
        default_theta=1_000_000.0,
    )
    local = {"rope_theta": hf.get("rope_local_base_freq") or 10_000.0}
    if by_kind is not None:
        local = {"rope_parameters": by_kind.get(WINDOWED)}
    rope, faults = read_rope(local, 10_000.0)
    layers = config.num_hidden_layers
    every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    types = hf.get("layer_types") or [WINDOWED if (i + 1) % every else WHOLE for i in range(layers)]
    refuse("Gemma 3", faults + layer_type_faults(types, layers))
    window = hf.get("sliding_window") or 4096
    notes = {name: value for name, value in hf.items() if name in full and name in (*READ, "rope_parameters")}
    return dataclasses.replace(
        config,
        local_rope=rope,
        query_scale=(hf.get("query_pre_attn_scalar") or 256) ** -0.5,
        windows=tuple(window if kind == WINDOWED else None for kind in types),
        notes={**config.notes, **notes},
    )

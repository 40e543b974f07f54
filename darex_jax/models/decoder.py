"""A causal decoder with rotary positions, grouped-query attention and a gated feed-forward layer.

Shared by Llama (Touvron et al., arXiv:2302.13971 and 2307.09288), Mistral, Qwen2, Qwen3 and Gemma 3; their
differences are in one file per family. Field names are Hugging Face's, so the parameter tree is the nested
Hugging Face state dict; a tied head is absent from it.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from darex_jax.models.config import (
    INERT,
    Depth,
    Number,
    Size,
    Token,
    read_fields,
    refuse,
    shown,
)
from darex_jax.models.layers import ACTIVATIONS, Embedding, Keys, Linear, RMSNorm, remat
from darex_jax.models.rotary import Rope, read_rope, rotate

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The config.json of a decoder, under its own names; `rope` and `windows` combine several fields.

    `windows` holds each layer's attention window in positions; None is unlimited. `local_rope` are the rotary
    positions of windowed layers, if different; `query_scale` is the factor of attention scores, None is
    head_dim ** -0.5. `notes` holds the fields that change no output; equality and hash ignore them.
    """

    COMPUTED: ClassVar[tuple[str, ...]] = ("rope", "local_rope", "query_scale", "windows", "notes")

    model_type: str
    architectures: tuple[str, ...]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    hidden_act: str
    rms_norm_eps: Number
    initializer_range: Number
    max_position_embeddings: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: Token | None = None
    eos_token_id: Token | list[Token] | None = dataclasses.field(default=None, hash=False)
    rope: Rope
    local_rope: Rope | None = None
    query_scale: float | None = None
    windows: tuple[int | None, ...] = ()
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False, compare=False)

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def features_per_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def biases(self) -> tuple[bool, bool]:
        """Whether the query, key and value projections, and the output projection, have a bias."""
        return (True, False) if self.model_type == "qwen2" else (self.attention_bias, self.attention_bias)

    @property
    def normalises_heads(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.model_type in ("qwen3", "gemma3_text")

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def faults(self) -> list[str]:
        """Problems of this config, one message each."""
        wrong = []
        if self.hidden_act not in ACTIVATIONS:
            wrong.append(f"hidden_act is {shown(self.hidden_act)}, supported: {', '.join(ACTIVATIONS)}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            wrong.append(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.key_value_heads:
            wrong.append(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.key_value_heads}"
            )
        for heads, name in ((self.num_attention_heads, "attention"), (self.key_value_heads, "key_value")):
            if heads * self.features_per_head >= 2**31:
                wrong.append(f"num_{name}_heads is {heads}, with {self.features_per_head} features each")
        if self.features_per_head % 2:
            wrong.append(f"head_dim is {self.features_per_head}, rotary positions need an even number")
        if self.rope.kind == "dynamic" and self.features_per_head < 4:
            wrong.append(f"head_dim is {self.features_per_head}, dynamic rotary positions need at least 4")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            wrong.append(f"pad_token_id is {self.pad_token_id}, the vocabulary has {self.vocab_size} rows")
        return wrong

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json: every field of the one that was read, with the same value."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in self.COMPUTED]
        values = {name: getattr(self, name) for name in names}
        own = {name: value for name, value in values.items() if value is not None}
        return {**self.notes, **own, "architectures": list(self.architectures)}


def read_decoder_config(
    family: str,
    hf: Mapping[str, Any],
    *,
    architectures: Collection[str],
    fixed: Mapping[str, Any],
    inert: Collection[str],
    ignored: Collection[str],
    read: Collection[str] = (),
    default_theta: float | None = None,
) -> DecoderConfig:
    """Reads the content of a config.json.

    Args:
      family: its name in errors.
      architectures: valid values of `architectures`.
      fixed, inert, read, ignored: as for `read_fields`; rotary position fields are handled here.
      default_theta: value of a missing `rope_theta`; None refuses it.
    Returns: the config, its `windows` empty.
    Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
    """
    values, notes, wrong = read_fields(
        DecoderConfig,
        hf,
        computed=DecoderConfig.COMPUTED,
        fixed=fixed,
        inert={*INERT, *inert},
        read={*read, "rope_theta", "rope_scaling", "rope_parameters"},
        ignored=ignored,
    )
    rope, rope_faults = read_rope(hf, default_theta)
    refuse(family, [*wrong, *rope_faults])
    assert rope is not None
    nulls = {name: None for name, value in values.items() if value is None and name in hf}
    config = DecoderConfig(**values, rope=rope, notes=nulls | notes)
    known = len(config.architectures) == 1 and config.architectures[0] in architectures
    stated = f"architectures is {shown(list(config.architectures))}, supported: {', '.join(architectures)}"
    refuse(family, config.faults() + ([] if known else [stated]))
    return config


class Cache(NamedTuple):
    """A key-value cache with S slots, filled to the same length in every row.

    Attributes:
      keys, values: per layer [B, S, K, H].
      real: [B, S] bool, True where a slot holds a token other than padding.
      length: int32 scalar, how many slots are filled.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    real: Array
    length: Array


class DecoderOutput(NamedTuple):
    """`last_hidden_state` [B, T, D]; `logits` [B, T, V] or None; `cache` if one was given."""

    last_hidden_state: Array
    logits: Array | None = None
    cache: Cache | None = None


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any) -> Cache:
    shape = (batch, slots, config.key_value_heads, config.features_per_head)
    layers = range(config.num_hidden_layers)
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype) for _ in layers),
        real=jnp.zeros((batch, slots), bool),
        length=jnp.int32(0),
    )


def contexts(
    config: DecoderConfig, windows: Collection[int | None], real: Array, positions: Array, slots: Array
) -> dict[int | None, tuple[tuple[Array, Array], Array]]:
    """What attention needs beside the hidden states, by window: the rotary angles and the mask [B, T, S].

    Args: real: [B, S] bool; positions: [B, T] of the queries; slots: [T] of the S that the queries are in.
    """
    features = config.features_per_head
    turns = local = config.rope.turns(features, positions)
    if config.local_rope is not None:
        local = config.local_rope.turns(features, positions)
    distance = slots[:, None] - jnp.arange(real.shape[1])[None]  # T S
    return {
        window: (
            turns if window is None else local,
            real[:, None] & ((distance >= 0) & (distance < (window or 2**31 - 1)))[None],
        )
        for window in windows
    }


Past = tuple[Array, Array, Array]  # a layer's cached keys and values, and the index of the new ones


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, *, norm: type[RMSNorm] = RMSNorm, rngs: Keys):
        size, heads, stddev = config.hidden_size, config.features_per_head, config.initializer_range
        inner, outer = config.biases
        keys = config.key_value_heads * heads
        queries = config.num_attention_heads * heads
        self.q_proj = Linear(size, queries, stddev=stddev, bias=inner, rngs=rngs)
        self.k_proj = Linear(size, keys, stddev=stddev, bias=inner, rngs=rngs)
        self.v_proj = Linear(size, keys, stddev=stddev, bias=inner, rngs=rngs)
        self.o_proj = Linear(queries, size, stddev=stddev, bias=outer, rngs=rngs)
        self.features_per_head, self.scale = heads, config.query_scale
        self.normalises = config.normalises_heads
        if self.normalises:
            self.q_norm, self.k_norm = (norm(heads, eps=config.rms_norm_eps) for _ in range(2))

    def __call__(
        self, x: Array, angles: tuple[Array, Array], mask: Array, past: Past | None
    ) -> tuple[Array, tuple[Array, Array]]:
        """Also returns the keys and values, including those of `past`."""
        q, k, v = (
            y.reshape(*y.shape[:2], -1, self.features_per_head)  # B T D -> B T N H
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        if self.normalises:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if past is not None:
            keys, values, start = past
            k = jax.lax.dynamic_update_slice_in_dim(keys, k.astype(keys.dtype), start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), start, axis=1)
        y = attend(q, k, v, mask, self.scale)
        return self.o_proj(y.reshape(*x.shape[:2], -1)), (k, v)  # B T N H -> B T D


def attend(q: Array, k: Array, v: Array, mask: Array, scale: float | None = None) -> Array:
    """Grouped-query attention: q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S].

    Scores are multiplied by `scale`; None is H ** -0.5. The kernel is cuDNN's on NVIDIA hardware for half
    precision (all it supports) and XLA's elsewhere.
    """
    attention = partial(jax.nn.dot_product_attention, scale=scale)
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fused = half and jax.default_backend() == "gpu" and q.shape[1] > 1 and q.shape[-1] in (64, 128)
    inputs, elsewhere = (q, k, v, None, mask[:, None]), partial(attention, implementation="xla")
    if not fused:
        return elsewhere(*inputs)
    # A process that has a GPU may still compute this on its CPU: that is known when it is lowered.
    return jax.lax.platform_dependent(
        *inputs, cuda=partial(attention, implementation="cudnn"), default=elsewhere
    )


class FeedForward(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: Keys):
        size, inner = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = {"stddev": config.initializer_range, "bias": config.mlp_bias, "rngs": rngs}
        self.gate_proj = Linear(size, inner, **options)
        self.up_proj = Linear(size, inner, **options)
        self.down_proj = Linear(inner, size, **options)
        self.activation = config.hidden_act

    def __call__(self, x: Array) -> Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: Keys):
        self.self_attn = Attention(config, rngs=rngs)
        self.mlp = FeedForward(config, rngs=rngs)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: Array, angles: tuple[Array, Array], mask: Array, past: Past | None
    ) -> tuple[Array, tuple[Array, Array]]:
        y, keys_and_values = self.self_attn(self.input_layernorm(x), angles, mask, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), keys_and_values


class Decoder(nnx.Module):
    """The body: `LlamaModel`, `Qwen2Model`, ..."""

    remat: bool = False  # a class attribute: not part of the graphdef, see `Model`
    layer: ClassVar[type[Layer]] = Layer
    embedding: ClassVar[type[Embedding]] = Embedding
    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: DecoderConfig, *, rngs: Keys):
        self.embed_tokens = self.embedding(
            config.vocab_size,
            config.hidden_size,
            stddev=config.initializer_range,
            padding_idx=config.pad_token_id,
            rngs=rngs,
        )
        self.layers = nnx.List([self.layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.config = config

    def __call__(self, input_ids: Array, real: Array, cache: Cache | None = None) -> DecoderOutput:
        """Runs the next T positions; `real` [B, T] is False for padding."""
        length = input_ids.shape[1]
        start = jnp.int32(0) if cache is None else cache.length
        if cache is not None:
            real = jax.lax.dynamic_update_slice_in_dim(cache.real, real, start, axis=1)
        # Padding does not advance positions: rows may be left-padded.
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        if cache is not None:
            positions = jax.lax.dynamic_slice_in_dim(positions, start, length, axis=1)
        windows = {self.config.window(i) for i in range(len(self.layers))}
        around = contexts(self.config, windows, real, positions, start + jnp.arange(length))
        x = self.embed_tokens(input_ids)  # B T -> B T D
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            past = None if cache is None else (cache.keys[i], cache.values[i], start)
            rest = (*around[self.config.window(i)], past)
            x, (k, v) = remat(layer, x, *rest) if self.remat else layer(x, *rest)
            keys.append(k)
            values.append(v)
        if cache is not None:
            cache = Cache(tuple(keys), tuple(values), real, start + length)
        return DecoderOutput(self.norm(x), None, cache)


class CausalLM(nnx.Module):
    """A decoder with a head over the vocabulary: `LlamaForCausalLM`, `Qwen2ForCausalLM`, ..."""

    body: ClassVar[type[Decoder]] = Decoder

    def __init__(self, config: DecoderConfig, *, rngs: Keys):
        self.model = self.body(config, rngs=rngs)
        size, stddev = config.hidden_size, config.initializer_range
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(size, config.vocab_size, stddev=stddev, bias=False, rngs=rngs)

    def __call__(self, input_ids: Array, real: Array, cache: Cache | None = None) -> DecoderOutput:
        out = self.model(input_ids, real, cache)
        return out._replace(logits=self.logits(out.last_hidden_state))

    def logits(self, x: Array) -> Array:
        """[..., D] -> [..., V]"""
        return self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)

"""ModernBERT (Warner et al., arXiv:2412.13663) as transformers computes it, with or without a classifier.

Differences from BERT: pre-norm without biases, rotary positions, a fused projection for queries, keys and
values, gated feed-forward layers, and local attention layers with a two-sided window between global ones.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from darex_jax.models.config import (
    INERT,
    WHOLE,
    WINDOWED,
    Number,
    Positive,
    Size,
    layer_type_faults,
    refuse,
    shown,
    type_faults,
)
from darex_jax.models.encoder import EncoderConfig, EncoderOutput, read_encoder_fields
from darex_jax.models.layers import ACTIVATIONS, Embedding, Keys, LayerNorm, Linear, dropout, remat, split_key
from darex_jax.models.rotary import Rope, read_rope, rotate

Array = jax.Array

FIXED: dict[str, Any] = {
    "norm_bias": False,
    "attention_dropout": 0.0,
    "position_embedding_type": "absolute",  # in old files, without effect
    "is_decoder": False,
    "is_encoder_decoder": False,
}
OWN_INERT = frozenset(
    """
    eos_token_id tie_word_embeddings initializer_cutoff_factor decoder_bias deterministic_flash_attn
    sparse_prediction sparse_pred_ignore_index reference_compile repad_logits_with_grad gradient_checkpointing
    """.split()  # noqa: SIM905
)
READ: dict[str, Any] = {
    "rope_parameters": dict | None,
    "global_rope_theta": Positive | None,
    "local_rope_theta": Positive | None,
    "global_attn_every_n_layers": Size | None,
    "layer_types": list[str] | None,
}
POOLINGS = ("cls", "mean")


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig(EncoderConfig):
    """The config.json of a ModernBERT, under config.json's own names.

    `local_attention` is the width of a window, both sides together. Derived from several fields: `rope` and
    `local_rope`, the rotary positions of global and local layers, and `local`, which layers are local.
    """

    COMPUTED: ClassVar[tuple[str, ...]] = ("num_labels", "notes", "rope", "local_rope", "local")

    hidden_activation: str = "gelu"
    norm_eps: Number = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    local_attention: Size = 128
    embedding_dropout: Number = 0.0
    mlp_dropout: Number = 0.0
    classifier_pooling: str = "cls"
    classifier_dropout: Number = 0.0
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    rope: Rope
    local_rope: Rope
    local: tuple[bool, ...]

    def faults(self) -> list[str]:
        wrong = super().faults()
        for name in ("hidden_activation", "classifier_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                known = ", ".join(ACTIVATIONS)
                wrong.append(f"{name} is {shown(getattr(self, name))}, supported: {known}")
        if self.classifier_pooling not in POOLINGS:
            wrong.append(
                f"classifier_pooling is {shown(self.classifier_pooling)}, supported: {', '.join(POOLINGS)}"
            )
        for name in ("embedding_dropout", "mlp_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"{name} is {getattr(self, name)}, it must be in [0, 1)")
        if self.hidden_size // self.num_attention_heads % 2:
            wrong.append("the head size is odd, rotary positions need an even one")
        return wrong

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], ignored: Collection[str] = ()) -> "ModernBertConfig":
        """Reads the content of a config.json, as transformers 4 (`global_rope_theta`, `local_rope_theta`,
        `global_attn_every_n_layers`) or 5 (`rope_parameters` by kind of layer, `layer_types`) writes it.

        Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
        """
        refuse("ModernBERT", type_faults({name: hf[name] for name in READ if name in hf}, READ))
        values = read_encoder_fields(
            cls, hf, fixed=FIXED, inert=INERT | OWN_INERT, read=READ, ignored=ignored
        )
        by_kind = hf.get("rope_parameters") or {}
        ropes: dict[str, Any] = {}
        faults = [
            f"rope_parameters has {name!r}, supported: {WHOLE}, {WINDOWED}"
            for name in by_kind
            if name not in (WHOLE, WINDOWED)
        ]
        for kind, name, theta in (
            (WHOLE, "global_rope_theta", 160_000.0),
            (WINDOWED, "local_rope_theta", 10_000.0),
        ):
            stated = {"rope_parameters": by_kind[kind]} if kind in by_kind else {}
            ropes[kind], wrong = read_rope(stated, hf.get(name) or theta)
            faults += wrong
        layers = values["num_hidden_layers"]
        every = hf.get("global_attn_every_n_layers") or 3
        types = hf.get("layer_types") or [WHOLE if i % every == 0 else WINDOWED for i in range(layers)]
        refuse("ModernBERT", faults + layer_type_faults(types, layers))
        whole, windowed = ropes[WHOLE], ropes[WINDOWED]
        assert whole is not None and windowed is not None
        local = tuple(kind == WINDOWED for kind in types)
        return cls(**values, rope=whole, local_rope=windowed, local=local)


class Embeddings(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, rngs: Keys):
        self.tok_embeddings = Embedding(
            config.vocab_size,
            config.hidden_size,
            stddev=config.initializer_range,
            padding_idx=config.pad_token_id,
            rngs=rngs,
        )
        self.norm = LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.rate = config.embedding_dropout

    def __call__(self, input_ids: Array, key: Array | None) -> Array:
        return dropout(self.norm(self.tok_embeddings(input_ids)), self.rate, key)


class Attention(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, rngs: Keys):
        size = config.hidden_size
        options: dict[str, Any] = {"stddev": config.initializer_range, "bias": config.attention_bias}
        self.Wqkv = Linear(size, 3 * size, **options, rngs=rngs)
        self.Wo = Linear(size, size, **options, rngs=rngs)
        self.heads = config.num_attention_heads

    def __call__(self, x: Array, turns: tuple[Array, Array], mask: Array) -> Array:
        rows, length, size = x.shape
        qkv = self.Wqkv(x).reshape(rows, length, 3, self.heads, -1)  # B T 3D -> B T 3 N H
        q, k, v = rotate(qkv[:, :, 0], *turns), rotate(qkv[:, :, 1], *turns), qkv[:, :, 2]
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
        # A finite minimum: an all-padding sequence attends uniformly instead of giving NaN.
        scores = jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)
        return self.Wo(jnp.einsum("BNTS,BSNH->BTNH", weights, v).reshape(rows, length, size))


class FeedForward(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, rngs: Keys):
        size, inner = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = {"stddev": config.initializer_range, "bias": config.mlp_bias}
        self.Wi = Linear(size, 2 * inner, **options, rngs=rngs)
        self.Wo = Linear(inner, size, **options, rngs=rngs)
        self.activation, self.rate = config.hidden_activation, config.mlp_dropout

    def __call__(self, x: Array, key: Array | None) -> Array:
        inner, gate = jnp.split(self.Wi(x), 2, axis=-1)
        return self.Wo(dropout(ACTIVATIONS[self.activation](inner) * gate, self.rate, key))


class Layer(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, first: bool, rngs: Keys):
        size, eps = config.hidden_size, config.norm_eps
        # The embeddings are normalised already.
        self.attn_norm = None if first else LayerNorm(size, eps=eps, bias=False)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(size, eps=eps, bias=False)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(self, x: Array, turns: tuple[Array, Array], mask: Array, key: Array | None) -> Array:
        y = x if self.attn_norm is None else self.attn_norm(x)
        x = x + self.attn(y, turns, mask)
        return x + self.mlp(self.mlp_norm(x), key)


class ModernBertModel(nnx.Module):
    """The body."""

    remat: bool = False  # a class attribute: not part of the graphdef, see `Model`

    def __init__(self, config: ModernBertConfig, *, rngs: Keys):
        self.embeddings = Embeddings(config, rngs=rngs)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([Layer(config, first=i == 0, rngs=rngs) for i in layers])
        self.final_norm = LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.config = config

    def __call__(
        self, input_ids: Array, mask: Array, token_type_ids: Array, key: Array | None = None
    ) -> EncoderOutput:
        """`token_type_ids` are ignored: the model has none."""
        config, length = self.config, input_ids.shape[1]
        embeddings_key, *keys = split_key(key, 1 + len(self.layers))
        positions = jnp.arange(length)
        near = jnp.abs(positions[:, None] - positions[None]) <= config.local_attention // 2
        everything = jnp.broadcast_to(mask[:, None, :], (*mask.shape, length))  # B T S
        masks = everything, everything & near[None]
        features = config.hidden_size // config.num_attention_heads
        turns = [rope.turns(features, positions[None]) for rope in (config.rope, config.local_rope)]
        x = self.embeddings(input_ids, embeddings_key)
        for layer, local, layer_key in zip(self.layers, config.local, keys, strict=True):
            rest = turns[local], masks[local], layer_key
            x = remat(layer, x, *rest) if self.remat else layer(x, *rest)
        return EncoderOutput(self.final_norm(x), None)


class Head(nnx.Module):
    """A dense layer, its activation and a norm, before the classifier."""

    def __init__(self, config: ModernBertConfig, *, rngs: Keys):
        size, stddev = config.hidden_size, config.initializer_range
        self.dense = Linear(size, size, stddev=stddev, bias=config.classifier_bias, rngs=rngs)
        self.norm = LayerNorm(size, eps=config.norm_eps, bias=False)
        self.activation = config.classifier_activation

    def __call__(self, x: Array) -> Array:
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))


class ModernBertForSequenceClassification(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, rngs: Keys):
        self.model = ModernBertModel(config, rngs=rngs)
        self.head = Head(config, rngs=rngs)
        size, stddev = config.hidden_size, config.initializer_range
        self.classifier = Linear(size, config.num_labels, stddev=stddev, rngs=rngs)
        self.rate, self.pooling = config.classifier_dropout, config.classifier_pooling

    def __call__(
        self, input_ids: Array, mask: Array, token_type_ids: Array, key: Array | None = None
    ) -> EncoderOutput:
        body_key, classifier_key = split_key(key, 2)
        out = self.model(input_ids, mask, token_type_ids, body_key)
        x = out.last_hidden_state
        if self.pooling == "cls":
            pooled = x[:, 0]
        else:
            real = mask[..., None].astype(x.dtype)
            pooled = jnp.sum(x * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
        hidden = self.head(pooled)  # B D
        return out._replace(logits=self.classifier(dropout(hidden, self.rate, classifier_key)))

"""BERT (Devlin et al., arXiv:1810.04805) as transformers computes it, with or without a classifier.

Its config and body are also used by RoBERTa, which differs in positions and head: `roberta.py`.

Field names are Hugging Face's, so the parameter tree is the nested Hugging Face state dict.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from darex_jax.models.config import INERT, Number, Size, shown
from darex_jax.models.encoder import EncoderConfig, EncoderOutput, read_encoder_fields
from darex_jax.models.layers import ACTIVATIONS, Embedding, Keys, LayerNorm, Linear, dropout, remat, split_key

Array = jax.Array

# Fields of config.json for which this model supports one value only; any other is refused.
FIXED: dict[str, Any] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
}

# BERT fields that do not affect this model's outputs, beside those of all families.
BERT_INERT = frozenset(
    """
    eos_token_id tie_word_embeddings tf_legacy_loss directionality pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """The config.json of a BERT or RoBERTa, under config.json's own names.

    Two fields may be missing in old files and then have transformers' documented defaults:
    `classifier_dropout` (None: `hidden_dropout_prob`) and `pad_token_id` (0, RoBERTa's 1).
    """

    hidden_act: str
    hidden_dropout_prob: Number
    attention_probs_dropout_prob: Number
    type_vocab_size: Size
    layer_norm_eps: Number
    classifier_dropout: Number | None = None

    def faults(self) -> list[str]:
        wrong = super().faults()
        if self.hidden_act not in ACTIVATIONS:
            wrong.append(f"hidden_act is {shown(self.hidden_act)}, supported: {', '.join(ACTIVATIONS)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                wrong.append(f"{name} is {rate}, it must be in [0, 1)")
        if self.prefix == "roberta" and self.pad_token_id is None:
            wrong.append("pad_token_id is missing: RoBERTa's positions start after it")
        return wrong

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], ignored: Collection[str] = ()) -> "BertConfig":
        """Reads the content of a config.json.

        Args: ignored: fields that are kept without being checked; see `read_fields`.
        Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
        """
        return cls(**read_encoder_fields(cls, hf, fixed=FIXED, inert=INERT | BERT_INERT, ignored=ignored))

    @property
    def max_length(self) -> int:
        """Longest input in tokens. RoBERTa's positions start after pad_token_id."""
        skipped = 0 if self.prefix == "bert" else (self.pad_token_id or 0) + 1
        return self.max_position_embeddings - skipped


class Embeddings(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: Keys):
        size, stddev = config.hidden_size, config.initializer_range
        self.word_embeddings = Embedding(
            config.vocab_size, size, stddev=stddev, padding_idx=config.pad_token_id, rngs=rngs
        )
        self.pad = config.pad_token_id if config.prefix == "roberta" else None
        self.position_embeddings = Embedding(
            config.max_position_embeddings, size, stddev=stddev, padding_idx=self.pad, rngs=rngs
        )
        self.token_type_embeddings = Embedding(config.type_vocab_size, size, stddev=stddev, rngs=rngs)
        self.LayerNorm = LayerNorm(size, eps=config.layer_norm_eps)
        self.rate = config.hidden_dropout_prob

    def __call__(self, input_ids: Array, token_type_ids: Array, key: Array | None) -> Array:
        if self.pad is None:
            positions = jnp.arange(input_ids.shape[1])[None]  # from 0, left padding included
        else:  # RoBERTa: positions start after the padding position
            real = input_ids != self.pad
            positions = jnp.cumsum(real, axis=1) * real + self.pad
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)  # B T -> B T D
        return dropout(self.LayerNorm(x + self.position_embeddings(positions)), self.rate, key)


class SelfAttention(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: Keys):
        size, stddev = config.hidden_size, config.initializer_range
        self.query = Linear(size, size, stddev=stddev, rngs=rngs)
        self.key = Linear(size, size, stddev=stddev, rngs=rngs)
        self.value = Linear(size, size, stddev=stddev, rngs=rngs)
        self.heads = config.num_attention_heads
        self.rate = config.attention_probs_dropout_prob

    def __call__(self, x: Array, mask: Array, key: Array | None) -> Array:
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)  # B T D -> B T N H
            for y in (self.query(x), self.key(x), self.value(x))
        )
        # Plain einsums: `jax.nn.dot_product_attention` has no attention dropout and is not faster here.
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
        # A finite minimum: an all-padding sequence attends uniformly instead of giving NaN.
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)
        y = jnp.einsum("BNTS,BSNH->BTNH", dropout(weights, self.rate, key), v)
        return y.reshape(x.shape)  # B T N H -> B T D


class Output(nnx.Module):
    """The end of each half of a layer: project, add the residual, normalise."""

    def __init__(self, config: BertConfig, in_features: int, *, rngs: Keys):
        self.dense = Linear(in_features, config.hidden_size, stddev=config.initializer_range, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rate = config.hidden_dropout_prob

    def __call__(self, x: Array, residual: Array, key: Array | None) -> Array:
        return self.LayerNorm(dropout(self.dense(x), self.rate, key) + residual)


class Attention(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: Keys):
        self.self = SelfAttention(config, rngs=rngs)
        self.output = Output(config, config.hidden_size, rngs=rngs)

    def __call__(self, x: Array, mask: Array, key: Array | None) -> Array:
        weights_key, output_key = split_key(key, 2)
        return self.output(self.self(x, mask, weights_key), x, output_key)


class Dense(nnx.Module):
    """A linear layer and an activation: a layer's `intermediate` and the `pooler`."""

    def __init__(self, config: BertConfig, out_features: int, activation: str, *, rngs: Keys):
        self.dense = Linear(config.hidden_size, out_features, stddev=config.initializer_range, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return ACTIVATIONS[self.activation](self.dense(x))


class Layer(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: Keys):
        self.attention = Attention(config, rngs=rngs)
        self.intermediate = Dense(config, config.intermediate_size, config.hidden_act, rngs=rngs)
        self.output = Output(config, config.intermediate_size, rngs=rngs)

    def __call__(self, x: Array, mask: Array, key: Array | None) -> Array:
        attention_key, output_key = split_key(key, 2)
        x = self.attention(x, mask, attention_key)
        return self.output(self.intermediate(x), x, output_key)


class Encoder(nnx.Module):
    # A class attribute, so that it is not part of the graphdef; see `Model`.
    remat: bool = False

    def __init__(self, config: BertConfig, *, rngs: Keys):
        self.layer = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Array, mask: Array, key: Array | None) -> Array:
        for layer, layer_key in zip(self.layer, split_key(key, len(self.layer)), strict=True):
            x = remat(layer, x, mask, layer_key) if self.remat else layer(x, mask, layer_key)
        return x


class BertModel(nnx.Module):
    """The body; `pooler=False` is transformers' `add_pooling_layer=False`."""

    def __init__(self, config: BertConfig, *, pooler: bool = True, rngs: Keys):
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.pooler = Dense(config, config.hidden_size, "tanh", rngs=rngs) if pooler else None

    def __call__(
        self, input_ids: Array, mask: Array, token_type_ids: Array, key: Array | None = None
    ) -> EncoderOutput:
        embeddings_key, encoder_key = split_key(key, 2)
        x = self.encoder(self.embeddings(input_ids, token_type_ids, embeddings_key), mask, encoder_key)
        return EncoderOutput(x, None if self.pooler is None else self.pooler(x[:, 0]))  # B T D -> B D


class BertForSequenceClassification(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: Keys):
        self.bert = BertModel(config, rngs=rngs)
        self.classifier = Linear(
            config.hidden_size, config.num_labels, stddev=config.initializer_range, rngs=rngs
        )
        rate = config.classifier_dropout
        self.rate = config.hidden_dropout_prob if rate is None else rate

    def __call__(
        self, input_ids: Array, mask: Array, token_type_ids: Array, key: Array | None = None
    ) -> EncoderOutput:
        body_key, classifier_key = split_key(key, 2)
        out = self.bert(input_ids, mask, token_type_ids, body_key)
        assert out.pooler_output is not None  # a classifier's body is built with its pooler
        logits = self.classifier(dropout(out.pooler_output, self.rate, classifier_key))  # B D -> B labels
        return out._replace(logits=logits)

"""RoBERTa (Liu et al., arXiv:1907.11692): BERT with shifted positions and another classification head.

Positions start after that of padding, as in transformers.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from darex_jax.models.bert import BertConfig, BertModel
from darex_jax.models.encoder import EncoderOutput
from darex_jax.models.layers import Keys, Linear, dropout, split_key

Array = jax.Array


class ClassificationHead(nnx.Module):
    """A dense layer and a projection of the first token, without a pooler."""

    def __init__(self, config: BertConfig, *, rngs: Keys):
        size, stddev = config.hidden_size, config.initializer_range
        self.dense = Linear(size, size, stddev=stddev, rngs=rngs)
        self.out_proj = Linear(size, config.num_labels, stddev=stddev, rngs=rngs)
        rate = config.classifier_dropout
        self.rate = config.hidden_dropout_prob if rate is None else rate

    def __call__(self, x: Array, key: Array | None) -> tuple[Array, Array]:
        """[B, D] -> logits [B, labels] and the dense layer's output [B, D]."""
        dense_key, out_key = split_key(key, 2)
        hidden = self.dense(dropout(x, self.rate, dense_key))
        return self.out_proj(dropout(jnp.tanh(hidden), self.rate, out_key)), hidden


class RobertaForSequenceClassification(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: Keys):
        self.roberta = BertModel(config, pooler=False, rngs=rngs)
        self.classifier = ClassificationHead(config, rngs=rngs)

    def __call__(
        self, input_ids: Array, mask: Array, token_type_ids: Array, key: Array | None = None
    ) -> EncoderOutput:
        body_key, classifier_key = split_key(key, 2)
        out = self.roberta(input_ids, mask, token_type_ids, body_key)
        logits, hidden = self.classifier(out.last_hidden_state[:, 0], classifier_key)  # B T D -> B D
        return out._replace(logits=logits, head_hidden=hidden)

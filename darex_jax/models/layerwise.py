"""A decoder one layer at a time: pure functions of the parameters of an embedding or of a layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from darex_jax.core.errors import DarexError
from darex_jax.models import MODULES, Config
from darex_jax.models.decoder import Array, CausalLM, Decoder, DecoderConfig, contexts

Params = Any


class LayerOutput(NamedTuple):
    """`last_hidden_state` [B, T, D]; there are no logits."""

    last_hidden_state: Array
    logits: Any = None


@dataclass(frozen=True)
class LayerModel:
    """A layer as a model of its own, hashable like `Model`: `model(params, hidden=..., target=...)`.

    Without parameters it returns the target: what another layer is to reproduce.
    """

    decoder: DecoderConfig
    graphdef: nnx.GraphDef[Any]
    window: int | None
    config: None = field(default=None)

    def __call__(self, params: Params, hidden: Array, attention_mask: Array, target: Array) -> LayerOutput:
        """Args: hidden, target: [B, T, D]; attention_mask: [B, T], zero for padding."""
        if not params:
            return LayerOutput(target)
        real = attention_mask != 0
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        slots = jnp.arange(real.shape[1])
        around = contexts(self.decoder, {self.window}, real, positions, slots)[self.window]
        return LayerOutput(nnx.merge(self.graphdef, params)(hidden, *around, None)[0])


def layer_models(config: Config) -> list[LayerModel]:
    """The layers of a decoder; those with the same window are equal, and compiled once.

    Raises: DarexError for an encoder.
    """
    decoder, body = _body(config)
    graphdef = nnx.split(nnx.eval_shape(lambda: body.layer(decoder, rngs=_keys())))[0]
    return [LayerModel(decoder, graphdef, decoder.window(i)) for i in range(decoder.num_hidden_layers)]


def embedded(config: Config, weight: Array, input_ids: Array) -> Array:
    """The hidden states before the first layer, [B, T] -> [B, T, D]. Args: weight: the table [V, D]."""
    decoder, body = _body(config)
    size = (decoder.vocab_size, decoder.hidden_size)
    options: dict[str, Any] = {"stddev": 0.0, "padding_idx": decoder.pad_token_id, "rngs": _keys()}
    table = nnx.eval_shape(lambda: body.embedding(*size, **options))
    return nnx.merge(nnx.split(table)[0], {"weight": weight})(input_ids)


def _body(config: Config) -> tuple[DecoderConfig, type[Decoder]]:
    if not isinstance(config, DecoderConfig):
        raise DarexError(f"a {config.model_type} model is not a decoder: only decoders go layer by layer.")
    module: Any = MODULES[config.architectures[0]]
    if isinstance(module, type) and issubclass(module, CausalLM):
        return config, module.body
    return config, module


def _keys() -> Any:
    key = jax.random.key(0)
    return lambda: key

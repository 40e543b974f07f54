"""Models as pure functions of their parameters, a nested Hugging Face state dict. No file is read here."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.models.bert import BertConfig, BertForSequenceClassification, BertModel, Encoder
from darex_jax.models.config import shown
from darex_jax.models.decoder import Decoder, DecoderConfig, DecoderOutput
from darex_jax.models.encoder import EncoderConfig, EncoderOutput, label_notes
from darex_jax.models.gemma3 import ARCHITECTURES as GEMMA3
from darex_jax.models.gemma3 import read_gemma3_config
from darex_jax.models.layers import Embedding, Keys, LayerNorm, Linear, RMSNorm
from darex_jax.models.llama import ARCHITECTURES as LLAMA
from darex_jax.models.llama import read_llama_config
from darex_jax.models.mistral import ARCHITECTURES as MISTRAL
from darex_jax.models.mistral import read_mistral_config
from darex_jax.models.modernbert import (
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
)
from darex_jax.models.qwen2 import ARCHITECTURES as QWEN2
from darex_jax.models.qwen2 import read_qwen2_config
from darex_jax.models.qwen3 import ARCHITECTURES as QWEN3
from darex_jax.models.qwen3 import read_qwen3_config
from darex_jax.models.roberta import RobertaForSequenceClassification
from darex_jax.parts.mixed import Mixed

__all__ = [
    "BertConfig",
    "Config",
    "DecoderConfig",
    "DecoderOutput",
    "EncoderConfig",
    "EncoderOutput",
    "Model",
    "build_model",
    "classifier_from_pretrained",
    "init_model",
    "read_model_config",
]

Array = jax.Array
Config = EncoderConfig | DecoderConfig
Params = Mapping[str, Any]  # a Hugging Face state dict, nested

CONFIGS: dict[str, Callable[[Mapping[str, Any], Collection[str]], Config]] = {  # by config.json's model_type
    "bert": BertConfig.from_hf,
    "roberta": BertConfig.from_hf,
    "xlm-roberta": BertConfig.from_hf,
    "modernbert": ModernBertConfig.from_hf,
    "llama": read_llama_config,
    "mistral": read_mistral_config,
    "qwen2": read_qwen2_config,
    "qwen3": read_qwen3_config,
    "gemma3_text": read_gemma3_config,
}
MODULES: dict[str, Callable[..., nnx.Module]] = {  # by config.json's architectures
    "BertModel": BertModel,
    "BertForSequenceClassification": BertForSequenceClassification,
    "RobertaModel": BertModel,
    "RobertaForSequenceClassification": RobertaForSequenceClassification,
    "XLMRobertaModel": BertModel,
    "XLMRobertaForSequenceClassification": RobertaForSequenceClassification,
    "ModernBertModel": ModernBertModel,
    "ModernBertForSequenceClassification": ModernBertForSequenceClassification,
    **LLAMA,
    **MISTRAL,
    **QWEN2,
    **QWEN3,
    **GEMMA3,
}


@dataclass(frozen=True)
class Model:
    """A model without its weights: hashable, so it can be a static argument of `jax.jit`.

    `options` are arguments of the architecture beside the config, see `build_model`. `remat`, set by
    `dataclasses.replace(model, remat=True)`, keeps only the activations between layers for the backward pass,
    which recomputes the inside of each layer: the same gradients within rounding, in less memory and about a
    third more time. Forward-mode differentiation is not supported then.
    """

    config: Config
    graphdef: nnx.GraphDef[Any]
    options: tuple[tuple[str, bool], ...] = ()
    remat: bool = False

    def __call__(
        self,
        params: Params,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        dropout_key: Array | None = None,
        observe: Callable[[str, Array], None] | None = None,
    ) -> Any:
        """Runs the model: a pure function of its arguments, under jit and grad as well.

        Args:
          params: the nested Hugging Face state dict; its dtype is the compute dtype, except for sums, which
            are float32. A leaf may be a `Mixed`, which gives every row of the batch its own delta; see
            `DeltaBank.mixed`.
          input_ids: integers [B, T]; an id outside the vocabulary gives NaN.
          attention_mask: [B, T], zero for padding tokens; None is all ones.
          token_type_ids: integers [B, T], encoders only; None is all zeros.
          dropout_key: typed key (`jax.random.key`) that enables dropout; None is evaluation. Decoders
            have no dropout.
          observe: called while tracing, with the name of each linear layer's weight and the layer's input,
            [B, T, D] or, after a pooler, [B, D].
        Returns: `EncoderOutput` or `DecoderOutput`: hidden states [B, T, D] and, with a head, logits:
          [B, labels] of an encoder, [B, T, V] of a decoder.
        Raises: ValueError if shapes do not match or the text is longer than the position table; TypeError if
          `dropout_key` is not a typed key.
        """
        input_ids = jnp.asarray(input_ids)
        if input_ids.ndim != 2:
            raise DarexError(f"input_ids has shape {input_ids.shape}, expected [batch, positions].")
        for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if value is not None and jnp.shape(value) != input_ids.shape:
                raise DarexError(f"{name} has shape {jnp.shape(value)}, input_ids {input_ids.shape}.")
        if dropout_key is not None and not jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key):
            raise TypeError(f"dropout_key is an array of {dropout_key.dtype}, expected jax.random.key(seed).")
        mask = jnp.ones_like(input_ids) if attention_mask is None else jnp.asarray(attention_mask)
        if isinstance(self.config, DecoderConfig):
            if token_type_ids is not None:
                raise DarexError(f"a {self.config.model_type} model has no token_type_ids.")
            return self.module(params, observe)(input_ids, mask != 0)
        if input_ids.shape[1] > self.config.max_length:
            raise DarexError(
                f"input_ids has {input_ids.shape[1]} positions, the model "
                f"{self.config.max_length}; truncate the text."
            )
        types = jnp.zeros_like(input_ids) if token_type_ids is None else jnp.asarray(token_type_ids)
        return self.module(params, observe)(input_ids, mask != 0, types, dropout_key)

    def module(self, params: Params, observe: Callable[[str, Array], None] | None = None) -> Any:
        """The Flax module with these parameters; it shares their arrays."""
        mixed: dict[str, dict[str, Mixed]] = {}  # layer -> parameter -> its value for every row
        params = _without_mixed(params, "", mixed)
        # nnx.List indexes its layers by int, a state dict by digits.
        module = nnx.merge(self.graphdef, _map_keys(lambda k: int(k) if k.isdigit() else k, params))
        if mixed:
            for path, layer in nnx.iter_modules(module):
                own = mixed.get(".".join(map(str, path)))
                if own and isinstance(layer, Linear | Embedding | LayerNorm | RMSNorm):
                    layer.mixed = own.get
        if self.remat and observe is None:  # observed values must not be trapped inside a checkpointed layer
            for _, part in nnx.iter_modules(module):
                if isinstance(part, Encoder | ModernBertModel | Decoder):
                    part.remat = True
        if observe is not None:
            for path, layer in nnx.iter_modules(module):
                if isinstance(layer, Linear):
                    layer.observe = partial(observe, ".".join(map(str, (*path, "weight"))))
        return module


def read_model_config(hf: Mapping[str, Any], ignore_config_fields: Collection[str] = ()) -> Config:
    """The config that a config.json describes.

    Args: ignore_config_fields: fields assumed to change no output, whatever their value. Otherwise unknown
      fields that might are refused; fields about a model's origin are recognised by name.
    Raises: ValueError for an unsupported family or field, or a value of another type.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in CONFIGS:
        raise DarexError(f"model_type is {shown(family)}, supported: {', '.join(CONFIGS)}.")
    return CONFIGS[family](hf, ignore_config_fields)


def build_model(config: Config, **options: bool) -> tuple[Model, dict[str, tuple[int, ...]]]:
    """The model of a config and its weights' shapes by name, without allocating weights.

    Args: options: of the architecture; `pooler=False` for a BERT body without one.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: new_module(config, jax.random.key(0), **options)))
    shapes = {name: x.shape for name, x in flatten_names(_state_dict(state)).items()}
    return Model(config, graphdef, tuple(sorted(options.items()))), shapes


def init_model(config: Config, key: Array, dtype: Any = jnp.float32) -> tuple[Model, dict[str, Any]]:
    """A model with newly initialised weights: N(0, initializer_range), zero biases, LayerNorm at identity."""
    weights = _state_dict(nnx.state(new_module(config, key)))
    return build_model(config)[0], jax.tree.map(lambda x: x.astype(dtype), weights)


def classifier_from_pretrained(
    model: Model,
    params: Params,
    num_labels: int,
    key: Array,
    problem_type: str | None = None,
    label_names: Sequence[str] = (),
) -> tuple[Model, dict[str, Any]]:
    """Builds a classifier from a pretrained model, for fine-tuning.

    The body goes under `bert.` or `roberta.`; the classifier, and the pooler if BERT's is missing, are
    initialised from N(0, initializer_range) with zero bias. A classifier that already has `num_labels` labels
    keeps its head and, unless others are given, its label names.

    Args:
      model, params: from `load_model`; the arrays are shared, not copied.
      num_labels: number of logits; 1 for regression.
      key: typed key for the new weights.
      problem_type: transformers' name of the loss, written to the config; None leaves that of a kept head.
      label_names: of the classes, written to the config.
    Returns: the model, whose `config.to_hf()` transformers reads as BertForSequenceClassification or
      RobertaForSequenceClassification, and its params.
    Raises: ValueError if `num_labels` or `problem_type` is invalid, or the model is a decoder.
    """
    if not isinstance(model.config, EncoderConfig):
        raise DarexError(f"classifiers are supported for encoders only, not for {model.config.model_type}.")
    headless, family = model.config.headless, model.config.prefix
    config = model.config.as_classifier(num_labels, problem_type, label_names)
    kept = {f"{family}.{name}" if headless else name: x for name, x in flatten_names(params).items()}
    if not headless and model.config.num_labels == num_labels:
        stated = {"problem_type": problem_type} if problem_type else {}
        notes = {**model.config.notes, **stated, **label_notes(label_names)}
        config = dataclasses.replace(model.config, notes=notes)
    else:
        kept = {name: x for name, x in kept.items() if not name.startswith("classifier.")}
    classifier, shapes = build_model(config)
    dtype = next(iter(kept.values())).dtype
    kept |= _new_weights(config, [name for name in shapes if name not in kept], key, dtype)
    return classifier, unflatten_names({name: kept[name] for name in shapes})


def _new_weights(config: Config, names: list[str], key: Array, dtype: Any) -> dict[str, Array]:
    """The weights of `init_model` with these names; in one jit, so that the others are never computed."""

    def init(key: Array) -> dict[str, Array]:
        weights = flatten_names(_state_dict(nnx.state(new_module(config, key))))
        return {name: weights[name].astype(dtype) for name in names}

    return jax.jit(init)(key)


def new_module(config: Config, key: Array, **options: bool) -> nnx.Module:
    """The Flax module of a config, with new weights; `options` as for `build_model`."""
    return MODULES[config.architectures[0]](config, rngs=Keys(key), **options)


def _state_dict(state: nnx.State[Any, Any]) -> dict[str, Any]:
    return _map_keys(str, nnx.to_pure_dict(state))


def _without_mixed(tree: Params, prefix: str, found: dict[str, dict[str, Mixed]]) -> dict[str, Any]:
    """The tree with each `Mixed` leaf replaced by its base; collects the `Mixed` leaves in `found`."""
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            value = _without_mixed(value, f"{prefix}.{key}" if prefix else str(key), found)
        elif isinstance(value, Mixed):
            found.setdefault(prefix, {})[key] = value
            value = value.base
        plain[key] = value
    return plain


def _map_keys(f: Callable[[Any], Any], tree: Mapping[Any, Any]) -> dict[Any, Any]:
    return {f(k): _map_keys(f, v) if isinstance(v, Mapping) else v for k, v in tree.items()}

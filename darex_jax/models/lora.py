"""Low-rank adapters on a model's linear layers (LoRA; Hu et al., arXiv:2106.09685).

There are two trees: the base's `params`, which are not changed, and the `adapter` of `core/lora.py`. A model
with adapters is called with their union: `model(combine(params, adapter), ...)`. The caller chooses what to
differentiate, usually the adapter alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from darex_jax.core.errors import DarexError
from darex_jax.core.lora import LoraConfig, adapter_factors, scales_by_layer
from darex_jax.core.tree import PyTree, leaf_keys, unflatten_names
from darex_jax.models import Model, new_module
from darex_jax.models.layers import Keys, Linear

Array = jax.Array


def add_adapters(model: Model, config: LoraConfig, key: Array) -> tuple[Model, dict[str, Any]]:
    """A model with new adapters that leave its outputs unchanged: A is random, B zero.

    No base weights are needed. Existing adapters of the model are replaced.

    Args:
      model: BERT, RoBERTa, Llama or Qwen2, with or without a head.
      key: typed key; a layer's A depends on it and on the layer's name alone.
    Returns: the model, and the adapter: float32, A [r, D] uniform within +-1/sqrt(D), as in PEFT (He et al.,
      arXiv:1502.01852, with a slope of sqrt(5)), and B [O, r] zero.
    Raises: ValueError if the config matches no linear layer of the model; TypeError for a key of another
      type.
    """
    shapes = {name: layer.weight.shape for name, layer in _linears(_shapes_only(model)).items()}
    layers = sorted(name for name in shapes if config.matches(name))
    if not layers:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in shapes}))
        raise DarexError(f"{config.targets!r} matches no linear layer of this model, which has {known}.")
    # By the layer's name: `prune` uses the leaf's name for the mask of A under the same key.
    keys = leaf_keys(key, layers)
    named = {}
    for name in layers:
        out_features, in_features = shapes[name]
        rank, bound = config.rank_of(name), in_features**-0.5
        named[f"{name}.lora_A.weight"] = jax.random.uniform(
            keys[name], (rank, in_features), minval=-bound, maxval=bound
        )
        named[f"{name}.lora_B.weight"] = jnp.zeros((out_features, rank))
    adapter = unflatten_names(named)
    return attach_adapters(model, adapter, config.scales(adapter)), adapter


def attach_adapters(model: Model, adapter: PyTree, scales: float | Mapping[str, float]) -> Model:
    """The model for adapters with these names and ranks.

    Args: adapter, scales: as for `adapter_delta`; the scales become part of the model.
    Raises: ValueError that names every layer which the model lacks or whose shape differs.
    """
    factors = adapter_factors(adapter)
    by_layer = scales_by_layer(scales, factors)
    module = _shapes_only(model)
    linears = _linears(module)
    wrong = [f"it has no linear layer '{name}'" for name in factors if name not in linears]
    wrong += [
        f"'{name}' is {list(linears[name].weight.shape)}, the adapter's {[b.shape[0], a.shape[1]]}"
        for name, (a, b) in factors.items()
        if name in linears and linears[name].weight.shape != (b.shape[0], a.shape[1])
    ]
    if wrong:
        raise DarexError(f"the adapter does not match the model: {'; '.join(wrong)}.")
    for name, (a, b) in factors.items():
        layer = linears[name]
        layer.lora_A, layer.lora_B = (_shapes_of_linear(x.shape) for x in (a, b))
        layer.scale = float(by_layer[name])
    return dataclasses.replace(model, graphdef=nnx.split(module)[0])


def _shapes_only(model: Model) -> nnx.Module:
    """The model's module without its adapters, with abstract weights."""
    return nnx.eval_shape(lambda: new_module(model.config, jax.random.key(0), **dict(model.options)))


def _shapes_of_linear(shape: tuple[int, int]) -> Linear:
    out_features, in_features = shape
    options: dict[str, Any] = {"stddev": 0.0, "bias": False}
    return nnx.eval_shape(lambda: Linear(in_features, out_features, rngs=Keys(jax.random.key(0)), **options))


def _linears(module: nnx.Module) -> dict[str, Linear]:
    """The linear layers by Hugging Face name."""
    layers = {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(module)}
    return {name: layer for name, layer in layers.items() if isinstance(layer, Linear)}

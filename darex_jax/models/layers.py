"""Layers shared by the model families: Hugging Face's field names, Hugging Face's `[out, in]` weights.

Shapes are written in einsum letters: B batch, T and S positions (query, key), D features in, O features out,
N heads, H features per head. Ranks are matched explicitly, so the code runs under
`jax_numpy_rank_promotion="raise"`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from darex_jax.parts.mixed import Mixed

Array = jax.Array
OfRows = Callable[[str], Mixed | None]  # a layer's parameter -> its per-row deltas, if any

# config.json's `hidden_act`; transformers' "gelu" is the exact one.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def project(x: Array, weight: Array, mixed: Mixed | None = None) -> Array:
    """`x @ weight.T` over the last axis, [..., D] and [O, D] -> [..., O]; sums in float32 at least.

    Args: mixed: per-row deltas of the weight, whose products are added.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.einsum("...D,OD->...O", x, weight, preferred_element_type=wide)
    return (y if mixed is None else y + mixed.product(x)).astype(x.dtype)


class Keys:
    """A stream of keys: the i-th call gives `fold_in(key, i)`.

    Like `nnx.Rngs`, whose counter is an array: incrementing that while tracing takes time quadratic in the
    number of layers.
    """

    def __init__(self, key: Array):
        self.key = key
        self.count = 0

    def __call__(self) -> Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


class Linear(nnx.Module):
    """`x @ weight.T + bias` over the last axis; `weight` [O, D] starts at N(0, stddev), `bias` [O] at 0.

    With an adapter (`models/lora.py`), `lora_A.weight` [r, D] and `lora_B.weight` [O, r], it adds
    `scale * x @ lora_A.weight.T @ lora_B.weight.T`.
    """

    # Class attributes, so that a layer without an adapter has no other graph nodes than its weights.
    lora_A: "Linear | None" = None
    lora_B: "Linear | None" = None
    scale: float = 1.0
    observe: Callable[[Array], None] | None = None  # called with each input, see `Model.module`
    mixed: OfRows | None = None  # see `Model.module`

    def __init__(self, in_features: int, out_features: int, *, stddev: float, bias: bool = True, rngs: Keys):
        self.weight = nnx.Param(stddev * jax.random.normal(rngs(), (out_features, in_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

    def __call__(self, x: Array) -> Array:
        if self.observe is not None:
            self.observe(x)
        y = project(x, self.weight[...], None if self.mixed is None else self.mixed("weight"))
        if self.bias is not None:
            y = y + jnp.broadcast_to(_vector(self, "bias", y.ndim), y.shape)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + self.scale * self.lora_B(self.lora_A(x))


class Embedding(nnx.Module):
    """Rows of `weight` [V, D]; an id outside the table gives NaN, never another row.

    As in PyTorch, the row `padding_idx` starts at zero and gets no gradient.
    """

    mixed: OfRows | None = None  # see `Model.module`

    def __init__(
        self, rows: int, features: int, *, stddev: float, padding_idx: int | None = None, rngs: Keys
    ):
        weight = stddev * jax.random.normal(rngs(), (rows, features))
        self.weight = nnx.Param(weight if padding_idx is None else weight.at[padding_idx].set(0))
        self.padding_idx = padding_idx

    def __call__(self, ids: Array) -> Array:
        ids = jnp.where(ids < 0, self.weight.shape[0], ids)  # negative indices would wrap around
        x = jnp.take(self.weight[...], ids, axis=0, mode="fill", fill_value=jnp.nan)
        if self.mixed is not None and (weight := self.mixed("weight")) is not None:
            x = x + weight.rows(ids).astype(x.dtype)
        if self.padding_idx is None:
            return x
        return jnp.where((ids == self.padding_idx)[..., None], jax.lax.stop_gradient(x), x)

    def attend(self, x: Array) -> Array:
        """The table as a tied head: [..., D] -> [..., V]."""
        return project(x, self.weight[...], None if self.mixed is None else self.mixed("weight"))


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` over the last axis; the mean square in float32 at least.

    Source: Zhang and Sennrich, arXiv:1910.07467.
    """

    mixed: OfRows | None = None  # see `Model.module`
    offset: ClassVar[float] = 0.0  # added to the weight; if not 0, the product is in float32

    def __init__(self, features: int, *, eps: float):
        self.weight = nnx.Param(jnp.full(features, 1.0 - self.offset))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        if self.offset:
            weight = self.offset + _vector(self, "weight", x.ndim).astype(y.dtype)
            return (y * jnp.broadcast_to(weight, x.shape)).astype(x.dtype)
        return y.astype(x.dtype) * jnp.broadcast_to(_vector(self, "weight", x.ndim), x.shape)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis with `weight` and optionally `bias` [D].

    Statistics are float32 at least.
    """

    mixed: OfRows | None = None  # see `Model.module`

    def __init__(self, features: int, *, eps: float, bias: bool = True):
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features)) if bias else None
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y * jnp.broadcast_to(_vector(self, "weight", y.ndim), y.shape)
        if self.bias is not None:
            y = y + jnp.broadcast_to(_vector(self, "bias", y.ndim), y.shape)
        return y.astype(x.dtype)


def _vector(layer: Any, name: str, ndim: int) -> Array:
    """A layer's vector [D]; with per-row deltas [B, 1, ..., D] with `ndim` axes."""
    vector: Array = getattr(layer, name)[...]
    mixed = None if layer.mixed is None else layer.mixed(name)
    if mixed is None:
        return vector
    own = vector.astype(jnp.float32)[None] + mixed.vectors()
    return own.astype(vector.dtype).reshape(len(own), *(1,) * (ndim - 2), -1)


def remat(layer: nnx.Module, x: Array, *args: Any) -> Any:
    """`layer(x, *args)`; only the arguments are saved for the backward pass, which recomputes the rest.

    Like `jax.checkpoint`, whose barrier against common subexpression elimination XLA removes on CPUs. Here
    the recomputation depends on the incoming gradient, so that no compiler can merge it with the first.

    Args: x: has the shape of the result, or of its first array.
    """
    graphdef, weights = nnx.split(layer)
    leaves, structure = jax.tree.flatten(args)
    # Keys are passed as raw data: reusing them in the recomputation is intended.
    impls = [
        jax.random.key_impl(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None
        for leaf in leaves
    ]
    numbers = [
        leaf if impl is None else jax.random.key_data(leaf) for leaf, impl in zip(leaves, impls, strict=True)
    ]

    def run(weights: nnx.State[Any, Any], x: Array, numbers: list[Array]) -> Any:
        args = [
            leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
            for leaf, impl in zip(numbers, impls, strict=True)
        ]
        return nnx.merge(graphdef, weights)(x, *jax.tree.unflatten(structure, args))

    def backward(kept: tuple[nnx.State[Any, Any], Array, list[Array]], gradient: Any) -> Any:
        weights, x, numbers = kept
        later = x + 0 * jax.tree.leaves(gradient)[0]  # equal to x, unless a gradient is not finite
        return jax.vjp(run, weights, later, numbers)[1](gradient)

    again = jax.custom_vjp(run)
    again.defvjp(lambda *kept: (run(*kept), kept), backward)
    return again(weights, x, numbers)


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """`count` independent keys; all None if `key` is None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes entries of `x` with probability `rate`, divides the rest by `1 - rate`; identity without key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0)

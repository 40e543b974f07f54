"""LoRA adapters as trees, independent of a model: leaf names, scales, and the equivalent delta.

An adapter is a nested dict with two float leaves for each weight [O, D] that it adapts, `q_proj.weight` say:
`q_proj.lora_A.weight` [r, D] and `q_proj.lora_B.weight` [O, r], PEFT's own names without their prefix. The
weight's delta is `scale * B @ A`, scale being alpha / r (Hu et al., arXiv:2106.09685) or alpha / sqrt(r)
(rsLoRA; Kalajdzievski, arXiv:2312.03732).

There are two ways to prune an adapter: `prune(key, adapter_delta(adapter, scales), drop_rate)` prunes
the merged delta; `prune(key, adapter, drop_rate)` prunes A and B themselves, as a delta from an
adapter of zeros, and `adapter_delta` of the result is merged.
"""

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from darex_jax.core.errors import DarexError
from darex_jax.core.scope import compile_pattern
from darex_jax.core.tree import PyTree, flatten_names, unflatten_names, working_dtype

PLAIN = re.compile(r"[\w.]+", re.ASCII)
MOST_PATTERNS = 256
SHOWN = 20  # most problems that one error lists
FACTORS = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class LoraConfig:
    """Which linear layers have an adapter, and its rank and scale; names follow PEFT's rules.

    Attributes:
      rank: r, at least 1.
      alpha: the numerator of the scale.
      targets: layer names, full or their last components (`q_proj`); or one regular expression, as a plain
        string, that matches full names. Expressions are RE2's, see `compile_pattern`.
      rslora: the scale is alpha / sqrt(r) instead of alpha / r.
      rank_pattern, alpha_pattern: {regular expression: rank or alpha} overrides for some layers; the
        expression matches a full name or its last components, and the first match wins. A pattern of letters,
        digits, underscores and dots only is a literal name; there may be any number of those, and 256 others.
    Raises: ValueError that names every rank below 1, every alpha that is not a finite number and every
      pattern that is not a valid RE2 regular expression.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        ranks = {"rank": self.rank, **{f"rank_pattern {p!r:.80}": r for p, r in self.rank_pattern.items()}}
        alphas = {
            "alpha": self.alpha,
            **{f"alpha_pattern {p!r:.80}": a for p, a in self.alpha_pattern.items()},
        }
        wrong = [
            f"{n} is {r!r:.80}, it must be an integer of 1 or more"
            for n, r in ranks.items()
            if not _is_rank(r)
        ]
        wrong += [
            f"{n} is {a!r:.80}, it must be a finite number" for n, a in alphas.items() if not _is_number(a)
        ]
        for of in ("targets", "rank_pattern", "alpha_pattern"):
            try:
                getattr(self, f"_{of}")
            except DarexError as error:
                wrong.append(f"{of}: {str(error).rstrip('.')}")
        if wrong:
            raise DarexError(f"LoRA config: {'; '.join(wrong[:SHOWN])}.")

    @cached_property
    def _targets(self) -> "frozenset[str] | Any":
        return compile_pattern(self.targets) if isinstance(self.targets, str) else frozenset(self.targets)

    @cached_property
    def _rank_pattern(self) -> "_ByName":
        return _ByName(self.rank_pattern)

    @cached_property
    def _alpha_pattern(self) -> "_ByName":
        return _ByName(self.alpha_pattern)

    def matches(self, module: str) -> bool:
        """Whether the linear layer of this name has an adapter."""
        if isinstance(self._targets, frozenset):
            return not self._targets.isdisjoint(_endings(module))
        return self._targets.fullmatch(module) is not None

    def rank_of(self, module: str) -> int:
        return self._rank_pattern.get(module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return self._alpha_pattern.get(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def scales(self, adapter: PyTree) -> dict[str, float]:
        """The scale of every layer in an adapter, by the layer's name.

        Raises: ValueError that names every layer whose rank in the adapter differs from this config.
        """
        factors = adapter_factors(adapter)
        wrong = [
            f"'{name}' has rank {a.shape[0]}, the config {self.rank_of(name)}"
            for name, (a, _) in factors.items()
            if a.shape[0] != self.rank_of(name)
        ]
        if wrong:
            raise DarexError(f"the adapter does not match its config: {'; '.join(wrong)}.")
        return {name: self.scale_of(name) for name in factors}


class _ByName:
    """The value of the first pattern that matches a name, as PEFT looks it up."""

    def __init__(self, patterns: Mapping[str, Any]):
        self.values = list(patterns.values())
        self.names = {p: i for i, p in enumerate(patterns) if PLAIN.fullmatch(p)}
        others = [(i, p) for i, p in enumerate(patterns) if p not in self.names]
        if len(others) > MOST_PATTERNS:
            raise DarexError(
                f"{len(others)} regular expressions, at most {MOST_PATTERNS} are accepted beside plain names"
            )
        self.others = [(i, compile_pattern(rf"(.*\.)?({p})")) for i, p in others]

    def get(self, module: str, default: Any) -> Any:
        fitting = [self.names[ending] for ending in _endings(module) if ending in self.names]
        fitting += next(([i] for i, pattern in self.others if pattern.fullmatch(module)), [])
        return self.values[min(fitting)] if fitting else default


def is_factor(name: str) -> bool:
    """Whether a leaf of this name is the A or B of an adapter."""
    return _layer_of(name) is not None


def adapter_factors(adapter: PyTree) -> dict[str, tuple[Any, Any]]:
    """`{layer: (A, B)}` of an adapter, by the layer's name; A [r, D], B [O, r].

    Raises: ValueError that names every leaf which is not an A or B, has no partner or does not match its
      shape.
    """
    named = flatten_names(adapter)
    layers = {name: _layer_of(name) for name in named}
    wrong = [f"'{name}' is not a factor of an adapter" for name, layer in layers.items() if layer is None]
    factors = {}
    for layer in dict.fromkeys(layer for layer in layers.values() if layer is not None):
        a, b = (named.get(f"{layer}.{factor}") for factor in FACTORS)
        if a is None or b is None:
            wrong.append(f"'{layer}' has no {FACTORS[0] if a is None else FACTORS[1]}")
            continue
        if not (len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0):
            wrong.append(f"'{layer}' has A {list(a.shape)} and B {list(b.shape)}, expected [r, in], [out, r]")
        factors[layer] = (a, b)
    if wrong:
        raise DarexError(f"this is not an adapter: {'; '.join(wrong)}.")
    return factors


def adapter_delta(adapter: PyTree, scales: float | Mapping[str, float]) -> dict[str, Any]:
    """The delta that an adapter adds to the weights: `scale * B @ A` in float32, by weight name.

    `apply_delta(params, adapter_delta(adapter, scales))` merges.

    Args:
      adapter: nested dict of A [r, D] and B [O, r], any floating dtypes.
      scales: one number, or one per layer: `LoraConfig.scales(adapter)`.
    Returns: nested dict `{layer: {"weight": [O, D]}}`.
    Raises: ValueError for leaves that are not adapter factors, or a layer without a scale.
    Source: Hu et al., arXiv:2106.09685, section 4.1.
    """
    factors = adapter_factors(adapter)
    by_layer = scales_by_layer(scales, factors)
    return unflatten_names(
        {f"{layer}.weight": by_layer[layer] * _product(b, a) for layer, (a, b) in factors.items()}
    )


def scales_by_layer(scales: float | Mapping[str, float], layers: Iterable[str]) -> dict[str, float]:
    """One scale per layer. Raises: ValueError that names the layers without one."""
    layers = list(layers)
    if not isinstance(scales, Mapping):
        return dict.fromkeys(layers, scales)
    missing = [layer for layer in layers if layer not in scales]
    if missing:
        raise DarexError(f"no scale for {', '.join(missing)}.")
    return {layer: scales[layer] for layer in layers}


def _product(b: Any, a: Any) -> jax.Array:
    b, a = jnp.asarray(b), jnp.asarray(a)
    dtype = working_dtype(b.dtype, a.dtype)
    # Accelerators multiply float32 at reduced precision by default.
    return jnp.matmul(b.astype(dtype), a.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def _layer_of(name: str) -> str | None:
    return next((name.removesuffix(f".{f}") for f in FACTORS if name.endswith(f".{f}")), None)


def _endings(module: str) -> Iterator[str]:
    """The full name, then every suffix of its dotted components."""
    while module:
        yield module
        module = module.partition(".")[2]


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

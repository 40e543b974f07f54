"""Rotary positions (Su et al., arXiv:2104.09864), and how a config.json states them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.models.config import Number, Positive, Size, kinds_of, shown, type_faults

Array = jax.Array


@dataclass(frozen=True)
class Rope:
    """Rotary positions and their scaling for long contexts, as in transformers.

    kind:
      "default";
      "linear", every frequency divided by `factor`;
      "llama3", which divides low frequencies (wavelengths beyond `original_max_position_embeddings /
        low_freq_factor`), keeps high ones and blends in between;
      "yarn" (Peng et al., arXiv:2309.00071), which divides the frequencies that turn less than `beta_slow`
        times within `original_max_position_embeddings`, keeps those that turn more than `beta_fast` times,
        blends in between, and scales cosines and sines by `attention_factor`;
      "dynamic", whose theta grows with the length of the text beyond `original_max_position_embeddings`
        (which is config.json's `max_position_embeddings` here).
    """

    theta: Positive
    kind: str = "default"
    factor: Positive = 1.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Size = 1
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    truncate: bool = True

    def frequencies(self, head_dim: int, lengths: Array) -> Array:
        """Radians per position, float32 [1, head_dim / 2]; for "dynamic" [B, head_dim / 2], by `lengths` [B].

        A row's frequencies depend on its own length only. transformers uses the longest of the batch, or of
        an earlier longer input.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        if self.kind == "dynamic":
            longer = jnp.maximum(lengths / self.original_max_position_embeddings, 1.0).astype(jnp.float32)
            stretch = self.factor * longer - (self.factor - 1)
            theta = self.theta * stretch ** (head_dim / (head_dim - 2))
            return 1.0 / theta[:, None] ** exponents[None]
        plain: np.ndarray = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        divided = self._divided(plain) * np.ones_like(plain)
        return jnp.asarray((divided * plain / self.factor + (1 - divided) * plain)[None], jnp.float32)

    def turns(self, head_dim: int, positions: Array) -> tuple[Array, Array]:
        """Cosines and sines of the angles at positions [B, T], scaled: [B, T, head_dim / 2]."""
        angles = positions[:, :, None] * self.frequencies(head_dim, positions.max(axis=1) + 1)[:, None]
        return self.scale * jnp.cos(angles), self.scale * jnp.sin(angles)

    def _divided(self, frequencies: np.ndarray) -> np.ndarray | float:
        """To what degree each frequency is divided by `factor`, from 0 (not at all) to 1."""
        if self.kind == "linear":
            return 1.0
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
            return np.clip((high - turns) / (high - low), 0.0, 1.0)
        if self.kind == "yarn":
            first, last = self._blended(2 * len(frequencies))
            return np.clip((np.arange(len(frequencies)) - first) / (last - first), 0.0, 1.0)
        return 0.0

    def _blended(self, head_dim: int) -> tuple[float, float]:
        """The pairs between which YaRN blends: those that turn about `beta_fast` and `beta_slow` times."""

        def pair(turns: float) -> float:
            wavelength = self.original_max_position_embeddings / turns
            return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(self.theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        return first, last if last != first else last + 0.001  # one step, and no division by zero

    @property
    def scale(self) -> float:
        """The factor of cosines and sines; 1 for all but YaRN."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def of(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return of(self.mscale) / of(self.mscale_all_dim)
        return of(1.0)


# The fields of each kind beside rope_theta: required and optional.
ROPE_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


def read_rope(hf: Mapping[str, Any], default_theta: float | None) -> tuple[Rope | None, list[str]]:
    """The rotary positions of a config.json, as transformers 4 (`rope_theta`, `rope_scaling`) or 5
    (`rope_parameters`) writes them.

    Returns: the rotary positions, or None and a list of problems.
    """
    both = {name: hf.get(name) for name in ("rope_scaling", "rope_parameters")}
    if wrong := type_faults(both, dict.fromkeys(both, dict | None)):
        return None, wrong
    stated = {**(both["rope_scaling"] or {}), **(both["rope_parameters"] or {})}
    theta = stated.pop("rope_theta", hf.get("rope_theta"))
    kind = stated.pop("rope_type", stated.pop("type", "default"))
    stated.pop("type", None)
    theta = default_theta if theta is None else theta
    if theta is None:
        return None, ["rope_theta is missing"]
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        return None, [f"rope_type is {shown(kind)}, supported: {', '.join(ROPE_KINDS)}"]
    needed, possible = ROPE_KINDS[kind]
    wrong = type_faults({"rope_theta": theta}, {"rope_theta": Positive})
    wrong += [f"{name} of the rope is missing" for name in needed if stated.get(name) is None]
    wrong += [
        f"{name} of the rope is {shown(value)}, which {kind!r} does not have"
        for name, value in stated.items()
        if name not in (*needed, *possible) and not (name == "partial_rotary_factor" and value == 1.0)
    ]
    values = {n: stated[n] for n in (*needed, *possible) if stated.get(n) is not None}
    wrong += [f"{fault} (of the rope)" for fault in type_faults(values, kinds_of(Rope))]
    if kind in ("dynamic", "yarn") and "original_max_position_embeddings" not in values:
        longest = {"max_position_embeddings": hf.get("max_position_embeddings")}
        wrong += type_faults(longest, {"max_position_embeddings": Size})
        values["original_max_position_embeddings"] = longest["max_position_embeddings"]
    if wrong:
        return None, wrong
    rope = Rope(theta, kind, **values)
    if kind == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:
        return None, ["high_freq_factor of the rope is not above its low_freq_factor"]
    if kind == "yarn" and rope.theta <= 1:
        return None, [f"rope_theta is {rope.theta}, 'yarn' needs one above 1"]
    return rope, []


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates each pair (x[i], x[i + H/2]) of [B, T, N, H] by its angle; cos, sin [B, T, H/2], float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # B T H/2 -> B T 1 H/2
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)

"""Statistics and callbacks from calibration data that a method may use beside the delta."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from darex_jax.core.tree import flatten_names


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Calibration data for methods; statistics are of each linear layer's inputs over calibration tokens.
    Mappings are by parameter name.

    Attributes:
      linear_layers: the names of their weights; by default those of `input_norms`.
      input_norms: the L2 norm [in] of each input feature, `sqrt(sum x_j^2)`.
      second_moments: `E[x x^T]`, [in, in].
      token_counts: how often each token occurs, [vocabulary], for the table that it looks up; gathered with
        second_moments, whose diagonal it is but for a factor.
      curvature: mean squared gradient of the outputs per entry, for any parameter.
      train: (float parts by name, bits) -> the same parts with trained values, quantised to `bits`, for which
        the outputs are close to the fine-tuned model's.
    """

    linear_layers: Collection[str] = ()
    input_norms: Mapping[str, Any] = field(default_factory=dict)
    second_moments: Mapping[str, Any] = field(default_factory=dict)
    token_counts: Mapping[str, Any] = field(default_factory=dict)
    curvature: Mapping[str, float] = field(default_factory=dict)
    train: Callable[[Mapping[str, Any], int | None], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "linear_layers", frozenset(self.linear_layers or flatten_names(self.input_norms))
        )

"""What a method may know beside the delta. How it is gathered is no method's concern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What examples and the fine-tuned model say; statistics are of what goes into each linear layer, by the
    name of its weight, over calibration tokens.

    Attributes:
      input_norms: the L2 norm [in] of each input feature, `sqrt(sum x_j^2)`.
      second_moments: `E[x x^T]`, [in, in].
      curvature: how much the answers move with an entry of a parameter, of any parameter.
      train: parts of floats by name, and bits -> the same parts with values, rounded to so many bits, with
        which the model answers as the fine-tuned one does.
    """

    input_norms: Mapping[str, Any] = field(default_factory=dict)
    second_moments: Mapping[str, Any] = field(default_factory=dict)
    curvature: Mapping[str, float] = field(default_factory=dict)
    train: Callable[[Mapping[str, Any], int | None], Mapping[str, Any]] | None = None

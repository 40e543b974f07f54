"""What a method may know beside the delta. How it is gathered is no method's concern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Statistics of what goes into each linear layer, by the name of its weight, over calibration tokens.

    Attributes:
      input_norms: the L2 norm [in] of each input feature, `sqrt(sum x_j^2)`.
      second_moments: `E[x x^T]`, [in, in].
    """

    input_norms: Mapping[str, Any] = field(default_factory=dict)
    second_moments: Mapping[str, Any] = field(default_factory=dict)

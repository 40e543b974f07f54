"""The budget of a method, as a drop rate or as bytes per parameter, and what it allows per kind of part."""

from __future__ import annotations

import math
from dataclasses import dataclass

from darex_jax.core.errors import DarexError
from darex_jax.core.threefry import keep_threshold

RAW_BITS = 16  # per value without quantisation: bfloat16
WHOLE = 0.1  # vectors are kept whole if they take at most this share of the bytes


class TooSmall(DarexError):
    """A size or a budget that a method cannot keep to, however little it keeps."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a method may spend on its parameters; exactly one of the two is set.

    Attributes:
      drop_rate: the share of entries that are dropped, in [0, 1); for methods that do not drop single
        entries, the share of numbers that are not stored.
      bytes_per_parameter: bytes of values and of entropy-coded indices divided by the number of entries.
        Scales of quantised values, about a hundredth of a low rank, come on top; `darex prune` fits the whole
        file.
    Raises: DarexError for none, both, or one out of range.
    """

    drop_rate: float | None = None
    bytes_per_parameter: float | None = None

    def __post_init__(self) -> None:
        if (self.drop_rate is None) == (self.bytes_per_parameter is None):
            raise DarexError("a budget is either a drop rate or bytes per parameter.")
        if self.drop_rate is not None:
            keep_threshold(self.drop_rate)
        elif not (self.bytes_per_parameter or 0.0) > 0.0:
            raise DarexError(f"bytes per parameter must be positive, got {self.bytes_per_parameter}.")

    def density(self, bits: float = RAW_BITS, *, places: bool) -> float:
        """The share of entries that can be kept at `bits` per value.

        Args: places: whether indices are stored as well, at the entropy of the mask, -d log d - ...
        """
        if self.bytes_per_parameter is None:
            assert self.drop_rate is not None
            return 1.0 - self.drop_rate
        room = 8.0 * self.bytes_per_parameter  # bits per entry
        if not places:
            return min(1.0, room / bits)

        def cost(density: float) -> float:
            return density * bits + entropy(density)

        low, high = 0.0, 1.0
        if cost(high) <= room:
            return 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle) <= room else (low, middle)
        return low

    def numbers(self, size: int, bits: float = RAW_BITS) -> float:
        """How many values of `bits` bits may be stored, without indices, for `size` entries."""
        if self.bytes_per_parameter is None:
            assert self.drop_rate is not None
            return (1.0 - self.drop_rate) * size
        return self.bytes_per_parameter * size * 8 / bits


def entropy(density: float) -> float:
    """Entropy of one entry of a random mask, in bits."""
    if not 0.0 < density < 1.0:
        return 0.0
    return -density * math.log2(density) - (1.0 - density) * math.log2(1.0 - density)

"""Threefry-2x32 for NumPy and JAX arrays: Salmon et al., SC 2011, as `jax.random` uses it.

The rounds are unrolled uint32 code, which XLA's CPU backend vectorises (unlike its own rolled loop), and
which also runs on NumPy arrays: `numpy_mask` is the definition of a mask without JAX.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from darex_jax.core.errors import DarexError

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(key: Any, high: Any, low: Any) -> tuple[Any, Any]:
    """One block per counter (high, low): two uint32 words each. `key` is two words, all are uint32."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    high, low = high + schedule[0], low + schedule[1]
    for block in range(5):
        for distance in ROTATIONS[block % 2]:
            high = high + low
            low = (low << np.uint32(distance)) | (low >> np.uint32(32 - distance))
            low = high ^ low
        high = high + schedule[(block + 1) % 3]
        low = low + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return high, low


def keep_threshold(drop_rate: float) -> int:
    """An entry survives where its 32 random bits are below this: `round((1 - drop_rate) * 2**32)`.

    Raises: ValueError if `drop_rate` is not in [0, 1); TypeError if it is not a concrete number.
    """
    try:
        rate = float(drop_rate)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "drop_rate must be a Python float: the threshold is computed from it in float64."
        ) from error
    if not 0.0 <= rate < 1.0:
        raise DarexError(f"drop_rate is a probability in [0, 1), got {drop_rate}.")
    return round((1.0 - rate) * 2**32)


def numpy_leaf_key(key: Sequence[int], words: tuple[int, int]) -> np.ndarray:
    """`fold_in(fold_in(key, words[0]), words[1])` without JAX. Returns uint32[2]."""
    folded = np.array(key, np.uint32).reshape(2, 1)
    for word in words:
        folded = np.array(threefry2x32(folded, np.zeros(1, np.uint32), np.array([word], np.uint32)))
    return folded[:, 0]


def numpy_mask(leaf_key: np.ndarray, start: int, length: int, threshold: int) -> np.ndarray:
    """Entries [start, start + length) of a leaf's flattened mask, in NumPy alone: the slow reference.

    Args: leaf_key: uint32[2], the data of the leaf's key. Returns: bool[length], True survives.
    """
    index = np.arange(start, start + length, dtype=np.uint64)
    key = leaf_key.astype(np.uint32)[:, None]
    high, low = threefry2x32(key, (index >> np.uint64(32)).astype(np.uint32), index.astype(np.uint32))
    return (high ^ low).astype(np.uint64) < threshold

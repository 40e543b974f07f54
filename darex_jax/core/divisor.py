"""The divisor q of random survivors: one number for all parameters, or one by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from darex_jax.core.errors import DarexError


def is_q(value: Any) -> bool:
    """Whether it is a valid divisor: a positive number that, like its reciprocal, is a normal float32."""
    if isinstance(value, list | tuple):
        return False
    number = np.asarray(value)
    return number.shape == () and number.dtype.kind in "iuf" and 2.0**-126 <= float(number) <= 2.0**126


def resolve_q(
    q: float | Mapping[str, Any] | None, drop_rate: float, names: Sequence[str], unused: Iterable[str] = ()
) -> dict[str, float]:
    """`{name: q}` for every name; None is DARE's 1 - drop_rate.

    Args: unused: further names that q may contain, of parameters that are not pruned.
    Raises: ValueError for a q that is missing, has an unknown name, or is invalid.
    """
    if q is None:
        q = 1.0 - drop_rate
    by_name = q if isinstance(q, Mapping) else dict.fromkeys(names, q)
    missing = [name for name in names if name not in by_name]
    unknown = sorted(by_name.keys() - set(names) - set(unused))
    if missing or unknown:
        faults = [f"q has no entry for '{name}'" for name in missing[:4]]
        faults += [f"q has {name!r:.80}, which is not a parameter" for name in unknown[:4]]
        raise DarexError("; ".join(faults) + ".")
    for name in names:
        if not is_q(by_name[name]):
            raise DarexError(f"q of '{name}' must be a positive float32 number, got {by_name[name]}.")
    return {name: float(by_name[name]) for name in names}

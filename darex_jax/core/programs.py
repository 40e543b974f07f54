"""Compiled programs, let go of before a process has used up its memory maps."""

import gc
from pathlib import Path

import jax

MAPS, LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
SHARE = 0.5  # of the memory maps that Linux allows a process


def release_programs() -> bool:
    """Clears JAX's caches if this process has used half of its memory maps; says whether it did.

    On a CPU a compiled program takes dozens of them; at the limit, 65,530 by default, compiling fails with
    "Cannot allocate memory", however much memory is free. Training compiles for each rank and length.
    """
    try:
        with MAPS.open("rb") as maps:
            used, allowed = sum(1 for _ in maps), int(LIMIT.read_text())
    except (OSError, ValueError):  # not Linux
        return False
    if used < SHARE * allowed:
        return False
    jax.clear_caches()
    gc.collect()
    return True

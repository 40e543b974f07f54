"""Compiled programs, let go of before a process has used up its memory maps."""

import ctypes
import gc
from pathlib import Path

import jax

MAPS, LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def release_programs(share: float = 0.5) -> bool:
    """Clears JAX's caches if this process has used this share of its memory maps; says whether it did.

    On a CPU a compiled program takes dozens of them; at the limit, 65,530 by default, compiling fails with
    "Cannot allocate memory", however much memory is free. Training compiles for each rank and length. A map
    stands for some 0.1 MB of memory, so that half of them are over 3 GB.
    """
    try:
        with MAPS.open("rb") as maps:
            used, allowed = sum(1 for _ in maps), int(LIMIT.read_text())
    except (OSError, ValueError):  # not Linux
        return False
    if used < share * allowed:
        return False
    jax.clear_caches()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # glibc keeps what was freed
    return True

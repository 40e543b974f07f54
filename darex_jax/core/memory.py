"""The memory of a process on a CPU: compiled programs are let go of, freed memory is used again."""

import ctypes
import gc
import sys
from pathlib import Path

import jax

MAPS, LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of malloc.h, for mallopt(3)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for what the process allocates next; call it before there are threads.

    By default a large buffer is mapped when it is allocated and unmapped when it is freed, so that at every
    step of a training the kernel clears all pages of its buffers: a tenth of the time, or more. Without
    effect on other systems.
    """
    for name, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        _of_c("mallopt", name, value)


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
    _of_c("malloc_trim", 0)  # glibc keeps what was freed
    return True


def _of_c(name: str, *numbers: int) -> None:
    """Calls a function of the C library where it has one of this name."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if function := getattr(library, name, None):
        function(*numbers)

"""Programs are let go of before memory maps run out; freed memory is used again where that is asked for."""

import ctypes
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from darex_jax.core import memory


def test_programs_are_released_only_where_maps_run_out(monkeypatch, tmp_path):
    compiled = jax.jit(lambda x: x + 1)
    compiled(jnp.ones(3))
    monkeypatch.setattr(memory, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(memory, "LIMIT", tmp_path / "limit")
    assert not memory.release_programs()  # a system without these files
    (tmp_path / "limit").write_text("100\n")
    (tmp_path / "maps").write_text("map\n" * 49)
    assert not memory.release_programs() and compiled._cache_size() == 1
    (tmp_path / "maps").write_text("map\n" * 50)
    assert memory.release_programs() and compiled._cache_size() == 0
    assert float(compiled(jnp.ones(3))[0]) == 2.0


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="not Linux")
def test_released_programs_give_their_maps_back():
    def count():
        return len(memory.MAPS.read_text().splitlines())

    before = count()
    many = [jax.jit(lambda x, i=i: jnp.sin(x) @ x.T + i) for i in range(20)]
    for each in many:
        each(jnp.ones((4, 4)))
    full = count()
    assert memory.release_programs(share=0.0)
    assert full > before + 20 and count() < before + (full - before) / 2


FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from darex_jax.core.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
product = jax.jit(lambda x: x[:, None] * x)
x = jnp.arange(4096.0)
for steps in (20, 10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        product(x).block_until_ready()  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_kept_memory_is_not_mapped_again_at_every_step():
    def pages(how):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True, timeout=120
        )
        return int(done.stdout)

    assert pages("kept") < pages("default") / 3

"""Programs are let go of before the memory maps of the process are used up."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from darex_jax.core import programs


def test_programs_are_released_only_where_maps_run_out(monkeypatch, tmp_path):
    compiled = jax.jit(lambda x: x + 1)
    compiled(jnp.ones(3))
    monkeypatch.setattr(programs, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(programs, "LIMIT", tmp_path / "limit")
    assert not programs.release_programs()  # a system without these files
    (tmp_path / "limit").write_text("100\n")
    (tmp_path / "maps").write_text("map\n" * 49)
    assert not programs.release_programs() and compiled._cache_size() == 1
    (tmp_path / "maps").write_text("map\n" * 50)
    assert programs.release_programs() and compiled._cache_size() == 0
    assert float(compiled(jnp.ones(3))[0]) == 2.0


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="not Linux")
def test_released_programs_give_their_maps_back():
    def count():
        return len(programs.MAPS.read_text().splitlines())

    before = count()
    many = [jax.jit(lambda x, i=i: jnp.sin(x) @ x.T + i) for i in range(20)]
    for each in many:
        each(jnp.ones((4, 4)))
    full = count()
    assert programs.release_programs(share=0.0)
    assert full > before + 20 and count() < before + (full - before) / 2

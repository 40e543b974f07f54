"""Dtypes of checkpoints and artifacts, and numbers that do not fit in them."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.errors import DarexError
from darex_jax.core.mask import survivor_indices
from darex_jax.core.threefry import numpy_leaf_key
from darex_jax.core.tree import flatten_names, name_words
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.restore import apply_artifact, restored_params
from darex_jax.files.safetensors import write_tensors
from tests.pairs import BF16, darex, encoder, prune, read_all, write


@pytest.mark.parametrize(("base_dtype", "fine_dtype"), [("f8", "f8"), ("f8", "f4"), ("f4", "f8")])
def test_float64_tensors_are_computed_in_float64(tmp_path, base_dtype, fine_dtype):
    """Stored and restored bits are those of `prune` and `apply_delta` under x64; float32 would lose them."""
    base = {
        name: leaf.astype(base_dtype) for name, leaf in encoder(0, prefix="").items() if leaf.dtype == "f4"
    }
    fine = {name: (leaf * np.float64(1 + 2.0**-30)).astype(fine_dtype) for name, leaf in base.items()}
    base |= {name: leaf * (1 - 2.0**-29) for name, leaf in base.items() if base_dtype == "f8"}
    write(tmp_path / "base", base)
    write(tmp_path / "fine", fine)
    names = list(prune(tmp_path / "base", tmp_path / "fine", tmp_path / "d", 0.8, q=0.3).recipe.parameters)
    with Checkpoint(tmp_path / "base") as b, DeltaFile(tmp_path / "d") as d:
        restored = dict(restored_params(b, d))
    assert {x.dtype for x in jax.tree.leaves(dx.load_delta(tmp_path / "d"))} == {np.dtype("f4")}
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(base[name], "f8") for name in names}
        delta = dx.compute_delta({name: fine[name] for name in names}, wide)
        delta = {name: leaf.astype(fine_dtype) for name, leaf in delta.items()}  # as it is stored
        pruned = dx.prune(jax.random.key(0), delta, 0.8, 0.3)
        found = flatten_names(dx.load_delta(tmp_path / "d"))
        for name, total in dx.apply_delta(wide, pruned).items():
            assert found[name].dtype == fine_dtype
            np.testing.assert_array_equal(found[name], pruned[name])
            assert restored[name].dtype == fine_dtype
            np.testing.assert_array_equal(restored[name], total.astype(fine_dtype))


def test_float64_deltas_of_trees(tmp_path):
    with jax.enable_x64(True):
        base = {"w": jnp.linspace(1.0, 2.0, 1000)}
        delta = {"w": base["w"] * 2.0**-40}
        dx.save_delta(tmp_path / "d", jax.random.key(5), delta, 0.9, 0.3, base=base)
        pruned = dx.prune(jax.random.key(5), delta, 0.9, 0.3)
        write_tensors(tmp_path / "base", base)
        with Checkpoint(tmp_path / "base") as b, DeltaFile(tmp_path / "d") as d:
            [(_, restored)] = restored_params(b, d)
        np.testing.assert_array_equal(dx.load_delta(tmp_path / "d")["w"], pruned["w"])
        np.testing.assert_array_equal(restored, dx.apply_delta(base, pruned)["w"])
        assert np.any(restored != base["w"])


def test_a_difference_below_float32_counts(tmp_path):
    """Otherwise a warning would say that the models are the same."""
    base = {name: leaf for name, leaf in encoder(0, prefix="").items() if leaf.dtype == "f4"}
    write(tmp_path / "base", base)
    write(tmp_path / "fine", {name: leaf * np.float64(1 + 2.0**-40) for name, leaf in base.items()})
    prune(tmp_path / "base", tmp_path / "fine", tmp_path / "d", 0.5)  # warnings are errors


def test_inexact_values_are_counted(tmp_path):
    write(tmp_path / "base", encoder(0, BF16, head=False))
    write(tmp_path / "fine", encoder(1, BF16, step=0.3))
    summary = prune(tmp_path / "base", tmp_path / "fine", tmp_path / "d", 0.0)
    base, fine = read_all(tmp_path / "base"), read_all(tmp_path / "fine")
    inexact = 0
    for name in summary.recipe.parameters:
        difference = fine[name].astype(np.float64) - base[name].astype(np.float64)
        inexact += np.count_nonzero(difference.astype(BF16).astype(np.float64) != difference)
    assert summary.recipe.inexact == inexact > 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_nan_and_infinity(tmp_path, value, dtype):
    fine = encoder(1, dtype)
    fine["bert.pooler.dense.weight"][0, 1] = value
    write(tmp_path / "base", encoder(0, dtype, head=False))
    write(tmp_path / "fine", fine)
    arguments = ("prune", tmp_path / "base", tmp_path / "fine", tmp_path / "d", "-p", 0.9)
    assert "'bert.pooler.dense.weight' has 1 NaN or infinite" in darex(*arguments, code=1).stderr
    assert not (tmp_path / "d").exists()
    report = json.loads(darex(*arguments, "--allow-nonfinite", "--json").stdout)
    assert report["nonfinite"] == 1


@pytest.mark.parametrize("q", [1e-50, 1e39])
def test_a_q_outside_of_float32_is_refused(tmp_path, pair, q):
    error = darex("prune", *pair, tmp_path / "d", "-p", 0.9, "--q", q, code=1).stderr
    assert f"must be a positive float32 number, got {q}" in error


def test_overflow_is_refused(tmp_path):
    write(tmp_path / "base", {"bert.w": np.ones(2000, np.float16)})
    write(tmp_path / "fine", {"bert.w": np.full(2000, 900, np.float16)})
    prune(tmp_path / "base", tmp_path / "fine", tmp_path / "d", 0.99)
    error = darex("apply", tmp_path / "base", tmp_path / "d", tmp_path / "out", code=1).stderr
    assert "'bert.w' overflows float16 when its delta is divided by q = 0.01" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("of_base", "of_fine"), [(BF16, np.float32), (np.float32, BF16), (BF16, np.float16)])
@pytest.mark.parametrize("written", [None, "float32", "bfloat16"])
def test_a_model_is_restored_in_the_fine_tunes_dtype(tmp_path, of_base, of_fine, written):
    """The config.json of both models has the base's dtype, so it does not help."""
    base, fine = encoder(0, of_base), encoder(1, of_fine, step=1e-4)
    config = {"torch_dtype": np.dtype(of_base).name, "num_labels": 2}
    write(tmp_path / "base", base, config)
    write(tmp_path / "fine", fine, config)
    prune(tmp_path / "base", tmp_path / "fine", tmp_path / "d", 0.5)
    command = ("apply", tmp_path / "base", tmp_path / "d", tmp_path / "out")
    darex(*command, *(["--dtype", written] if written else []))
    dtype = np.dtype(of_fine if written is None else written)
    restored = read_all(tmp_path / "out")
    with Checkpoint(tmp_path / "base") as b, DeltaFile(tmp_path / "d") as d:
        in_memory = dict(restored_params(b, d, written))
        mask = {
            n: survivor_indices(numpy_leaf_key(d.recipe.key, name_words(n)), base[n].size, d.threshold())
            for n in d.recipe.parameters
        }
    assert {n: x.tobytes() for n, x in restored.items()} == {n: x.tobytes() for n, x in in_memory.items()}
    for name, kept in mask.items():
        start = base[name].astype(np.float32).reshape(-1)
        delta = (fine[name].astype(np.float32).reshape(-1) - start).astype(of_fine).astype(np.float32)[kept]
        start[kept] += np.where(delta == 0, 0, delta * (np.float32(1) / np.float32(0.5)))
        assert restored[name].dtype == dtype
        assert restored[name].tobytes() == start.astype(dtype).tobytes()
    assert restored["classifier.weight"].dtype == dtype
    assert restored["bert.embeddings.position_ids"].dtype == np.int64
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype.name


def test_a_dtype_that_overflows_is_refused(tmp_path):
    write(tmp_path / "base", {"bert.w": np.array([1e20, 1, 2], BF16)})
    write(tmp_path / "fine", {"bert.w": np.array([1e20, 1, 3], BF16)})
    prune(tmp_path / "base", tmp_path / "fine", tmp_path / "d", 0.0)
    command = ("apply", tmp_path / "base", tmp_path / "d", tmp_path / "out")
    assert "'bert.w' overflows float16" in darex(*command, "--dtype", "float16", code=1).stderr
    darex(*command)
    for dtype in (np.dtype(np.int32), np.dtype(ml_dtypes.float8_e4m3fn)):
        refused_ = pytest.raises(DarexError, match=f"dtype must be floating, of 16 bits or more, got {dtype}")
        with Checkpoint(tmp_path / "base") as b, DeltaFile(tmp_path / "d") as d, refused_:
            apply_artifact(b, d, tmp_path / "other", dtype=dtype)

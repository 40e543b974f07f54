"""Magnitude, WANDA and structured masks, against sorts in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import darex_jax as dx
from darex_jax.methods.magnitude import largest as on_the_host

# Indices of the 8 largest of 32 words of the leaf's key, from a sort in NumPy.
GOLDEN = [0, 1, 9, 14, 15, 20, 22, 31]


def largest(scores, count):
    """The mask of the `count` largest of a vector; a stable sort keeps the first of ties."""
    mask = np.zeros(scores.shape, bool)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 9), st.floats(0, 0.999), st.booleans())
@settings(max_examples=40, deadline=None)
def test_magnitude_and_wanda_are_the_sorted_ones(seed, columns, rows, drop_rate, with_ties):
    rng = np.random.default_rng(seed)
    delta = rng.normal(size=(rows, columns)).astype(np.float32)
    if with_ties:
        delta = np.round(delta)
    norms = np.abs(rng.normal(size=columns)).astype(np.float32)
    keep = round((1 - drop_rate) * delta.size)
    mask = dx.magnitude_mask({"w": delta}, drop_rate)["w"]
    np.testing.assert_array_equal(mask, largest(np.abs(delta).reshape(-1), keep).reshape(delta.shape))
    scores = np.abs(delta) * norms
    by_matrix = dx.wanda_mask({"w": delta}, {"w": norms}, drop_rate, group="matrix")["w"]
    np.testing.assert_array_equal(by_matrix, largest(scores.reshape(-1), keep).reshape(delta.shape))
    by_row = dx.wanda_mask({"w": delta}, {"w": norms}, drop_rate)["w"]
    keep = round((1 - drop_rate) * columns)
    np.testing.assert_array_equal(by_row, np.stack([largest(row, keep) for row in scores]))


def test_wanda_compares_leaves_without_norms_by_magnitude():
    delta = {"w": jnp.array([[1.0, 2.0], [4.0, 3.0]]), "b": jnp.array([0.1, -3.0])}
    mask = dx.wanda_mask(delta, {"w": jnp.array([10.0, 1.0])}, 0.5)
    assert mask["w"].tolist() == [[True, False], [True, False]] and mask["b"].tolist() == [False, True]
    with pytest.raises(ValueError, match="not in the delta"):
        dx.wanda_mask(delta, {"x": jnp.ones(2)}, 0.5)
    with pytest.raises(ValueError, match=r"'w' has shape \[3\].*one norm per input feature"):
        dx.wanda_mask(delta, {"w": jnp.ones(3)}, 0.5)
    with pytest.raises(ValueError, match="'row' or 'matrix'"):
        dx.wanda_mask(delta, {}, 0.5, group="column")


def test_structured_masks_are_whole_columns():
    tree = {"a": jnp.zeros((7, 200)), "b": jnp.zeros((7, 200)), "v": jnp.zeros(200), "s": jnp.zeros(())}
    mask = jax.tree.map(np.asarray, dx.structured_mask(jax.random.key(3), tree, 0.9))
    for name in ("a", "b"):
        assert (mask[name] == mask[name][0]).all() and mask[name][0].sum() == 20
    assert mask["v"].sum() == 20 and mask["s"].shape == ()
    assert (mask["a"] != mask["b"]).any()  # each leaf has its own subset
    alone = dx.structured_mask(jax.random.key(3), {"b": jax.ShapeDtypeStruct((7, 200), jnp.bfloat16)}, 0.9)
    np.testing.assert_array_equal(alone["b"], mask["b"])
    assert (dx.structured_mask(jax.random.key(4), tree, 0.9)["a"] != mask["a"]).any()
    few = dx.structured_mask(jax.random.key(0), {"w": jnp.zeros((2, 8))}, 0.999)["w"]
    assert few.sum() == 2  # one column at least


def test_structured_columns_are_chosen_evenly():
    keys = [jax.random.key(seed) for seed in range(200)]
    tree = {"w": jax.ShapeDtypeStruct((1, 10), jnp.float32)}
    counts = sum(np.asarray(dx.structured_mask(key, tree, 0.7)["w"][0], int) for key in keys)
    assert counts.sum() == 600 and np.abs(counts - 60).max() < 5 * np.sqrt(200 * 0.3 * 0.7)


def test_structured_golden():
    mask = dx.structured_mask(jax.random.key(0), {"w": jax.ShapeDtypeStruct((1, 32), jnp.float32)}, 0.75)
    assert np.flatnonzero(mask["w"][0]).tolist() == GOLDEN


def test_under_jit_and_sharded():
    delta = {"w": jax.random.normal(jax.random.key(0), (16, 64))}
    expected = dx.magnitude_mask(delta, 0.9)["w"]
    jitted = jax.jit(lambda d: dx.magnitude_mask(d, 0.9))(delta)["w"]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    sharded = dx.magnitude_mask(jax.device_put(delta, sharding), 0.9)["w"]
    np.testing.assert_array_equal(expected, jitted)
    np.testing.assert_array_equal(expected, sharded)


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_refusals(rate):
    for make in (
        lambda: dx.magnitude_mask({"w": jnp.ones(3)}, rate),
        lambda: dx.wanda_mask({"w": jnp.ones((1, 3))}, {}, rate),
        lambda: dx.structured_mask(jax.random.key(0), {"w": jnp.ones((1, 3))}, rate),
    ):
        with pytest.raises(ValueError, match=r"drop_rate is a probability in \[0, 1\)"):
            make()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_the_largest_on_the_host_are_those_of_the_mask(dtype):
    rng = np.random.default_rng(0)
    for shape, drop_rate in (((40, 30), 0.9), ((40, 30), 0.99), ((7,), 0.5), ((5, 5), 0.0), ((3, 3), 0.99)):
        leaf = np.round(rng.normal(size=shape), 1).astype(dtype)  # many are equal
        with jax.enable_x64(dtype == np.float64):
            mask = dx.magnitude_mask({"a": leaf}, drop_rate)["a"]
        kept = on_the_host(leaf, round((1.0 - drop_rate) * leaf.size))
        np.testing.assert_array_equal(kept, np.asarray(mask))

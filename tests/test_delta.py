"""The delta algebra: exact identities, statistics, dtypes, and bits that do not depend on compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import darex_jax as dx
from darex_jax.core.delta import _compiled_prune


def model(seed, dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "dense": {"weight": (scale * jax.random.normal(keys[0], (600, 700))).astype(dtype)},
        "norm": {"weight": (scale * jax.random.normal(keys[1], (700,))).astype(dtype)},
        "scalar": (scale * jax.random.normal(keys[2], ())).astype(dtype),
    }


def numpy_prune(seed, name, delta, drop_rate, q):
    """DARE / DAREx-q in a few lines of NumPy, the mask from the definition."""
    mask = np.asarray(dx.random_mask(jax.random.key(seed), {name: delta}, drop_rate)[name])
    scale = np.float32(1) / np.float32(q)
    return np.where(mask, (np.asarray(delta, np.float32) * scale).astype(delta.dtype), delta.dtype.type(0))


def assert_bits(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).tobytes(), np.asarray(b).tobytes())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("q", [None, 0.037, 1.0])
def test_prune_is_the_published_rule(dtype, q):
    delta = model(1, dtype)["dense"]["weight"]  # large enough for the chunked path in float32
    expected = numpy_prune(0, "w", delta, 0.9, 1 - 0.9 if q is None else q)
    assert_bits(dx.prune(jax.random.key(0), {"w": delta}, 0.9, q), {"w": expected})
    jitted = jax.jit(lambda d: dx.prune(jax.random.key(0), {"w": d}, 0.9, q))
    assert_bits(jitted(delta), {"w": expected})
    donated = jnp.array(delta, copy=True)  # that no NumPy array is a view of
    assert_bits(dx.prune(jax.random.key(0), {"w": donated}, 0.9, q, donate=True), {"w": expected})
    assert donated.is_deleted()


def test_an_array_that_two_leaves_share_is_not_donated():
    tied = jnp.ones((4, 5))
    delta = {"embedding": tied, "head": tied, "other": jnp.ones(3)}
    expected = dx.prune(jax.random.key(0), delta, 0.5)
    assert_bits(dx.prune(jax.random.key(0), delta, 0.5, donate=True), expected)
    assert not tied.is_deleted() and delta["other"].is_deleted()


@pytest.mark.parametrize("q", [jnp.float32(-1.0), jnp.float32(0.0), jnp.float32(jnp.nan)])
def test_a_q_on_the_device_is_checked_like_any_other(q):
    delta = {"w": jnp.ones(8)}
    with pytest.raises(dx.DarexError, match="must be positive"):
        dx.prune(jax.random.key(0), delta, 0.5, q)
    good = jnp.float32(0.037)
    assert_bits(dx.prune(jax.random.key(0), delta, 0.5, good), dx.prune(jax.random.key(0), delta, 0.5, 0.037))


def test_complex_leaves_are_refused():
    with pytest.raises(dx.DarexError, match="'w' is complex"):
        dx.compute_delta({"w": np.array([3 + 0j])}, {"w": np.array([1 + 0j])})
    one, imaginary = {"w": np.ones(2, np.float32)}, {"w": np.array([1j, 2j])}
    for base, delta in ((one, imaginary), (imaginary, one)):
        with pytest.raises(dx.DarexError, match="'w' is complex"):
            dx.apply_delta(base, delta)
    with pytest.raises(dx.DarexError, match="'w' holds complex64"):
        dx.magnitude_mask(imaginary, 0.5)


def test_leaves_that_are_floating_in_one_tree_only_have_no_delta():
    whole, half = {"w": np.array([1, 2])}, {"w": np.array([0.5, 0.5], np.float32)}
    for fine, base in ((whole, half), (half, whole)):
        with pytest.raises(dx.DarexError, match=r"'w' is .* one of them is floating"):
            dx.compute_delta(fine, base)
    assert not np.any(dx.compute_delta(whole, whole)["w"])


@pytest.mark.parametrize("leaf", [jnp.tanh, "x", jax.random.key(0), np.array([1, 2]), True])
def test_what_cannot_be_pruned_is_named(leaf):
    for function in (
        lambda tree: dx.prune(jax.random.key(0), tree, 0.5),
        lambda tree: dx.rescale(tree, 0.5),
        lambda tree: dx.magnitude_mask(tree, 0.5),
    ):
        with pytest.raises(dx.DarexError, match=r"'layer\.w'"):
            function({"layer": {"w": leaf}})


def test_parts_are_pruned_as_their_sum():
    delta = {"w": np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)}
    parts = dx.svd(delta, dx.Budget(drop_rate=0.5))
    dense = {"w": parts["w"].to_dense()}
    assert_bits(dx.prune(jax.random.key(0), parts, 0.5), dx.prune(jax.random.key(0), dense, 0.5))


@pytest.mark.parametrize("size", [1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, (1 << 19) + 12345])
def test_chunk_borders(size):
    delta = jax.random.normal(jax.random.key(0), (size,))
    assert_bits(
        dx.prune(jax.random.key(1), {"w": delta}, 0.5, 0.3), {"w": numpy_prune(1, "w", delta, 0.5, 0.3)}
    )


def test_bfloat16_special_values_round_like_everyone():
    values = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 3.4e38, -3.4e38, 1e-40], jnp.bfloat16)
    got = dx.prune(jax.random.key(0), {"w": values}, 0.0, q=0.3)["w"]
    expected = (values.astype(jnp.float32) * (np.float32(1) / np.float32(0.3))).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))


def test_rate_zero_is_the_identity():
    delta = model(2)
    assert_bits(dx.prune(jax.random.key(0), delta, 0.0), delta)
    assert bool(jax.tree.all(jax.tree.map(jnp.all, dx.random_mask(jax.random.key(0), delta, 0.0))))


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9, 0.99, 0.999])
def test_mean_is_preserved(drop_rate):
    size = 1 << 20
    pruned = dx.prune(jax.random.key(4), {"w": jnp.ones(size)}, drop_rate)["w"]
    standard_error = np.sqrt(drop_rate / (1 - drop_rate) / size)
    assert abs(float(np.asarray(pruned, np.float64).mean()) - 1.0) < 5 * standard_error


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip(dtype):
    base, fine = model(0, dtype), model(1, dtype)
    delta = dx.compute_delta(fine, base)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(delta))
    restored = dx.apply_delta(base, delta)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(fine), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32),
            np.asarray(b, np.float32),
            rtol=0,
            atol=1e-6 if dtype == jnp.float32 else 1e-2,
        )


def test_drop_then_rescale_is_prune():
    delta, key = model(3), jax.random.key(0)
    by_hand = dx.rescale(dx.drop(dx.random_mask(key, delta, 0.9), delta), 0.07)
    pruned = dx.prune(key, delta, 0.9, 0.07)
    for a, b in zip(jax.tree.leaves(by_hand), jax.tree.leaves(pruned), strict=True):
        np.testing.assert_array_equal(a, b)


def test_whole_numbers_are_rescaled_like_others():
    delta = {"w": jnp.array([-1.0, 0.0, 1.0, 2.0])}
    assert dx.rescale(delta, 0.5)["w"].tolist() == [-2.0, 0.0, 2.0, 4.0]


def test_same_bits_in_one_compiled_program():
    """A fused multiply-add across prune and apply would round differently."""
    base, delta, key = model(0), model(1, scale=0.1), jax.random.key(0)
    apart = dx.apply_delta(base, dx.prune(key, delta, 0.5, 0.3))
    together = jax.jit(lambda b, d, q: dx.apply_delta(b, dx.prune(key, d, 0.5, q)))(base, delta, 0.3)
    assert_bits(apart, together)
    kept = jax.jit(lambda b, d, q: dx.apply_delta(b, dx.prune(key, d, 0.0, q)))(base, delta, 0.3)
    assert_bits(dx.apply_delta(base, dx.prune(key, delta, 0.0, 0.3)), kept)


def test_base_bits_stay_where_nothing_changes():
    base = {"w": jnp.array([-0.0, 1.0]), "ids": jnp.arange(3)}
    out = dx.apply_delta(base, {"w": jnp.zeros(2), "ids": jnp.zeros(3)})
    assert_bits(out, base)
    assert dx.compute_delta(base, base)["ids"].dtype == jnp.float32


def test_q_by_leaf():
    delta, key = model(1), jax.random.key(0)
    tree_q = {"dense": {"weight": 0.1}, "norm": {"weight": 0.2}, "scalar": 0.3}
    named_q = {"dense.weight": 0.1, "norm.weight": 0.2, "scalar": 0.3}
    by_tree = dx.prune(key, delta, 0.5, tree_q)
    assert_bits(by_tree, dx.prune(key, delta, 0.5, named_q))
    assert_bits(by_tree["norm"], dx.prune(key, delta, 0.5, 0.2)["norm"])
    with pytest.raises(ValueError, match=r"no q for \['scalar'\]; no leaf for \['other'\]"):
        dx.prune(key, delta, 0.5, {"dense.weight": 1.0, "norm.weight": 1.0, "other": 1.0})
    for q, fault in (
        (0.0, "must be positive, got 0.0"),
        (float("nan"), "must be positive, got nan"),
        (1e-39, "1e-39 is so small that 1/q is infinite"),
        (np.ones(3), r"got an array of shape \(3,\)"),
        (jnp.ones(700), r"got an array of shape \(700,\)"),
        (named_q | {"scalar": jnp.ones(2)}, r"got an array of shape \(2,\)"),
        ("closed-form", "a number, or one number per leaf; got 'closed-form'"),
    ):
        with pytest.raises(ValueError, match=fault):
            dx.prune(key, delta, 0.5, q)
    assert not any(leaf.any() for leaf in jax.tree.leaves(dx.rescale(delta, float("inf"))))


def test_integers_are_not_rescaled():
    for call in (lambda t: dx.rescale(t, 0.5), lambda t: dx.prune(jax.random.key(0), t, 0.5)):
        with pytest.raises(ValueError, match="'ids' holds int32: only floating parameters are pruned"):
            call({"ids": jnp.arange(3)})


def test_another_key_rate_or_q_does_not_recompile():
    delta = model(1)
    dx.prune(jax.random.key(0), delta, 0.5)
    size = _compiled_prune("cpu", False)._cache_size()
    assert size > 0
    dx.prune(jax.random.key(1), delta, 0.99, 0.02)
    dx.prune(jax.random.key(1), delta, 0.0, 0.5)
    assert _compiled_prune("cpu", False)._cache_size() == size


def test_inside_a_program_that_captures_its_arguments():
    delta, key = model(1), jax.random.key(0)
    assert_bits(jax.jit(lambda: dx.prune(key, delta, 0.5))(), dx.prune(key, delta, 0.5))
    assert_bits(jax.jit(lambda: dx.random_mask(key, delta, 0.5))(), dx.random_mask(key, delta, 0.5))
    two = jnp.stack([delta["scalar"], 2 * delta["scalar"]])
    batched = jax.vmap(lambda x: dx.prune(key, {"scalar": x}, 0.0, 0.5)["scalar"])(two)
    np.testing.assert_array_equal(batched, two * 2)


def test_mismatches_are_named():
    with pytest.raises(ValueError, match=r"'b' is only in base; 'a' is .2,. in fine and .3,. in base"):
        dx.compute_delta({"a": jnp.zeros(2)}, {"a": jnp.zeros(3), "b": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"'a' is .2,. in mask and .3,. in delta"):
        dx.drop({"a": jnp.zeros(2)}, {"a": jnp.zeros(3)})


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.floats(0, 0.999), st.floats(0.001, 2))
@settings(max_examples=30, deadline=None)
def test_every_entry_is_zero_or_rescaled(seed, size, drop_rate, q):
    delta = jax.random.normal(jax.random.key(0), (size,))
    pruned = np.asarray(dx.prune(jax.random.key(seed), {"w": delta}, drop_rate, q)["w"])
    rescaled = np.asarray(delta) * (np.float32(1) / np.float32(q))
    assert np.all((pruned == 0) | (pruned == rescaled))

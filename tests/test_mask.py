"""The mask: its definition, three implementations, statistics, and what it does not depend on."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import darex_jax as dx
from darex_jax.core.mask import STREAM_CHUNKS, compiler_options, stream_mask, traced_threshold
from darex_jax.core.threefry import keep_threshold, numpy_leaf_key, numpy_mask
from darex_jax.core.tree import flatten_names, leaf_key, name_words, unflatten_names

NAME = "encoder.layer.0.output.dense.weight"


def definition(seed, name, shape, drop_rate):
    """Spec, section 5: plain JAX, one line."""
    digest = hashlib.sha256(name.encode()).digest()
    key = jax.random.key(seed)
    for part in (digest[0:4], digest[4:8]):
        key = jax.random.fold_in(key, int.from_bytes(part, "big"))
    return np.asarray(jax.random.bits(key, shape, jnp.uint32)) < round((1 - drop_rate) * 2**32)


def one(name, leaf):
    return unflatten_names({name: leaf})


def digest(mask):
    return hashlib.sha256(np.packbits(np.asarray(mask)).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("shape", [(), (3,), (7, 11), (5, 3, 2), (700, 900), (1 << 20,)])
@pytest.mark.parametrize("drop_rate", [0.1, 0.99])
def test_every_implementation_is_the_definition(shape, drop_rate):
    expected = definition(3, NAME, shape, drop_rate)
    tree = one(NAME, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    mask = flatten_names(dx.random_mask(jax.random.key(3), tree, drop_rate))[NAME]
    np.testing.assert_array_equal(mask, expected)
    words = numpy_leaf_key((0, 3), name_words(NAME))
    np.testing.assert_array_equal(words, jax.random.key_data(leaf_key(jax.random.key(3), NAME)))
    threshold = keep_threshold(drop_rate)
    flat = stream_mask(words, 0, expected.size, threshold)
    np.testing.assert_array_equal(flat, expected.reshape(-1))
    head = min(1000, expected.size)
    np.testing.assert_array_equal(numpy_mask(words, 0, head, threshold), flat[:head])


GOLDEN = {
    (0, 0.5): "aad83eec5c9292b1",
    (0, 0.9): "8ba859daa271b66e",
    (0, 0.99): "a902cc5fb135f096",
    (4294967295, 0.999): "a225da39f0fdca90",
}


@pytest.mark.parametrize(("seed", "drop_rate"), GOLDEN)
def test_golden_digests(seed, drop_rate):
    tree = one(NAME, jnp.zeros((384, 1536)))
    mask = flatten_names(dx.random_mask(jax.random.key(seed), tree, drop_rate))[NAME]
    assert digest(mask) == GOLDEN[seed, drop_rate]


def test_first_entries_written_out():
    mask = dx.random_mask(jax.random.key(0), {"w": jnp.zeros(24)}, 0.5)["w"]
    assert "".join("01"[int(x)] for x in np.asarray(mask)) == "000011101000110001110101"


def test_beyond_32_bit_indices():
    words = numpy_leaf_key((0, 7), name_words("w"))
    start = 2**32 - 1000
    expected = numpy_mask(words, start, 2000, keep_threshold(0.5))
    np.testing.assert_array_equal(stream_mask(words, start, 2000, keep_threshold(0.5)), expected)
    assert 900 < expected.sum() < 1100


def test_a_leaf_whose_indices_need_more_than_32_bits_is_left_to_jax():
    """The unrolled implementation has 32-bit counters. Only lowered, as the mask would take 4 GiB."""
    for size, written_out in ((2**32 - 1, True), (2**32, False), (2**33, False)):
        tree = {"w": jax.ShapeDtypeStruct((size,), jnp.bfloat16)}
        program = jax.make_jaxpr(lambda key, tree=tree: dx.random_mask(key, tree, 0.5))(jax.random.key(0))
        assert ("platform_index" in str(program)) is written_out


def test_thresholds_are_compared_to_their_last_bit():
    for threshold in (1, 5, 2**31 + 1, 2**32 - 1):
        assert traced_threshold(1 - threshold / 2**32) == (threshold, False)
    assert traced_threshold(0.0) == (0, True)


def test_a_version_of_xla_without_the_option_still_works(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("No such compile option")

    monkeypatch.setattr(jax, "jit", refuse)
    assert compiler_options.__wrapped__("cpu") is None


@pytest.mark.parametrize("length", [40_000, 131_072, STREAM_CHUNKS[0] + 40_000])
def test_a_range_of_several_chunks(length):
    words, threshold = numpy_leaf_key((0, 1), name_words("w")), keep_threshold(0.5)
    expected = numpy_mask(words, 5, length, threshold)
    np.testing.assert_array_equal(stream_mask(words, 5, length, threshold), expected)


@given(st.integers(0, 2**20), st.integers(1, 5000), st.sampled_from([0.0, 0.3, 0.99]))
@settings(max_examples=25, deadline=None)
def test_any_range_of_the_stream(start, length, drop_rate):
    words = numpy_leaf_key((0, 1), name_words("w"))
    expected = numpy_mask(words, start, length, keep_threshold(drop_rate))
    np.testing.assert_array_equal(stream_mask(words, start, length, keep_threshold(drop_rate)), expected)


@pytest.mark.parametrize("drop_rate", [0.0, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_density(drop_rate):
    size = 1 << 20
    mask = dx.random_mask(jax.random.key(5), {"w": jnp.zeros((1024, 1024), jnp.bfloat16)}, drop_rate)["w"]
    error = 5 * np.sqrt(drop_rate * (1 - drop_rate) / size)
    assert abs(float(mask.mean()) - (1 - drop_rate)) <= error


def test_independence_of_leaves_rows_and_keys():
    tree = {"a": jnp.zeros((512, 512)), "b": jnp.zeros((512, 512))}
    first = dx.random_mask(jax.random.key(0), tree, 0.5)
    second = dx.random_mask(jax.random.key(1), tree, 0.5)
    a = np.asarray(first["a"], np.float64) - 0.5
    for other in (first["b"], second["a"], np.roll(first["a"], 1, axis=0), np.roll(first["a"], 1, axis=1)):
        correlation = 4 * np.mean(a * (np.asarray(other, np.float64) - 0.5))
        assert abs(correlation) < 5 / 512


def test_depends_on_name_and_nothing_around_it():
    key = jax.random.key(0)
    alone = dx.random_mask(key, {"x": {"w": jnp.zeros((64, 64))}}, 0.9)
    company = dx.random_mask(
        key, {"a": jnp.zeros(3), "x": {"v": jnp.zeros(9), "w": jnp.zeros((64, 64), jnp.float16)}}, 0.9
    )
    np.testing.assert_array_equal(alone["x"]["w"], company["x"]["w"])
    jitted = jax.jit(lambda key: dx.random_mask(key, {"x": {"w": jnp.zeros((64, 64))}}, 0.9))(key)
    np.testing.assert_array_equal(alone["x"]["w"], jitted["x"]["w"])


def test_the_callers_settings_change_nothing():
    tree = {"w": jnp.zeros((64, 64))}
    expected = dx.random_mask(jax.random.key(0), tree, 0.9)["w"]
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(dx.random_mask(jax.random.key(0), tree, 0.9)["w"], expected)
        jitted = jax.jit(lambda k: dx.random_mask(k, tree, 0.9))
        np.testing.assert_array_equal(jitted(jax.random.key(0))["w"], expected)
    with jax.default_prng_impl("rbg"):
        with pytest.raises(TypeError, match="Threefry"):
            dx.random_mask(jax.random.key(0), tree, 0.9)
        key = jax.random.key(0, impl="threefry2x32")
        np.testing.assert_array_equal(dx.random_mask(key, tree, 0.9)["w"], expected)


@pytest.mark.parametrize("spec", [("x",), ("y", "x"), (("x", "y"),), (None, "y")])
def test_sharded_over_eight_devices(spec):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    leaf = jax.random.normal(jax.random.key(9), (256, 512))
    sharded = jax.device_put(leaf, sharding)
    mask = dx.random_mask(jax.random.key(0), {"w": sharded}, 0.9)["w"]
    assert mask.sharding == sharding
    np.testing.assert_array_equal(mask, definition(0, "w", leaf.shape, 0.9))
    pruned = dx.prune(jax.random.key(0), {"w": sharded}, 0.9, q=0.3)["w"]
    np.testing.assert_array_equal(pruned, dx.prune(jax.random.key(0), {"w": leaf}, 0.9, q=0.3)["w"])
    jitted = jax.jit(lambda d: dx.prune(jax.random.key(0), d, 0.9, q=0.3))({"w": sharded})["w"]
    np.testing.assert_array_equal(jitted, pruned)


def test_refusals():
    tree = {"w": jnp.zeros(4)}
    for rate in (1.0, -0.1, 2):
        with pytest.raises(ValueError, match=r"drop_rate is a probability in \[0, 1\)"):
            dx.random_mask(jax.random.key(0), tree, rate)
    with pytest.raises(TypeError, match=r"jax.random.key\(seed\)"):
        dx.random_mask(jax.random.PRNGKey(0), tree, 0.5)
    with pytest.raises(TypeError, match="one key"):
        dx.random_mask(jax.random.split(jax.random.key(0)), tree, 0.5)
    with pytest.raises(TypeError, match="Python float"):
        jax.jit(lambda p: dx.random_mask(jax.random.key(0), tree, p))(0.5)

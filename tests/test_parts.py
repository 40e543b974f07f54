"""Every part: dense, matmul and chunks agree, and encoding is lossless."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.errors import DarexError
from darex_jax.core.mask import survivor_indices
from darex_jax.core.threefry import keep_threshold
from darex_jax.core.tree import flatten_names, leaf_key
from darex_jax.files.blocks import pack, unpack
from darex_jax.files.coding import CODERS, Stream, decode, encode, from_gaps, to_gaps
from darex_jax.methods.budget import Budget, entropy
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.svd import decompose, low_rank
from darex_jax.methods.table import METHODS
from darex_jax.parts.columns import Columns
from darex_jax.parts.dense import Dense
from darex_jax.parts.low_rank import LowRank
from darex_jax.parts.mixed import stack_parts
from darex_jax.parts.random import Random
from darex_jax.parts.rounding import rounded
from darex_jax.parts.sign import Sign, pack_signs
from darex_jax.parts.sparse import Sparse
from darex_jax.parts.total import PARTS, Parts
from darex_jax.parts.values import Values, _fit, quantise

SHAPE = (24, 37)
DELTA = np.random.default_rng(0).normal(0, 1e-2, SHAPE).astype(np.float32)
Q = np.asarray(np.float32(0.3))
KEY = np.asarray(jax.random.key_data(leaf_key(jax.random.key(7), "layer.weight")))
FORMS = [(None, "matrix"), (8, "row"), (2, 16), (1, "column")]


def values_of(numbers, form, places=None):
    bits, per = form
    rows, columns = (None, None) if places is None else np.divmod(places, SHAPE[1])
    return quantise(numbers, bits, per, rows=rows, columns=columns, shape=SHAPE)


def make(kind, form):
    """A part of each kind with its values in a form."""
    places = np.flatnonzero(np.abs(DELTA).reshape(-1) > 0.012).astype(np.uint32)
    if kind == "sparse":
        return Sparse(values_of(DELTA.reshape(-1)[places], form, places), places, Q, SHAPE)
    if kind == "random":
        places = survivor_indices(KEY, DELTA.size, keep_threshold(0.9))
        return Random(values_of(DELTA.reshape(-1)[places], form, places), KEY, Q, 0.9, SHAPE)
    if kind == "columns":
        columns = np.array([0, 3, 4, 17, 36], np.uint32)
        cells = np.arange(SHAPE[0])[:, None] * SHAPE[1] + columns[None]
        return Columns(values_of(DELTA[:, columns], form, cells), columns, Q, SHAPE)
    if kind == "low_rank":
        u, s, v = np.linalg.svd(DELTA, full_matrices=False)
        bits, per = form
        a = quantise(u[:, :5] * s[:5], bits, per, rows=np.arange(24)[:, None], columns=np.arange(5)[None])
        b = quantise(v[:5], bits, per, rows=np.arange(5)[:, None], columns=np.arange(37)[None])
        return LowRank(a, b, Q, SHAPE)
    if kind == "sign":
        per = form[1] if isinstance(form[1], str) else "row"
        scales = np.abs(DELTA).mean({"matrix": None, "row": 1, "column": 0}[per]).reshape(-1)
        return Sign(np.asarray(pack_signs(DELTA)), scales.astype(ml_dtypes.bfloat16), Q, per, SHAPE)
    return Dense(values_of(DELTA, form, np.arange(DELTA.size).reshape(SHAPE)), Q, SHAPE)


def from_chunks(part, length):
    flat = np.zeros(int(np.prod(part.shape)), np.float32)
    for i, (index, numbers) in enumerate(part.chunks(length)):
        flat[i * length : (i + 1) * length][index] = numbers
    return flat.reshape(part.shape)


def read_back(part):
    entry, data = pack({"a": Parts((part,), SHAPE), "layer.weight": Parts((part, part), SHAPE)})
    entry = json.loads(json.dumps(entry))
    found = unpack(entry, data, {"a": SHAPE, "layer.weight": SHAPE}, (0, 7))
    return found["layer.weight"].parts[1]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", list(PARTS))
def test_part(kind, form):
    part = make(kind, form)
    dense = np.asarray(part.to_dense())
    assert dense.shape == SHAPE and dense.dtype == np.float32 and np.any(dense)
    close = dict(rtol=1e-6, atol=1e-8) if kind == "low_rank" else dict(rtol=0, atol=0)
    for length in (1 << 20, 64, 5):  # the same numbers with any chunk length
        np.testing.assert_allclose(from_chunks(part, length), dense, **close)
    np.testing.assert_array_equal(jax.jit(lambda p: p.to_dense())(part), dense)
    x = np.random.default_rng(1).normal(size=(2, 3, SHAPE[1])).astype(np.float32)
    for product in (part.matmul(jnp.asarray(x)), jax.jit(lambda p, x: p.matmul(x))(part, x)):
        assert product.shape == (2, 3, SHAPE[0])
        np.testing.assert_allclose(product, x @ dense.T, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(from_chunks(read_back(part), 64), from_chunks(part, 64))


def test_a_rank_of_zero_stores_nothing_and_takes_nothing():
    """A forged file may claim any width for it: chunks are as long as asked, not as a row."""
    shape = (1, 2**36)
    arrays = {"a.values": np.zeros(0, np.float32), "b.values": np.zeros(0, np.float32)}
    part = LowRank.read({"rank": 0, "q": 1.0}, arrays, shape)
    _, numbers = next(part.chunks(7))
    np.testing.assert_array_equal(numbers, np.zeros(7, np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.int64])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_sparse_product_by_entries_and_by_blocks(rows, dtype):
    """23 rows are not a multiple of the blocks; 1 input is few for 200 values of 851, 40 are many. Positions
    of 8 bits do not hold every edge of the matrix."""
    rng = np.random.default_rng(0)
    places = np.sort(rng.choice(min(23 * 37, np.iinfo(dtype).max + 1), 200, replace=False)).astype(dtype)
    numbers, dense = rng.normal(size=200).astype(np.float32), np.zeros(23 * 37, np.float32)
    part, dense[places] = Sparse(Values(numbers), places, Q, (23, 37)), numbers * (1 / Q)
    assert (rows * 200 > 23 * 37 / 2) == (rows == 40)
    x = rng.normal(size=(rows, 37)).astype(np.float32)
    np.testing.assert_allclose(part.to_dense(), dense.reshape(23, 37), rtol=1e-6)
    np.testing.assert_allclose(part.matmul(jnp.asarray(x)), x @ dense.reshape(23, 37).T, rtol=2e-5, atol=2e-5)
    stack = stack_parts([Parts((part,), (23, 37))])
    np.testing.assert_allclose(stack.delta(jnp.int32(0)), dense.reshape(23, 37), rtol=1e-6)
    with jax.enable_x64(True):
        assert part.matmul(jnp.asarray(x, np.float64)).dtype == np.float64


def test_positions_that_32_bits_do_not_hold_are_not_cut():
    part = Sparse(Values(np.ones(1, np.float32)), np.array([2**32 + 7], np.uint64), Q, (2**17, 2**16))
    for read in (part.to_dense, lambda: part.matmul(jnp.ones((1, 2**16)))):
        with pytest.raises(DarexError, match="set jax_enable_x64"):
            read()
    found = [index + number * 2**30 for number, (index, _) in enumerate(part.chunks(2**30))]
    assert np.concatenate(found).tolist() == [2**32 + 7]


@pytest.mark.parametrize("kind", list(PARTS))
def test_part_is_a_pytree_of_its_arrays(kind):
    part = make(kind, (4, "row"))
    twice = jax.tree.map(lambda x: x, part)
    assert type(twice) is type(part) and twice.shape == SHAPE
    assert len(jax.tree.leaves(part)) >= 2


def test_sum_of_parts():
    pair = Parts((make("sign", (None, "matrix")), make("sparse", (None, "matrix"))), SHAPE)
    expected = np.asarray(pair.parts[0].to_dense()) + np.asarray(pair.parts[1].to_dense())
    np.testing.assert_array_equal(pair.to_dense(), expected)
    np.testing.assert_array_equal(from_chunks(pair, 100), expected)
    x = np.ones((2, SHAPE[1]), np.float32)
    np.testing.assert_allclose(pair.matmul(jnp.asarray(x)), x @ expected.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(Parts((), SHAPE).to_dense(), np.zeros(SHAPE))


def test_random_part_is_prune():
    """A random part equals the result of `prune` bit for bit."""
    delta = {"layer": {"weight": jnp.asarray(DELTA)}}
    expected = dx.prune(jax.random.key(7), delta, 0.9, q=0.3)["layer"]["weight"]
    part = Random(Values(DELTA[np.asarray(expected) != 0]), KEY, Q, 0.9, SHAPE)
    np.testing.assert_array_equal(part.to_dense(), expected)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_quantised_values_are_least_squares(bits):
    """The scale is optimal for the chosen integers, and more bits are better."""
    x = np.random.default_rng(2).standard_t(4, 4096).astype(np.float32)
    values = quantise(x, bits, dtype=jnp.float32)
    error = np.sum((np.asarray(values.read()) - x) ** 2)
    for factor in (0.98, 1.02):
        moved = Values(values.numbers, values.scales * factor, values.bits, values.per)
        assert np.sum((np.asarray(moved.read()) - x) ** 2) > error
    limits = {8: 1e-3, 4: 0.06, 2: 0.35, 1: 0.6}
    assert error < limits[bits] * np.sum(x * x)


@pytest.mark.parametrize("fault", ["count", "rising", "outside", "q", "scales", "integers"])
def test_forged_parts_are_refused(fault):
    part = make("sparse", (4, "row"))
    fields, arrays = part.fields(), dict(part.arrays())
    if fault == "count":
        arrays["int4"] = arrays["int4"][:-1]
    if fault == "rising":
        arrays["positions"] = arrays["positions"][::-1].copy()
    if fault == "outside":
        arrays["positions"] = arrays["positions"] + np.uint32(DELTA.size)
    if fault == "q":
        fields["q"] = float("nan")
    if fault == "scales":
        arrays["scales"] = arrays["scales"][:-1]
    if fault == "integers":
        arrays["int4"] = np.full_like(arrays["int4"], 8)
    with pytest.raises(DarexError):
        Sparse.read(fields, arrays, SHAPE)


# Streams


ARRAYS = {
    "float32": np.random.default_rng(0).normal(size=1000).astype(np.float32),
    "bfloat16": np.random.default_rng(0).normal(size=1000).astype(ml_dtypes.bfloat16),
    "float16": np.random.default_rng(0).normal(size=999).astype(np.float16),
    "nonfinite": np.array([0.0, -0.0, np.inf, -np.inf, np.nan], ml_dtypes.bfloat16),
    "integers": np.random.default_rng(0).integers(-7, 8, 1001).astype(np.int8),
    "bytes": np.frombuffer(b"the same words " * 50, np.uint8),
    "empty": np.zeros(0, np.float32),
    "constant": np.zeros(100_000, np.float32),
}


@pytest.mark.parametrize("name", list(ARRAYS))
def test_streams_come_back(name):
    array = ARRAYS[name]
    bits = 4 if name == "integers" else None
    stream = encode(array, bits=bits)
    np.testing.assert_array_equal(decode(stream, bits).view(np.uint8), array.view(np.uint8))
    assert len(stream.data) <= array.nbytes


@pytest.mark.parametrize("positions", [[], [0], [5], [0, 1, 2], [3, 900, 2**32 - 1]])
def test_positions_come_back(positions):
    array = np.array(positions, np.uint32)
    np.testing.assert_array_equal(from_gaps(decode(encode(to_gaps(array)))), array)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_packed_integers_come_back(bits):
    most = max(1, 2 ** (bits - 1) - 1)
    choices = [-1, 1] if bits == 1 else list(range(-most, most + 1))
    array = np.random.default_rng(0).choice(choices, 77).astype(np.int8)
    stream = encode(array, bits=bits)
    assert len(stream.data) <= -(-77 * bits // 8)
    np.testing.assert_array_equal(decode(stream, bits), array)


@pytest.mark.parametrize("drop_rate", [0.9, 0.99, 0.999])
def test_positions_near_the_entropy_of_their_mask(drop_rate):
    size = 1 << 23
    places = np.flatnonzero(np.random.default_rng(0).random(size) >= drop_rate).astype(np.uint32)
    least = size * entropy(len(places) / size) / 8
    assert len(encode(to_gaps(places)).data) <= 1.03 * least


def test_damaged_streams_are_refused():
    """Changed, truncated or mislabelled bytes: an error or other numbers, never a crash or a large array."""
    rng = np.random.default_rng(0)
    places = np.sort(rng.choice(10_000, 500, replace=False)).astype(np.uint32)
    good = [encode(ARRAYS[name]) for name in ARRAYS] + [encode(to_gaps(places))]
    for _ in range(300):
        stream = good[rng.integers(len(good))]
        data = bytearray(stream.data)
        for _ in range(rng.integers(0, 4)):
            if data:
                data[rng.integers(len(data))] = rng.integers(256)
        cut = len(data) - int(rng.integers(0, 3))
        count = stream.size + int(rng.choice([0, 0, 1, -1, 2**40]))
        coder = str(rng.choice([stream.coder, *CODERS]))
        try:
            found = decode(Stream(coder, stream.dtype, count, bytes(data[:cut])))
        except DarexError:
            continue
        assert found.size == count <= 200_000


# Methods


TREE = {
    "layer": {"weight": jnp.asarray(np.random.default_rng(3).normal(0, 1e-2, (64, 96)), jnp.float32),
              "bias": jnp.asarray(np.random.default_rng(4).normal(0, 1e-2, 64), jnp.float32)},
    "other": {"weight": jnp.asarray(np.random.default_rng(5).normal(0, 1e-3, (32, 64)), jnp.float32)},
}  # fmt: skip
ROWS = {n: np.random.default_rng(6).normal(size=(200, w)) for n, w in (("layer", 96), ("other", 64))}
EVIDENCE = Evidence(
    input_norms={"layer.weight": jnp.linspace(1.0, 3.0, 96)},
    second_moments={f"{name}.weight": x.T @ x / len(x) for name, x in ROWS.items()},
    curvature={"layer.weight": 1.0, "layer.bias": 1.0, "other.weight": 1.0},
)


def run(name, budget, tree=TREE):
    method = METHODS[name]
    return method.prune(tree, budget, EVIDENCE, **({"key": jax.random.key(0)} if method.random else {}))


def stored(parts):
    """Bytes of all arrays before coding, with positions at their entropy."""
    total = 0.0
    for leaf in jax.tree.leaves(parts, is_leaf=lambda x: isinstance(x, Parts)):
        for part in leaf.parts:
            for name, array in part.arrays().items():
                if name == "positions":
                    size = int(np.prod(part.shape))
                    total += size * entropy(len(array) / size) / 8
                else:
                    total += array.nbytes
    return total


@pytest.mark.parametrize("room", [0.4, 0.16])
@pytest.mark.parametrize("name", list(METHODS))
def test_method_keeps_to_its_bytes(name, room):
    entries = sum(x.size for x in jax.tree.leaves(TREE))
    options = {"dtype": jnp.bfloat16} if name == "dare" else {}
    method = METHODS[name]
    key = {"key": jax.random.key(0)} if method.random else {}
    parts = method.prune(TREE, Budget(bytes_per_parameter=room), EVIDENCE, **key, **options)
    assert set(parts) == set(TREE)
    dense = jax.tree.map(lambda p: p.to_dense(), parts, is_leaf=lambda x: isinstance(x, Parts))
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, TREE)
    # The number of random survivors varies, and signs have a fixed size.
    assert 0.8 * min(room, 0.125) * entries < stored(parts) <= 1.1 * room * entries


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_are_deterministic_and_better_with_more_room(name):
    def error(room):
        parts = run(name, Budget(bytes_per_parameter=room))
        leaf = parts["layer"]["weight"].to_dense()
        return float(
            jnp.sum((leaf * float(parts["layer"]["weight"].parts[0].q) - TREE["layer"]["weight"]) ** 2)
        )

    assert error(0.5) == error(0.5)
    assert error(0.5) <= error(0.2)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.leafwise])
def test_leafwise_methods_take_leaves_alone(name):
    budget = Budget(drop_rate=0.8)
    whole = run(name, budget)["layer"]["weight"].to_dense()
    alone = run(name, budget, {"layer": {"weight": TREE["layer"]["weight"]}})["layer"]["weight"].to_dense()
    np.testing.assert_array_equal(whole, alone)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dare", {}),
        ("dare", {"bits": 4}),
        ("svd", {"bits": 4}),
        ("structured", {"bits": 4}),
        ("sign_svd", {"bits": 4}),
    ],
)
@pytest.mark.parametrize("vectors", [8, 900])
def test_a_budget_of_bytes_is_kept_to_without_a_file(method, options, vectors):
    """In memory, in float32 as `compute_delta` gives it; only scales come on top."""
    rng = np.random.default_rng(0)
    delta = {name: rng.normal(size=(96, 128)).astype(np.float32) for name in "abc"}
    delta["v"] = rng.normal(size=vectors).astype(np.float32)
    key = {"key": jax.random.key(0)} if method in ("dare", "structured") else {}
    room = 0.3
    parts = getattr(dx, method)(delta, Budget(bytes_per_parameter=room), Evidence(), **key, **options)
    stored = 0.0
    for name, each in parts.items():
        for part in each.parts:
            for array, x in part.arrays().items():
                places = array in ("positions", "columns")
                bits = 4 if array.endswith("int4") else 0 if "scales" in array else 8 * x.dtype.itemsize
                stored += delta[name].size * entropy(x.size / delta[name].size) if places else bits * x.size
    entries = sum(x.size for x in delta.values())
    assert 0.75 * room < stored / 8 / entries < 1.04 * room


@pytest.mark.parametrize("q", [0.0, -1.0, float("nan"), float("inf"), {"a": 0.1}])
def test_a_q_that_no_file_could_hold_is_refused(q):
    delta = {name: np.ones((8, 8), np.float32) for name in "ab"}
    for method in (dx.dare, dx.structured):
        with pytest.raises(DarexError, match="q"):
            method(delta, Budget(drop_rate=0.5), key=jax.random.key(0), q=q)


def test_positions_of_any_width_are_read_in_chunks():
    narrow = Sparse(Values(np.ones(2, np.float32)), np.array([3, 255], np.uint8), Q, (2, 1000))
    chunks = [(index + 500 * i).tolist() for i, (index, _) in enumerate(narrow.chunks(500))]
    assert chunks == [[3, 255], [], [], []]


def test_a_random_part_of_which_nothing_survives_is_zero():
    delta = {"layer": {"weight": DELTA, "bias": np.ones(5, np.float32)}}
    parts = dx.dare(delta, Budget(drop_rate=0.999), key=jax.random.key(0))
    bias = parts["layer"]["bias"]
    assert not len(bias.parts[0].values) and not np.any(bias.to_dense())
    empty = Random(Values(np.zeros(0, np.float32)), KEY, Q, 0.99999, SHAPE)
    assert not np.any(empty.to_dense()) and not np.any(empty.matmul(np.ones((2, SHAPE[1]), np.float32)))


@pytest.mark.parametrize("kind", ["random", "sparse", "sign", "low_rank", "columns", "dense"])
def test_a_product_outside_of_jit_is_compiled_once(kind):
    part, x = make(kind, FORMS[0]), np.ones((3, SHAPE[1]), np.float32)
    part.matmul(x)
    compiled = []

    def seen(event, *_, **__):
        compiled.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(seen)
    try:
        part.matmul(x)
        assert not compiled
        part.matmul(np.ones((5, SHAPE[1]), np.float32))
        assert compiled  # what is counted happens
    finally:
        jax.monitoring.unregister_event_duration_listener(seen)


@pytest.mark.parametrize("method", ["allocated", "structured", "svd", "sign", "magnitude", "dare"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), ()])
def test_empty_leaves_and_scalars_are_pruned(method, shape):
    delta = {"w": DELTA, "x": np.zeros(shape, np.float32)}
    key = {"key": jax.random.key(0)} if method in ("dare", "structured") else {}
    parts = getattr(dx, method)(delta, Budget(bytes_per_parameter=0.6), Evidence(curvature={"w": 1.0}), **key)
    assert parts["x"].to_dense().shape == shape and np.any(parts["w"].to_dense())


def test_vectors_alone_are_pruned_by_structured_too():
    vectors = {"v": np.arange(1000.0, dtype=np.float32)}
    found = dx.structured(vectors, Budget(drop_rate=0.9), key=jax.random.key(0))
    assert np.count_nonzero(found["v"].to_dense()) == 100


def test_evidence_is_found_by_name_or_nested_and_its_absence_is_told():
    delta, budget = {"l": {"weight": np.array([[1.0, 2.0]], np.float32)}}, Budget(drop_rate=0.5)
    norms = np.array([9.0, 1.0], np.float32)
    for given in ({"l.weight": norms}, {"l": {"weight": norms}}):
        kept = dx.wanda(delta, budget, Evidence(input_norms=given))["l"]["weight"]
        np.testing.assert_array_equal(kept.to_dense(), [[1.0, 0.0]])
    for method, needed in ((dx.wanda, "input_norms"), (dx.resolved, "second_moments")):
        with pytest.raises(DarexError, match=needed):
            method(delta, budget, Evidence())
    with pytest.raises(DarexError, match="NaN"):
        dx.svd({"w": np.full((3, 3), np.nan, np.float32)}, budget)


def test_a_support_is_one_of_those_that_there_are():
    delta, options = {"w": DELTA}, {"key": jax.random.key(0)}
    for support, told in (
        ("lowrank", "support is one of"),
        ("largest", "names none"),
        ("random", "names none"),
    ):
        with pytest.raises(DarexError, match=told):
            dx.distilled(delta, Budget(drop_rate=0.5), Evidence(), support=support, **options)


def test_what_a_method_cannot_prune_is_refused_not_dropped():
    tree = {"kernel": DELTA.reshape(24, 37, 1), "norm": DELTA[0]}
    with pytest.raises(DarexError, match="'kernel' has 3 axes, but this method prunes matrices"):
        dx.allocated(tree, Budget(bytes_per_parameter=0.5), Evidence())
    whole = dx.allocated(tree, Budget(drop_rate=0.0), Evidence(), bits=None)
    np.testing.assert_allclose(whole["kernel"].to_dense(), tree["kernel"], rtol=0.01)
    parts = dx.svd({"a": DELTA}, Budget(drop_rate=0.9))
    with pytest.raises(DarexError, match="'a' is no array"):
        dx.magnitude(parts, Budget(drop_rate=0.9))
    with pytest.raises(DarexError, match="names no linear layer in the delta"):
        dx.distilled(
            {"a": DELTA}, Budget(drop_rate=0.9), Evidence(linear_layers=["b"]), key=jax.random.key(0)
        )
    with pytest.raises(DarexError, match="per is one of matrix, row, column, got 'rows'"):
        dx.sign({"a": DELTA}, Budget(drop_rate=0.9), per="rows")


@pytest.mark.parametrize("name", list(METHODS))
def test_leaves_that_are_not_floating_are_named(name):
    for leaf in (DELTA.astype(np.complex64), DELTA.astype(np.int32)):
        with pytest.raises(DarexError, match=r"'layer.weight' holds .*: only floating"):
            run(name, Budget(drop_rate=0.5), {"layer": {"weight": leaf}})


@pytest.mark.parametrize("name", ["dare", "magnitude", "wanda", "resolved", "structured"])
def test_without_a_dtype_values_keep_the_leaves(name):
    """And a budget of bytes is counted in it."""
    for dtype in (jnp.float32, jnp.bfloat16):
        tree = {"layer": {"weight": TREE["layer"]["weight"].astype(dtype)}}
        counts = []
        for given in (None, dtype):
            method, key = METHODS[name], {"key": jax.random.key(0)} if METHODS[name].random else {}
            budget = Budget(bytes_per_parameter=0.5)
            (part,) = method.prune(tree, budget, EVIDENCE, dtype=given, **key)["layer"]["weight"].parts
            assert part.values.numbers.dtype == dtype
            counts.append(part.values.numbers.size)
        assert counts[0] == counts[1] > 100


def test_evidence_names_layers_of_nested_norms():
    assert Evidence(input_norms={"a": {"weight": DELTA[0]}}).linear_layers == {"a.weight"}


def test_the_bytes_of_float64_are_counted():
    parts = dx.dare({"a": DELTA.astype(np.float64)}, Budget(bytes_per_parameter=0.4), key=jax.random.key(0))
    numbers = parts["a"].parts[0].values.numbers
    assert numbers.dtype == np.float64 and abs(numbers.nbytes / DELTA.size - 0.4) < 0.1


def test_signs_are_refused_for_small_budgets():
    with pytest.raises(DarexError, match=r"0\.125 bytes per parameter"):
        run("sign", Budget(bytes_per_parameter=0.1))


def test_budgets_have_exactly_one_limit():
    for wrong in (
        {},
        {"drop_rate": 0.9, "bytes_per_parameter": 1.0},
        {"drop_rate": 1.0},
        {"bytes_per_parameter": 0.0},
    ):
        with pytest.raises(DarexError):
            Budget(**wrong)
    density = Budget(bytes_per_parameter=0.02).density(16, places=True)
    assert density * 16 + entropy(density) == pytest.approx(0.16, rel=1e-6)
    assert Budget(drop_rate=0.9).density(16, places=True) == pytest.approx(0.1)


def test_resolved_values_are_those_of_least_squares():
    """Per row against another solver: augmented least squares on the inputs."""
    x, delta = ROWS["layer"], np.asarray(TREE["layer"]["weight"], np.float64)
    parts = METHODS["resolved"].prune(TREE, Budget(drop_rate=0.8), EVIDENCE, dtype=np.float32)
    found = np.asarray(parts["layer"]["weight"].to_dense())
    moments = x.T @ x / len(x)
    ridge = np.sqrt(0.01 * np.mean(np.diag(moments)))
    scores = np.abs(delta) * np.sqrt(np.diag(moments))
    for row in range(0, 64, 9):
        kept = np.sort(np.argsort(-scores[row])[: round(0.2 * 96)])
        system = np.concatenate([x[:, kept] / np.sqrt(len(x)), ridge * np.eye(len(kept))])
        wanted = np.concatenate([x @ delta[row] / np.sqrt(len(x)), np.zeros(len(kept))])
        np.testing.assert_allclose(found[row, kept], np.linalg.lstsq(system, wanted)[0], rtol=1e-4, atol=1e-7)
        assert np.count_nonzero(found[row]) == len(kept)
    plain = (
        METHODS["wanda"]
        .prune(
            TREE, Budget(drop_rate=0.8), Evidence(input_norms={"layer.weight": np.sqrt(np.diag(moments))})
        )["layer"]["weight"]
        .to_dense()
    )
    error = [np.linalg.norm(x @ (delta - d).T) for d in (found, np.asarray(plain))]
    assert error[0] < error[1]


def test_resolved_weights_the_rows_of_a_table_by_their_tokens():
    """As least squares over one-hot inputs does: one row of x for each token."""
    ids = np.random.default_rng(1).zipf(1.5, 400)
    ids = ids[ids < 30]
    counts = np.bincount(ids, minlength=64).astype(np.float32)
    delta = np.asarray(TREE["layer"]["weight"])
    tree, evidence = (
        {"table": {"weight": TREE["layer"]["weight"]}, "other": TREE["other"]},
        dataclasses.replace(EVIDENCE, token_counts={"table.weight": counts}),
    )
    parts = dx.resolved(tree, Budget(drop_rate=0.8), evidence, dtype=np.float32)
    found = np.asarray(parts["table"]["weight"].to_dense())
    assert not np.any(found[counts == 0])
    x = np.eye(64)[ids]
    moments = x.T @ x / len(x)
    scores = np.abs(delta) * np.sqrt(np.diag(moments))[:, None]
    kept = scores > np.sort(scores, axis=None)[-round(0.2 * scores.size) - 1]
    wanted = np.linalg.solve(
        moments + 0.01 * np.mean(np.diag(moments)) * np.eye(64), moments @ (delta * kept)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-8)
    few = np.zeros(64, np.float32)
    few[3] = 5
    evidence = dataclasses.replace(EVIDENCE, token_counts={"table.weight": few})
    found = dx.resolved(tree, Budget(drop_rate=0.8), evidence)["table"]["weight"]
    assert np.flatnonzero(found.to_dense()).size == 96 == len(found.parts[0].positions)  # no zero is stored


def test_distilled_hands_its_support_to_training_and_takes_what_comes_back():
    seen = {}

    def train(parts, bits):
        seen.update(bits=bits, names=set(parts), kinds={p.kind for s in parts.values() for p in s.parts})
        return {name: rounded(each, bits) for name, each in parts.items()}

    tree = TREE | {"embeddings": {"weight": 30 * TREE["other"]["weight"]}}
    evidence = dataclasses.replace(EVIDENCE, train=train)
    distilled = partial(METHODS["distilled"].prune, key=jax.random.key(7))
    parts = distilled(tree, Budget(bytes_per_parameter=0.5), evidence, bits=4)
    assert seen["bits"] == 4 and seen["kinds"] == {"low_rank", "dense"}
    assert seen["names"] >= {"layer.weight", "layer.bias", "embeddings.weight"}
    assert parts["layer"]["weight"].parts[0].a.bits == 4
    # One rank of the embedding, worth most here, needs 96 numbers: more than a fifth of 410.
    tight = distilled(tree, Budget(bytes_per_parameter=0.02), EVIDENCE, bits=4)
    assert tight["embeddings"]["weight"].parts == () and tight["layer"]["weight"].parts
    tight = distilled(tree, Budget(bytes_per_parameter=0.004), EVIDENCE, bits=4)
    assert tight["layer"]["bias"].parts == ()  # stored whole it would take more than half
    seen.clear()
    distilled(tree, Budget(bytes_per_parameter=1e-6), evidence, bits=4)
    assert not seen  # there is nothing to train


def test_allocated_takes_of_each_matrix_the_kind_that_explains_it():
    rng = np.random.default_rng(0)
    few, some = np.zeros((40, 48), np.float32), np.zeros((40, 48), np.float32)
    few.reshape(-1)[rng.permutation(few.size)[:30]] = rng.normal(size=30)
    some[:, [5, 30]] = np.outer(rng.choice([-1, 1], 40), [0.3, -0.3]) + 0.1 * rng.normal(size=(40, 2))
    tree = {
        "entries": few,
        "columns": some,
        "ranks": np.outer(rng.normal(size=40), rng.normal(size=48)).astype(np.float32),
        "unseen": rng.normal(size=(40, 48)).astype(np.float32),
        "bias": rng.normal(size=4).astype(np.float32),
    }
    allocated = METHODS["allocated"].prune
    curvature = dict.fromkeys(tree, 2.0) | {"unseen": 0.0}
    parts = allocated(tree, Budget(bytes_per_parameter=0.04), Evidence(curvature=curvature), bits=8)
    kinds = {name: [part.kind for part in each.parts] for name, each in parts.items()}
    assert kinds["bias"] == ["dense"] and kinds["unseen"] == []  # no effect on the outputs
    assert (
        kinds["entries"] == ["sparse"] and kinds["columns"] == ["columns"] and kinds["ranks"] == ["low_rank"]
    )
    for name in ("entries", "columns", "ranks"):
        left = np.linalg.norm(np.asarray(parts[name].to_dense()) - tree[name]) / np.linalg.norm(tree[name])
        assert left < 0.1, name

    def share(weight):
        known = Evidence(curvature={"layer.weight": weight, "other.weight": 1.0})
        parts = allocated(TREE, Budget(bytes_per_parameter=0.1), known, bits=8)
        return stored(parts["layer"]["weight"]) / stored(parts)

    assert share(1e-6) < share(1.0) == share(1.0) <= share(1e6)


@pytest.mark.parametrize("support", ["largest", "random"])
@pytest.mark.parametrize("bits", [None, 4, 1])
def test_distilled_survivors_are_of_linear_layers_and_have_the_bytes_they_may(support, bits):
    tree = TREE | {"embeddings": {"weight": 30 * TREE["other"]["weight"]}}
    seen = {}

    def train(parts, _):
        seen.update(parts)
        return {name: rounded(each, bits) for name, each in parts.items()}

    evidence = dataclasses.replace(EVIDENCE, train=train)
    budget, key = Budget(bytes_per_parameter=0.04), jax.random.key(7)
    parts = METHODS["distilled"].prune(tree, budget, evidence, key=key, support=support, bits=bits)
    assert parts["embeddings"]["weight"].parts == ()
    (start,) = seen["layer.weight"].parts
    assert start.kind == {"largest": "sparse", "random": "random"}[support] and float(start.q) == 1.0
    size = sum(np.size(leaf) for leaf in flatten_names(tree).values())
    data = pack(flatten_names(parts))[1]
    assert 0.7 * 0.04 < len(data) / size < 1.2 * 0.04
    dense, kept = np.asarray(tree["layer"]["weight"]), np.asarray(seen["layer.weight"].to_dense())
    places = kept != 0
    np.testing.assert_array_equal(kept[places], dense[places])
    if support == "random":
        np.testing.assert_array_equal(start.key, KEY)  # the same mask as other methods with this key
    else:
        assert np.abs(dense[~places]).max() <= np.abs(dense[places]).min()


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (12, 12)])
def test_decompositions_are_numpys(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    matrix[:, -1] = matrix[:, 0]  # rank-deficient
    left, values, right = decompose(matrix)
    np.testing.assert_allclose(values, np.linalg.svd(matrix)[1], atol=1e-5)
    np.testing.assert_allclose(left * values @ right, matrix, atol=1e-5)
    for rank in (1, 3):
        best = np.linalg.svd(matrix)
        expected = best[0][:, :rank] * best[1][:rank] @ best[2][:rank]
        np.testing.assert_allclose(left[:, :rank] * values[:rank] @ right[:rank], expected, atol=1e-5)


def test_quantising_compiles_one_program_for_similar_shapes():
    matrix = np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)

    def compiled(rank):
        quantise(matrix[:, :rank], 4, "column", columns=np.arange(rank)[None], shape=(100, rank))
        return _fit._cache_size()

    assert compiled(6) == compiled(7)


def test_coarse_factors_explain_more_in_as_many_bytes():
    """Each value is less exact and, entropy-coded, shorter; other parts are rounded as ever."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(400, 200)))[0] for _ in range(2))
    matrix = (left / (1 + np.arange(200)) ** 0.3) @ right.T

    def stored(rank, coarse):
        parts = Parts((low_rank(decompose(matrix), rank, None, jnp.float32),), matrix.shape)
        parts = rounded(parts, 4, coarse=coarse)
        return len(pack({"layer.weight": parts})[1]), np.sum((parts.to_dense() - matrix) ** 2)

    (fine_bytes, fine_error), (coarse_bytes, coarse_error) = stored(60, False), stored(78, True)
    assert coarse_bytes < fine_bytes and coarse_error < 0.98 * fine_error
    for kind, bits in (("sparse", 4), ("low_rank", 8)):
        part = make(kind, (None, "matrix"))
        same = [rounded(Parts((part,), SHAPE), bits, coarse=coarse).to_dense() for coarse in (False, True)]
        np.testing.assert_array_equal(*same)


def test_svd_spends_where_it_explains_most():
    """The matrix of the larger delta gets the ranks."""
    parts = run("svd", Budget(bytes_per_parameter=0.2))
    ranks = {n: sum(p.rank for p in parts[n]["weight"].parts) for n in ("layer", "other")}
    assert ranks["layer"] > ranks["other"]

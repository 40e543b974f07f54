"""Merging deltas, against the published algorithms in NumPy and against peft's functions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import darex_jax as dx
from darex_jax.core.tree import leaf_key
from darex_jax.merging.merge import MERGES

NAME, SHAPE, KEY = "layer.weight", (12, 20), jax.random.key(3)
DELTAS = [np.random.default_rng(i).normal(0, 1e-2, SHAPE).astype(np.float32) for i in range(3)]
WEIGHTS = [1.0, 0.5, 2.0]
OPTIONS = {
    "linear": {},
    "ties": {"drop_rate": 0.75},
    "dare-linear": {"drop_rate": 0.75, "key": KEY},
    "dare-ties": {"drop_rate": 0.75, "key": KEY, "q": 0.4},
    "breadcrumbs": {"drop_rate": 0.75, "outliers": 0.05},
    "della": {"drop_rate": 0.6, "key": KEY, "window": 0.4},
}


def trees(leaves=DELTAS):
    return [{"layer": {"weight": leaf, "bias": leaf[0]}} for leaf in leaves]


def merged(method, leaves=DELTAS, **more):
    found = dx.merge(trees(leaves), method, **(OPTIONS[method] | {"weights": WEIGHTS[: len(leaves)]} | more))
    return np.asarray(found["layer"]["weight"])


def thinned(method, number, delta):
    """What each paper keeps of a delta, written down again."""
    flat = np.abs(delta).reshape(-1)
    order = np.argsort(flat, kind="stable")
    options = OPTIONS[method]
    own = leaf_key(jax.random.fold_in(KEY, number), NAME)
    if method == "linear":
        return delta
    if method == "ties":
        kept = np.zeros(flat.size, bool)
        kept[order[-60:]] = True  # a quarter of 240
        return np.where(kept.reshape(SHAPE), delta, 0)
    if method.startswith("dare"):
        mask = jax.random.bits(own, SHAPE, jnp.uint32) < round(0.25 * 2**32)
        return np.where(mask, delta, 0) * np.float32(1 / options.get("q", 0.25))
    if method == "breadcrumbs":
        kept = np.zeros(flat.size, bool)
        kept[order[-72:-12]] = True  # below the largest 12 a quarter of all
        return np.where(kept.reshape(SHAPE), delta, 0)
    ranks = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)  # della: 0.8 for the smallest, 0.4
    rates = 0.8 - ranks * 0.4 / 19
    kept = np.asarray(jax.random.bits(own, SHAPE, jnp.uint32)) / 2**32 < 1 - rates
    return np.where(kept, delta / (1 - rates), 0)


@pytest.mark.parametrize("method", MERGES)
def test_merges_are_the_published_ones(method):
    parts = np.stack([thinned(method, i, delta) for i, delta in enumerate(DELTAS)])
    weights = np.array(WEIGHTS)[:, None, None]
    if method in ("linear", "dare-linear", "breadcrumbs"):
        expected = (weights * parts).sum(0)
    else:
        sign = np.where(parts.sum(0) >= 0, 1, -1)
        agrees = np.sign(parts) == sign
        expected = (weights * parts * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
    np.testing.assert_allclose(merged(method), expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["linear", "ties", "dare-linear", "dare-ties"])
def test_merges_are_pefts(method, monkeypatch):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("peft.utils.merge_utils")
    ours = iter(thinned(method, i, delta) for i, delta in enumerate(DELTAS))
    monkeypatch.setattr(theirs, "random_pruning", lambda *_, **__: torch.from_numpy(np.array(next(ours))))
    name = {"linear": "task_arithmetic"}.get(method, method.replace("-", "_"))
    density = {} if method == "linear" else {"density": 0.25}
    tensors = [torch.from_numpy(delta) for delta in DELTAS]
    found = getattr(theirs, name)(tensors, torch.tensor(WEIGHTS), **density)
    np.testing.assert_allclose(merged(method), found.numpy(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", MERGES)
def test_a_leaf_alone_compiled_or_as_parts_gives_the_same(method):
    whole = merged(method)
    alone = dx.merge([{NAME: delta} for delta in DELTAS], method, weights=WEIGHTS, **OPTIONS[method])
    np.testing.assert_array_equal(alone[NAME], whole)
    compiled = jax.jit(partial(dx.merge, method=method, weights=WEIGHTS, **OPTIONS[method]))(trees())
    np.testing.assert_allclose(compiled["layer"]["weight"], whole, rtol=1e-6, atol=1e-9)
    parts = [dx.magnitude({NAME: delta}, dx.Budget(drop_rate=0.5)) for delta in DELTAS]
    dense = [{NAME: np.asarray(part[NAME].to_dense())} for part in parts]
    both = [dx.merge(some, method, **OPTIONS[method])[NAME] for some in (parts, dense)]
    np.testing.assert_array_equal(*both)


@given(st.sampled_from(["linear", "ties", "dare-ties"]), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_one_delta_of_which_nothing_is_dropped_is_itself(method, seed):
    delta = np.random.default_rng(seed).normal(size=(3, 5)).astype(np.float32)
    options = {"linear": {}, "ties": {"drop_rate": 0.0}, "dare-ties": {"drop_rate": 0.0, "key": KEY}}
    np.testing.assert_array_equal(dx.merge([{"w": delta}], method, **options[method])["w"], delta)


def test_q_is_one_or_one_for_each_delta():
    one, each = merged("dare-linear", q=0.5), merged("dare-linear", q=[0.5, 0.25, 0.1])
    parts = [np.asarray(thinned("dare-linear", i, d)) * 0.25 for i, d in enumerate(DELTAS)]
    np.testing.assert_allclose(one, sum(w * p / 0.5 for w, p in zip(WEIGHTS, parts, strict=True)), rtol=1e-5)
    expected = sum(w * p / q for w, p, q in zip(WEIGHTS, parts, (0.5, 0.25, 0.1), strict=True))
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-8)


def test_della_drops_as_often_as_it_says_and_keeps_the_mean():
    delta = np.sort(np.random.default_rng(0).normal(size=(4000, 10)).astype(np.float32), axis=1)
    found = np.asarray(dx.merge([{"w": delta}], "della", drop_rate=0.6, window=0.4, key=KEY)["w"])
    ranks = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
    for rank in range(10):
        rate = 0.8 - 0.4 * rank / 9
        dropped = np.mean(found[ranks == rank] == 0)
        assert abs(dropped - rate) < 4 * np.sqrt(rate * (1 - rate) / 4000)
    assert abs(found.mean() - delta.mean()) < 0.02


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "slerp"}, "'slerp' is no way to merge: linear, ties"),
        ({"method": "ties"}, "ties has to know drop_rate"),
        ({"method": "dare-ties", "drop_rate": 0.5}, "dare-ties has to know key"),
        ({"method": "linear", "drop_rate": 0.5}, "linear takes no drop_rate"),
        ({"method": "linear", "weights": [1.0]}, "3 deltas have as many weights, got 1"),
        ({"method": "breadcrumbs", "drop_rate": 0.5, "outliers": 0.6}, "outliers are part of the drop rate"),
        ({"method": "della", "drop_rate": 0.95, "key": KEY}, "leave \\[0, 1\\)"),
        ({"method": "dare-linear", "drop_rate": 0.5, "key": KEY, "q": [0.1]}, "one q or as many, got 1"),
    ],
)
def test_what_does_not_fit_is_said(arguments, text):
    with pytest.raises(ValueError, match=text):
        dx.merge(trees(), **arguments)


def test_deltas_of_other_names_or_shapes_are_refused():
    with pytest.raises(ValueError, match=r"'layer.bias' is only in the first delta"):
        dx.merge([trees()[0], {NAME: DELTAS[1]}], "linear")
    with pytest.raises(ValueError, match="no deltas"):
        dx.merge([], "linear")

"""Every public function of the algebra under all JAX transformations and on every kind of tree."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx, struct
from jax.sharding import NamedSharding, PartitionSpec

import darex_jax as dx
from darex_jax.core.tree import flatten_names, unflatten_names

KEY = jax.random.key(7)

# Each has two arguments, fine and base; functions of one tree use the first as the delta.
FUNCTIONS = {
    "compute_delta": dx.compute_delta,
    "apply_delta": lambda fine, base: dx.apply_delta(base, fine),
    "drop": lambda fine, base: dx.drop(jax.tree.map(lambda leaf: leaf > 0, base), fine),
    "rescale": lambda fine, base: dx.rescale(fine, 0.3),
    "prune": lambda fine, base: dx.prune(KEY, fine, 0.5, 0.3),
    "random_mask": lambda fine, base: dx.random_mask(KEY, fine, 0.5),
    "structured_mask": lambda fine, base: dx.structured_mask(KEY, fine, 0.5),
    "magnitude_mask": lambda fine, base: dx.magnitude_mask(fine, 0.5),
    "wanda_mask": lambda fine, base: dx.wanda_mask(
        fine, {n: abs(x[0]) for n, x in flatten_names(base).items() if x.ndim == 2}, 0.5
    ),
    "output_error_bound": lambda fine, base: jax.tree.map(
        lambda leaf: dx.output_error_bound(leaf, 0.9, 0.3, 0.05), fine
    ),
    "adapter_delta": lambda fine, base: dx.adapter_delta(
        {n.replace(".", "/"): {"lora_A": {"weight": x.reshape(x.shape[0], -1)[:2]},
                               "lora_B": {"weight": x.reshape(x.shape[0], -1)[:, :1] * jnp.ones((1, 2))}}
         for n, x in flatten_names(fine).items()}, 0.5
    ),
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass
class Plain:
    w: jax.Array
    v: jax.Array


@struct.dataclass
class Flax:
    w: jax.Array
    v: jax.Array


class Tuple(NamedTuple):
    w: jax.Array
    v: jax.Array


class Equinox(eqx.Module):
    w: jax.Array
    v: jax.Array
    name: str = eqx.field(static=True, default="static")


class Module(nnx.Module):
    def __init__(self, w, v):
        self.w, self.v = nnx.Param(w), nnx.Param(v)


KINDS = {
    "dict": lambda w, v: {"w": w, "v": v},
    "list": lambda w, v: [w, [v]],
    "tuple": lambda w, v: (w, (v,)),
    "None": lambda w, v: {"w": w, "none": None, "v": [None, v]},
    "dataclass": Plain,
    "flax.struct": Flax,
    "NamedTuple": Tuple,
    "equinox": Equinox,
    "nnx.State": lambda w, v: nnx.State({"w": nnx.Param(w), "v": nnx.Param(v)}),
    "nnx.Module": Module,
    "array": lambda w, v: w,
}


def pair(kind="dict", dtype=jnp.float32):
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((8, 4), (8,)) * 2]
    return KINDS[kind](leaves[0], leaves[1]), KINDS[kind](leaves[2], leaves[3])


def assert_same(left, right, exact=True):
    left, right = flatten_names(left), flatten_names(right)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert leaf.dtype == right[name].dtype, name
        if exact:
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(right[name]), err_msg=name)
        else:
            np.testing.assert_allclose(leaf, right[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tree(kind):
    """The result is a tree of the same kind, with the same values as for a nested dict."""
    fine, base = pair(kind)
    for name, function in FUNCTIONS.items():
        if name == "adapter_delta":  # which returns its own tree
            continue
        out = function(fine, base)
        assert type(out) is type(fine), name
        if kind != "array":
            assert jax.tree.structure(out) == jax.tree.structure(fine), name
        plain = [unflatten_names(flatten_names(tree)) for tree in (fine, base)]
        assert_same(out, function(*plain))


@pytest.mark.parametrize("kind", [*KINDS, "linen boxes"])
@pytest.mark.parametrize("name", ["dare", "magnitude", "structured", "sign", "svd", "allocated", "wanda"])
def test_what_a_method_keeps_of_every_kind_of_tree_is_added_back(name, kind):
    if kind == "linen boxes":
        base, delta = (
            {n: linen.LogicallyPartitioned(x, ("a",) * x.ndim) for n, x in tree.items()} for tree in pair()
        )
    else:
        base, delta = pair(kind)
    norms = {n: abs(np.asarray(x)[0]) for n, x in flatten_names(delta).items() if jnp.ndim(x) == 2}
    options = {"key": KEY} if name in ("dare", "structured") else {}
    evidence = dx.Evidence(input_norms=norms)

    def kept(base, delta):
        return dx.apply_delta(base, getattr(dx, name)(delta, dx.Budget(drop_rate=0.4), evidence, **options))

    found = kept(base, delta)
    assert jax.tree.structure(found) == jax.tree.structure(base)
    assert_same(found, kept(*(unflatten_names(flatten_names(tree)) for tree in (base, delta))))


@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x"), PartitionSpec()])
@pytest.mark.parametrize("within", [False, True])
def test_on_a_mesh_with_explicit_axes(spec, within):
    """As `jax.make_mesh` makes it: an array's sharding is part of its type."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    rng = np.random.default_rng(0)
    base, delta = ({"w": rng.standard_normal((16, 8)).astype(np.float32)} for _ in range(2))
    norms = {"w": abs(rng.standard_normal(8).astype(np.float32))}
    budget, evidence = dx.Budget(drop_rate=0.4), dx.Evidence(input_norms=norms)
    functions = {
        "magnitude_mask": lambda base, delta: dx.magnitude_mask(delta, 0.5),
        "wanda_mask": lambda base, delta: dx.wanda_mask(delta, norms, 0.5),
        "wanda_mask of the matrix": lambda base, delta: dx.wanda_mask(delta, norms, 0.5, "matrix"),
        "prune": lambda base, delta: dx.prune(KEY, delta, 0.5),
        "apply_delta": lambda base, delta: dx.apply_delta(base, delta),
        "magnitude": lambda base, delta: dx.apply_delta(base, dx.magnitude(delta, budget)),
        "sign": lambda base, delta: dx.apply_delta(base, dx.sign(delta, budget)),
        "svd": lambda base, delta: dx.apply_delta(base, dx.svd(delta, budget)),
        "wanda": lambda base, delta: dx.apply_delta(base, dx.wanda(delta, budget, evidence)),
        "dare": lambda base, delta: dx.apply_delta(base, dx.dare(delta, budget, key=KEY)),
    }
    place = partial(jax.device_put, device=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh) if within else nullcontext():
        sharded = [{"w": place(tree["w"])} for tree in (base, delta)]
        found = {name: function(*sharded)["w"] for name, function in functions.items()}
    for name, function in functions.items():
        np.testing.assert_array_equal(found[name], function(base, delta)["w"], name)
        assert found[name].sharding.is_equivalent_to(sharded[0]["w"].sharding, 2), name


def total(tree):
    return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree))


def all_transforms(function, fine, base):
    """A function's value under each transformation, by the transformation's name."""
    of_fine = lambda fine: total(function(fine, base))  # noqa: E731
    slope = jax.grad(of_fine)(fine)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), (fine, base), (base, fine))
    mesh = dx.make_mesh(data=2, devices=jax.devices()[:2])
    whole, split = PartitionSpec(), PartitionSpec("data")
    by_block = lambda fine, base: jax.tree.map(lambda x: x[None], function(fine, base))  # noqa: E731
    return {
        "jit": function(fine, base),
        "vmap": jax.vmap(function)(*stacked),
        "whole": jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole)(fine, base),
        "blocks": jax.shard_map(by_block, mesh=mesh, in_specs=split, out_specs=split)(fine, base),
        "grad": slope,
        "jvp": jax.jvp(of_fine, (fine,), (fine,))[1],
        "slope along fine": sum(
            jnp.vdot(g, x) for g, x in zip(jax.tree.leaves(slope), jax.tree.leaves(fine), strict=True)
        ),
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_transformation(name):
    function, (fine, base) = FUNCTIONS[name], pair()
    plain, swapped = function(fine, base), function(base, fine)
    found = jax.jit(lambda fine, base: all_transforms(function, fine, base))(fine, base)
    exact = name not in ("output_error_bound", "adapter_delta")  # sums, whose order depends on the program
    assert_same(found["jit"], plain, exact)
    assert_same(found["vmap"], jax.tree.map(lambda a, b: jnp.stack([a, b]), plain, swapped), exact)

    is_mask = jax.tree.leaves(plain)[0].dtype == bool
    slopes = jax.tree.leaves(found["grad"])
    assert all(np.isfinite(leaf).all() for leaf in slopes)
    assert is_mask != any(leaf.any() for leaf in slopes)  # masks have no gradient
    np.testing.assert_allclose(found["jvp"], found["slope along fine"], rtol=1e-4, atol=1e-5)

    # Replicated leaves, and one block of rows per device, which is then the leaf.
    assert_same(found["whole"], plain, exact)
    rows = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], (fine, base)) for i in range(2)]
    blocks = [function(*part) for part in rows]
    assert_same(found["blocks"], jax.tree.map(lambda *x: jnp.stack(x), *blocks), exact)

    shapes = jax.eval_shape(function, fine, base)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), plain
    )


@pytest.mark.parametrize("name", ["prune", "random_mask", "structured_mask", "apply_delta"])
def test_transformations_outside_of_a_program(name):
    """Without an enclosing jit, functions compile their own parts."""
    function, (fine, base) = FUNCTIONS[name], pair()
    slope = jax.grad(lambda fine: total(function(fine, base)))(fine)
    jitted = jax.jit(jax.grad(lambda fine: total(function(fine, base))))(fine)
    assert_same(slope, jitted)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (fine, base))
    mapped, plain = jax.vmap(function)(*stacked), function(fine, base)
    assert_same(mapped, jax.tree.map(lambda x: jnp.stack([x, x]), plain))


@pytest.mark.parametrize(
    ("dtype", "rtol", "wrap"),
    [(jnp.float32, 1e-5, lambda f: f), (jnp.bfloat16, 2e-2, jax.jit), (jnp.float16, 2e-3, jax.jit)],
)
def test_slopes_of_a_pruned_model(dtype, rtol, wrap):
    """d/dq of delta mask / q is -delta mask / q^2, d/ddelta is mask / q: at zeros of the delta, too."""
    fine, base = pair(dtype=dtype)
    delta = jax.tree.map(lambda x: x.at[0].set(0), fine)
    mask = dx.random_mask(KEY, delta, 0.5)
    whole = jax.tree.map(jnp.ones_like, mask)
    cases = [
        (mask, lambda q, d: total(dx.prune(KEY, d, 0.5, q))),
        (mask, lambda q, d: total(dx.apply_delta(base, dx.prune(KEY, d, 0.5, q)))),
        (whole, lambda q, d: total(dx.rescale(d, q))),
    ]
    slopes = wrap(lambda q, d: [jax.grad(function, argnums=(0, 1))(q, d) for _, function in cases])(
        0.4, delta
    )
    for (kept, _), (by_q, by_delta) in zip(cases, slopes, strict=True):
        survivors = jax.tree.leaves(jax.tree.map(lambda m, d: m * np.asarray(d, np.float64), kept, delta))
        expected = -sum(leaf.sum() for leaf in survivors) / 0.4**2
        assert abs(by_q - expected) < rtol * sum(np.abs(leaf).sum() for leaf in survivors) / 0.4**2
        for leaf, m in zip(jax.tree.leaves(by_delta), jax.tree.leaves(kept), strict=True):
            assert leaf.dtype == dtype
            np.testing.assert_allclose(leaf.astype(jnp.float32), m / 0.4, rtol=rtol)


def test_q_and_key_may_be_mapped():
    fine, _ = pair()
    qs, keys = jnp.array([0.2, 0.7]), jax.random.split(jax.random.key(1))
    mapped = jax.vmap(lambda key, q: dx.prune(key, fine, 0.5, q))(keys, qs)
    for i in range(2):
        assert_same(jax.tree.map(lambda x, i=i: x[i], mapped), dx.prune(keys[i], fine, 0.5, qs[i]))


def test_shapes_replace_arrays_where_values_are_not_needed():
    fine, _ = pair("nnx.State")
    shapes = jax.eval_shape(lambda: fine)
    assert_same(dx.random_mask(KEY, shapes, 0.5), dx.random_mask(KEY, fine, 0.5))
    assert_same(dx.structured_mask(KEY, shapes, 0.5), dx.structured_mask(KEY, fine, 0.5))
    mesh = dx.make_mesh()
    assert dx.param_shardings(mesh, shapes) == dx.param_shardings(mesh, fine)
    for call in (lambda: dx.prune(KEY, shapes, 0.5), lambda: dx.magnitude_mask(shapes, 0.5)):
        with pytest.raises(ValueError, match="'v' is a ShapeDtypeStruct, not an array"):
            call()


def test_a_module_with_functions_in_it():
    """Equinox modules have leaves that are not arrays: named in errors, kept if nothing is added."""

    class Network(eqx.Module):
        w: jax.Array
        v: jax.Array
        activation: Callable

    fine, base = (Network(tree.w, tree.v, jax.nn.relu) for tree in pair("equinox"))
    with pytest.raises(ValueError, match=r"'activation' is a .*not an array; .*equinox.filter"):
        dx.compute_delta(fine, base)
    with pytest.raises(ValueError, match="'activation' is a "):
        dx.random_mask(KEY, fine, 0.5)
    delta = dx.compute_delta(*(eqx.filter(network, eqx.is_array) for network in (fine, base)))
    restored = dx.apply_delta(base, dx.prune(KEY, delta, 0.0))
    assert restored.activation is base.activation
    np.testing.assert_allclose(restored.w, fine.w, atol=1e-6)


def test_float64_leaves_are_computed_in_float64():
    """Under x64; differences below float32's resolution are preserved."""
    with jax.enable_x64(True):
        base = {"w": jnp.array([1.0, 1.0, 2.0, 1e-290])}
        fine = {"w": base["w"] * (1 + 2.0**-40)}
        delta = dx.compute_delta(fine, base)
        assert delta["w"].dtype == jnp.float64
        np.testing.assert_array_equal(dx.apply_delta(base, delta)["w"], fine["w"])
        for q in (0.3, jnp.float64(0.3)):
            scaled = np.asarray(delta["w"]) * (1 / 0.3)
            np.testing.assert_array_equal(dx.prune(KEY, delta, 0.0, q)["w"], scaled)
            np.testing.assert_array_equal(dx.rescale(delta, q)["w"], scaled)
        mask = dx.magnitude_mask({"w": jnp.array([1.0, 1.0 + 2.0**-40, 1e-300, 2e-300])}, 0.5)["w"]
        assert mask.tolist() == [True, True, False, False]
        mask = dx.magnitude_mask({"w": jnp.array([1e-300, 2e-300, 1.0, 1.0 + 2.0**-40])}, 0.75)["w"]
        assert mask.tolist() == [False, False, False, True]
        factors = {"a": {"lora_A": {"weight": jnp.ones((1, 1))},
                         "lora_B": {"weight": fine["w"][:1, None]}}}  # fmt: skip
        assert dx.adapter_delta(factors, 1.0)["a"]["weight"][0, 0] == fine["w"][0]
        mixed = dx.compute_delta({"w": jnp.ones(2, jnp.float32)}, {"w": jnp.ones(2)})
        assert mixed["w"].dtype == jnp.float64
        single = dx.prune(KEY, {"w": jnp.ones(2, jnp.float32)}, 0.0, jnp.float64(0.3))["w"]
        assert single.dtype == jnp.float32 and single[0] == np.float32(1) / np.float32(0.3)


def test_float16_overflows_where_the_quotient_does_and_nowhere_else():
    delta = {"w": jnp.array([1e-3, 0.06, 0.07, -0.07, 0.0], jnp.float16)}
    quotients = np.asarray(delta["w"], np.float32) * np.float32(1e6)
    with np.errstate(over="ignore"):
        expected = quotients.astype(np.float16)
    assert np.isinf(expected).tolist() == [False, False, True, True, False]
    for pruned in (dx.prune(KEY, delta, 0.0, 1e-6), dx.rescale(delta, 1e-6)):
        np.testing.assert_array_equal(pruned["w"], expected)
    # As in the docs: the delta in float32, rounded once when it is added.
    base = {"w": jnp.array([-1.0, 0.5, 1.0, 1.0, 1.0], jnp.float16)}
    wide = dx.prune(KEY, dx.compute_delta(delta, base), 0.0, 1e-6)
    assert wide["w"].dtype == jnp.float32 and np.isfinite(wide["w"]).all()

"""Names of leaves: the same for every kind of tree."""

from dataclasses import dataclass

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

import darex_jax as dx
from darex_jax.core.tree import flatten_names, map_named


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)  # only two shapes, to limit compilation
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs)])
        self.value = nnx.Param(jnp.ones(4))  # an attribute name, not a box
        self.table = nnx.Dict(value=nnx.Param(jnp.ones((4, 4))))


NAMES = ["blocks.0.bias", "blocks.0.kernel", "layer.bias", "layer.kernel", "table.value", "value"]


@pytest.fixture(scope="module")
def state():
    return nnx.state(Model(nnx.Rngs(0)), nnx.Param)


def test_a_variable_is_no_part_of_a_name(state):
    model = Model(nnx.Rngs(0))
    pure = nnx.to_pure_dict(state)
    shapes = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
    for tree in (state, pure, model, shapes):
        assert sorted(flatten_names(tree)) == NAMES
    moments = flatten_names(optax.adam(1e-3).init(state)[0].mu)
    assert sorted(moments) == NAMES
    assert list(flatten_names(nnx.Param(jnp.ones(2)))) == [""]
    assert list(flatten_names({"x": nnx.Variable({"a": 1, "b": 2})})) == ["x.a", "x.b"]


def test_other_boxes_and_other_values():
    ones = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    boxed = nn.Dense(3, kernel_init=ones).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert list(flatten_names(boxed)) == ["bias", "kernel"]

    @jax.tree_util.register_dataclass
    @dataclass
    class Head:
        value: jax.Array

    @struct.dataclass
    class Flax:
        value: jax.Array

    class Module(eqx.Module):
        value: jax.Array

    for kind in (Head, Flax, Module):  # a field with this name is part of the path
        assert list(flatten_names({"a": kind(jnp.ones(1))})) == ["a.value"]
    assert list(flatten_names({"a": {"value": 1}})) == ["a.value"]
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    assert list(flatten_names([linear, (1, None)])) == ["0.weight", "0.bias", "1.0"]


@pytest.mark.parametrize("method", ["to_dense", "matmul"])
def test_a_part_has_both_methods_of_one(method):
    """A module with only one of the methods is an ordinary branch."""
    kind = jax.tree_util.register_dataclass(
        type("Layer", (), {method: lambda self: None, "__init__": lambda self, w: setattr(self, "w", w)}),
        data_fields=["w"],
        meta_fields=[],
    )
    assert list(flatten_names({"a": kind(jnp.ones(1))})) == ["a.w"]


def test_masks_of_a_state_are_those_of_its_dict(state):
    key, pure = jax.random.key(0), nnx.to_pure_dict(state)
    for make in (dx.random_mask, dx.structured_mask):
        mask = make(key, state, 0.5)
        assert isinstance(mask, nnx.State)
        for name, leaf in flatten_names(make(key, pure, 0.5)).items():
            np.testing.assert_array_equal(flatten_names(mask)[name], leaf)
    pruned = dx.prune(key, state, 0.5)
    assert isinstance(pruned, nnx.State)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(pruned), dx.prune(key, pure, 0.5))
    module = dx.prune(key, Model(nnx.Rngs(0)), 0.5)
    np.testing.assert_array_equal(module.layer.kernel[...], pruned["layer"]["kernel"][...])


def test_a_state_is_sharded_like_its_dict():
    mesh = dx.make_mesh(model=4, devices=jax.devices()[:4])
    names = ("q_proj", "down_proj")
    state = nnx.State({n: nnx.State({"weight": nnx.Param(jnp.ones((8, 16)))}) for n in names})
    shardings = flatten_names(dx.param_shardings(mesh, {"mlp": state}))
    assert shardings == flatten_names(dx.param_shardings(mesh, {"mlp": nnx.to_pure_dict(state)}))
    assert shardings["mlp.q_proj.weight"].spec == jax.sharding.PartitionSpec("model", None)
    placed = jax.device_put(state, dx.param_shardings(mesh, {"mlp": state})["mlp"])
    assert placed["q_proj"]["weight"][...].sharding == shardings["mlp.q_proj.weight"]


def test_trees_of_two_kinds_are_matched_by_name(state):
    """A module's state and a nested dict from a file are the same model."""
    pure = nnx.to_pure_dict(state)
    other = jax.tree.map(lambda x: x + 1, pure)
    delta = dx.compute_delta(state, other)
    assert isinstance(delta, nnx.State)
    assert all(np.allclose(leaf, -1) for leaf in jax.tree.leaves(delta))
    restored = dx.apply_delta(state, dx.compute_delta(other, state))
    assert isinstance(restored, nnx.State)
    jax.tree.map(np.testing.assert_allclose, nnx.to_pure_dict(restored), other)
    kept = dx.drop(dx.random_mask(jax.random.key(0), pure, 0.5), delta)
    expected = dx.prune(jax.random.key(0), delta, 0.5, 1.0)
    jax.tree.map(np.testing.assert_array_equal, kept, expected)


def test_two_leaves_with_one_name_are_refused():
    tree = {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}
    both = r"two leaves are called 'a.b': \['a'\]\['b'\] and \['a.b'\]; rename one"
    other = {"a": {"b": jnp.zeros(2)}}
    for call in (
        lambda: flatten_names(tree),
        lambda: dx.apply_delta(tree, other),
        lambda: dx.apply_delta(other, tree),
        lambda: dx.compute_delta(tree, tree),
        lambda: dx.drop(tree, tree),
        lambda: dx.rescale(tree, 0.5),
        lambda: dx.prune(jax.random.key(0), tree, 0.5),
        lambda: dx.prune(jax.random.key(0), other, 0.5, tree),
        lambda: dx.random_mask(jax.random.key(0), tree, 0.5),
        lambda: dx.structured_mask(jax.random.key(0), tree, 0.5),
        lambda: dx.wanda_mask(tree, {}, 0.5),
    ):
        with pytest.raises(ValueError, match=both):
            call()


def test_map_named_takes_more_trees(state):
    out = map_named(lambda name, a, b: (name, a.shape, b), {"x": state, "y": None}, {"x": state, "y": None})
    names = [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, str)]
    assert sorted(names) == [f"x.{name}" for name in NAMES]

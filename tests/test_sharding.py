"""Sharding: partitioning rules, equal bits, no communication, and files read in shards."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import darex_jax as dx
from darex_jax.core.sharding import batch_sharding, param_sharding
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation.classification import predict
from darex_jax.files.manifest import params_digest
from darex_jax.files.safetensors import SafetensorsFile, write_tensors
from darex_jax.models import build_model, init_model, read_model_config

BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 61,  # a prime, so the embedding is not divisible
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "initializer_range": 0.2,
    "layer_norm_eps": 1e-12,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "attention_bias": True,
}
SPLIT_OUTPUTS = re.compile(
    r"(query|key|value|intermediate.dense|[qkv]_proj|gate_proj|up_proj)\.(weight|bias)$"
)
SPLIT_INPUTS = re.compile(r"(output.dense|o_proj|down_proj)\.weight$")
COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|reduce-scatter|collective")


def init(config, seed=0, dtype=jnp.float32):
    return init_model(read_model_config(config), jax.random.key(seed), dtype)


def assert_bits(left, right):
    for (name, a), b in zip(flatten_names(left).items(), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8), name)


def assert_lies(tree, shardings):
    for (name, leaf), sharding in zip(flatten_names(tree).items(), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), f"{name}: {leaf.sharding}"


# The rule


@pytest.mark.parametrize("config", [BERT, LLAMA])
def test_every_matrix_of_a_layer_is_split(config):
    _, shapes = build_model(read_model_config(config))
    mesh = dx.make_mesh(data=2)
    assert dict(mesh.shape) == {"data": 2, "model": 4}
    for name, shape in shapes.items():
        spec = param_sharding(mesh, name, shape).spec
        if SPLIT_OUTPUTS.search(name):
            expected = PartitionSpec("model", *[None] * (len(shape) - 1))
        elif SPLIT_INPUTS.search(name):
            expected = PartitionSpec(None, "model")
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected = PartitionSpec("model", None)
        else:
            assert len(shape) == 1 or re.search(r"embeddings|pooler|classifier", name), name
            expected = PartitionSpec()
        assert spec == expected, name


def test_indivisible_axes_are_replicated():
    mesh = dx.make_mesh(model=4, devices=jax.devices()[:4])
    name = "bert.embeddings.word_embeddings.weight"
    assert param_sharding(mesh, name, (61, 32)).spec == PartitionSpec()
    assert param_sharding(mesh, name, (64, 32)).spec == PartitionSpec("model", None)
    assert param_sharding(mesh, name, (64,)).spec == PartitionSpec()


@pytest.mark.parametrize("parts", [{"data": 3}, {"data": 0}, {"data": 2, "model": 2}, {"model": 16}])
def test_a_mesh_has_as_many_parts_as_devices(parts):
    with pytest.raises(ValueError, match=r"does not fit 8 devices"):
        dx.make_mesh(**parts)


# The delta algebra


def prune_step(key, fine, base, q):
    return dx.apply_delta(base, dx.prune(key, dx.compute_delta(fine, base), 0.9, q))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pruned_models_are_the_same_bits_and_stay_where_they_lie(dtype):
    small = LLAMA | {"num_hidden_layers": 1, "attention_bias": False}
    (_, base), (_, fine), key = init(small, 0, dtype), init(small, 1, dtype), jax.random.key(3)
    expected = jax.jit(prune_step)(key, fine, base, 0.2)
    assert_bits(prune_step(key, fine, base, 0.2), expected)
    shardings = dx.param_shardings(dx.make_mesh(data=2), base)
    base, fine = jax.device_put((base, fine), (shardings, shardings))

    compiled = jax.jit(prune_step).lower(key, fine, base, 0.2).compile()
    assert not COLLECTIVE.search(compiled.as_text())
    together = compiled(key, fine, base, 0.2)
    assert_bits(together, expected)
    assert_lies(together, shardings)

    delta = dx.compute_delta(fine, base)
    pruned = dx.prune(key, delta, 0.9, 0.2)
    apart = dx.apply_delta(base, pruned)
    assert_bits(apart, expected)
    for tree in (delta, pruned, apart, dx.random_mask(key, base, 0.9)):
        assert_lies(tree, shardings)


# Models


def test_an_encoder_evaluates_alike():
    model, params = init(BERT)
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(1, 61, (8, 16)),
        "attention_mask": np.arange(16)[None] < rng.integers(4, 17, 8)[:, None],
        "token_type_ids": rng.integers(0, 2, (8, 16)),
    }
    expected = model(params, **batch).logits
    mesh = dx.make_mesh(data=2)
    sharded = jax.device_put(params, dx.param_shardings(mesh, params))
    rows = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
    forward = jax.jit(lambda p, b: model(p, **b).logits).lower(sharded, rows).compile()
    assert COLLECTIVE.search(forward.as_text())  # the all-reduce at the end of each half of a layer
    logits = forward(sharded, rows)
    assert logits.sharding.shard_shape(logits.shape) == (4, 2)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    whole = batch | {"index": np.arange(8), "weight": np.ones(8)}
    np.testing.assert_allclose(predict(model, sharded, [whole]), expected, atol=1e-5)


def test_a_decoder_generates_alike():
    model, params = init(LLAMA)
    ids = np.random.default_rng(1).integers(3, 96, (2, 7))
    mask = np.ones_like(ids)
    mesh = dx.make_mesh(data=2)
    sharded = jax.device_put(params, dx.param_shardings(mesh, params))
    np.testing.assert_allclose(model(sharded, ids).logits, model(params, ids).logits, atol=1e-4)
    tokens = dx.generate(model, params, ids, mask, max_new_tokens=6)
    ids, mask = jax.device_put((ids, mask), batch_sharding(mesh))
    np.testing.assert_array_equal(dx.generate(model, sharded, ids, mask, max_new_tokens=6), tokens)


# Files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    _, params = init(LLAMA)
    dx.save_params(path, params, LLAMA)
    return path, params


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_model_is_loaded_onto_a_mesh(saved, dtype):
    path, params = saved
    mesh = dx.make_mesh(data=2)
    for loaded in (dx.load_params(path, dtype, mesh), dx.load_model(path, dtype, mesh)[1]):
        assert_bits(loaded, dx.load_params(path, dtype))
        assert_lies(loaded, dx.param_shardings(mesh, loaded))
    if dtype is None:
        assert_bits(loaded, params)


def test_each_shard_is_read_once_and_nothing_else(saved, monkeypatch):
    path, params = saved
    mesh, reads = dx.make_mesh(), []
    read_into = SafetensorsFile.read_into
    monkeypatch.setattr(
        SafetensorsFile,
        "read_into",
        lambda self, info, start, out: reads.append(out.size) or read_into(self, info, start, out),
    )
    dx.load_params(path, mesh=mesh)
    parts = [
        np.prod(leaf.shape) if param_sharding(mesh, name, leaf.shape).is_fully_replicated else leaf.size // 8
        for name, leaf in flatten_names(params).items()
    ]
    assert max(reads) == max(parts) and sum(reads) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_sharded_model_is_saved(saved, tmp_path):
    path, params = saved
    sharded = jax.device_put(params, dx.param_shardings(dx.make_mesh(), params))
    dx.save_params(tmp_path / "m", sharded, LLAMA)
    assert (tmp_path / "m/model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_integers_stay_numpys(tmp_path):
    named = {
        "embeddings.position_ids": np.arange(2**40, 2**40 + 3),
        "lm_head.weight": np.ones((8, 2), np.float32),
    }
    dx.save_params(tmp_path / "m", unflatten_names(named))
    loaded = flatten_names(dx.load_params(tmp_path / "m", mesh=dx.make_mesh()))
    np.testing.assert_array_equal(loaded["embeddings.position_ids"], named["embeddings.position_ids"])
    assert loaded["lm_head.weight"].addressable_shards[0].data.shape == (1, 2)


def test_a_digest_leaves_nothing_on_the_host():
    named = {"lm_head.weight": np.arange(64.0, dtype=np.float32).reshape(8, 8), "norm.weight": np.ones(3)}
    named = {name: x.astype(np.float32) for name, x in named.items()}
    mesh = dx.make_mesh()
    placed = {n: jax.device_put(x, param_sharding(mesh, n, x.shape)) for n, x in named.items()}
    assert placed["lm_head.weight"].addressable_shards[0].data.shape == (1, 8)
    assert params_digest(unflatten_names(placed)) == params_digest(unflatten_names(named))
    # The host copy that a sharded array caches once it is read.
    assert all(x._npy_value is None for x in placed.values())
    np.asarray(placed["lm_head.weight"])
    assert placed["lm_head.weight"]._npy_value is not None


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_part_of_a_tensor(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
    index = []
    for length in shape:
        start = data.draw(st.integers(0, length))
        index.append(
            data.draw(st.sampled_from([slice(None), slice(start, data.draw(st.integers(start, length)))]))
        )
    whole = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    path = tmp_path_factory.mktemp("part") / "file"
    write_tensors(path, {"first": np.zeros(3, np.float32), "w": whole})
    with SafetensorsFile(path) as file:
        part = file.read_part(file.tensors["w"], tuple(index))
    np.testing.assert_array_equal(part, whole[tuple(index)])

"""Programs for accelerators, lowered on a machine without any."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import darex_jax as dx
from darex_jax.core.sharding import batch_sharding
from darex_jax.models import init_model, read_model_config
from darex_jax.models.decoder import attend
from darex_jax.models.generate import decode, prefill, stop_tokens
from tests.test_sharding import BERT, LLAMA

ACCELERATORS = ("cuda", "tpu")
TREE = {"mlp": {"up_proj": {"weight": jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)}}}
KEY = jax.eval_shape(jax.random.key, 0)
# One of Threefry's 20 rounds on every entry of the leaf, and such rounds in a called function, as in JAX.
ROUND = re.compile(r"stablehlo\.shift_left .*tensor<64x128xui32>")
CALL = re.compile(r"call @threefry2x32.*tensor<64x128xui32>")


def prune_step(key, fine, base):
    return dx.apply_delta(base, dx.prune(key, dx.compute_delta(fine, base), 0.9))


def lowered(function, platform, *args, **options):
    return export.export(function, platforms=[platform])(*args, **options).mlir_module()


@pytest.mark.parametrize("platform", ["cpu", *ACCELERATORS])
def test_each_platform_has_its_mask(platform):
    """Unrolled rounds on a CPU; on accelerators `jax.random.bits` only."""
    mask = jax.jit(lambda key: dx.random_mask(key, TREE, 0.9))
    for module in (
        lowered(mask, platform, KEY),
        lowered(jax.jit(prune_step), platform, KEY, TREE, TREE),
    ):
        assert len(ROUND.findall(module)) == 20
        assert bool(CALL.search(module)) == (platform in ACCELERATORS)
        main = next(text for text in module.split("func.func ") if text.startswith("public @main"))
        assert bool(ROUND.search(main)) == (platform == "cpu")
        assert "custom_call" not in module


def test_a_program_for_every_platform_gives_the_same_bits_here():
    leaves = jax.random.normal(jax.random.key(1), (2, 64, 128), jnp.bfloat16)
    fine, base = ({"mlp": {"up_proj": {"weight": leaf}}} for leaf in leaves)
    everywhere = export.export(jax.jit(prune_step), platforms=["cpu", *ACCELERATORS])(KEY, TREE, TREE)
    assert everywhere.platforms == ("cpu", *ACCELERATORS)
    key = jax.random.key(5)
    here, expected = everywhere.call(key, fine, base), prune_step(key, fine, base)
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_with_a_gpu_at_hand_the_cpu_still_has_its_own_attention(monkeypatch):
    """In half precision a GPU takes cuDNN's kernel, which is chosen by where the program runs."""

    def kernel(q, k, v, bias, mask, *, scale, implementation):
        return q * {"cudnn": 2.0, "xla": 3.0}[implementation]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, mask = jnp.ones((2, 16, 4, 64), jnp.bfloat16), jnp.ones((2, 16, 16), bool)
    attention = jax.jit(attend)
    np.testing.assert_array_equal(attention(q, q, q, mask), q * 3.0)
    for platform, factor in (("cpu", "3.0"), ("tpu", "3.0"), ("cuda", "2.0")):
        module = lowered(attention, platform, q, q, q, mask)
        assert re.findall(r"dense<([23]\.0)", module.replace("00e+00", "")) == [factor]


@pytest.mark.parametrize("platform", ACCELERATORS)
def test_models_lower_and_so_does_decoding(platform):
    mesh = dx.make_mesh(data=2)
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32, sharding=batch_sharding(mesh))

    def sharded(config):
        model, params = init_model(read_model_config(config), jax.random.key(0), jnp.bfloat16)
        return model, jax.device_put(params, dx.param_shardings(mesh, params))

    for config in (BERT, LLAMA):
        model, params = sharded(config)
        forward = jax.jit(lambda p, i, model=model: model(p, i).logits)
        exported = export.export(forward, platforms=[platform])(params, ids)
        assert exported.nr_devices == 8
        assert exported.out_avals[0].shape == ((2, 2) if config is BERT else (2, 8, 96))

    stops = stop_tokens(2)
    state = jax.eval_shape(
        lambda p, i: prefill(model, p, i, jnp.ones((2, 8), int), slots=16, stops=stops), params, ids
    )
    module = lowered(decode, platform, model, params, state, 4, stops=stops, pad=0)
    # Since JAX 0.11 a cumulative sum is one operation on NVIDIA hardware, described by a loop.
    functions = [
        text for text in module.split("func.func ") if "chlo.scan.impl(" not in text.partition("{")[0]
    ]
    assert sum(text.count("stablehlo.while") for text in functions) == 1  # over tokens, and none inside

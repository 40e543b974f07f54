"""Tests that need a GPU: `make test-gpu`. Not part of the suite; without a GPU the run fails.

Masks have the same golden digests as on every platform, models' outputs match the CPU's, in float32 and
bfloat16 (which uses cuDNN's attention), decoding gives the same tokens, and pruning the same bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.tree import flatten_names
from darex_jax.models import init_model, read_model_config
from darex_jax.models.generate import generate
from tests.test_calibration import FAMILIES, make_batches
from tests.test_mask import GOLDEN, NAME, digest, one

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason=f"there is no GPU: JAX runs on {jax.default_backend()}"
)


def on_cpu(tree):
    return jax.device_put(tree, jax.devices("cpu")[0])


@pytest.mark.parametrize(("seed", "drop_rate"), GOLDEN)
def test_masks_have_the_golden_digests(seed, drop_rate):
    tree = one(NAME, jnp.zeros((384, 1536)))
    mask = flatten_names(dx.random_mask(jax.random.key(seed), tree, drop_rate))[NAME]
    assert mask.devices().pop().platform == "gpu"
    assert digest(mask) == GOLDEN[seed, drop_rate]


def test_pruning_gives_the_cpus_bits():
    delta = {"w": jax.random.normal(jax.random.key(1), (999, 1001))}
    here = dx.prune(jax.random.key(0), delta, 0.99, 0.03)["w"]
    with jax.default_device(jax.devices("cpu")[0]):
        there = dx.prune(jax.random.key(0), on_cpu(delta), 0.99, 0.03)["w"]
    np.testing.assert_array_equal(np.asarray(here), np.asarray(there))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_the_cpus(family, dtype):
    hf = FAMILIES[family] | {
        "hidden_size": 256,
        "num_attention_heads": 4,
    }  # 64 features a head: cuDNN's kernel
    model, params = init_model(read_model_config(hf), jax.random.key(0), dtype)
    batch = make_batches(1)[0]
    inputs = batch["input_ids"], batch["attention_mask"]
    with jax.default_matmul_precision("highest"):
        here = np.asarray(model(params, *inputs).logits, np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        there = np.asarray(model(on_cpu(params), *inputs).logits, np.float32)
    scale = np.abs(there).max()
    np.testing.assert_allclose(here, there, atol=(1e-4 if dtype == jnp.float32 else 0.03) * scale)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_decoding_writes_the_cpus_tokens(family):
    model, params = init_model(read_model_config(FAMILIES[family]), jax.random.key(0))
    prompts = make_batches(1)[0]["input_ids"]
    ones = np.ones_like(prompts)
    with jax.default_matmul_precision("highest"):
        here = generate(model, params, prompts, ones, max_new_tokens=16)
    with jax.default_device(jax.devices("cpu")[0]):
        there = generate(model, on_cpu(params), prompts, ones, max_new_tokens=16)
    np.testing.assert_array_equal(np.asarray(here), np.asarray(there))

"""Low-rank adapters: on a model, as a delta, in PEFT's format and merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.lora import LoraConfig
from darex_jax.core.tree import combine, flatten_names, leaf_key, unflatten_names
from darex_jax.models import build_model, init_model, read_model_config
from darex_jax.models.lora import add_adapters, attach_adapters

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
    "initializer_range": 0.3,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "num_labels": 3,
}
ROBERTA = BERT | {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]}
ROBERTA |= {"pad_token_id": 1}
DECODER, ENCODER = ("q_proj", "v_proj", "down_proj"), ("query", "value", "output.dense")
CASES = {
    "bert": (BERT, ENCODER),
    "bert body": (BERT | {"architectures": ["BertModel"]}, ENCODER),
    "roberta": (ROBERTA, ENCODER),
    "roberta body": (ROBERTA | {"architectures": ["RobertaModel"]}, ENCODER),
    "llama": (LLAMA, DECODER),
    "llama body": (LLAMA | {"architectures": ["LlamaModel"]}, DECODER),
    "qwen2": (QWEN2, DECODER),
}
IDS = np.random.default_rng(1).integers(3, 41, (3, 11))
KEY = jax.random.key(0)


def made(case, **changes):
    """A tiny model with fresh adapters of rank 4: base model, params, adapted model, adapter, config."""
    hf, targets = CASES[case]
    config = LoraConfig(**({"rank": 4, "alpha": 6.0, "targets": targets} | changes))
    base, params = init_model(read_model_config(hf), KEY)
    return base, params, *add_adapters(base, config, jax.random.key(1)), config


def trained(adapter, seed=0):
    """An adapter whose B are no longer zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), adapter)


def output(model, params, ids=IDS):
    out = model(params, ids)
    return np.asarray(out.last_hidden_state if out.logits is None else out.logits)


# On a model


@pytest.mark.parametrize("case", CASES)
def test_fresh_adapters_change_nothing(case):
    base, params, model, adapter, _ = made(case)
    np.testing.assert_array_equal(output(model, combine(params, adapter)), output(base, params))
    factors = flatten_names(adapter)
    assert {name.rpartition("lora_")[2] for name in factors} == {"A.weight", "B.weight"}
    for name, x in factors.items():
        assert x.dtype == jnp.float32
        if "lora_B" in name:
            assert not x.any()
        else:  # PyTorch's Kaiming uniform with a slope of sqrt(5)
            bound = x.shape[1] ** -0.5
            assert x.shape[0] == 4 and abs(x).max() <= bound < 1.1 * abs(x).max()
            assert abs(x.std() - bound / 3**0.5) < 0.1 * bound


@pytest.mark.parametrize("case", CASES)
def test_running_with_an_adapter_is_running_the_merged_model(case):
    base, params, model, adapter, config = made(case)
    adapter = trained(adapter)
    merged = dx.apply_delta(params, dx.adapter_delta(adapter, config.scales(adapter)))
    adapted = output(model, combine(params, adapter))
    np.testing.assert_allclose(adapted, output(base, merged), atol=1e-5 * np.abs(adapted).max())
    assert np.abs(adapted - output(base, params)).max() > 0.05


def test_generation_runs_with_an_adapter():
    base, params, model, adapter, config = made("llama")
    adapter = trained(adapter, seed=1)
    merged = dx.apply_delta(params, dx.adapter_delta(adapter, config.scales(adapter)))
    ones = np.ones_like(IDS)
    tokens = dx.generate(model, combine(params, adapter), IDS, ones, max_new_tokens=5)
    np.testing.assert_array_equal(tokens, dx.generate(base, merged, IDS, ones, max_new_tokens=5))
    assert (tokens != dx.generate(base, params, IDS, ones, max_new_tokens=5)).any()


def test_a_body_without_a_pooler_stays_without():
    base, shapes = build_model(read_model_config(CASES["bert body"][0]), pooler=False)
    params = unflatten_names({name: jnp.ones(shape) for name, shape in shapes.items()})
    model, adapter = add_adapters(base, LoraConfig(2, 2, ("query",)), KEY)
    assert model(combine(params, adapter), IDS).pooler_output is None


def test_models_without_adapters_are_as_before():
    base, params, model, *_ = made("llama")
    rebuilt, _ = build_model(base.config)
    assert rebuilt == base != model and hash(rebuilt) == hash(base)
    assert not any("lora" in name for name in flatten_names(params))


def test_gradients_reach_what_is_asked_for():
    _, params, model, adapter, _ = made("bert")
    adapter = trained(adapter)

    def loss(adapter, params):
        return jnp.square(model(combine(params, adapter), IDS).logits).sum()

    gradient = jax.jit(jax.grad(loss))
    grads = gradient(adapter, params)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    assert all(float(abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    fresh = flatten_names(gradient(made("bert")[3], params))  # where B is zero, none reaches A
    assert all((float(abs(g).max()) > 0) == ("lora_B" in name) for name, g in fresh.items())
    of_params = jax.eval_shape(jax.grad(loss, argnums=1), adapter, params)
    assert jax.tree.structure(of_params) == jax.tree.structure(params)


def test_an_A_depends_on_the_key_and_its_layer_alone():
    one = flatten_names(made("llama", targets=("q_proj",))[3])
    all_three = flatten_names(made("llama")[3])
    assert set(one) < set(all_three)
    for name, x in one.items():
        np.testing.assert_array_equal(x, all_three[name])
    name = "model.layers.1.self_attn.q_proj"
    bound = 32**-0.5
    expected = jax.random.uniform(leaf_key(jax.random.key(1), name), (4, 32), minval=-bound, maxval=bound)
    np.testing.assert_array_equal(one[f"{name}.lora_A.weight"], expected)


def test_targets_are_matched_as_peft_matches_them():
    def layers(*targets, pattern=None):
        adapter = made("llama", targets=pattern or targets)[3]
        return {name.rpartition(".lora_")[0] for name in flatten_names(adapter)}

    assert layers("self_attn.q_proj") == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert layers("lm_head", "model.layers.1.mlp.up_proj") == {"lm_head", "model.layers.1.mlp.up_proj"}
    assert layers(pattern=r".*\.1\.self_attn\.[qv]_proj") == {
        f"model.layers.1.self_attn.{x}_proj" for x in "qv"
    }
    for nothing in (("proj",), ("roj", "embed_tokens"), "q_proj"):
        with pytest.raises(
            ValueError, match=r"matches no linear layer of this model; it has down_proj, gate"
        ):
            made("llama", targets=nothing)


def test_scales_and_ranks():
    name = "model.layers.0.self_attn.q_proj"
    assert LoraConfig(4, 6, ("q_proj",)).scale_of(name) == 1.5
    assert LoraConfig(4, 6, ("q_proj",), rslora=True).scale_of(name) == 3.0
    patterns = {
        "rank_pattern": {r"layers\.0\..*": 2, "q_proj": 8},
        "alpha_pattern": {"q_proj": 10, "_proj": 1},
    }
    base, params, model, adapter, config = made("llama", **patterns)
    assert config.scales(adapter) == {
        f"model.layers.{i}.{layer}": alpha / rank
        for i, layer, alpha, rank in (
            (0, "self_attn.q_proj", 10, 2), (0, "self_attn.v_proj", 6, 2), (0, "mlp.down_proj", 6, 2),
            (1, "self_attn.q_proj", 10, 8), (1, "self_attn.v_proj", 6, 4), (1, "mlp.down_proj", 6, 4),
        )
    }  # fmt: skip
    adapter = trained(adapter)
    merged = dx.apply_delta(params, dx.adapter_delta(adapter, config.scales(adapter)))
    adapted = output(model, combine(params, adapter))
    np.testing.assert_allclose(adapted, output(base, merged), atol=1e-5 * np.abs(adapted).max())
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' has rank 2, its config says 8"):
        LoraConfig(4, 6, ("q_proj",), rank_pattern={"q_proj": 8}).scales(adapter)
    hash(config)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rank": 0}, "rank is 0, it must be an integer of 1 or more"),
        ({"rank_pattern": {"x": -1}}, "rank_pattern 'x' is -1"),
        ({"alpha": float("nan")}, "alpha is nan, it must be a finite number"),
        ({"targets": "(", "alpha": "8"}, r"alpha is '8'.*; '\(' is not a regular expression"),
    ],
)
def test_config_refusals(fields, text):
    with pytest.raises(ValueError, match=text):
        LoraConfig(**({"rank": 4, "alpha": 8, "targets": ("q_proj",)} | fields))


def test_what_does_not_fit_a_model_is_named():
    base, _, _, adapter, config = made("llama")
    scales = config.scales(adapter)
    other, _ = init_model(read_model_config(LLAMA | {"intermediate_size": 44}), KEY)
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.down_proj' is \[32, 44\], the adapter's \[32, 48\]; 'm"
    ):
        attach_adapters(other, adapter, scales)
    with pytest.raises(ValueError, match=r"it has no linear layer 'x.y'"):
        attach_adapters(base, combine(adapter, {"x": {"y": factors(2, 3, 4)}}), 1.0)
    with pytest.raises(ValueError, match=r"no scale for model.layers.1.self_attn.v_proj"):
        attach_adapters(base, adapter, {n: s for n, s in scales.items() if "1.self_attn.v" not in n})
    for wrong, text in (
        ({"lora_A": {"weight": np.ones((2, 3))}}, "'x' has no lora_B.weight"),
        ({"weight": np.ones((2, 3))}, "'x.weight' is no factor"),
        (factors(2, 3, 4) | {"lora_B": {"weight": np.ones((4, 3))}}, r"'x' has A \[2, 3\] and B \[4, 3\]"),
    ):
        with pytest.raises(ValueError, match=text):
            dx.adapter_delta({"x": wrong}, 1.0)


def factors(rank, in_features, out_features, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, in_features)), rng.normal(size=(out_features, rank))
    return {"lora_A": {"weight": np.float32(a)}, "lora_B": {"weight": np.float32(b)}}


# As a delta


def masked(key, name, delta, rate):
    """`prune` in NumPy, by the definition of the mask."""
    bits = np.asarray(jax.random.bits(leaf_key(key, name), delta.shape, jnp.uint32))
    kept = bits < round((1 - rate) * 2**32)
    return np.where(kept, delta / np.float32(1 - rate), 0)


def test_pruning_the_merged_delta():
    tree = {"x": {"q": factors(3, 40, 50), "v": factors(2, 40, 20, seed=1)}}
    delta = dx.adapter_delta(tree, {"x.q": 0.5, "x.v": 2.0})
    assert flatten_names(delta).keys() == {"x.q.weight", "x.v.weight"}
    pruned = flatten_names(dx.prune(jax.random.key(7), delta, 0.8))
    for name, scale in (("q", 0.5), ("v", 2.0)):
        a, b = (tree["x"][name][f]["weight"] for f in ("lora_A", "lora_B"))
        expected = masked(jax.random.key(7), f"x.{name}.weight", scale * b @ a, 0.8)
        assert pruned[f"x.{name}.weight"].dtype == jnp.float32
        np.testing.assert_allclose(pruned[f"x.{name}.weight"], expected, rtol=1e-5, atol=1e-5)
        assert 0.7 < (expected == 0).mean() < 0.9


def test_pruning_A_and_B():
    """As the delta of an adapter of zeros: the pruned factors are the adapter, which is then merged."""
    tree = {"x": {"q": factors(3, 40, 50)}}
    pruned = dx.prune(jax.random.key(7), tree, 0.5)
    a, b = (
        masked(jax.random.key(7), f"x.q.{f}.weight", tree["x"]["q"][f]["weight"], 0.5)
        for f in ("lora_A", "lora_B")
    )
    np.testing.assert_allclose(pruned["x"]["q"]["lora_A"]["weight"], a, rtol=1e-6)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, dx.apply_delta(zeros, pruned), pruned))
    merged = dx.apply_delta(
        {"x": {"q": {"weight": np.ones((50, 40), np.float32)}}}, dx.adapter_delta(pruned, 2.0)
    )
    np.testing.assert_allclose(merged["x"]["q"]["weight"], 1 + 2 * b @ a, rtol=1e-5, atol=1e-5)


def test_factors_in_bfloat16_are_multiplied_in_float32():
    tree = {"q": jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), factors(3, 40, 50))}
    delta = dx.adapter_delta(tree, 1.0)["q"]["weight"]
    exact = np.asarray(tree["q"]["lora_B"]["weight"], np.float64) @ np.asarray(
        tree["q"]["lora_A"]["weight"], np.float64
    )
    assert delta.dtype == jnp.float32
    np.testing.assert_allclose(delta, exact, rtol=1e-5, atol=1e-5)

"""LoRA adapters: on a model, as a delta, in PEFT's format, and merged."""

import json
import re
import warnings
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.core.lora import LoraConfig
from darex_jax.core.tree import combine, flatten_names, leaf_key, unflatten_names
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.merge import merge_adapter
from darex_jax.files.safetensors import FileError, write_tensors
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
    """A tiny model with new adapters of rank 4: base model, params, adapted model, adapter, config."""
    hf, targets = CASES[case]
    config = LoraConfig(**({"rank": 4, "alpha": 6.0, "targets": targets} | changes))
    base, params = init_model(read_model_config(hf), KEY)
    return base, params, *add_adapters(base, config, jax.random.key(1)), config


def trained(adapter, seed=0):
    """An adapter with nonzero B."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), adapter)


def output(model, params, ids=IDS):
    out = model(params, ids)
    return np.asarray(out.last_hidden_state if out.logits is None else out.logits)


# On a model


@pytest.mark.parametrize("case", CASES)
def test_new_adapters_change_nothing(case):
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
    fresh = flatten_names(gradient(made("bert")[3], params))  # with B zero, A gets no gradient
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
            ValueError, match=r"matches no linear layer of this model, which has down_proj, gate"
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
    # The first match wins, whether a name or an expression.
    for first, rank in (("q_proj", 3), (".*proj", 3), ("self_attn.q_proj", 3), ("proj", 8)):
        assert LoraConfig(4, 6, ("x",), rank_pattern={first: 3, "q_proj|x": 8}).rank_of(name) == rank
    assert LoraConfig(4, 6, ("x",), rank_pattern={"q_proj|x": 8, "q_proj": 3}).rank_of(name) == 8
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' has rank 2, the config 8"):
        LoraConfig(4, 6, ("q_proj",), rank_pattern={"q_proj": 8}).scales(adapter)
    hash(config)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rank": 0}, "rank is 0, it must be an integer of 1 or more"),
        ({"rank_pattern": {"x": -1}}, "rank_pattern 'x' is -1"),
        ({"alpha": float("nan")}, "alpha is nan, it must be a finite number"),
        (
            {"targets": "(", "alpha": "8"},
            r"alpha is '8'.*; targets: the pattern '\(' is not supported by RE2",
        ),
        (
            {"rank_pattern": {f"{i}.*": 1 for i in range(257)}},
            "257 regular expressions, at most 256",
        ),
    ],
)
def test_config_refusals(fields, text):
    with pytest.raises(ValueError, match=text):
        LoraConfig(**({"rank": 4, "alpha": 8, "targets": ("q_proj",)} | fields))


def test_mismatches_with_a_model_are_named():
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
        ({"weight": np.ones((2, 3))}, "'x.weight' is not a factor"),
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
    """As a delta from an adapter of zeros: the pruned factors are an adapter, which is then merged."""
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


# PEFT's format


@contextmanager
def quiet():
    """PEFT and transformers warn of each other's deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def torch_base(hf, path):
    """A random transformers model, saved."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = {"llama": "Llama", "qwen2": "Qwen2", "bert": "Bert", "roberta": "Roberta"}[hf["model_type"]]
    own = {name: x for name, x in hf.items() if name not in ("model_type", "architectures")}
    config = getattr(transformers, f"{kind}Config")(**own)
    model = getattr(transformers, hf["architectures"][0])(config).eval()
    with quiet():
        model.save_pretrained(path)
    return model


def torch_logits(model):
    import torch

    with torch.no_grad(), quiet():
        return model(torch.tensor(IDS)).logits.numpy()


def from_peft(hf, base, path, **options):
    """A random adapter created and saved by PEFT, and its logits."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = torch_base(hf, base)
    with quiet(), torch.no_grad():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
        for p in wrapped.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
        wrapped.save_pretrained(path)
    return torch_logits(wrapped)


PEFT_CASES = {
    "llama": (LLAMA, {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}),
    "llama head": (LLAMA, {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]}),
    "qwen2": (QWEN2, {"r": 4, "lora_alpha": 8, "target_modules": r".*\.1\..*_proj"}),
    "rslora": (LLAMA, {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "use_rslora": True}),
    "patterns": (
        LLAMA,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "exclude_modules": ["0.mlp.up_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\..*": 3, "v_proj": 6},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 24, "up_proj": 2},
        },
    ),
    "bert": (BERT, {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "roberta": (
        ROBERTA,
        {"r": 4, "lora_alpha": 8, "target_modules": ["query", "dense"], "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_reads_what_peft_writes_and_back(tmp_path, case):
    """Read and run, merged, and written again for PEFT: its logits each time."""
    peft = pytest.importorskip("peft")
    hf, options = PEFT_CASES[case]
    logits = from_peft(hf, tmp_path / "base", tmp_path / "theirs", **options)
    config, adapter, dense = dx.load_adapter(tmp_path / "theirs")
    base, params = dx.load_model(tmp_path / "base")
    model = attach_adapters(base, adapter, config.scales(adapter))
    np.testing.assert_allclose(output(model, combine(params, adapter, dense)), logits, atol=1e-4)
    assert np.abs(output(base, params) - logits).max() > 0.01
    # PEFT also stores the weights of an adapted head.
    whole = {"bert": {"classifier"}, "roberta": {"classifier"}, "llama head": {"lm_head"}}
    assert set(dense) == whole.get(case, set())

    summary = merge_adapter(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    assert summary.merged == len(config.scales(adapter))
    np.testing.assert_allclose(output(*dx.load_model(tmp_path / "merged")), logits, atol=1e-4)

    dx.save_adapter(tmp_path / "ours", config, adapter, dense, task_type=options.get("task_type"))
    again, adapter_again, dense_again = dx.load_adapter(tmp_path / "ours")
    assert again == config
    for one, other in ((adapter, adapter_again), (dense, dense_again)):
        assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
    with quiet():
        theirs = peft.PeftModel.from_pretrained(torch_base(hf, tmp_path / "fresh"), tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(theirs), logits, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "qwen2", "bert", "roberta"])
def test_peft_reads_what_is_written(tmp_path, case):
    peft = pytest.importorskip("peft")
    hf, targets = CASES[case]
    torch_model = torch_base(hf, tmp_path / "base")
    base, params = dx.load_model(tmp_path / "base")
    options = {"rslora": True} if case == "qwen2" else {"rank_pattern": {"value|v_proj": 2}}
    config = LoraConfig(4, 6, targets, **options)
    model, adapter = add_adapters(base, config, KEY)
    adapter, dense, task = trained(adapter), None, "CAUSAL_LM"
    if "classifier" in params:
        dense, task = {"classifier": jax.tree.map(lambda x: x + 0.1, params["classifier"])}, "SEQ_CLS"
    dx.save_adapter(tmp_path / "a", config, adapter, dense, task_type=task, base=str(tmp_path / "base"))
    with quiet():
        theirs = peft.PeftModel.from_pretrained(torch_model, tmp_path / "a").eval()
    ours = output(model, combine(params, adapter, dense or {}))
    np.testing.assert_allclose(torch_logits(theirs), ours, atol=1e-4)
    stated = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert stated["target_modules"] == list(targets) and stated["task_type"] == task
    assert stated["modules_to_save"] == (["classifier"] if dense else None)


# Refusals


def stored(path, config=None, tensors=None):
    """An adapter on one layer of LLAMA, with changes."""
    path.mkdir()
    own = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(own | (config or {})))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    named = {f"{layer}.{f}.weight": x["weight"] for f, x in factors(2, 32, 32).items()} | (tensors or {})
    write_tensors(path / "adapter_model.safetensors", {n: x for n, x in named.items() if x is not None})
    return path


PEFT = "base_model.model."
LAYER = f"{PEFT}model.layers.0.self_attn.q_proj"
REFUSED = [
    ({"peft_type": "LOHA"}, None, "peft_type is 'LOHA', supported: 'LORA'"),
    ({"bias": "all"}, None, "bias is 'all', supported: 'none'"),
    ({"use_dora": True}, None, "'use_dora' is True, which is not supported"),
    ({"fan_in_fan_out": True}, None, "'fan_in_fan_out' is True"),
    ({"layer_replication": [[0, 1]]}, None, r"'layer_replication' is \[\[0, 1\]\]"),
    ({"lora_bias": True, "use_qalora": True}, None, "'lora_bias' is True.*; 'use_qalora' is True"),
    ({"target_parameters": ["w"]}, None, "'target_parameters' is"),
    ({"a_future_way": {"x": 1}}, None, "'a_future_way' is {'x': 1}, which is not supported"),
    ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa', which also changes the base"),
    ({"r": 0}, None, "rank is 0, it must be"),
    ({"r": "2"}, None, "rank is '2', it must be"),
    ({"r": 3}, None, "q_proj' has rank 2, the config 3"),
    ({"rank_pattern": {"q_proj": 4}}, None, "q_proj' has rank 2, the config 4"),
    ({"rank_pattern": ["q_proj"]}, None, r"rank_pattern is \['q_proj'\], expected an object"),
    ({"alpha_pattern": {"(": 4}}, None, r"alpha_pattern: the pattern '.*' is not supported by RE2"),
    ({"rank_pattern": {"a{99999999999}": 4}}, None, "invalid repetition size"),
    ({"lora_alpha": 10**400}, None, "alpha is 10000"),
    ({"use_rslora": "no"}, None, "use_rslora is 'no', expected true or false"),
    (
        {},
        {f"{PEFT}x.weight": np.ones(2), f"{PEFT}x.base_layer.weight": np.ones(2)},
        "'x.weight' is stored twice",
    ),
    ({"lora_alpha": None}, None, "alpha is None, it must be a finite number"),
    ({}, {f"{LAYER}.lora_A.weight": None}, r"q_proj' has no lora_A\.weight"),
    ({}, {f"{LAYER}.lora_B.weight": np.ones((32, 3))}, r"q_proj' has A \[2, 32\] and B \[32, 3\]"),
    ({}, {f"{LAYER}.lora_B.weight": np.ones((32, 2), np.int32)}, "int32, not floating"),
    (
        {},
        {f"{LAYER}.lora_magnitude_vector": np.ones(32)},
        "lora_magnitude_vector' is not a factor of a linear",
    ),
    ({}, {f"{LAYER}.lora_B.bias": np.ones(32)}, "lora_B.bias' is not a factor of a linear layer"),
    ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 9))}, "embedding_A' is not"),
    ({}, {"classifier.weight": np.ones(2)}, r"'classifier.weight' does not begin with base_model\.model\."),
    ({}, {f"{LAYER}.lora_A.weight": None, f"{LAYER}.lora_B.weight": None}, "no factors of linear layers"),
]


@pytest.mark.parametrize(("config", "tensors", "text"), REFUSED, ids=[text[:30] for *_, text in REFUSED])
def test_adapters_that_are_refused(tmp_path, config, tensors, text):
    with pytest.raises(FileError, match=text) as caught:
        dx.load_adapter(stored(tmp_path / "a", config, tensors))
    assert str(tmp_path / "a") in str(caught.value)


def test_patterns_take_linear_time(tmp_path):
    """Patterns with catastrophic backtracking, and as many names as fit in a large config.json."""
    evil = {"(a+)+$": 9, "(.*)*x": 9, f"({'a|aa' * 20})*b": 9}
    many = {f"model.layers.{i}.q_proj": 2 for i in range(100_000)}
    path = stored(tmp_path / "a", {"rank_pattern": evil | many, "alpha_pattern": {f"n{i}": 1 for i in many}})
    config, _, _ = dx.load_adapter(path)
    assert config.rank_of("a" * 3000 + "!") == 2 and config.rank_of("b.model.layers.77.q_proj") == 2
    assert not LoraConfig(1, 1, "(a+)+$").matches("a" * 3000 + "!")
    names = [f"layers.{i}.q_proj" for i in range(20_000)]
    config = LoraConfig(1, 1, tuple(names))
    assert all(config.matches(f"model.{name}") for name in names) and not config.matches("layers.x.q_proj")


def test_missing_files_and_pickles(tmp_path):
    with pytest.raises(FileError, match=r"adapter_config\.json"):
        dx.load_adapter(tmp_path)
    path = stored(tmp_path / "a")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(
        FileError, match=r"has no adapter_model.safetensors. It has adapter_model.bin, a pickle"
    ):
        dx.load_adapter(path)


def test_what_cannot_be_saved(tmp_path):
    _, params, _, adapter, config = made("roberta", targets=("query", "dense"))
    with pytest.raises(ValueError, match=r"'classifier.dense' is part of 'classifier', which is saved whole"):
        dx.save_adapter(tmp_path / "a", config, adapter, {"classifier": params["classifier"]})
    with pytest.raises(ValueError, match=r"'classifier.dense' is part of 'classifier'"):
        dx.save_adapter(tmp_path / "a", config, adapter, task_type="SEQ_CLS")
    with pytest.raises(
        ValueError, match=r"attention.self.query' is not among the config's targets, \('dense',\)"
    ):
        dx.save_adapter(tmp_path / "a", LoraConfig(4, 6, ("dense",)), adapter)
    with pytest.raises(ValueError, match=r"query.lora_A.weight' is a LoRA factor"):
        dx.save_adapter(tmp_path / "a", config, adapter, adapter)
    head, classifier = LoraConfig(2, 2, ("classifier",)), {"classifier": factors(2, 32, 3)}
    with pytest.raises(ValueError, match=r"'classifier' is part of 'classifier'"):
        dx.save_adapter(tmp_path / "a", head, classifier, task_type="SEQ_CLS")
    assert not list(tmp_path.iterdir())
    dx.save_adapter(tmp_path / "a", config, adapter)
    with pytest.raises(FileError, match="already exists"):
        dx.save_adapter(tmp_path / "a", config, adapter)
    dx.save_adapter(tmp_path / "a", config, adapter, overwrite=True)


# Merged


def test_the_command(tmp_path):
    """An adapter merged into a bfloat16 base, and the result pruned like any fine-tuned model."""
    model, params, _, adapter, config = made("llama")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapter = trained(adapter)
    base, lora, out = (str(tmp_path / name) for name in ("base", "lora", "out"))
    dx.save_params(base, half, model.config.to_hf())
    (tmp_path / "base/tokenizer.json").write_text("{}")
    dx.save_adapter(lora, config, adapter)

    def darex(*args, code=0):
        result = CliRunner().invoke(main, list(args))
        assert result.exit_code == code, result.output
        return result.output

    report = json.loads(darex("merge-adapter", base, lora, out, "--json"))
    assert report == {"out": out, "merged": 6, "replaced": [], "bytes": report["bytes"]}
    expected = dx.apply_delta(half, dx.adapter_delta(adapter, config.scales(adapter)))
    written = dx.load_params(out)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), written, expected))
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert "already exists" in darex("merge-adapter", base, lora, out, code=1)
    assert "6 weights" in darex("merge-adapter", base, lora, out, "--overwrite")
    for place in (base, lora):
        text = darex("merge-adapter", base, lora, place, "--overwrite", code=1)
        assert "writing this would replace" in re.sub(r"\s+", " ", text)
    delta = str(tmp_path / "delta.safetensors")
    darex("prune", base, out, delta, "-p", "0.5")
    assert "ok" in darex("verify", delta, "--base", base)


@pytest.mark.parametrize("wide", ["base", "adapter", "both"])
def test_float64_tensors_are_merged_in_float64(tmp_path, wide):
    model, params, _, adapter, config = made("llama")
    adapter = trained(adapter)
    with jax.enable_x64(True):
        widen = lambda tree, which: jax.tree.map(  # noqa: E731
            lambda x: x * np.float64(1 + 2.0**-30) if wide in (which, "both") else x, tree
        )
        params, adapter = widen(params, "base"), widen(adapter, "adapter")
        dx.save_params(tmp_path / "base", params, model.config.to_hf())
        dx.save_adapter(tmp_path / "lora", config, adapter)
        expected = flatten_names(dx.apply_delta(params, dx.adapter_delta(adapter, config.scales(adapter))))
    merge_adapter(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    with Checkpoint(tmp_path / "out") as out:
        assert out.tensors.keys() == expected.keys()
        for name, tensor in out.tensors.items():
            assert tensor.info.dtype == expected[name].dtype
            np.testing.assert_array_equal(tensor.read(), expected[name])


def test_a_classifiers_adapter_on_the_body_it_was_made_of(tmp_path):
    xlm = {"model_type": "xlm-roberta", "architectures": ["XLMRobertaForSequenceClassification"]}
    for hf in (BERT, ROBERTA, ROBERTA | xlm):
        folder, family = tmp_path / hf["model_type"], hf["model_type"].removeprefix("xlm-")
        fine, params = init_model(read_model_config(hf), KEY)
        config = LoraConfig(2, 4, ("query",))
        model, adapter = add_adapters(fine, config, KEY)
        adapter, dense = trained(adapter), {"classifier": params["classifier"]}
        dx.save_adapter(folder / "lora", config, adapter, dense, task_type="SEQ_CLS")
        body = fine.config.to_hf() | {"architectures": [f"{type_name(hf['model_type'])}Model"]}
        dx.save_params(folder / "base", params[family], {n: x for n, x in body.items() if "2" not in n})
        merge_adapter(folder / "base", folder / "lora", folder / "out")
        merged = dx.load_model(folder / "out")
        expected = output(model, combine(params, adapter))
        np.testing.assert_allclose(output(*merged), expected, atol=1e-5 * np.abs(expected).max())
        half = {
            "classifier": {n: x for n, x in flatten_names(dense["classifier"]).items() if "bias" not in n}
        }
        dx.save_adapter(folder / "lora", config, adapter, half, task_type="SEQ_CLS", overwrite=True)
        with pytest.raises(ValueError, match=r"a classifier also needs classifier\.(dense\.)?bias"):
            merge_adapter(folder / "base", folder / "lora", folder / "none")


def type_name(family):
    return {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}[family]


def test_merging_what_the_base_lacks(tmp_path):
    model, params, *_ = made("llama")
    dx.save_params(tmp_path / "base", params, model.config.to_hf())
    dense = {"base_model.model.score.weight": np.ones((2, 32), np.float32)}
    path = stored(tmp_path / "a", tensors=dense)
    with pytest.raises(ValueError, match=r"a does not match .*base: score.weight is not in the base\."):
        merge_adapter(tmp_path / "base", path, tmp_path / "out")
    layer = "base_model.model.model.layers.7.self_attn.q_proj"
    named = {f"{layer}.{f}.weight": x["weight"] for f, x in factors(2, 32, 32).items()}
    named |= {f"{LAYER}.lora_B.weight": np.ones((31, 2), np.float32)}
    text = r"0.self_attn.q_proj.weight is \[32, 32\] in the base, \[31, 32\] in the adapter; model.layers.7"
    with pytest.raises(ValueError, match=text):
        merge_adapter(tmp_path / "base", stored(tmp_path / "b", tensors=named), tmp_path / "out")
    named = {f"{LAYER}.lora_B.weight": np.full((32, 2), np.nan, np.float32)}
    with pytest.raises(ValueError, match=r"q_proj.weight' of .* would hold infinity or NaN"):
        merge_adapter(tmp_path / "base", stored(tmp_path / "c", tensors=named), tmp_path / "out")
    assert not (tmp_path / "out").exists()

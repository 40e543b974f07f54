"""Decoders against transformers, and their configs."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.errors import DarexError, DarexWarning
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.models import build_model, init_model, read_model_config
from darex_jax.models.config import INERT
from darex_jax.models.decoder import DecoderConfig, empty_cache
from darex_jax.models.gemma3 import READ
from darex_jax.models.qwen2 import WINDOW_FIELDS
from darex_jax.models.rotary import Rope
from tests.test_bank import darex

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {name: value for name, value in LLAMA.items() if name not in ("attention_bias", "mlp_bias")} | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
}
WITHOUT = ("attention_bias", "mlp_bias")
MISTRAL = {name: value for name, value in LLAMA.items() if name not in WITHOUT} | {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5,
}  # fmt: skip
QWEN3 = {name: value for name, value in QWEN2.items()} | {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "attention_bias": False,
}  # fmt: skip
GEMMA3 = {name: value for name, value in LLAMA.items() if name not in (*WITHOUT, "hidden_act")} | {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "tie_word_embeddings": True,
    "rope_local_base_freq": 30.0, "attention_bias": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARNS = {  # each YaRN field with another value than its default
    "yarn": YARN,
    "yarn by default": {"type": "yarn", "factor": 2.0},  # of max_position_embeddings
    "yarn betas": YARN | {"beta_fast": 3.0, "beta_slow": 0.5},
    "yarn whole": YARN | {"beta_fast": 3.0, "truncate": False},
    "yarn attention": YARN | {"attention_factor": 0.7},
    "yarn mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3},
    "yarn below 1": YARN | {"factor": 0.5},
}
DYNAMIC = {"type": "dynamic", "factor": 3.0}
CASES = {
    "llama": LLAMA,
    "tied": LLAMA | {"tie_word_embeddings": True},
    "one key head": LLAMA | {"num_key_value_heads": 1},
    "head_dim": LLAMA | {"head_dim": 16},
    "biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": LLAMA | {"rope_scaling": LLAMA3},
    "padding id": LLAMA | {"pad_token_id": 0},
    "body": LLAMA | {"architectures": ["LlamaModel"]},
    "qwen2": QWEN2,
    "qwen2 tied": QWEN2 | {"tie_word_embeddings": True},
    "windows": QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen2 yarn": QWEN2 | {"rope_scaling": YARN},
    "mistral": MISTRAL,
    "mistral whole": MISTRAL | {"sliding_window": None, "head_dim": 16},
    "qwen3": QWEN3,
    "qwen3 biases": QWEN3 | {"attention_bias": True},
    "qwen3 windows": QWEN3 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma3": GEMMA3,
    "gemma3 stretched": GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3 body": GEMMA3 | {"architectures": ["Gemma3TextModel"]},
}
CONFIGS = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "mistral": "MistralConfig", "qwen3": "Qwen3Config",
           "gemma3_text": "Gemma3TextConfig"}  # fmt: skip
STRETCHED = LLAMA | {"rope_scaling": DYNAMIC, "max_position_embeddings": 16}


def original(hf, path):
    """A random transformers model with this config, saved; its biases and norms are random as well."""
    torch.manual_seed(0)
    config = getattr(transformers, CONFIGS[hf["model_type"]])
    fields = {name: value for name, value in hf.items() if name not in ("architectures", "model_type")}
    fields = copy.deepcopy(fields)  # transformers writes into rope_scaling
    model = getattr(transformers, hf["architectures"][0])(config(**fields)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(path)
    return model


def batch(length=40, rows=3, vocabulary=97):
    """Token ids and masks: a full row, one padded on the right, one on the left."""
    ids = np.random.default_rng(1).integers(3, vocabulary, (rows, length))
    mask = np.ones((rows, length), int)
    mask[1, length - 9 :] = 0
    mask[2, :7] = 0
    return ids, mask


def reference(model, ids, mask):
    with torch.no_grad():
        out = model(
            torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True, use_cache=False
        )
    return [x.numpy() for x in out.hidden_states], out.logits.numpy() if "logits" in out else None


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(tmp_path, case):
    hf = CASES[case]
    theirs = original(hf, tmp_path)
    model, params = dx.load_model(tmp_path)
    ids, mask = batch()  # 40 positions: more than the fastest pairs' period and the windows
    hidden, logits = reference(theirs, ids, mask)
    out = model(params, ids, mask)
    real = mask == 1
    np.testing.assert_allclose(np.asarray(out.last_hidden_state)[real], hidden[-1][real], atol=1e-4)
    if logits is None:
        assert out.logits is None
    else:
        np.testing.assert_allclose(np.asarray(out.logits)[real], logits[real], atol=1e-4)
    saved = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    if hf["tie_word_embeddings"]:
        saved.pop("lm_head.weight", None)
    assert {name: x.shape for name, x in flatten_names(params).items()} == saved


@pytest.mark.parametrize("rope", [*YARNS.values(), DYNAMIC], ids=[*YARNS, "dynamic"])
def test_scaled_rotary_positions_match_transformers(rope):
    """Frequencies and scale, for short texts and beyond the original length."""
    fields = {name: value for name, value in QWEN2.items() if name not in ("architectures", "model_type")}
    hf = QWEN2 | {"hidden_size": 512, "rope_theta": 1e6, "max_position_embeddings": 32, "rope_scaling": rope}
    config = transformers.Qwen2Config(**copy.deepcopy(fields | hf))
    kind = rope.get("type", rope.get("rope_type"))
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind]
    ours = read_model_config(hf).rope
    for length in (5, 32, 33, 200):
        theirs, scale = compute(config, "cpu", seq_len=torch.tensor(length))
        frequencies = ours.frequencies(128, jnp.array([length]))
        np.testing.assert_allclose(frequencies[0], theirs, rtol=2e-6)
        assert ours.scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("family", [LLAMA, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("length", [10, 40])
def test_dynamic_positions_follow_each_rows_own_length(tmp_path, family, length):
    """As in transformers for a single row; below the original length nothing is scaled."""
    hf = family | {"rope_scaling": DYNAMIC, "max_position_embeddings": 16}
    theirs = original(hf, tmp_path)
    model, params = dx.load_model(tmp_path)
    ids, mask = batch(length)
    mask[1, length // 2 :], mask[2, : length // 3] = 0, 0
    out = np.asarray(model(params, ids, mask).logits)
    plain, _ = build_model(read_model_config(family | {"max_position_embeddings": 16}))
    for row in range(3):
        real = mask[row] == 1
        fresh = type(theirs)(theirs.config)  # without state of an earlier, longer text
        fresh.load_state_dict(theirs.state_dict())
        _, logits = reference(fresh.eval(), ids[row : row + 1, real], mask[row : row + 1, real])
        np.testing.assert_allclose(out[row][real], logits[0], atol=1e-4)
        same = np.allclose(out[row][real], np.asarray(plain(params, ids, mask).logits)[row][real], atol=1e-4)
        assert same == (real.sum() <= 16)


def test_rematerialisation_keeps_less_and_changes_nothing():
    model, params = init_model(read_model_config(LLAMA | {"num_hidden_layers": 4}), jax.random.key(0))
    ids, mask = batch(length=64)

    def loss(model, params):
        return jnp.square(model(params, ids, mask).logits * mask[..., None]).mean()

    def compiled(model):
        return jax.jit(jax.grad(loss, argnums=1), static_argnums=0).lower(model, params).compile()

    whole, less = compiled(model), compiled(dataclasses.replace(model, remat=True))
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (whole, less)]
    assert sizes[1] < 0.6 * sizes[0], sizes
    for a, b in zip(*(jax.tree.leaves(c(params)) for c in (whole, less)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(a).max())
    # Observation still works.
    seen = []
    dataclasses.replace(model, remat=True)(params, ids, mask, observe=lambda name, x: seen.append(name))
    assert len(seen) == 4 * 7 + 1


def test_each_layer_matches_transformers(tmp_path):
    theirs = original(LLAMA, tmp_path)
    _, params = dx.load_model(tmp_path)
    ids, mask = batch()
    hidden, _ = reference(theirs, ids, mask)
    real = mask == 1
    for depth in (1, 2):  # the first layers only, with a final norm of almost identity weights
        layers = {str(i): params["model"]["layers"][str(i)] for i in range(depth)}
        cut = {**params["model"], "layers": layers}
        config = LLAMA | {"num_hidden_layers": depth, "architectures": ["LlamaModel"]}
        model, _ = build_model(read_model_config(config))
        out = np.asarray(model(cut, ids, mask).last_hidden_state)[real]
        x = hidden[depth][real]
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + LLAMA["rms_norm_eps"])
        np.testing.assert_allclose(out, normed * np.asarray(params["model"]["norm"]["weight"]), atol=1e-4)


def test_gradients_match_torch(tmp_path):
    theirs = original(QWEN2, tmp_path).train()
    model, params = dx.load_model(tmp_path)
    ids, mask = batch()

    def loss(p):
        return jnp.sum(jnp.square(model(p, ids, mask).logits) * mask[..., None]) / 1000

    grads = flatten_names(jax.jit(jax.grad(loss))(params))
    out = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), use_cache=False).logits
    (torch.sum(out**2 * torch.tensor(mask)[..., None]) / 1000).backward()
    for name, weight in theirs.named_parameters():
        expected = weight.grad.numpy()
        np.testing.assert_allclose(grads[name], expected, atol=2e-4 * np.abs(expected).max(), err_msg=name)


def test_bfloat16(tmp_path):
    original(LLAMA, tmp_path)
    model, params = dx.load_model(tmp_path)
    half_model, half = dx.load_model(tmp_path, dtype=jnp.bfloat16)
    ids, mask = batch()
    out, exact = half_model(half, ids, mask).logits, np.asarray(model(params, ids, mask).logits)
    assert out.dtype == jnp.bfloat16
    error = np.asarray(out, np.float32) - exact
    # Three layers of products, each rounded to 8 bits: 0.02 of the logits' standard deviation measured.
    assert np.sqrt(np.mean(error**2)) < 0.05 * exact.std()
    # Sums are float32: 4096 ones give 4096, where bfloat16 would stop at 256.
    from darex_jax.models.layers import project

    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert float(project(ones, ones)[0, 0]) == 4096


def test_cached_steps_are_the_whole(tmp_path):
    """Prefill and single steps match one full pass, also for left-padded rows."""
    config = read_model_config(CASES["windows"])
    model, params = init_model(config, jax.random.key(0))
    ids, mask = batch(length=12)
    mask[1] = 1  # rows of a cache are padded on the left only
    whole = model(params, ids, mask).logits
    module = model.module(params)
    cache = empty_cache(config, 3, 20, jnp.float32)
    out = module(ids[:, :8], mask[:, :8] != 0, cache)
    pieces = [out.logits]
    for i in range(8, 12):
        out = module(ids[:, i : i + 1], mask[:, i : i + 1] != 0, out.cache)
        pieces.append(out.logits)
    assert int(out.cache.length) == 12 and out.cache.keys[0].shape == (3, 20, 2, 8)
    real = mask == 1
    together = np.concatenate([np.asarray(x) for x in pieces], axis=1)
    np.testing.assert_allclose(together[real], np.asarray(whole)[real], atol=1e-5)


def test_padding_does_not_matter():
    model, params = init_model(read_model_config(LLAMA), jax.random.key(0))
    ids, mask = batch()
    other = np.where(mask, ids, 5)
    a, b = (np.asarray(model(params, x, mask).logits)[mask == 1] for x in (ids, other))
    np.testing.assert_array_equal(a, b)
    assert np.isfinite(np.asarray(model(params, ids, np.zeros_like(mask)).logits)).all()


# Configs


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_field_changes_something(family):
    hf = LLAMA if family == "llama" else QWEN2
    ids, mask = batch()
    _, fresh = init_model(read_model_config(hf), jax.random.key(0))

    def behaviour(**changes):
        config = read_model_config(hf | changes)
        model, params = init_model(config, jax.random.key(0))
        shapes = {name: x.shape for name, x in flatten_names(params).items()}
        if shapes != {name: x.shape for name, x in flatten_names(fresh).items()}:
            return shapes, []
        start = jax.tree.map(lambda x: x + 0.01, fresh)  # biases and norms differ from their initial values
        loss = lambda p: jnp.square(model(p, jnp.zeros((1, 2), int)).last_hidden_state).sum()  # noqa: E731

        @jax.jit
        def outcome(start):
            row = jax.grad(loss)(start)["model"]["embed_tokens"]["weight"][0].sum()
            return model(start, ids, mask).logits.sum(), row

        first = params["model"]["layers"]["0"]["self_attn"]["q_proj"]["weight"]
        return shapes, [float(x) for x in (*outcome(start), first.sum())]

    standard = behaviour()
    changed = {
        "vocab_size": 98,
        "hidden_size": 40,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-2,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "rope_theta": 50.0,
    }
    if family == "llama":
        changed |= {"attention_bias": True, "mlp_bias": True}
    # Rotary embeddings do not use the maximum length; end tokens concern generation.
    rest = {"model_type", "architectures", "max_position_embeddings", "eos_token_id"}
    fields = {f.name for f in dataclasses.fields(DecoderConfig)} - {*DecoderConfig.COMPUTED}
    if family == "qwen2":
        rest |= {"attention_bias", "mlp_bias"}
        assert behaviour(use_sliding_window=True, sliding_window=5, max_window_layers=1) != standard
        windows = {"use_sliding_window": True, "sliding_window": 5}
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        assert behaviour(**windows, layer_types=kinds) != behaviour(
            **windows, layer_types=kinds[1:] + kinds[:1]
        )
    assert fields - changed.keys() == rest
    for name, value in changed.items():
        assert behaviour(**{name: value}) != standard, name
    for scaling in ({"type": "linear", "factor": 2.0}, LLAMA3, YARN, DYNAMIC | {"factor": 90.0}):
        stretched = behaviour(rope_scaling=scaling, max_position_embeddings=16)
        assert stretched != standard, scaling
    assert behaviour(rope_scaling=YARN | {"attention_factor": 0.7}) != behaviour(rope_scaling=YARN)
    carried = {name: "anything" for name in INERT - {"tie_encoder_decoder"}}
    assert behaviour(**carried) == standard


@pytest.mark.parametrize(
    ("hf", "changes"),
    [
        (MISTRAL, {"sliding_window": 7}),
        (QWEN3, {"head_dim": 8, "rms_norm_eps": 1e-2}),
        (GEMMA3, {"sliding_window": 7, "query_pre_attn_scalar": 16, "rope_local_base_freq": 20.0,
                  "rope_theta": 50.0, "hidden_activation": "gelu", "layer_types": ["full_attention"] * 3,
                  "rms_norm_eps": 1e-2}),
    ],
    ids=["mistral", "qwen3", "gemma3"],
)  # fmt: skip
def test_every_own_field_changes_something(hf, changes):
    ids, mask = batch()

    def behaviour(**change):
        model, params = init_model(read_model_config(hf | change), jax.random.key(0))
        return float(jnp.sum(model(params, ids, mask).logits[:, :, :3]))

    standard = behaviour()
    assert np.isfinite(standard)
    for name, value in changes.items():
        assert behaviour(**{name: value}) != standard, name


def test_gemma3_as_both_generations_of_transformers_write_it():
    new = {
        name: value for name, value in GEMMA3.items() if name not in ("rope_theta", "rope_local_base_freq")
    }
    new["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        "full_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    assert read_model_config(new) == read_model_config(GEMMA3)
    short = {name: value for name, value in GEMMA3.items() if name != "layer_types"}
    windows = read_model_config(short | {"num_hidden_layers": 7}).windows
    assert windows == (5, 5, 5, 5, 5, None, 5)
    assert read_model_config(short | {"sliding_window_pattern": 2}).windows == (5, None, 5)
    plain = {name: value for name, value in GEMMA3.items() if name in LLAMA and name != "rope_theta"}
    config = read_model_config(plain)
    assert (config.rope.theta, config.local_rope.theta, config.query_scale) == (1e6, 1e4, 1 / 16)
    assert config.windows == (4096,) * 3 and config.hidden_act == "gelu_pytorch_tanh"


def test_every_field_of_the_rope_changes_its_turns():
    def turns(rope):
        rope = read_model_config(LLAMA | {"head_dim": 32, "rope_scaling": rope}).rope
        return [*rope.frequencies(32, jnp.array([100]))[0].tolist(), rope.scale]

    yarn = YARN | {"original_max_position_embeddings": 640}
    for start, changes in (
        (LLAMA3, {"factor": 2.0, "low_freq_factor": 0.5, "high_freq_factor": 3.0,
                  "original_max_position_embeddings": 8}),
        (yarn, {"factor": 2.0, "beta_fast": 3.0, "beta_slow": 0.2, "attention_factor": 0.7,
                "original_max_position_embeddings": 64, "truncate": False}),
        (yarn | {"mscale": 0.7, "mscale_all_dim": 0.3}, {"mscale": 0.6, "mscale_all_dim": 0.4}),
        (DYNAMIC, {"factor": 2.0}),
    ):  # fmt: skip
        for name, value in changes.items():
            assert turns(start | {name: value}) != turns(start), name


@pytest.mark.parametrize("hf", [*CASES.values(), STRETCHED], ids=[*CASES, "dynamic"])
def test_config_round_trip(hf):
    hf = hf | {"torch_dtype": "float32", "transformers_version": "4.40.0", "use_cache": True}
    config = read_model_config(hf)
    out = config.to_hf()
    assert {name: out.get(name) for name in hf} == hf
    assert read_model_config(out) == config and hash(read_model_config(out)) == hash(config)
    json.dumps(out)


@pytest.mark.parametrize("hf", [LLAMA, CASES["llama3"], CASES["linear"], QWEN2, CASES["qwen2 yarn"],
                                STRETCHED])  # fmt: skip
def test_configs_of_transformers_4_and_5_are_equivalent(hf, tmp_path):
    """Version 4 writes rope_theta and rope_scaling, version 5 rope_parameters and dtype."""
    old = hf | {"torch_dtype": "float32"}
    scaling = dict(hf.get("rope_scaling") or {})
    kind = scaling.pop("type", scaling.pop("rope_type", "default"))
    new = {name: value for name, value in hf.items() if name not in ("rope_theta", "rope_scaling")}
    new |= {"dtype": "float32", "rope_parameters": {"rope_theta": 100.0, "rope_type": kind, **scaling}}
    assert read_model_config(old).rope == read_model_config(new).rope != Rope(100.0, "other")
    assert read_model_config(old) == read_model_config(new)
    original(hf, tmp_path)  # as the installed transformers writes it
    assert (
        read_model_config(json.loads((tmp_path / "config.json").read_text())).rope
        == read_model_config(old).rope
    )


def test_llama_2_without_rope_theta():
    hf = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    assert read_model_config(hf).rope == Rope(10_000.0)
    with pytest.raises(ValueError, match="Qwen2 config: rope_theta is missing"):
        read_model_config({name: value for name, value in QWEN2.items() if name != "rope_theta"})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type is 'longrope', supported"),
        ({"rope_scaling": {"type": "yarn"}}, "factor of the rope is missing"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type is \['yarn'\], supported"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        ({"rope_scaling": YARN | {"factor": "4"}}, r"factor is '4', expected a finite number above 0 \(of"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate is 1, expected true or false"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta is 1, 'yarn' needs one above 1"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "high_freq_factor of the rope is not above"),
        ({"rope_scaling": DYNAMIC, "head_dim": 2}, "head_dim is 2, dynamic rotary positions need at least 4"),
        ({"rope_theta": 0}, "rope_theta is 0, expected a finite number above 0"),
        ({"rope_scaling": {"type": "linear"}}, "factor of the rope is missing"),
        ({"rope_scaling": LLAMA3 | {"mscale": 1}}, "mscale of the rope is 1, which 'llama3' does not have"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor of"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, supported: 0.0"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2, supported: 1"),
        ({"logit_scale": 2}, "logit_scale is unknown"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish', supported: gelu"),
        ({"architectures": ["LlamaForTokenClassification"]}, "supported: LlamaModel, LlamaForCausalLM"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 34}, "hidden_size 34 is not a multiple of num_attention_heads 4"),
        ({"head_dim": 5}, "head_dim is 5, rotary positions need an even number"),
        ({"rms_norm_eps": None, "hidden_act": None}, "hidden_act is missing; rms_norm_eps is missing"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral', supported: bert, roberta, xlm-roberta, m"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_config_refusals(changes, text):
    with pytest.raises(ValueError, match=text):
        read_model_config(LLAMA | changes)


WRONG = ("4", [4], {"x": 4}, None, True, 0, -1, 1.5, float("nan"), float("inf"), 2**31, 10**400, "x" * 10**6)


POSSIBLE = {  # valid values per field: all others are refused
    "rms_norm_eps": (0, 1.5, 2**31), "initializer_range": (0, 1.5, 2**31),
    "rope_theta": (1.5, 2**31, None), "rope_scaling": (None,),
    "num_key_value_heads": (None,), "head_dim": (None,), "pad_token_id": (None, 0, -1),
    "use_sliding_window": (None, 0, True), "eos_token_id": (None, 0, -1, [4]),
    "attention_bias": (None, True), "mlp_bias": (None, True),
    "tie_word_embeddings": (None, True), "sliding_window": (None,), "max_window_layers": (0,),
    "layer_types": (None,), "hidden_activation": (None,), "query_pre_attn_scalar": (None, 1.5, 2**31),
    "rope_local_base_freq": (None, 1.5, 2**31), "sliding_window_pattern": (None,),
}  # fmt: skip


@pytest.mark.parametrize("hf", [LLAMA, CASES["windows"], MISTRAL, CASES["qwen3 windows"], GEMMA3],
                         ids=["llama", "qwen2", "mistral", "qwen3", "gemma3"])  # fmt: skip
def test_a_value_of_another_type_is_one_line(hf):
    """Whatever the value in a config.json, the error names the field and is a user error."""
    fields = {f.name for f in dataclasses.fields(DecoderConfig)} - {*DecoderConfig.COMPUTED}
    own = {"qwen2": WINDOW_FIELDS, "qwen3": WINDOW_FIELDS, "mistral": {"sliding_window"}, "gemma3_text": READ}
    if hf != LLAMA:
        fields = fields - {"attention_bias", "mlp_bias"} | set(own[hf["model_type"]])
    if hf == GEMMA3:
        fields -= {"hidden_act", "_sliding_window_pattern"}
    for name in [*fields, "rope_theta", "rope_scaling"]:
        for value in WRONG:
            if any(value is x or (type(value) is type(x) and value == x) for x in POSSIBLE.get(name, ())):
                continue
            with pytest.raises(DarexError) as error:
                read_model_config(hf | {name: value})
            message = str(error.value)
            assert name.removesuffix("_scaling") in message, (name, value, message)
            assert "\n" not in message and len(message) < 400, (name, value, message)


@pytest.mark.parametrize("hf", [LLAMA, CASES["windows"]], ids=["llama", "qwen2"])
def test_values_that_can_be(hf):
    others = ("attention_bias", "mlp_bias") if hf != LLAMA else WINDOW_FIELDS
    for name, values in POSSIBLE.items():
        for value in values if name not in (*others, *(READ.keys() - WINDOW_FIELDS)) else ():
            if (name, value) != ("rope_theta", None) or hf == LLAMA:
                read_model_config(hf | {name: value})


def test_fields_of_tools_and_unknown_ones():
    notes = {
        "unsloth_version": "2024.9", "unsloth_fixed": True, "model_name": "mine",
        "training_date": "2025-01-01", "base_model_name_or_path": "x/y",
        "license": "mit", "_anything": 3, "future": None,
    }  # fmt: skip
    config = read_model_config(LLAMA | notes)
    assert config == read_model_config(LLAMA) and {n: config.to_hf()[n] for n in notes} == notes
    for off in (False, "", [], {}):
        with pytest.warns(DarexWarning, match="the unknown field 'use_qk_norm'"):
            read_model_config(LLAMA | {"use_qk_norm": off})
    nulls = {"eos_token_id": None, "pad_token_id": None, "head_dim": None}
    assert {n: read_model_config(LLAMA | nulls).to_hf().get(n, 0) for n in nulls} == nulls
    for name, value in {
        "use_qk_norm": True, "unsloth_scale": 2.0, "attention_version": 2, "drop_path": 0.1,
        "norm_name": "rms", "softcap": 0, "quantization_config": {"bits": 4}, "activation": "mish",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is unknown .--ignore-config-field"):
            read_model_config(LLAMA | {name: value})
        config = read_model_config(LLAMA | {name: value}, [name])
        assert config == read_model_config(LLAMA) and config.to_hf()[name] == value
    assert read_model_config(LLAMA | {"attention_dropout": 0.1}, ["attention_dropout"]).hidden_size == 32
    for name in ("hidden_size", "rope_theta", "rope_scaling"):
        with pytest.raises(ValueError, match=f"{name} is read by the model and cannot be ignored"):
            read_model_config(LLAMA, [name])


def test_a_config_that_claims_more_than_its_weights(tmp_path):
    """Layers that are not in the file are neither traced nor allocated."""
    _, params = init_model(read_model_config(LLAMA), jax.random.key(0))
    for changes, text in (
        (
            {"num_hidden_layers": 1_000_000},
            "num_hidden_layers is 1000000, expected an integer from 1 to",
        ),
        ({"num_hidden_layers": 9_999}, "has num_hidden_layers 9999, its weights have 3 layers"),
        ({"vocab_size": 2**31 - 1}, r"embed_tokens.weight has shape \[97, 32\], expected \[2147483647, 32\]"),
        ({"hidden_size": 2**31 - 4, "intermediate_size": 2**31 - 1, "head_dim": 2}, "has shape"),
        ({"num_attention_heads": 2**30, "head_dim": 8}, "num_attention_heads is 1073741824, with 8 features"),
        ({"num_hidden_layers": 2}, r"model.layers.2.input_layernorm.weight is unexpected"),
    ):
        dx.save_params(tmp_path, params, LLAMA | changes, overwrite=True)
        with pytest.raises(ValueError, match=text):
            dx.load_model(tmp_path)


def test_qwen2_refusals():
    windows = {"use_sliding_window": True, "sliding_window": 5}
    with pytest.raises(ValueError, match=r"layer_types is \['chunked'\], expected 3 of full_attention"):
        read_model_config(QWEN2 | windows | {"layer_types": ["chunked"]})
    with pytest.raises(ValueError, match="attention_bias is True, supported: False"):
        read_model_config(QWEN2 | {"attention_bias": True})


def test_default_windows_match_transformers():
    for changes in (
        {"sliding_window": None},
        {"sliding_window": 5},
        {"sliding_window": 5, "max_window_layers": 1},
        {"max_window_layers": 1},
        {"use_sliding_window": False, "max_window_layers": 1},
    ):
        hf = {name: x for name, x in QWEN2.items() if name not in ("sliding_window", "max_window_layers")}
        hf |= {"use_sliding_window": True, **changes}
        own = {name: x for name, x in hf.items() if name not in ("model_type", "architectures")}
        theirs = transformers.Qwen2Config(**own)
        config = read_model_config(hf)
        sliding = [kind == "sliding_attention" for kind in theirs.layer_types]
        expected = [theirs.sliding_window if slides else None for slides in sliding]
        assert [config.window(i) for i in range(config.num_hidden_layers)] == expected, changes


# Files


def test_extra_tensors_of_old_files(tmp_path):
    """A copy of a tied head and Llama 2's stored frequencies are dropped; a different head is refused."""
    hf = CASES["tied"]
    _, params = init_model(read_model_config(hf), jax.random.key(0))
    table = params["model"]["embed_tokens"]["weight"]
    named = flatten_names(params) | {
        "lm_head.weight": table,
        "model.layers.0.self_attn.rotary_emb.inv_freq": jnp.ones(4),
    }
    dx.save_params(tmp_path / "m", unflatten_names(named), hf)
    _, loaded = dx.load_model(tmp_path / "m")
    assert flatten_names(loaded).keys() == flatten_names(params).keys()
    dx.save_params(tmp_path / "n", unflatten_names(named | {"lm_head.weight": table + 1}), hf)
    with pytest.raises(
        ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight, although config.json"
    ):
        dx.load_model(tmp_path / "n")


def test_a_delta_of_old_files(tmp_path):
    """Frequencies are in no delta, whichever model has them; a tied head goes with pruned embeddings."""
    hf, number = CASES["tied"], "model.layers.{}.self_attn.rotary_emb.inv_freq"
    for i, name in enumerate(("base", "fine")):
        _, params = init_model(read_model_config(hf), jax.random.key(i))
        old = {number.format(i): jnp.ones(4), "lm_head.weight": params["model"]["embed_tokens"]["weight"]}
        dx.save_params(tmp_path / name, unflatten_names(flatten_names(params) | old), hf)
    base, delta, out = tmp_path / "base", tmp_path / "delta", tmp_path / "out"
    line = ("prune", base, tmp_path / "fine", delta, "-p", 0.5, "--json")
    told = json.loads(darex(*line, "--include", "embed_tokens|self_attn").stdout)
    assert "the copy is left out" in str(told["warnings"])
    assert not [n for n in flatten_names(dx.load_delta(delta)) if "inv_freq" in n or "lm_head" in n]
    darex("apply", base, delta, out)
    _, restored = dx.load_model(out)
    _, expected = dx.load_model(base, delta=delta)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    darex("merge", base, delta, tmp_path / "fine", tmp_path / "merged", "--method", "linear")
    assert len(flatten_names(dx.load_params(tmp_path / "merged"))) == len(flatten_names(restored))
    for name in ("base", "fine"):  # the one matrix is stored under the other name: nothing is left out
        named = flatten_names(dx.load_params(tmp_path / name))
        del named["model.embed_tokens.weight"]
        dx.save_params(tmp_path / f"{name}-2", unflatten_names(named), hf)
    darex("prune", tmp_path / "base-2", tmp_path / "fine-2", delta, "-p", 0.5, "--include", ".")
    assert "lm_head.weight" in flatten_names(dx.load_delta(delta))
    again = [*line[:3], tmp_path / "kept", *line[4:]]  # embeddings out of scope: all stays as it is
    assert "both copies are kept" in str(json.loads(darex(*again).stdout)["warnings"])
    darex("apply", base, tmp_path / "kept", tmp_path / "whole")
    assert "lm_head.weight" in flatten_names(dx.load_params(tmp_path / "whole"))


@pytest.mark.parametrize("case", ["llama", "qwen2 tied"])
def test_saved_models_are_read_by_transformers(tmp_path, case):
    hf = CASES[case]
    model, params = init_model(read_model_config(hf), jax.random.key(0))
    dx.save_params(tmp_path, params, model.config.to_hf())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, mask = batch()
    _, logits = reference(theirs, ids, mask)
    out = np.asarray(model(params, ids, mask).logits)
    np.testing.assert_allclose(out[mask == 1], logits[mask == 1], atol=1e-4)

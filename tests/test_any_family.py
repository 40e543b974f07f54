"""A dozen families without code in darex_jax: pruned, restored, and run by transformers."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.scope import choose_scope, starred
from darex_jax.core.tree import flatten_names
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.prune import Job, prune_checkpoints
from darex_jax.files.restore import apply_artifact
from darex_jax.files.safetensors import write_tensors
from tests.test_bank import darex

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
# family -> model class, further config, patterns of the default scope
FAMILIES = {
    "gpt2": (
        "AutoModelForCausalLM", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        ["mlp.c_fc.weight"],
    ),
    "gpt_neox": ("AutoModelForCausalLM", {}, ["attention.query_key_value.weight"]),
    "opt": ("AutoModelForCausalLM", {"ffn_dim": 24, "word_embed_proj_dim": 16}, ["fc1.weight"]),
    "phi3": ("AutoModelForCausalLM", {}, ["qkv_proj.weight", "gate_up_proj.weight"]),
    "mixtral": ("AutoModelForCausalLM", EXPERTS, ["experts"]),
    "qwen3_moe": ("AutoModelForCausalLM", EXPERTS, ["experts", "mlp.gate.weight"]),
    "mamba": ("AutoModelForCausalLM", {"state_size": 4}, ["mixer.in_proj.weight"]),
    "distilbert": (
        "AutoModelForSequenceClassification",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}, ["q_lin.weight"],
    ),
    "deberta-v2": ("AutoModelForSequenceClassification", {}, ["query_proj.weight"]),
    "t5": (
        "AutoModelForSeq2SeqLM", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        ["SelfAttention.q.weight"],
    ),
    "vit": (
        "AutoModelForImageClassification", {"image_size": 8, "patch_size": 4},
        ["attention.query.weight"],
    ),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        {
            "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4,
            "max_source_positions": 8, "max_target_positions": 16, "decoder_start_token_id": 1,
        },
        ["encoder_attn.q_proj.weight"],
    ),
}  # fmt: skip


def outputs(torch, family, model):
    tokens = torch.arange(3, 11)[None]
    inputs = {"input_ids": tokens}
    if family == "vit":
        inputs = {"pixel_values": torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)}
    elif family == "t5":
        inputs |= {"decoder_input_ids": tokens}
    elif family == "whisper":
        inputs = {"input_features": torch.linspace(-1, 1, 64).reshape(1, 4, 16), "decoder_input_ids": tokens}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_without_code_here_is_pruned_and_restored(tmp_path, family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, more, patterns = FAMILIES[family]
    auto = getattr(transformers, kind)
    config = transformers.AutoConfig.for_model(family, **(SMALL | more))
    torch.manual_seed(0)
    base = auto.from_config(config)
    base.save_pretrained(tmp_path / "base")
    fine = auto.from_config(config)
    fine.load_state_dict(base.state_dict())
    with torch.no_grad():
        for leaf in fine.parameters():
            leaf.add_(0.05 * torch.randn_like(leaf))
    fine.save_pretrained(tmp_path / "fine")

    with Checkpoint(tmp_path / "base") as b, Checkpoint(tmp_path / "fine") as f:
        scope = choose_scope(family, shapes=f.shapes)
        summary = prune_checkpoints(Job(b, f, tmp_path / "d", scope), key=(0, 3), drop_rate=0.5)
    pruned = set(map(starred, summary.match.pruned))
    for pattern in patterns:
        assert any(pattern in name for name in pruned), pruned
    assert not [n for n in pruned if "norm" in n or "embed" in n or n.endswith("bias") or "lm_head" in n], (
        pruned
    )
    with Checkpoint(tmp_path / "base") as b, DeltaFile(tmp_path / "d") as d:
        apply_artifact(b, d, tmp_path / "out")

    restored, with_base, with_fine = (
        flatten_names(dx.load_params(tmp_path / x)) for x in ("out", "base", "fine")
    )
    delta = flatten_names(dx.load_delta(tmp_path / "d"))
    assert set(delta) == set(summary.match.pruned)
    for name, array in restored.items():
        if name in delta:  # the definition: the key's mask of the delta, divided by 1 - p
            own = dx.prune(jax.random.key(3), {name: with_fine[name] - with_base[name]}, 0.5)[name]
            np.testing.assert_array_equal(array, with_base[name] + own)
        else:
            np.testing.assert_array_equal(array, with_fine[name])

    _, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    expected = with_fine | {name: with_base[name] + delta[name] for name in delta}
    dx.save_params(tmp_path / "expected", expected, config.to_dict())
    seen, wanted, unpruned = (
        outputs(torch, family, auto.from_pretrained(tmp_path / folder))
        for folder in ("out", "expected", "fine")
    )
    assert np.isfinite(seen).all() and not np.array_equal(seen, unpruned)
    np.testing.assert_array_equal(seen, wanted)


def quantised(seed, kind):
    """Weights of two blocks, in eight bits with scales beside them."""
    rng, tensors = np.random.default_rng(seed), {"model.norm.weight": np.ones(8, np.float32)}
    for layer in (f"model.layers.{i}.mlp.up_proj" for i in range(2)):
        codes, scales = rng.normal(size=(16, 8)).astype(np.float32), rng.random((4, 8)).astype(np.float32)
        if kind == "fp8":
            tensors[f"{layer}.weight"] = codes.astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{layer}.weight_scale_inv"] = scales
        elif kind == "gptq":
            tensors[f"{layer}.qweight"] = (1000 * codes).astype(np.int32)
            tensors[f"{layer}.scales"] = scales.astype(np.float16)
        else:
            tensors[f"{layer}.weight"] = (100 * codes).astype(np.uint8)
            tensors[f"{layer}.weight.absmax"] = scales
        attention = np.random.default_rng(0).normal(size=(8, 8)) + 0.01 * seed * rng.normal(size=(8, 8))
        plain = f"{layer.replace('mlp.up_proj', 'self_attn.q_proj')}.weight"
        tensors[plain] = attention.astype(ml_dtypes.bfloat16)
    return tensors


@pytest.mark.parametrize("kind", ["fp8", "gptq", "bitsandbytes"])
def test_scales_of_quantised_weights_are_kept_with_them(tmp_path, kind):
    config = {"model_type": "qwen3", "torch_dtype": "bfloat16"}
    models = {name: quantised(seed, kind) for name, seed in (("base", 0), ("fine", 1))}
    for name, tensors in models.items():
        dx.save_params(tmp_path / name, tensors, config)
    base, fine, delta = (tmp_path / name for name in ("base", "fine", "delta"))
    said = darex("prune", base, fine, delta, "-p", 0.5).output
    assert "it is quantised: 2 parameters" in said
    darex("apply", base, delta, tmp_path / "out")
    with Checkpoint(tmp_path / "out") as out:
        for name, array in models["fine"].items():
            same = out.tensors[name].read().tobytes() == array.tobytes()
            assert same == ("q_proj" not in name), name
        assert out.config == config
    for given in (fine, delta):  # whole numbers have no deltas to merge
        line = ("merge", base, given, tmp_path / "merged", "--method", "linear")
        assert "give models that are not quantised" in darex(*line, code=1).output
    assert not (tmp_path / "merged").exists()


def test_the_scope_found_is_printed_before_the_work(tmp_path):
    rng = np.random.default_rng(0)
    for model in ("base", "fine"):
        (tmp_path / model).mkdir()
        tensors = {
            f"model.layers.{i}.w.weight": rng.normal(size=(4, 6)).astype(np.float32) for i in range(2)
        } | {
            "model.norm.weight": np.ones(4, np.float32),
            "model.layers.0.scaled.weight": rng.normal(size=(4, 4)).astype(ml_dtypes.float8_e4m3fn),
            "model.layers.1.scaled.weight": np.zeros((4, 4), ml_dtypes.float8_e4m3fn),
        }
        head = {"special_head.out.weight": np.ones((2, 4), np.float32)} if model == "fine" else {}
        write_tensors(tmp_path / model / "model.safetensors", tensors | head)
        (tmp_path / model / "config.json").write_text(json.dumps({"model_type": "newest"}))
    base, fine = str(tmp_path / "base"), str(tmp_path / "fine")
    seen = darex("check", base, fine)
    assert "repeated blocks" in seen.output and "model.layers.*.w.weight" in seen.output
    out = darex("prune", base, fine, str(tmp_path / "d"), "--drop-rate", "0.5")
    said = " ".join(out.output.split())
    assert "newest has no default scope. Pruned: the matrices of repeated blocks: " in said
    assert ": model.layers.*.w.weight; 48 of 60 entries" in said
    darex("apply", base, str(tmp_path / "d"), str(tmp_path / "out"))
    with Checkpoint(tmp_path / "out") as restored, Checkpoint(fine) as whole:
        for name in ("model.layers.0.scaled.weight", "special_head.out.weight"):
            assert restored.tensors[name].info.dtype == whole.tensors[name].info.dtype
            np.testing.assert_array_equal(
                restored.tensors[name].read().view(np.uint8), whole.tensors[name].read().view(np.uint8)
            )
    darex("apply", base, str(tmp_path / "d"), str(tmp_path / "half"), "--dtype", "bfloat16")
    with Checkpoint(tmp_path / "half") as half:
        dtypes = {name: str(tensor.info.dtype) for name, tensor in half.tensors.items()}
    assert dtypes["model.norm.weight"] == "bfloat16"
    assert dtypes["model.layers.0.scaled.weight"] == "float8_e4m3fn"  # codes, whose scales are stored beside

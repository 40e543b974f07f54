"""Export: adapters with the same outputs in PEFT, and patches that give the bits of apply."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import darex_jax as dx
from darex_jax.core.tree import flatten_names
from tests.pairs import write
from tests.test_bank import METHODS, darex, encoders, pruned  # noqa: F401  # a fixture
from tests.test_readme import programs

PREFIX = "base_model.model."


def exported_deltas(folder):
    """The delta of each matrix of an adapter, and the tensors stored whole, in NumPy only."""
    tensors, config = load_file(folder / "adapter_model.safetensors"), json.loads(
        (folder / "adapter_config.json").read_text()
    )  # fmt: skip
    deltas, whole = {}, {}
    for key, x in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_B.weight"):
            layer = name.removesuffix(".lora_B.weight")
            deltas[f"{layer}.weight"] = x @ tensors[f"{PREFIX}{layer}.lora_A.weight"]
        elif name.endswith(".lora_embedding_B"):
            layer = name.removesuffix(".lora_embedding_B")
            deltas[f"{layer}.weight"] = (x @ tensors[f"{PREFIX}{layer}.lora_embedding_A"]).T
        elif "lora_" not in name:
            whole[name.replace(".base_layer.", ".")] = x
    for name in deltas:  # all scales are 1
        layer = name.removesuffix(".weight")
        assert config["rank_pattern"][layer] == config["alpha_pattern"][layer]
    return deltas, whole


@pytest.mark.parametrize("method", ["svd", "structured"])
def test_an_adapter_holds_the_delta_itself(tmp_path, encoders, method):  # noqa: F811
    base, files = encoders
    result = darex("export", files[method], tmp_path / "out", "--to", "peft", "--base", base, "--json")
    report = json.loads(result.output)
    deltas, whole = exported_deltas(tmp_path / "out")
    stored = flatten_names(dx.load_delta(files[method]))
    restored = flatten_names(dx.load_model(base, delta=files[method])[1])
    for name, delta in stored.items():
        if delta.ndim == 2:
            np.testing.assert_allclose(deltas.get(name, np.zeros(delta.shape)), delta, atol=1e-6)
        else:
            assert np.array_equal(whole[name], restored[name])
    assert all(np.array_equal(whole[n], restored[n]) for n in whole if n.startswith("classifier"))
    assert report["lost"] == 0 and set(report["whole"]) == set(whole)
    assert report["ranks"].keys() == {name.removesuffix(".weight") for name in deltas}


@pytest.mark.parametrize("method", ["svd", "structured"])
def test_peft_computes_the_restored_model_with_it(tmp_path, encoders, method):  # noqa: F811
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base, files = encoders
    darex("export", files[method], tmp_path / "out", "--to", "peft", "--base", base)
    model, params = dx.load_model(base, delta=files[method])
    labels = model.config.num_labels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses names deprecated in transformers
        head = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
        theirs = peft.PeftModel.from_pretrained(head, tmp_path / "out").eval()
    ids = jax.random.randint(jax.random.key(1), (3, 12), 2, 97)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(np.array(ids))).logits.numpy()
    np.testing.assert_allclose(model(params, ids).logits, logits, atol=1e-5)


def test_families_with_transposed_layers_are_refused(tmp_path):
    for i, name in enumerate(("base", "fine")):
        layers = {f"h.{n}.attn.c_proj.weight": np.eye(4, dtype=np.float32) + i for n in range(2)}
        dx.save_params(tmp_path / name, layers, {"model_type": "gpt2"})
    delta = pruned(tmp_path / "base", tmp_path / "fine", tmp_path / "delta", "--method", "svd", "-p", "0")
    line = ("export", delta, tmp_path / "out", "--to", "peft", "--base", tmp_path / "base")
    assert "stored [in, out]" in darex(*line, code=1).output and not (tmp_path / "out").exists()


def test_a_head_is_tied_by_default_in_gemma(tmp_path):
    table = {"model.embed_tokens.weight": np.eye(6, 4, dtype=np.float32)}
    config = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    for i, name in enumerate(("base", "fine")):
        layers = {f"model.layers.{n}.mlp.w.weight": np.eye(4, dtype=np.float32) + i for n in range(2)}
        dx.save_params(tmp_path / name, layers | {n: x + i for n, x in table.items()}, config)
    line = (tmp_path / "base", tmp_path / "fine", tmp_path / "delta", "--method", "svd", "-p", "0")
    pruned(*line, "--include", ".")
    darex("export", tmp_path / "delta", tmp_path / "out", "--to", "peft", "--base", tmp_path / "base")
    _, whole = exported_deltas(tmp_path / "out")
    assert "lm_head.weight" in whole


@pytest.mark.parametrize("scope", [(), ("--include", ".")])
def test_peft_computes_a_decoder_with_a_tied_head(tmp_path, folders, scope):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pair = []
    for which in ("base", "fine"):
        model, params = dx.load_model(folders / "llama" / which)
        config = model.config.to_hf() | {"tie_word_embeddings": True}
        dx.save_params(tmp_path / which, {"model": params["model"]}, config)
        pair.append(tmp_path / which)
    delta = pruned(*pair, tmp_path / "delta", "--method", "svd", "-p", "0.5", *scope)
    darex("export", delta, tmp_path / "out", "--to", "peft", "--base", pair[0])
    model, params = dx.load_model(pair[0], delta=delta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of adapted tied layers
        head = transformers.AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(head, tmp_path / "out").eval()
    ids = jax.random.randint(jax.random.key(1), (2, 12), 3, 200)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(np.array(ids))).logits.numpy()
    np.testing.assert_allclose(model(params, ids).logits, logits, atol=2e-4)


def test_a_rank_brings_others_to_low_rank(tmp_path, encoders):  # noqa: F811
    base, files = encoders
    refused = darex("export", files["dare"], tmp_path / "out", "--to", "peft", "--base", base, code=1).output
    assert "not low-rank (random)" in refused and "--rank" in refused
    losses = []
    for rank in (2, 8, 32):
        options = ("--to", "peft", "--base", base, "--rank", rank, "--overwrite", "--json")
        report = json.loads(darex("export", files["dare"], tmp_path / "out", *options).output)
        assert max(report["ranks"].values()) <= rank
        deltas, _ = exported_deltas(tmp_path / "out")
        stored = {n: x for n, x in flatten_names(dx.load_delta(files["dare"])).items() if x.ndim == 2}
        left = sum(float(jnp.sum((stored[n] - deltas.get(n, 0)) ** 2)) for n in stored)
        assert report["lost"] == pytest.approx(
            left / sum(float(jnp.sum(x**2)) for x in stored.values()), abs=1e-5
        )
        losses.append(report["lost"])
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.2
    assert "matrices are not low-rank (sign)" in darex(
        "export", files["sign"], tmp_path / "o", "--to", "peft", "--base", base, code=1
    ).output  # fmt: skip


def test_a_wide_matrix_takes_the_memory_of_its_columns(tmp_path):
    """Ten columns of 100,000: a unit matrix has 40 GB. What a configuration states may be anything."""
    for seed, config in ((0, {}), (1, {"architectures": 5})):
        wide = np.random.default_rng(seed).normal(size=(2, 100_000)).astype(np.float32)
        write(tmp_path / str(seed), {"encoder.layer.0.dense.weight": wide}, config)
    options = ("--method", "structured", "--drop-rate", 0.9999, "--bits", 16)
    darex("prune", tmp_path / "0", tmp_path / "1", tmp_path / "d", *options)
    darex("export", tmp_path / "d", tmp_path / "out", "--to", "peft")
    deltas, _ = exported_deltas(tmp_path / "out")
    expected = dx.load_delta(tmp_path / "d")["encoder"]["layer"]["0"]["dense"]["weight"]
    np.testing.assert_allclose(deltas["encoder.layer.0.dense.weight"], expected, rtol=1e-6)
    assert 0 < np.count_nonzero(expected) < 60


def test_missing_arguments_are_explained(tmp_path, encoders, folders):  # noqa: F811
    base, files = encoders
    out = tmp_path / "out"
    assert "pass the base (--base BASE)" in darex("export", files["svd"], out, "--to", "peft", code=1).output
    assert "a patch needs --base" in darex("export", files["svd"], out, "--to", "patch", code=2).output
    other = folders / "llama" / "base"
    for form in ("peft", "patch"):
        result = darex("export", files["svd"], out, "--to", form, "--base", other, code=1)
        assert "base" in result.output and "a bug in" not in result.output
    out.write_text("mine")
    assert "--overwrite" in darex("export", files["svd"], out, "--to", "patch", "--base", base, code=1).output
    assert out.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    options = ("--to", "peft", "--base", base, "--overwrite")
    for target in (base, files["svd"].parent):
        assert "would replace" in darex("export", files["svd"], target, *options, code=1).output
    assert files["svd"].exists() and (base / "model.safetensors").exists()
    options = ("--to", "patch", "--base", base, "--overwrite")
    assert (
        "would replace" in darex("export", files["svd"], base / "model.safetensors", *options, code=1).output
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_patch_gives_the_bits_of_apply(tmp_path, encoders, method, monkeypatch):  # noqa: F811
    """With the reader in the docs, running the whole page."""
    base, files = encoders
    darex("apply", base, files[method], tmp_path / "model")
    out = tmp_path / "patch.safetensors"
    report = json.loads(darex("export", files[method], out, "--to", "patch", "--base", base, "--json").output)
    (tmp_path / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    _, reader = programs("docs/many.md")
    names: dict = {}
    exec(reader, names)
    restored = load_file(tmp_path / "model" / "model.safetensors")
    # Names are the base's, a body's here; parameters that it lacks have their own.
    found = {f"bert.{n}" if f"bert.{n}" in restored else n: x for n, x in names["tensors"].items()}
    assert found.keys() == restored.keys()
    assert all(x.tobytes() == restored[name].tobytes() for name, x in found.items())
    before = load_file(base / "model.safetensors")
    changed = sum(
        int((x != before[n.removeprefix("bert.")]).sum()) if n.removeprefix("bert.") in before else x.size
        for n, x in restored.items()
    )
    assert report["changed"] == changed
    if method in ("dare", "magnitude"):
        assert out.stat().st_size < sum(x.nbytes for x in restored.values())


def test_a_patch_in_bfloat16(tmp_path, folders):
    pair = []
    for which in ("base", "fine"):
        model, params = dx.load_model(folders / "llama" / which, jnp.bfloat16)
        dx.save_params(tmp_path / which, params, model.config.to_hf())
        pair.append(tmp_path / which)
    delta = pruned(*pair, tmp_path / "delta", "--method", "magnitude", "-p", "0.99")
    darex("export", delta, tmp_path / "patch", "--to", "patch", "--base", pair[0])
    darex("apply", pair[0], delta, tmp_path / "model")
    tensors, patch = load_file(pair[0] / "model.safetensors"), load_file(tmp_path / "patch")
    for key, values in patch.items():
        if key.startswith("values/"):
            flat = tensors[key[7:]].reshape(-1)
            flat[patch["indices/" + key[7:]]] = values
        elif key.startswith("tensors/"):
            tensors[key[8:]] = values
    for name, array in load_file(tmp_path / "model" / "model.safetensors").items():
        assert array.tobytes() == tensors[name].tobytes()


def test_the_page_on_many_deltas(tmp_path, encoders, monkeypatch):  # noqa: F811
    base, files = encoders
    (tmp_path / "base").symlink_to(base)
    for name, method in (("sst2", "svd"), ("mrpc", "magnitude")):
        (tmp_path / f"{name}.safetensors").symlink_to(files[method])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(programs("docs/many.md")[0], names)
    labels = names["alone"].shape[1]
    np.testing.assert_allclose(names["mixed"][0, :labels], names["alone"][0], atol=2e-5)

"""Distilling a decoder layer by layer, on tiny models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from test_decoders import GEMMA3, LLAMA, QWEN3, batch

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import choose_scope
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.prune import Job
from darex_jax.methods.budget import Budget
from darex_jax.models import init_model, read_model_config
from darex_jax.models.layerwise import embedded, layer_models
from darex_jax.runs.blockwise import prune_blockwise
from darex_jax.tasks.source import Source

STEPS = 18
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


@pytest.mark.parametrize(
    "config",
    [LLAMA, QWEN3 | WINDOWS, GEMMA3, GEMMA3 | {"architectures": ["Gemma3TextModel"]}],
    ids=["llama", "qwen3 with windows", "gemma3", "gemma3 body"],
)
def test_layers_one_after_the_other_are_the_model(config):
    model, params = init_model(read_model_config(config), jax.random.key(0))
    ids, mask = (jnp.asarray(x) for x in batch())
    whole = model(params, ids, mask).last_hidden_state
    body = params.get("model", params)
    hidden = embedded(model.config, body["embed_tokens"]["weight"], ids)
    layers = layer_models(model.config)
    assert len(layers) == model.config.num_hidden_layers
    for i, layer in enumerate(layers):
        own = body["layers"][str(i)]
        hidden = layer(own, hidden=hidden, attention_mask=mask, target=hidden).last_hidden_state
    module = model.module(params)
    normed = getattr(module, "model", module).norm(hidden)
    real = np.asarray(mask) != 0
    np.testing.assert_allclose(np.asarray(normed)[real], np.asarray(whole)[real], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Texts of one length: one shape is compiled."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("texts") / "texts"
    path.write_text("".join("".join(rng.choice([*"abcdefgh "], 24)).strip() + "\n" for _ in range(24)))
    return Source(text=path)


@pytest.fixture
def block_wise(folders, source):
    base, fine = folders / "llama" / "base", folders / "llama" / "fine"

    def run(out, budget, **options):
        with Checkpoint(base) as b, Checkpoint(fine) as f:
            job = Job(b, f, out, choose_scope("llama"))
            return prune_blockwise(job, source, budget, **{"steps": STEPS} | options)

    return run


@pytest.mark.parametrize(("support", "bits"), [("low-rank", 4), ("random", None), ("largest", 8)])
def test_training_lowers_the_error_behind_the_last_layer(folders, block_wise, tmp_path, support, bits):
    budget, looks = Budget(bytes_per_parameter=0.5), []
    options = {"support": support, "bits": bits}
    untrained = block_wise(tmp_path / "a", budget, steps=3, **options)
    found = block_wise(
        tmp_path / "b", budget, **options, on_block=lambda *told: looks.append(told)
    )  # fmt: skip
    assert found.error < untrained.error and found.held_out == 12
    assert [told[:2] for told in looks] == [(1, 2), (2, 2)] and looks[-1][2].loss == found.error
    recipe = found.summary.recipe
    assert recipe.method == "distilled" and recipe.options["blockwise"] and recipe.options["bits"] == bits
    model, params = dx.load_model(folders / "llama" / "base", delta=tmp_path / "b")
    fine = dx.load_params(folders / "llama" / "fine")
    np.testing.assert_array_equal(params["model"]["norm"]["weight"], fine["model"]["norm"]["weight"])
    assert jnp.isfinite(model(params, jnp.ones((1, 8), jnp.int32)).logits).all()


def test_what_is_stored_is_what_was_looked_at(folders, source, block_wise, tmp_path):
    """The error that is reported is that of the restored file, measured on the whole model's own path."""
    found = block_wise(tmp_path / "delta", Budget(bytes_per_parameter=0.5), support="random")
    _, restored = dx.load_model(folders / "llama" / "base", delta=tmp_path / "delta")
    fine = dx.load_params(folders / "llama" / "fine")
    model, _ = dx.load_model(folders / "llama" / "fine")
    from darex_jax.tasks.source import hold_out, read_material

    material = read_material(folders / "llama" / "fine", source, "train")
    _, held = hold_out(len(material.encoded), found.held_out, 0)
    total = rows = 0.0
    for part in material.select(held).batches():
        states = []
        for params in (fine, restored):
            hidden = embedded(model.config, params["model"]["embed_tokens"]["weight"], part["input_ids"])
            for i, layer in enumerate(layer_models(model.config)):
                own = params["model"]["layers"][str(i)]
                mask = jnp.asarray(part["attention_mask"])
                hidden = layer(own, hidden=hidden, attention_mask=mask, target=hidden).last_hidden_state
            states.append(np.asarray(hidden) * (part["attention_mask"] * part["weight"][:, None])[..., None])
        change = np.sum((states[0] - states[1]) ** 2, (1, 2)) / np.maximum(
            np.sum(states[0] ** 2, (1, 2)), 1e-12
        )
        total, rows = total + change.sum(), rows + part["weight"].sum()
    assert total / rows == pytest.approx(found.error, rel=1e-3)


def test_an_interrupted_run_resumes_to_the_same_file(block_wise, tmp_path):
    budget = Budget(bytes_per_parameter=0.5)
    whole = block_wise(tmp_path / "whole", budget)

    def stop(done, count, look):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block_wise(tmp_path / "out", budget, checkpoints=tmp_path / "kept", on_block=stop)
    assert not (tmp_path / "out").exists()
    resumed = block_wise(tmp_path / "out", budget, checkpoints=tmp_path / "kept")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert resumed.error == whole.error


@pytest.mark.parametrize("changed", [{"seed": 1}, {"bits": 8}, {"exclude": ("layers.0.mlp",)}])
def test_checkpoints_of_other_settings_are_not_resumed(folders, source, tmp_path, changed):
    base, fine = folders / "llama" / "base", folders / "llama" / "fine"

    def run(out, checkpoints, exclude=(), **options):
        with Checkpoint(base) as b, Checkpoint(fine) as f:
            job = Job(b, f, tmp_path / out, choose_scope("llama", exclude=exclude))
            options = {"steps": 3, "support": "largest", "checkpoints": tmp_path / checkpoints} | options
            prune_blockwise(job, source, Budget(bytes_per_parameter=0.3), **options)
        return (tmp_path / out).read_bytes()

    run("first", "kept")
    assert run("second", "kept", **changed) == run("fresh", "other", **changed)


@pytest.mark.parametrize(
    ("support", "bits", "size"), [("largest", 1, 60_000), ("random", 4, 37_000), ("low-rank", 1, 37_000)]
)
def test_a_size_is_kept_to(block_wise, tmp_path, support, bits, size):
    found = block_wise(tmp_path / "out", size, support=support, bits=bits, steps=3)
    assert 0.7 * size < found.summary.file_bytes <= size
    assert (tmp_path / "out").stat().st_size == found.summary.file_bytes


def test_a_layer_out_of_scope_and_a_buffer_in_it(folders, source, tmp_path):
    """Nothing is kept of either: an old Llama's files hold `inv_freq` of every layer, never read."""
    for name in ("base", "fine"):
        named = flatten_names(dx.load_params(folders / "llama" / name))
        named |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": jnp.ones(4) for i in range(2)}
        config = json.loads((folders / "llama" / name / "config.json").read_text())
        dx.save_params(
            tmp_path / name, unflatten_names(named), config, companions_from=folders / "llama" / name
        )
    with Checkpoint(tmp_path / "base") as b, Checkpoint(tmp_path / "fine") as f:
        job = Job(b, f, tmp_path / "out", choose_scope("llama", exclude=(r"layers\.0\.(mlp|.*proj)",)))
        found = prune_blockwise(job, source, 52_000, support="random", steps=3)
    assert found.summary.file_bytes <= 52_000
    delta = flatten_names(dx.load_delta(tmp_path / "out"))
    assert np.any(np.asarray(delta["model.layers.1.mlp.up_proj.weight"]))
    assert not any("inv_freq" in name for name in delta)


def test_memory_holds_a_layer(source, tmp_path):
    config = read_model_config(LLAMA | {"num_hidden_layers": 6, "vocab_size": 300})
    from darex_jax.tasks.word_problems import word_problem_tokenizer

    model, base = init_model(config, jax.random.key(0))
    fine = jax.tree.map(lambda x: x + 0.05 * jnp.sin(100 * x), base)
    for name, params in (("base", base), ("fine", fine)):
        dx.save_params(tmp_path / name, params, model.config.to_hf())
        word_problem_tokenizer().save_pretrained(tmp_path / name)
    layer = sum(x.nbytes for x in jax.tree.leaves(base["model"]["layers"]["0"]))
    del base, fine
    most = []

    def measure(done, count, look):
        most.append(sum(x.nbytes for x in jax.live_arrays()))

    with Checkpoint(tmp_path / "base") as b, Checkpoint(tmp_path / "fine") as f:
        job = Job(b, f, tmp_path / "out", choose_scope("llama"))
        budget = Budget(bytes_per_parameter=0.1)
        prune_blockwise(job, source, budget, steps=3, support="largest", on_block=measure)
    assert len(most) == 6 and max(most[1:]) - min(most[1:]) < layer  # the same at every layer, but for parts


def darex(*arguments, fails=False):
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def test_the_command(folders, tmp_path):
    base, fine = folders / "llama" / "base", folders / "llama" / "fine"
    common = ("--method", "distilled", "--block-wise", "--text", folders / "text", "--steps", 6)
    size = 60_000
    entries = json.loads(darex("prune", base, fine, tmp_path / "dare", "-p", 0.9, "--json"))["pruned_entries"]
    told = ("--bytes-per-parameter", size / entries)
    report = json.loads(darex("prune", base, fine, tmp_path / "out", *common, *told, "--json"))
    assert (
        0.5 * size < report["bytes"] <= size and report["last_layer_error"] >= 0 and report["held_out"] == 1
    )
    assert "last layer" in darex("prune", base, fine, tmp_path / "out", *common, *told)
    for wrong, message in (
        (("--size", "1000x"), "without any part the file is"),
        (("--bytes-per-parameter", 1, "--include", "embed_tokens"), "leave it out with --exclude"),
        (("--max-loss", 0.1), "which --max-loss needs"),
        (("--bytes-per-parameter", 1, "--support", "allocated"), "which --support allocated needs"),
    ):
        assert message in " ".join(
            darex("prune", base, fine, tmp_path / "no", *common, *wrong, fails=True).split()
        )
        assert not (tmp_path / "no").exists()
    dare = ("--method", "dare", "--block-wise", "-p", 0.9)
    assert "dare does not train" in darex("prune", base, fine, tmp_path / "no", *dare, fails=True)
    encoder = folders / "bert" / "base", folders / "bert" / "fine"
    assert "only decoders" in darex("prune", *encoder, tmp_path / "no", *common, *told, fails=True)


def test_an_encoder_has_no_layer_models(folders):
    with pytest.raises(DarexError, match="only decoders go layer by layer"):
        layer_models(dx.load_model(folders / "bert" / "base")[0].config)

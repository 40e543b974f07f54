"""Checkpoints and artifacts end to end: bits, and the command line."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.errors import DarexError, DarexWarning
from darex_jax.core.scope import choose_scope
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.card import CARD
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.prune import Job
from darex_jax.files.restore import apply_artifact, restored_params
from darex_jax.files.safetensors import FileError, SafetensorsFile, write_tensors
from darex_jax.tasks.batching import load_tokenizer
from tests.pairs import BF16, FILES, darex, encoder, prune, read_all, with_files, write


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("drop_rate", "q"), [(0.9, None), (0.9, 0.3), (0.0, None), (0.999, 0.004)])
def test_restored_model_has_the_in_memory_models_bits(tmp_path, dtype, shards, drop_rate, q):
    base, fine = encoder(0, dtype, prefix="", head=False), encoder(1, dtype)
    write(tmp_path / "base", base, shards=shards)
    write(tmp_path / "fine", fine, {"num_labels": 2})
    summary = prune(tmp_path / "base", tmp_path / "fine", tmp_path / "d", drop_rate, q=q)
    with Checkpoint(tmp_path / "base") as b, DeltaFile(tmp_path / "d") as d:
        apply_artifact(b, d, tmp_path / "out")
        in_memory = dict(restored_params(b, d))
        stored = {name: d.read(f"values/{name}") for name in d.recipe.parameters}
    restored = read_all(tmp_path / "out")
    assert restored.keys() == fine.keys() == in_memory.keys()
    assert all(in_memory[name].tobytes() == restored[name].tobytes() for name in restored)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_labels"] == 2
    np.testing.assert_array_equal(restored["classifier.weight"], fine["classifier.weight"])
    np.testing.assert_array_equal(restored["bert.embeddings.position_ids"], np.arange(8)[None])
    floats = {n: v for n, v in fine.items() if n.startswith("bert.") and v.dtype == dtype}
    delta = dx.compute_delta(floats, {n: base[n.removeprefix("bert.")] for n in floats})
    # Stored values are rounded to the fine-tuned dtype; in float32 that changes nothing.
    delta = {name: leaf.astype(dtype).astype(jnp.float32) for name, leaf in delta.items()}
    mask = dx.random_mask(jax.random.key(0), delta, drop_rate)
    expected = dx.apply_delta(
        {n: base[n.removeprefix("bert.")] for n in floats}, dx.prune(jax.random.key(0), delta, drop_rate, q)
    )
    for name in floats:
        assert restored[name].dtype == dtype
        assert restored[name].tobytes() == np.asarray(expected[name]).tobytes(), name
        values = np.asarray(delta[name])[np.asarray(mask[name])].astype(dtype)
        np.testing.assert_array_equal(stored[name], values)
    assert summary.survivors == sum(int(m.sum()) for m in jax.tree.leaves(mask))


def test_a_delta_of_format_1_as_parts(tmp_path, pair):
    prune(*pair, tmp_path / "d", q=0.3)
    dense = dx.load_delta(tmp_path / "d")
    parts = dx.load_delta(tmp_path / "d", parts=True)
    found = jax.tree.map(lambda part: part.to_dense(), parts, is_leaf=lambda x: hasattr(x, "to_dense"))
    jax.tree.map(np.testing.assert_array_equal, found, dense)


def test_any_safetensors_reader_opens_it(tmp_path, pair):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    prune(*pair, tmp_path / "d")
    theirs = safetensors_numpy.load_file(tmp_path / "d")
    with DeltaFile(tmp_path / "d") as d:
        assert theirs.keys() == d.tensors.keys()
        for name, array in theirs.items():
            np.testing.assert_array_equal(array, d.read(name))


def test_same_command_same_bytes(tmp_path, pair):
    prune(*pair, tmp_path / "a")
    prune(*pair, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_extra_vocabulary_rows_and_old_names(tmp_path):
    base = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): v for n, v in encoder(0, head=False).items()}
    fine = encoder(1, rows=53)
    write(tmp_path / "base", base)
    write(tmp_path / "fine", fine)
    summary = prune(tmp_path / "base", tmp_path / "fine", tmp_path / "d")
    assert summary.match.extra_rows == {"bert.embeddings.word_embeddings.weight": 3}
    darex("apply", tmp_path / "base", tmp_path / "d", tmp_path / "out")
    restored = read_all(tmp_path / "out")
    name = "bert.embeddings.word_embeddings.weight"
    assert restored[name].shape == (53, 16)
    np.testing.assert_array_equal(restored[name][50:], fine[name][50:])
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in restored


def test_decoder_scope(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,), "lm_head.weight": (20, 8)}
    shapes |= {"model.layers.0.mlp.up_proj.weight": (32, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8)}
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    fine = {name: leaf + np.float32(0.01) for name, leaf in base.items()} | {
        "model.norm.weight": base["model.norm.weight"]
    }
    for name, tensors in (("base", base), ("fine", fine)):
        write(tmp_path / name, tensors, {"model_type": "llama"})
    darex("prune", tmp_path / "base", tmp_path / "fine", tmp_path / "d", "--drop-rate", 0.5)
    with DeltaFile(tmp_path / "d") as d:
        assert sorted(d.recipe.parameters) == [n for n in sorted(shapes) if "layers" in n]
        assert sorted(d.names("dense")) == ["lm_head.weight", "model.embed_tokens.weight"]


def test_command_line(tmp_path, pair):
    base, fine = pair
    out, restored = tmp_path / "delta.safetensors", tmp_path / "restored"
    checked = json.loads(darex("check", base, fine, "--json").stdout)
    assert checked["pruned"]["parameters"] == 5 and checked["dense_names"] == ["classifier.weight"]
    pruned = json.loads(darex("prune", base, fine, out, "-p", 0.9, "--seed", 3, "--json").stdout)
    assert pruned["bytes"] == out.stat().st_size
    seen = json.loads(darex("inspect", out, "--json").stdout)
    assert seen["bytes_per_parameter"] == out.stat().st_size / seen["entries"]
    assert seen["key"] == [0, 3] and seen["survivors"] == pruned["survivors"]
    assert "ok" in darex("verify", out, "--base", base).stdout
    darex("apply", base, out, restored)
    assert "already exists" in darex("apply", base, out, restored, code=1).stderr
    darex("apply", base, out, restored, "--overwrite")
    for command in ("check", "prune", "apply", "inspect", "verify", "train", "eval", "find-q", "demo"):
        assert "--json" in darex(command, "--help").stdout
    q_file = tmp_path / "q.json"
    q_file.write_text('{"q": 0.25}')
    darex("prune", base, fine, out, "-p", 0.9, "--q", q_file)
    assert json.loads(darex("inspect", out, "--json").stdout)["q"] == [0.25]
    assert (
        "neither a number nor a file" in darex("prune", base, fine, out, "-p", 0.9, "--q", "x", code=2).stderr
    )


def test_commands_on_files_import_little():
    code = (
        "import sys; from darex_jax.cli import main; import darex_jax.files.prune, darex_jax.files.restore; "
        "heavy = {'transformers', 'flax', 'datasets', 'torch'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys; import darex_jax, darex_jax.cli; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrong_models_are_named(tmp_path, pair):
    base, fine = pair
    prune(base, fine, tmp_path / "d")
    other = encoder(0, prefix="", head=False)
    other["pooler.dense.weight"][3, 4] += 1
    write(tmp_path / "other", other)
    error = darex("apply", tmp_path / "other", tmp_path / "d", tmp_path / "x", code=1).stderr
    assert "'pooler.dense.weight' has other values" in error
    assert (
        "'pooler.dense.weight'"
        in darex("verify", tmp_path / "d", "--base", tmp_path / "other", code=1).stderr
    )
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*partial"))
    wrong = encoder(1, rows=40)
    wrong["bert.encoder.layer.1.x.weight"] = np.zeros(3, np.float32)
    del wrong["bert.encoder.layer.0.output.dense.bias"]
    write(tmp_path / "wrong", wrong)
    error = darex("check", base, tmp_path / "wrong", code=1).stderr
    assert "is [50, 16] in the base and [40, 16]" in error
    assert "'bert.encoder.layer.1.x.weight' is in the fine-tuned model only" in error
    assert "'encoder.layer.0.output.dense.bias' is in the base only" in error


def test_parameters_that_do_not_pair(tmp_path):
    x = np.ones(6, np.float32)
    write(tmp_path / "base", {"a": x, "b": x.astype(np.int64), "c": x})
    write(tmp_path / "fine", {"bert.a": x, "a": x, "bert.b": x, "bert.c": x.astype(np.int8)})
    error = darex("check", tmp_path / "base", tmp_path / "fine", code=1).stderr
    assert "'a' of the base matches both 'a' and 'bert.a'" in error
    assert "'bert.b' is int64 in the base and float32 in the fine-tuned model: floating in only one" in error
    assert "'bert.c' is float32 in the base and int8 in the fine-tuned model: floating in only one" in error


def test_empty_and_single_numbers(tmp_path):
    shapes = {"bert.a": (), "bert.b": (0,), "bert.embed.weight": (0, 3), "bert.c": (4, 0), "bert.d": (5,)}
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    fine = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    fine["bert.embed.weight"] = np.ones((2, 3), np.float32)  # extra rows beyond none
    write(tmp_path / "base", base)
    write(tmp_path / "fine", fine)
    prune(tmp_path / "base", tmp_path / "fine", tmp_path / "d", 0.0)
    darex("verify", tmp_path / "d", "--base", tmp_path / "base")
    darex("apply", tmp_path / "base", tmp_path / "d", tmp_path / "out")
    restored = read_all(tmp_path / "out")
    assert {name: x.shape for name, x in restored.items()} == {name: x.shape for name, x in fine.items()}
    assert all((x == 1).all() for x in restored.values())


def test_params_round_trip(tmp_path):
    named = encoder(1, BF16)
    dx.save_params(tmp_path / "m", unflatten_names(named), {"model_type": "bert"})
    loaded = flatten_names(dx.load_params(tmp_path / "m"))
    assert loaded.keys() == named.keys()
    for name, leaf in named.items():
        assert loaded[name].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(loaded[name], np.float32), np.asarray(leaf, np.float32))
    cast = flatten_names(dx.load_params(tmp_path / "m", dtype=jnp.float32))
    assert cast["classifier.weight"].dtype == jnp.float32
    with pytest.raises(FileError, match="already exists"):
        dx.save_params(tmp_path / "m", unflatten_names(named))


def test_read_into_stops_at_a_shrunk_file(tmp_path):
    write_tensors(tmp_path / "m", {"w": np.zeros(1000, np.float32)})
    with SafetensorsFile(tmp_path / "m") as file:
        os.truncate(tmp_path / "m", 500)
        with pytest.raises(FileError, match="became shorter"):
            file.read("w")


def test_artifact_size_at_one_percent(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"bert.layer.{i}.weight": rng.normal(size=(1500, 1000)).astype(BF16) for i in range(2)}
    fine = {n: (v.astype(np.float32) * 1.01).astype(BF16) for n, v in base.items()}
    write(tmp_path / "base", base)
    write(tmp_path / "fine", fine)
    summary = prune(tmp_path / "base", tmp_path / "fine", tmp_path / "d", 0.99)
    assert (tmp_path / "d").stat().st_size <= 2.05 * 0.01 * summary.pruned_size + 8000


def test_help_names_every_command():
    text = darex("--help").stdout
    assert all(c in text for c in ("check", "prune", "apply", "inspect", "verify", "demo"))
    assert Path(sys.executable).exists()


def test_out_of_memory_names_the_options_that_take_less(tmp_path, pair, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 23 bytes.\nmore")

    monkeypatch.setattr("darex_jax.runs.train.train_run", fails)
    said = darex("train", pair[0], tmp_path / "out", code=1).stderr
    assert "Error: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 23 bytes.)." in said
    assert "--remat" in said and "--block-wise" not in said and "a bug in" not in said


def test_library_round_trip(tmp_path):
    """`save_delta`, `load_delta` and `darex apply` agree with `prune` and `apply_delta`, bit for bit."""
    named = {n: v for n, v in encoder(0, head=False).items() if v.dtype == np.float32}
    fine = {n: encoder(1)[n] for n in named}
    write(tmp_path / "base", named)
    base, delta = unflatten_names(named), dx.compute_delta(unflatten_names(fine), unflatten_names(named))
    dx.save_delta(tmp_path / "d", jax.random.key(5), delta, 0.9, 0.3, base=base)
    pruned = dx.prune(jax.random.key(5), delta, 0.9, 0.3)
    loaded = dx.load_delta(tmp_path / "d")
    assert dx.load_kept(tmp_path / "d") == {}
    expected = flatten_names(dx.apply_delta(base, pruned))
    for name, leaf in flatten_names(dx.apply_delta(base, loaded)).items():
        assert np.asarray(leaf).tobytes() == np.asarray(expected[name]).tobytes()
    darex("verify", tmp_path / "d", "--base", tmp_path / "base")
    darex("apply", tmp_path / "base", tmp_path / "d", tmp_path / "out")
    for name, leaf in read_all(tmp_path / "out").items():
        assert leaf.tobytes() == np.asarray(expected[name]).tobytes()
    with pytest.raises(ValueError, match="has no base parameter of"):
        dx.save_delta(tmp_path / "e", jax.random.key(5), delta, 0.9, base={"w": jnp.zeros(3)})


def test_load_delta_of_a_checkpoint_pair(tmp_path, pair):
    prune(*pair, tmp_path / "d")
    assert list(flatten_names(dx.load_kept(tmp_path / "d"))) == ["classifier.weight"]
    assert "bert.pooler.dense.weight" in flatten_names(dx.load_delta(tmp_path / "d"))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("config.json", FILES["config.json"].replace("1e-12", "1e-5"), "was different"),
        ("vocab.txt", "[UNK]\nb\n", "was different"),
        ("vocab.txt", None, "is missing; it existed"),
    ],
)
def test_a_base_whose_files_changed_is_refused(tmp_path, pair, name, content, what):
    base, fine = with_files(pair[0]), with_files(pair[1])
    delta, out = tmp_path / "d", tmp_path / "out"
    darex("prune", base, fine, delta, "-p", 0.9)
    assert darex("verify", delta, "--base", base).stderr == ""
    (base / name).unlink() if content is None else (base / name).write_text(content)
    fault = f"{base / name}, which the restored model inherits, {what} when {delta} was made"
    for command in (("apply", base, delta, out), ("verify", delta, "--base", base)):
        assert fault in darex(*command, code=1).stderr
        allowed = darex(*command, "--allow-changed-files", "--json")
        assert f"warning: {fault}: allowed." in allowed.stderr
        assert len(json.loads(allowed.stdout)["warnings"]) == 1
    assert {file.name for file in out.iterdir()} == {CARD, *(file.name for file in base.iterdir())}
    with pytest.raises(FileError, match="which the restored model inherits"):
        dx.load_model(base, delta=delta)
    (base / "vocab.txt").touch()
    with pytest.raises(FileError, match="which the restored model inherits"):
        load_tokenizer(base, delta)


def test_files_of_the_delta_may_change_in_the_base(tmp_path, pair):
    base, fine = with_files(pair[0]), pair[1]  # the fine-tune has another config.json and no vocab.txt
    darex("prune", base, fine, tmp_path / "d", "-p", 0.9)
    (base / "config.json").write_text('{"model_type": "bert", "layer_norm_eps": 1}')
    assert darex("apply", base, tmp_path / "d", tmp_path / "out").stderr == ""
    assert (tmp_path / "out/config.json").read_bytes() == (fine / "config.json").read_bytes()
    assert (tmp_path / "out/vocab.txt").read_text() == FILES["vocab.txt"]


def test_a_restored_model_has_no_file_that_the_fine_tune_lacks(tmp_path, pair):
    """A chat template in a file of its own, for one, takes precedence over the tokenizer's."""
    own = {"tokenizer_config.json": '{"chat_template": "mine"}', "spm.model": "pieces"}
    base, fine = with_files(pair[0]), with_files(pair[1], FILES | own)
    for name in ("chat_template.jinja", "generation_config.json"):
        (base / name).write_text("{}")
    darex("prune", base, fine, tmp_path / "d", "-p", 0.9)
    (base / "added_tokens.json").write_text("{}")  # later, and of no importance to the restored model
    for more in ((), ("--allow-changed-files",)):
        assert darex("apply", base, tmp_path / "d", tmp_path / "out", *more, "--overwrite").stderr == ""
        found = {file.name for file in (tmp_path / "out").iterdir()}
        assert found == {CARD, *(file.name for file in fine.iterdir())}
    assert (tmp_path / "out/spm.model").read_text() == "pieces"
    run = darex("merge", base, tmp_path / "d", tmp_path / "m", "--method", "linear", "--json")
    assert json.loads(run.stdout) and not (tmp_path / "m/chat_template.jinja").exists()


def test_files_of_a_kind_that_neither_model_had_are_not_taken_unasked(tmp_path, pair):
    darex("prune", *pair, tmp_path / "d", "-p", 0.9)
    (pair[0] / "tokenizer.json").write_text("{}")
    fault = darex("apply", pair[0], tmp_path / "d", tmp_path / "out", code=1).stderr
    assert "tokenizer.json, which the restored model inherits, did not exist" in fault
    allowed = darex("apply", pair[0], tmp_path / "d", tmp_path / "out", "--allow-changed-files").stderr
    assert "did not exist" in allowed and (tmp_path / "out/tokenizer.json").exists()


def test_patterns_that_match_nothing_are_reported(tmp_path, pair):
    found = darex("prune", *pair, tmp_path / "d", "-p", 0.9, "--exclude", "embedings", "--json")
    assert "--exclude 'embedings' matches no parameter" in found.stderr
    assert len(json.loads(found.stdout)["warnings"]) == 1
    for option, value in (("--exclude", "embedings"), ("--rename", "zzz=y")):
        checked = json.loads(darex("check", pair[1], pair[1], option, value, "--json").stdout)
        assert f"{option} '{value.partition('=')[0]}' matches no parameter" in checked["warnings"][0]
    assert darex("prune", *pair, tmp_path / "d", "-p", 0.9, "--exclude", "embeddings").stderr == ""


@pytest.mark.parametrize("method", ["dare", "svd", "magnitude", "sign-svd"])
def test_entries_that_are_not_finite_are_named_whatever_the_method(tmp_path, pair, method):
    fine = encoder(1)
    fine["bert.pooler.dense.weight"][1, 2] = np.nan
    write(tmp_path / "nan", fine)
    budget = ("-p", 0.5) if method == "dare" else ("--bytes-per-parameter", 3)
    line = ("prune", pair[0], tmp_path / "nan", tmp_path / "d", "--method", method, *budget)
    assert "'bert.pooler.dense.weight' has 1 NaN" in darex(*line, code=1).stderr
    said = darex("merge", pair[0], tmp_path / "nan", tmp_path / "m", "--method", "linear", code=1).stderr
    assert f"{tmp_path / 'nan'}: 'pooler.dense.weight' differs from the base by NaN" in said


def test_an_adapter_is_no_model_and_the_error_says_what_makes_one(tmp_path, pair):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    said = darex("prune", pair[0], tmp_path / "lora", tmp_path / "d", "-p", 0.5, code=1).stderr
    assert "darex merge-adapter BASE ADAPTER" in said


def test_a_file_of_a_size_counts_what_it_reads_once(tmp_path, pair):
    """However many sizes are tried."""
    from darex_jax.methods.evidence import Evidence
    from darex_jax.runs.prune import prune_by

    counted, progress = [], []
    for budget in (dx.Budget(drop_rate=0.5), 4000):
        with Checkpoint(pair[0]) as b, Checkpoint(pair[1]) as f:
            job = Job(b, f, tmp_path / "d", choose_scope("bert"), progress=progress.append)
            prune_by(job, "dare", budget, gathered=(Evidence(), {}), options={"bits": 4})
        counted.append(sum(progress))
        progress.clear()
    assert counted[0] == counted[1] > 0


def test_probable_mistakes_give_warnings(tmp_path, pair):
    base, fine = pair
    out = tmp_path / "d"

    def warned(*options, fine=fine):
        run = darex("prune", base, fine, out, *options, "--json")
        lines = json.loads(run.stdout)["warnings"]
        assert run.stderr == "".join(f"warning: {line}\n" for line in lines)
        return "".join(lines)

    assert warned("-p", 0.9) == warned("-p", 0.99, "--q", 0.01) == warned("-p", 0.9, "--q", 0.5) == ""
    assert "q = 0.05 of 'bert." in warned("-p", 0.9, "--q", 0.05)
    assert "every delta is zero" in warned("-p", 0.9, fine=base)
    assert "keeps nothing: 1 - drop rate is below the masks' resolution" in warned("-p", 1 - 2**-33, "--q", 1)
    assert "nothing survived the drop rate of 0.99999" in warned("-p", 0.99999)
    darex("apply", base, out, tmp_path / "out")
    with pytest.warns(DarexWarning, match="every delta is zero"):
        dx.save_delta(out, jax.random.key(0), {"w": jnp.zeros(50)}, 0.5, base={"w": jnp.ones(50)})


def test_many_scalars(tmp_path):
    """The header has room for the shapes of their values, [0] or [1], which are longer than theirs, []."""
    for seed in (0, 1):
        scalars = {f"encoder.gate.{i}": np.float32(i + seed) for i in range(80)}
        write(tmp_path / str(seed), {name: np.asarray(x) for name, x in scalars.items()})
    prune(tmp_path / "0", tmp_path / "1", tmp_path / "d", 0.0)
    darex("verify", tmp_path / "d", "--base", tmp_path / "0")
    darex("apply", tmp_path / "0", tmp_path / "d", tmp_path / "out")
    assert {name: float(x) for name, x in read_all(tmp_path / "out").items()} == scalars


def test_integers_of_the_base_are_not_changed(tmp_path):
    base = {"w": jnp.ones(9), "ids": jnp.arange(9)}
    delta = dx.compute_delta({"w": jnp.full(9, 2.0), "ids": jnp.arange(9)}, base)
    dx.save_delta(tmp_path / "d", jax.random.key(0), delta, 0.0, {"w": 1.0, "ids": 1.0}, base=base)
    assert list(dx.load_delta(tmp_path / "d")) == ["w"]
    with pytest.raises(DarexError, match="'ids' of the base holds int32, which a delta does not change"):
        dx.save_delta(tmp_path / "d", jax.random.key(0), {"ids": jnp.ones(9)}, 0.0, base=base)


def test_save_delta_counts_and_refuses_like_prune(tmp_path):
    base = {"a": jnp.ones(40), "b": [jnp.ones((5, 8)), jnp.zeros(3)]}
    delta = {"a": jnp.ones(40).at[3].set(jnp.nan).at[4].set(-jnp.inf), "b": [jnp.ones((5, 8)), jnp.ones(3)]}
    key = jax.random.key(0)

    def save(q, delta=delta):
        return dx.save_delta(tmp_path / "d", key, delta, 0.5, q, base=base)

    assert save(None).nonfinite == 2
    by_leaf = {"a": 0.5, "b.0": 0.6, "b.1": 0.7}
    for q in ({"a": 0.5, "b": [0.6, 0.7]}, by_leaf, {"a": np.float32(0.5), "b": (0.6, jnp.float32(0.7))}):
        recipe = save(q)
        assert {name: round(entry["q"], 6) for name, entry in recipe.parameters.items()} == by_leaf
    as_list = dx.save_delta(tmp_path / "d", key, [delta["a"]], 0.5, [0.8], base=[base["a"]])
    assert as_list.parameters["0"]["q"] == 0.8
    assert dx.load_delta(tmp_path / "d")["0"].shape == (40,)
    for q, text in (
        (by_leaf | {"c": 1.0}, "q has 'c', which is not a parameter"),
        ({"a": 0.5}, "q has no entry for 'b.0'; q has no entry for 'b.1'"),
        (by_leaf | {"a": 0}, "q of 'a' must be a positive float32 number"),
        (by_leaf | {"a": jnp.ones(2)}, "q of 'a' must be a positive float32 number"),
    ):
        with pytest.raises(DarexError, match=text):
            save(q)
    with pytest.raises(DarexError, match="'a' of the delta holds int32: only floating"):
        save(None, {"a": jnp.ones(40, jnp.int32)})
    with pytest.raises(DarexError, match="is not a valid parameter name in a file"):
        dx.save_delta(tmp_path / "d", key, {"a\n": jnp.ones(3)}, 0.5, base={"a\n": jnp.ones(3)})


def test_unknown_names_of_q_are_refused(tmp_path, pair):
    q = dict.fromkeys(encoder(1), 0.5) | {"classifier.weight": 0.5}  # out of scope, which is allowed
    prune(*pair, tmp_path / "d", q=q)
    with pytest.raises(DarexError, match=r"q has 'bert\.pooler', which is not a parameter"):
        prune(*pair, tmp_path / "d", q=q | {"bert.pooler": 0.5})


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_load_delta_needs_no_more_than_its_result(tmp_path, drop_rate):
    entries = 6 << 20
    base = {"w": np.zeros(entries, np.float32)}
    dx.save_delta(tmp_path / "d", jax.random.key(0), {"w": base["w"] + 1}, drop_rate, base=base)
    dx.load_delta(tmp_path / "d")  # compiled
    tracemalloc.start()
    try:
        dx.load_delta(tmp_path / "d")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * entries + (34 << 20)  # the leaf, and memory for a chunk of a million entries

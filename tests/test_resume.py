"""Resuming, repeating and running trainings from the command line, on a tiny BERT and a tiny Llama."""

import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax import runs
from darex_jax.cli import main
from darex_jax.core.errors import FileError
from darex_jax.core.tree import flatten_names
from darex_jax.files.atomic import only_one
from darex_jax.files.manifest import params_digest
from darex_jax.models import init_model, read_model_config
from darex_jax.runs import train as train_module
from darex_jax.runs.repeat import repeat_run
from darex_jax.runs.train import train_run
from darex_jax.tasks.word_problems import word_problem_tokenizer
from darex_jax.training.checkpoints import Checkpoints
from darex_jax.training.loop import Recipe, StepRecord, train
from darex_jax.training.record import metrics_file, plot_metrics, read_metrics

BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 57, "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 128,
    "type_vocab_size": 2, "initializer_range": 0.1, "layer_norm_eps": 1e-12,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu",
    "max_position_embeddings": 512, "initializer_range": 0.1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
RECIPE = Recipe(learning_rate=1e-3, steps=12, batch_size=8, optimizer="adamr", weight_decay=0.01)
SHORT = {"limit": 60, "validation_limit": 20, "checkpoint_every": 3}


@pytest.fixture(scope="module", autouse=True)
def few_test_examples():
    """The final report of a run uses 48 examples instead of 1,000."""
    load = train_module.load_task

    def load_few(*arguments):
        task = load(*arguments)
        return dataclasses.replace(task, test=task.test.select(slice(48)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "load_task", load_few)
        yield


def save_bert(path):
    """A tiny BERT with a character-level vocabulary."""
    from transformers import BertTokenizerFast

    model, params = init_model(read_model_config(BERT), jax.random.key(0))
    dx.save_params(path, params, model.config.to_hf())
    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return path


def save_llama(path):
    """A tiny Llama with the word problems' tokenizer."""
    tokenizer = word_problem_tokenizer()
    config = LLAMA | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model, params = init_model(read_model_config(config), jax.random.key(0))
    dx.save_params(path, params, model.config.to_hf())
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="module")
def whole(bert, tmp_path_factory):
    """An uninterrupted run: its directory and its report."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train_run(bert, out, RECIPE, **SHORT)


def weights(path):
    return (path / "model.safetensors").read_bytes()


def command(*arguments):
    return [sys.executable, "-m", "darex_jax", *map(str, arguments)]


OPTIONS = (
    "--learning-rate", 1e-3, "--steps", 12, "--batch-size", 8, "--optimizer", "adamr", "--weight-decay", 0.01,
    "--limit", 60, "--validation-limit", 20, "--checkpoint-every", 3,
)  # fmt: skip


# Resuming.


def test_a_killed_process_resumes_bit_for_bit(bert, whole, tmp_path):
    out, _ = whole
    line = command("train", bert, tmp_path / "killed", *OPTIONS)
    metrics = tmp_path / "killed.run" / "metrics.jsonl"
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 600
    while len(read_metrics(metrics)) < 5 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    before = read_metrics(metrics)
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"resuming the run in {tmp_path / 'killed.run'}" in done.stderr
    assert weights(tmp_path / "killed") == weights(out)
    after = read_metrics(metrics)
    assert [x["step"] for x in after] == list(range(12)) and len(before) < 12
    expected = read_metrics(out.with_name("whole.run") / "metrics.jsonl")
    for got, want in zip(after, expected, strict=True):
        got, want = ({k: v for k, v in x.items() if k != "examples_per_second"} for x in (got, want))
        assert got == want
    again = CliRunner().invoke(main, list(map(str, line[3:])))
    assert again.exit_code == 1 and "already exists; choose another path" in again.stderr


class Stop(Exception):
    pass


def interrupted(base, out, at, **options):
    """A run that ends in the middle of step `at`."""

    def on_step(steps, line):
        if line["step"] == at:
            raise Stop

    with pytest.raises(Stop):
        train_run(base, out, RECIPE, **(SHORT | options), on_step=on_step)


@pytest.mark.parametrize("at", [0, 2, 3, 7, 11])
def test_resuming_from_any_step(bert, whole, tmp_path, at):
    interrupted(bert, tmp_path / "out", at)
    train_run(bert, tmp_path / "out", RECIPE, **SHORT)
    assert weights(tmp_path / "out") == weights(whole[0])


def newest(out):
    folder = out.with_name(out.name + ".run") / "checkpoints"
    return max((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def large_files(folder):
    """The files with arrays: orbax stores some content twice."""
    return [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 1000]


def flip_a_byte(folder):
    for file in large_files(folder):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def cut_short(folder):
    for file in large_files(folder):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_its_files(folder):
    for file in large_files(folder):
        file.unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, without_its_files])
def test_a_damaged_checkpoint_is_skipped(bert, whole, tmp_path, damage):
    interrupted(bert, tmp_path / "out", 10)
    assert newest(tmp_path / "out").name == "9"
    damage(newest(tmp_path / "out"))
    said = []
    train_run(bert, tmp_path / "out", RECIPE, **SHORT, say=said.append)
    assert any("9 is damaged and set aside; the one before is used" in line for line in said)
    assert weights(tmp_path / "out") == weights(whole[0])


def test_another_command_does_not_resume(bert, tmp_path):
    interrupted(bert, tmp_path / "out", 5)
    with pytest.raises(ValueError, match=r"interrupted run with another limit \(60 there, 61 here\)"):
        train_run(bert, tmp_path / "out", RECIPE, **(SHORT | {"limit": 61}))


@pytest.fixture
def kept(tmp_path):
    """Checkpoints of steps 1 to 5, the best at 2, of a state multiplied by the step."""
    checkpoints = Checkpoints(tmp_path / "c", every=1, keep=2, warn=lambda line: None)
    state = {"w": jax.numpy.arange(4.0)}
    assert checkpoints.restore(state) is None and checkpoints.best(state) is None
    for step, metric in enumerate([0.1, 0.9, 0.3, 0.2, 0.25], start=1):
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x * s, state), metric)
    return checkpoints, state


def test_the_newest_and_the_best_are_kept(kept):
    checkpoints, state = kept
    assert checkpoints.steps() == [2, 4, 5]
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [
        "2",
        "2.json",
        "4",
        "4.json",
        "5",
        "5.json",
    ]
    for (step, found), expected in ((checkpoints.restore(state), 5), (checkpoints.best(state), 2)):
        assert step == expected
        np.testing.assert_array_equal(found["w"], expected * np.arange(4.0))
    with pytest.raises(ValueError, match="need every >= 1 and keep >= 1, got 0 and 2"):
        Checkpoints(checkpoints.folder, every=0)


def test_damage_of_any_file_falls_back_to_the_previous_checkpoint(kept):
    checkpoints, state = kept
    for step, before in ((5, 4), (4, 2)):
        (checkpoints.folder / f"{step}.json").write_text("{")
        assert checkpoints.restore(state)[0] == before
        assert (checkpoints.folder / f"{step}.damaged").is_dir()
    for file in (checkpoints.folder / "2").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert checkpoints.best(state) is None and checkpoints.restore(state) is None
    checkpoints.save(5, state, 0.5)
    assert checkpoints.restore(state)[0] == 5


def test_other_errors_are_not_taken_for_damage(kept, monkeypatch):
    checkpoints, state = kept

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Checkpoints, "_read", full)
    with pytest.raises(MemoryError):
        checkpoints.restore(state)
    assert checkpoints.steps() == [2, 4, 5]


def test_a_checkpoint_that_does_not_fit_leaves_the_others(tmp_path, monkeypatch, capfd):
    """A file size limit simulates a full disk; orbax then fails in many ways and places."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    keys = jax.random.split(jax.random.key(0), 20)
    state = {str(i): jax.random.normal(key, (10, 1000)) for i, key in enumerate(keys)}
    checkpoints = Checkpoints(tmp_path / "c", every=1)
    checkpoints.save(1, state, 0.5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(
            FileError, match=r"c: the checkpoint after step 2 cannot be written .File too large.. Free disk"
        ) as e:
            checkpoints.save(2, state, 0.6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(e.value)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["1", "1.json"]
    assert checkpoints.restore(state)[0] == 1
    checkpoints.save(2, state, 0.6)
    assert checkpoints.restore(state)[0] == 2
    del e
    gc.collect()
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_reported_whatever_orbax_raises(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise RuntimeError("Event loop is closed")

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(orbax.checkpoint.StandardCheckpointer, "save", closed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(FileError, match="the disk is full: 1 bytes are free, the state has 16"):
        Checkpoints(tmp_path / "c", every=1).save(1, {"w": jax.numpy.arange(4.0)})


def test_two_trainings_do_not_share_an_out(bert, tmp_path):
    with only_one(tmp_path / "out.run" / "lock", ""):
        with pytest.raises(
            FileError, match=r"another training is writing .*out; wait for it, or choose another OUT"
        ):
            train_run(bert, tmp_path / "out", RECIPE, **SHORT)
        assert [p.name for p in (tmp_path / "out.run").iterdir()] == ["lock"]


def test_the_best_checkpoint_is_returned_if_asked_for(tmp_path):
    """Trains one number that grows by about one Adam step at a time; the metric is best in the middle."""

    def loss(model, params, batch, key):
        return -params["w"].sum(), jax.numpy.float32(1)

    def batches(epoch):
        yield from [{"x": np.zeros((2, 1), np.float32)}] * 3

    recipe = Recipe(learning_rate=0.1, steps=6, batch_size=2, warmup_ratio=0.0)
    seen = []

    def validate(params):
        seen.append(float(params["w"]))
        return -abs(len(seen) - 2)  # best at the second checkpoint

    def run(folder, **options):
        return train(
            loss, None, {"w": jax.numpy.zeros(())}, batches, recipe, steps=6, dropout_key=None, **options,
            checkpoints=Checkpoints(folder, every=2, keep=1), validate=validate,
        )[0]  # fmt: skip

    best = run(tmp_path / "best", best=True)
    assert float(best["w"]) == seen[1] < seen[2]
    seen.clear()
    assert float(run(tmp_path / "last")["w"]) == seen[2]


def test_a_best_run_reports_what_it_wrote(bert, tmp_path, monkeypatch):
    values = iter([0.2, 0.8, 0.3, 0.1])
    prepare = runs.train._classifying
    monkeypatch.setattr(
        runs.train, "_classifying", lambda *a: prepare(*a)._replace(validate=lambda _: next(values))
    )
    report = train_run(bert, tmp_path / "out", RECIPE, **SHORT, best=True)
    lines = read_metrics(tmp_path / "out.run" / "metrics.jsonl")
    assert report["step_taken"] == 6 and report["validation"] == 0.8
    assert report["loss"] == lines[5]["loss"] and report["delta_rms"] == lines[5]["delta_rms"]
    assert report["digest"] == params_digest(dx.load_params(tmp_path / "out"))


def test_a_finished_run_gives_its_result_again(bert, tmp_path):
    report = train_run(bert, tmp_path / "out", RECIPE, **SHORT)
    shutil.rmtree(tmp_path / "out")
    steps = []
    again = train_run(bert, tmp_path / "out", RECIPE, **SHORT, on_step=lambda n, line: steps.append(line))
    assert steps == [] and again == report


# Repeating.


def test_a_run_is_repeated_from_its_manifest(bert, whole, tmp_path):
    out, report = whole
    manifest = json.loads((out / "darex_manifest.json").read_text())
    assert manifest["outputs"] == {"model": report["digest"]} and manifest["options"]["steps"] == 12
    again = repeat_run(out)
    assert again == {"same": True, "outputs": {"model": [report["digest"], True]}, "differences": []}
    other = tmp_path / "other.json"
    manifest["options"]["seed"] = 1
    manifest["versions"]["jax"] = "0.0.0"
    manifest["inputs"]["train"] = "another"
    other.write_text(json.dumps(manifest))
    result = repeat_run(other)
    assert not result["same"] and not result["outputs"]["model"][1]
    assert {d["what"] for d in result["differences"]} == {
        "versions: jax",
        "inputs: train",
        "inputs: held_out",
    }
    done = CliRunner().invoke(main, ["repeat", str(other)])
    assert done.exit_code == 1 and "NOT the same bits" in done.output and "0.0.0 then" in done.output
    other.write_text(json.dumps(manifest | {"command": "eval"}))
    done = CliRunner().invoke(main, ["repeat", str(other)])
    assert done.exit_code == 1 and "is of 'eval'; only 'train' can be repeated" in done.output
    del manifest["options"]["clip_norm"]
    other.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is of another version, with different options: clip_norm"):
        repeat_run(other)
    with pytest.raises(ValueError, match="is not of a finished run: it lacks outputs"):
        repeat_run(out.with_name("whole.run") / "manifest.json")


# From the command line.


def test_a_config_file_gives_defaults_and_the_command_line_takes_precedence(bert, whole, tmp_path):
    out, report = whole
    resolved = out.with_name("whole.run") / "train.toml"
    assert 'optimizer = "adamr"' in resolved.read_text()
    arguments = ["train", str(bert), str(tmp_path / "out"), "--config", str(resolved), "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["digest"] == report["digest"]
    assert (tmp_path / "out.run" / "train.toml").read_text() == resolved.read_text()
    arguments[2:3] = [str(tmp_path / "shorter"), "--epochs", "0.5"]
    done = CliRunner().invoke(main, arguments)
    assert json.loads(done.stdout)["steps"] == 4
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("learning_rte = 1e-4\n")
    done = CliRunner().invoke(main, ["train", str(bert), str(tmp_path / "x"), "--config", str(wrong)])
    assert done.exit_code == 2 and "has unknown learning_rte; the options are" in done.output
    wrong.write_text("learning_rate = \n")
    done = CliRunner().invoke(main, ["train", str(bert), str(tmp_path / "x"), "--config", str(wrong)])
    assert done.exit_code == 2 and "is not TOML" in done.output


def test_a_merged_adapter_has_the_class_names_it_was_trained_on(bert, tmp_path):
    """Also where the base is a classifier with as many classes of other names."""
    rows = "text,kind\n" + "".join(f"{'purr' if i % 2 else 'bark'} {i},{'cat' if i % 2 else 'dog'}\n"
                                   for i in range(40))  # fmt: skip
    (tmp_path / "pets.csv").write_text(rows)
    own = ["--data", str(tmp_path / "pets.csv"), "--text", "text", "--label", "kind"]

    def darex(*line):
        done = CliRunner().invoke(main, [*map(str, line)])
        assert done.exit_code == 0, done.output
        return done.stdout

    short = ("--steps", 1, "--batch-size", 4)
    darex("train", bert, tmp_path / "opinions", "--task", "opinions", *short)
    for i, base in enumerate((bert, tmp_path / "opinions")):
        lora, merged = tmp_path / f"lora-{i}", tmp_path / f"merged-{i}"
        darex("train", base, lora, *own, *short, "--lora-rank", 2)
        darex("merge-adapter", base, lora, merged)
        config = json.loads((merged / "config.json").read_text())
        assert config["id2label"] == {"0": "cat", "1": "dog"}
        assert json.loads(darex("eval", merged, *own, "--json"))["n"] > 0


def test_an_adapter_is_trained_saved_and_merged(bert, tmp_path):
    out = tmp_path / "adapter"
    report = train_run(bert, out, RECIPE, **SHORT, lora_rank=2)
    config, adapter, dense = dx.load_adapter(out)
    assert config.rank == 2 and config.alpha == 4.0
    assert set(flatten_names(dense)) == {"classifier.weight", "classifier.bias"}
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in flatten_names(adapter)}
    assert layers == {"query", "value"}
    assert any(np.any(x) for name, x in flatten_names(adapter).items() if "lora_B" in name)
    merged = np.concatenate([np.ravel(x) for x in jax.tree.leaves(dx.adapter_delta(adapter, 2.0))])
    assert report["delta_max"] == pytest.approx(np.abs(merged).max(), rel=1e-5)
    assert report["delta_rms"] == pytest.approx(np.sqrt(np.mean(merged**2)), rel=1e-4)
    assert json.loads((out / "darex_manifest.json").read_text())["outputs"] == {"adapter": report["digest"]}
    done = CliRunner().invoke(main, ["merge-adapter", str(bert), str(out), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["eval", str(tmp_path / "merged"), "--limit", "48", "--json"])
    assert json.loads(done.stdout)["metric"] == pytest.approx(report["test"], abs=0.005)
    interrupted(bert, tmp_path / "again", 7, lora_rank=2)
    assert train_run(bert, tmp_path / "again", RECIPE, **SHORT, lora_rank=2)["digest"] == report["digest"]


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_decoder_learns_to_answer_problems(llama, tmp_path, lora_rank):
    rate = 3e-3 if lora_rank is None else 3e-2
    recipe = Recipe(learning_rate=rate, steps=10, batch_size=8, accumulate=2)
    options = {"task": "word-problems", "limit": 50, "validation_limit": 10, "difficulty": 1}
    report = train_run(llama, tmp_path / "out", recipe, **options, lora_rank=lora_rank)
    losses = [x["loss"] for x in read_metrics(tmp_path / "out.run" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.05
    assert 0 <= report["validation"] <= 1 and report["validation_loss"] > 0
    if lora_rank is None:
        assert dx.load_model(tmp_path / "out")[0].config.model_type == "llama"
    else:
        assert dx.load_adapter(tmp_path / "out")[0].rank == 2


def test_errors_are_explained_before_anything_is_written(bert, tmp_path):
    with pytest.raises(ValueError, match="unknown task 'nli'; the tasks are opinions, cola"):
        train_run(bert, tmp_path / "out", RECIPE, task="nli")
    with pytest.raises(ValueError, match="mesh must be DATAxMODEL, such as 4x2, got '8'"):
        train_run(bert, tmp_path / "out", RECIPE, mesh="8")
    with pytest.raises(ValueError, match="mesh 3x1: 8 examples per micro-batch are not divisible by 3"):
        train_run(bert, tmp_path / "out", RECIPE, mesh="3x1")
    with pytest.raises(ValueError, match=r"word-problems is for decoders, but .* is a bert"):
        train_run(bert, tmp_path / "out", RECIPE, task="word-problems")
    with pytest.raises(ValueError, match="is inside the base"):
        train_run(bert, bert / "out", RECIPE)
    with pytest.raises(ValueError, match="cannot be saved: 'classifier' is part of 'classifier'"):
        train_run(bert, tmp_path / "out", RECIPE, lora_rank=2, lora_targets=("classifier", "query"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="already exists; choose another path"):
        train_run(bert, tmp_path / "full", RECIPE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("name", ["steps", "epochs", "learning_rate", "clip_norm", "batch_size"])
def test_recipes_out_of_range_are_refused(name):
    others = {"learning_rate": 1e-3, **({} if name in ("steps", "epochs") else {"steps": 1})}
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
            Recipe(**(others | {name: value}))


def test_a_base_without_a_tokenizer_is_refused(bert, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(bert / name, bare / name)
    with pytest.raises(ValueError, match=r"bare: has no tokenizer \(tokenizer.json, "):
        train_run(bare, tmp_path / "out", RECIPE)


def test_a_changed_config_does_not_resume_and_is_named_by_a_repeat(bert, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    train_run(base, tmp_path / "done", RECIPE, **SHORT)
    interrupted(base, tmp_path / "out", 7)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.3}))
    with pytest.raises(ValueError, match="interrupted run with another config"):
        train_run(base, tmp_path / "out", RECIPE, **SHORT)
    result = repeat_run(tmp_path / "done")
    assert not result["same"] and [d["what"] for d in result["differences"]] == ["inputs: config"]


def test_parts_of_a_mesh_train_the_same_model(bert, whole, tmp_path):
    _, report = whole
    split = train_run(bert, tmp_path / "out", RECIPE, **SHORT, mesh="4x2")
    assert split["loss"] == pytest.approx(report["loss"], rel=1e-3)
    one, other = (flatten_names(dx.load_params(p)) for p in (whole[0], tmp_path / "out"))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=2e-3, err_msg=name)
    interrupted(bert, tmp_path / "again", 7, mesh="4x2")
    assert train_run(bert, tmp_path / "again", RECIPE, **SHORT, mesh="4x2")["digest"] == split["digest"]
    options = {"mesh": "4x2", "lora_rank": 2}
    adapter = train_run(bert, tmp_path / "adapter", RECIPE, **SHORT, **options)
    interrupted(bert, tmp_path / "later", 7, **options)
    assert train_run(bert, tmp_path / "later", RECIPE, **SHORT, **options)["digest"] == adapter["digest"]


# Metrics.


def test_metrics_continue_from_a_step(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    with metrics_file(file, 8) as write:
        for step in range(4):
            write(StepRecord(step, 1.0, 2.0, 1e-3, *((0.1, 0.2, 0.5) if step % 2 else (None,) * 3)))
    with file.open("a") as broken:
        broken.write('{"step": 4, "lo')
    assert [x["step"] for x in read_metrics(file)] == [0, 1, 2, 3]
    assert "delta_rms" in read_metrics(file)[1] and "delta_rms" not in read_metrics(file)[2]
    with metrics_file(file, 8) as write:
        line = write(StepRecord(2, 9.0, 2.0, 1e-3))
        assert line == {"step": 2, "loss": 9.0, "gradient_norm": 2.0, "learning_rate": 1e-3}
        write(StepRecord(3, 1.0, 2.0, 1e-3))
    lines = read_metrics(file)
    assert [(x["step"], x["loss"]) for x in lines] == [(0, 1.0), (1, 1.0), (2, 9.0), (3, 1.0)]
    assert lines[3]["examples_per_second"] > 0
    plot_metrics(lines, "accuracy", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    plot_metrics(lines[:1], "accuracy", Path(tmp_path / "none.png"))

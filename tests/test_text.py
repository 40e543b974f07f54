"""Text generation with a tiny random Llama and a byte-level tokenizer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.core.errors import DarexWarning
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation.text import complete, left_padded, sample_texts, stream_text
from darex_jax.models import init_model, read_model_config
from darex_jax.tasks.answers import encode_prompts, encode_texts
from darex_jax.tasks.opening import open_model
from tests.test_decoders import LLAMA

transformers = pytest.importorskip("transformers")
PROMPTS = ["the soup was", "we", "a long day by the sea and then the show"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    model, params = init_model(read_model_config(LLAMA | {"vocab_size": 259}), jax.random.key(5))
    dx.save_params(path, params, model.config.to_hf(), overwrite=True)
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def opened(folder):
    from darex_jax.tasks.batching import load_tokenizer

    return *dx.load_model(folder), load_tokenizer(folder)


def by_hand(opened, prompt, new):
    model, params, tokenizer = opened
    ids = np.asarray([tokenizer(prompt)["input_ids"]])
    tokens = np.asarray(dx.generate(model, params, ids, np.ones_like(ids), max_new_tokens=new))[0]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_padded_batch_is_each_prompt_alone(opened):
    texts = complete(*opened, PROMPTS, max_new_tokens=40, eos_token_id=None, batch_size=4)
    assert texts == [by_hand(opened, prompt, 40) for prompt in PROMPTS]


def test_streamed_pieces_are_the_text(opened):
    options = {"max_new_tokens": 30, "eos_token_id": None, "piece": 3}
    pieces = list(stream_text(*opened, PROMPTS[0], **options))
    assert "".join(pieces) == by_hand(opened, PROMPTS[0], 30) and len(pieces) > 3


def test_stop_strings_end_a_text_and_are_not_part_of_it(opened):
    whole = by_hand(opened, PROMPTS[0], 30)
    for stop in (whole[5], whole[7:9], whole[-2:]):
        expected = whole[: whole.index(stop)]
        options = {"max_new_tokens": 30, "eos_token_id": None, "stop": ("never there", stop)}
        assert complete(*opened, [PROMPTS[0]], **options) == [expected]
        for piece in (1, 4):
            assert "".join(stream_text(*opened, PROMPTS[0], piece=piece, **options)) == expected


def test_end_tokens_end_a_text(opened):
    model, params, tokenizer = opened
    ids = np.asarray([tokenizer(PROMPTS[1])["input_ids"]])
    tokens = np.asarray(dx.generate(model, params, ids, np.ones_like(ids), max_new_tokens=20))[0]
    end = int(tokens[6])
    length = tokens.tolist().index(end)
    (text,) = complete(*opened, [PROMPTS[1]], max_new_tokens=20, eos_token_id=[end])
    assert text == tokenizer.decode(tokens[:length], skip_special_tokens=True)


def test_sampled_texts_are_what_the_model_draws(opened):
    model, params, tokenizer = opened
    options = {"max_new_tokens": 12, "eos_token_id": 2, "key": jax.random.key(4), "temperature": 0.7}
    done = []
    texts = sample_texts(*opened, 40, **options, on_texts=done.append)
    assert len(texts) == 40 and len(set(texts)) > 30 and done == [32, 40]
    assert sample_texts(*opened, 3, **options) == texts[:3]
    given = np.zeros((32, 1), np.int32)  # <s>, which this tokenizer does not add by itself, so it is written
    own = jax.random.fold_in(jax.random.key(4), 0)
    drawn = dx.generate(
        model, params, given, np.ones_like(given), max_new_tokens=12, eos_token_id=2, key=own, temperature=0.7
    )
    ended = [(row, [*row, 2].index(2)) for row in np.asarray(drawn).tolist()]
    whole = [(tokenizer.decode([0, *row[:length]]), length == 12) for row, length in ended]
    expected = [text.rstrip("\N{REPLACEMENT CHARACTER}") if cut else text for text, cut in whole]
    assert texts[:32] == [text for text in expected if text.strip()]
    assert all(tokenizer(text)["input_ids"][0] == 0 for text in texts)  # read again as it was written
    continued = sample_texts(*opened, 5, prompts=PROMPTS, **options)
    assert all(text.startswith(PROMPTS[i % 3]) for i, text in enumerate(continued))
    assert len(set(continued)) == 5


def test_the_start_of_sampled_texts_depends_on_the_tokenizer(opened):
    model, params, tokenizer = opened

    class Known:
        bos_token_id, eos_token_id, adds, ends = None, None, (), ()

        def __call__(self, text, add_special_tokens=True):
            if not isinstance(text, str):
                return {"input_ids": [self(each, add_special_tokens)["input_ids"] for each in text]}
            before, behind = (self.adds, self.ends) if add_special_tokens else ((), ())
            return {"input_ids": [*before, *tokenizer(text)["input_ids"], *behind]}

        def decode(self, tokens, **options):
            return tokenizer.decode(tokens, **options)

    options = {"max_new_tokens": 6, "eos_token_id": None, "key": jax.random.key(0)}
    known = Known()
    with pytest.raises(ValueError, match="no start or end token"):
        sample_texts(model, params, known, 2, **options)
    known.eos_token_id = 2
    assert not any("</s>" in text[:4] for text in sample_texts(model, params, known, 9, **options))
    known.adds = (0,)
    texts = sample_texts(model, params, known, 9, **options)
    assert not any(text.startswith("<s>") for text in texts)  # the tokenizer adds it again
    assert sample_texts(model, params, known, 9, prompts=["we"], **options)[0].startswith("we")
    known.ends = (2,)
    assert encode_prompts(known, ["we", "<s>we", ""]) == [[0, *tokenizer("we")["input_ids"]]] * 2 + [[0]]
    assert sample_texts(model, params, known, 9, **options) == texts
    (text,) = sample_texts(model, params, known, 1, prompts=["<s>we"], **options)
    assert text.startswith("we") and "</s>" not in text[:5]
    ends = list(range(259))  # every token
    with pytest.raises(ValueError, match="ended at their first token: pass prompts"):
        sample_texts(model, params, known, 2, **options | {"eos_token_id": ends})


def test_sample_writes_texts_that_prune_reads(folder, tmp_path):
    model, params = dx.load_model(folder)
    fine = jax.tree.map(lambda x: x + 0.01 * jnp.sin(100 * x), params)
    dx.save_params(tmp_path / "fine", fine, model.config.to_hf())
    for file in folder.glob("*token*"):
        (tmp_path / "fine" / file.name).write_bytes(file.read_bytes())
    prompts, out = tmp_path / "prompts.txt", tmp_path / "own.jsonl"
    prompts.write_text("\n".join(PROMPTS))
    line = ["sample", tmp_path / "fine", out, "--count", 12, "--max-new-tokens", 8, "--text", prompts]
    shown = CliRunner().invoke(main, [str(x) for x in line])
    assert shown.exit_code == 0 and "12 of them distinct" in shown.output and "--data" in shown.output
    texts = [json.loads(line)["text"] for line in out.read_text().split("\n")[:-1]]
    assert len(texts) == 12 and texts[1].startswith("we")
    report = json.loads(CliRunner().invoke(main, [*map(str, line), "--json"]).stdout)
    assert (
        report["texts"] == 12 and [json.loads(x)["text"] for x in out.read_text().split("\n")[:-1]] == texts
    )
    pruned = ["prune", folder, tmp_path / "fine", tmp_path / "d", "--method", "wanda", "--drop-rate", 0.9,
              "--data", out, "--text", "text", "--json"]  # fmt: skip
    done = CliRunner().invoke(main, [str(x) for x in pruned])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["warnings"] == []
    for wrong, told in (
        (["--data", out, "--text", "text"], "OUT would replace the prompts"),
        (["--data-dir", tmp_path], "pass the task as well"),
        (["--difficulty", 2], "--difficulty is of generated problems"),
        (["--chat"], "--chat formats prompts"),
    ):
        refused = CliRunner().invoke(main, [str(x) for x in (*line[:3], *wrong)])
        assert refused.exit_code == 2 and told in refused.stderr
    refused = CliRunner().invoke(main, ["sample", str(tmp_path / "fine"), str(tmp_path / "own.txt")])
    assert refused.exit_code == 2 and "must end in .jsonl" in refused.stderr
    missing = CliRunner().invoke(main, ["sample", str(folder.parent / "none"), str(out)])
    assert missing.exit_code == 1 and len(out.read_text().split("\n")) == 13


def test_long_texts_are_cut(opened):
    encoded = encode_texts(opened[2], ["a" * 600, "b"])
    assert [len(ids) for ids in encoded.input_ids] == [512, 1]


def test_padding_of_prompts():
    ids, mask = left_padded([[5, 6], [7]], 1, 3)
    assert ids.shape == (3, 32) and ids[:, -2:].tolist() == [[5, 6], [1, 7], [5, 6]]
    assert mask.sum(axis=1).tolist() == [2, 1, 2]
    with pytest.raises(ValueError, match="expected 1 to 4096"):
        left_padded([[1] * 5000], 1, 1)
    with pytest.raises(ValueError, match="a prompt has 0 tokens, expected 1"):
        left_padded([[1], []], 1, 2)


def darex(*arguments, code=0):
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_generate_from_the_terminal(folder, opened, tmp_path):
    """prune -> apply -> generate gives the text of generate --delta, and another one than the base."""
    _, params, _ = opened
    named = flatten_names(params)
    moved = {n: x + 0.3 * jax.random.normal(jax.random.key(len(n)), x.shape) for n, x in named.items()}
    fine, delta, out = tmp_path / "fine", tmp_path / "delta", tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    dx.save_params(fine, unflatten_names(moved), config, companions_from=folder)
    darex("prune", folder, fine, delta, "--drop-rate", 0.9)
    darex("apply", folder, delta, out)
    options = (PROMPTS[0], "--max-new-tokens", 20)
    with_delta = darex("generate", folder, *options, "--delta", delta).stdout
    assert with_delta == darex("generate", out, *options).stdout
    assert with_delta != darex("generate", folder, *options).stdout
    report = json.loads(darex("generate", out, *options, "--json").stdout)
    assert report["text"] + "\n" == with_delta
    sampled = [darex("generate", folder, *options, "--temperature", 1, "--seed", s).stdout for s in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    model, restored = dx.load_model(folder, delta=delta)
    assert model.config == opened[0].config
    _, applied = dx.load_model(out)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, restored, applied))
    error = darex("generate", fine, *options, "--delta", delta, code=1).stderr
    assert "this is not the base" in error and "has other values" in error
    assert "no chat template" in darex("generate", folder, "x", "--chat", code=1).stderr


def test_a_base_with_a_delta_is_the_restored_directory(folder, opened, tmp_path):
    """Config, generation config, tokenizer and end tokens are the fine-tuned model's either way."""
    model, params, tokenizer = opened
    prompt = PROMPTS[1]
    ids = np.asarray([tokenizer(prompt)["input_ids"]])
    tokens = np.asarray(dx.generate(model, params, ids, np.ones_like(ids), max_new_tokens=20))[0].tolist()
    end = tokens[5]  # an end token of the fine-tuned model only
    base, fine, delta, out = (tmp_path / name for name in ("base", "fine", "delta", "out"))
    config = json.loads((folder / "config.json").read_text())
    head = params["lm_head"]["weight"]
    dx.save_params(base, params, config, companions_from=folder)
    dx.save_params(fine, params | {"lm_head": {"weight": head * 1.5}}, config, companions_from=folder)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (fine / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    special = json.loads((folder / "tokenizer_config.json").read_text())
    (fine / "tokenizer_config.json").write_text(json.dumps(special | {"chat_template": "{{ 'x' }}"}))
    darex("prune", base, fine, delta, "--drop-rate", 0.5)
    darex("apply", base, delta, out)
    ways = [open_model(base, delta=delta), open_model(out)]
    assert [way.ends for way in ways] == [[2, end]] * 2 and open_model(base).ends == 2
    assert ways[0].model == ways[1].model
    assert [way.tokenizer.chat_template for way in ways] == ["{{ 'x' }}"] * 2
    options = (prompt, "--max-new-tokens", 20)
    texts = [darex("generate", *way, *options).stdout for way in ((base, "--delta", delta), (out,), (base,))]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) <= 6 < len(texts[2])
    # The same for answers to problems and their records.
    scores = []
    for i, way in enumerate(((base, "--delta", delta), (out,))):
        records = tmp_path / f"records{i}"
        limits = ("--task", "word-problems", "--limit", 2, "--max-new-tokens", 5, "--json")
        darex("eval", *way, *limits, "--records", records)
        scores.append(records.read_text())
    assert scores[0] == scores[1] and f'"eos_token_id": {sorted([2, end])}' in scores[0]
    (fine / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(
        ValueError, match=r"generation_config\.json: eos_token_id is '</s>', expected a token id"
    ):
        open_model(fine)


def test_changed_files_of_the_base_are_used_if_allowed(folder, opened, tmp_path):
    base, delta = tmp_path / "base", tmp_path / "delta"
    config = json.loads((folder / "config.json").read_text())
    dx.save_params(base, opened[1], config, companions_from=folder)
    darex("prune", base, folder, delta, "--drop-rate", 0.5)
    (base / "config.json").write_text(json.dumps(config, indent=1))
    short = ("--max-new-tokens", 2, "--delta", delta)
    problems = ("--task", "word-problems", "--limit", 1, "--records", tmp_path / "records")
    for command in (("generate", base, PROMPTS[0], *short), ("eval", base, *problems, *short)):
        assert "--allow-changed-files" in darex(*command, code=1).stderr
        told = darex(*command, "--allow-changed-files").stderr
        assert told.count("warning:") == 1 and "was different" in told and "allowed" in told


def test_fields_of_fine_tuning_tools_are_accepted(folder, tmp_path):
    """Metadata of unsloth is accepted; fields that might change outputs need an option."""
    _, params = dx.load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    dx.save_params(tmp_path / "m", params, config | {"unsloth_fixed": True}, companions_from=folder)
    options = (PROMPTS[1], "--max-new-tokens", 3)
    text = darex("generate", folder, *options).stdout
    assert darex("generate", tmp_path / "m", *options).stdout == text
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(config | {"final_softcap": 30.0, "attention_dropout": 0.1}))
    error = darex("generate", tmp_path / "m", *options, code=1).stderr
    assert "attention_dropout is 0.1, supported: 0.0; final_softcap is unknown" in error
    assert "--ignore-config-field" in error
    ignore = ("--ignore-config-field", "final_softcap", "--ignore-config-field", "attention_dropout")
    assert darex("generate", tmp_path / "m", *options, *ignore).stdout == text
    file.write_text(json.dumps(config | {"use_softcap": False}))
    with pytest.warns(DarexWarning, match="unknown field 'use_softcap' = False, which is ignored"):
        dx.load_model(tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-m", "darex_jax", "generate", tmp_path / "m", *map(str, options)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.startswith("warning: config.json has the unknown field 'use_softcap'")
    assert done.stdout == text


smollm2 = os.environ.get("DAREX_SMOLLM2")


@pytest.mark.skipif(not smollm2, reason="DAREX_SMOLLM2 does not name a folder made by experiments/smollm2.py")
def test_smollm2_is_pytorchs():
    """Real weights: logits within 1e-3 at magnitudes of about 30, and 64 equal greedy tokens."""
    import torch

    path = Path(str(smollm2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model, params = dx.load_model(path)
    for prompt in ("The capital of France is", "Natalia sold clips to 48 of her friends in April, and then"):
        row = tokenizer(prompt, return_tensors="pt")
        ids, mask = row["input_ids"].numpy(), row["attention_mask"].numpy()
        with torch.no_grad():
            logits = theirs(**row).logits.numpy()
        np.testing.assert_allclose(model(params, ids, mask).logits, logits, atol=1e-3)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 64}
        expected = theirs.generate(**row, **options)[0, ids.shape[1] :].numpy()
        out = np.asarray(dx.generate(model, params, ids, mask, max_new_tokens=64))[0]
        assert out.tolist() == expected.tolist()

"""Training of causal language models on a toy model: batches, the loss on answers only, the loop."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darex_jax.tasks.answers import ANSWER_BUCKETS, EncodedAnswers, answer_batches, encode_answers
from darex_jax.tasks.gsm8k import gsm8k_prompt, metamath_solution
from darex_jax.tasks.word_problems import word_problem_tokenizer
from darex_jax.training.causal_lm import answer_loss, answer_scores, train_answers
from darex_jax.training.loop import Recipe

VOCABULARY, END, PAD = 12, 11, 0


def toy(params, input_ids, attention_mask):
    """Logits [B, T, V] of the next token from the last one only."""
    hidden = params["embed"]["weight"][input_ids] * attention_mask[..., None]
    return SimpleNamespace(logits=hidden @ params["head"]["weight"].T)


@pytest.fixture
def start():
    keys = jax.random.split(jax.random.key(0))
    leaves = [0.3 * jax.random.normal(key, (VOCABULARY, 8)) for key in keys]
    return {"embed": {"weight": leaves[0]}, "head": {"weight": leaves[1]}}


def counting(n: int, seed: int = 0) -> EncodedAnswers:
    """Prompts of random tokens 1 to 8; an answer counts on from the prompt's last token, up to 9."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 9, rng.integers(2, 14)).tolist() for _ in range(n)]
    rows = [[*prompt, *range(prompt[-1] + 1, 10), END] for prompt in prompts]
    return EncodedAnswers(rows, [len(prompt) for prompt in prompts], PAD)


def run(start, **changes):
    loop = {name: changes.pop(name) for name in {"key", "on_step"} & changes.keys()}
    recipe = Recipe(**({"learning_rate": 0.05, "batch_size": 16, "steps": 8} | changes))
    return train_answers(toy, start, counting(100), recipe, **({"key": jax.random.key(3)} | loop))


# Batches.


def test_batches_hold_every_row_once_and_mark_the_answers():
    data = counting(45)
    batches = list(answer_batches(data, 16, seed=0, epoch=0))
    assert len(batches) == 3 and all(b["input_ids"].shape[0] == 16 for b in batches)
    assert {b["input_ids"].shape[1] for b in batches} <= set(ANSWER_BUCKETS)
    seen = []
    for batch in batches:
        assert (batch["input_ids"].dtype, batch["attention_mask"].dtype) == (np.int32, np.int32)
        for ids, mask, counted in zip(
            *(batch[k] for k in ("input_ids", "attention_mask", "loss_mask")), strict=True
        ):
            row = ids[mask == 1].tolist()
            assert mask[: len(row)].all() and not ids[len(row) :].any()
            if counted.any():
                answer = ids[counted == 1].tolist()
                assert answer[-1] == END and row[-len(answer) :] == answer
                seen.append((row, len(row) - len(answer)))
    assert sorted(seen) == sorted(zip(data.input_ids, data.prompt_lengths, strict=True))


def test_the_order_follows_from_seed_and_epoch():
    data = counting(100)

    def order(seed, epoch):
        return tuple(b["input_ids"].tobytes() for b in answer_batches(data, 16, seed, epoch))

    assert order(1, 2) == order(1, 2)
    assert len({order(s, e) for s in (0, 1) for e in (0, 1)}) == 4


def test_answers_are_encoded_behind_the_prompt_as_generation_sees_it():
    tokenizer = word_problem_tokenizer()
    prompt = gsm8k_prompt("Tom has 5 apples. Tom buys 3 more apples. How many apples does Tom have now?")
    answer = metamath_solution("Tom has 5 + 3 = <<5+3=8>>8 apples.\n#### 8")
    encoded = encode_answers(tokenizer, [prompt, "Tom"], [answer, "Tom"])
    ids, length = encoded.input_ids[0], encoded.prompt_lengths[0]
    assert ids[:length] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(ids[length:]) == answer + "</s>" and ids.count(tokenizer.bos_token_id) == 1
    assert encoded.pad_id == tokenizer.pad_token_id and len(encoded) == 2
    tokenizer.pad_token = None
    assert encode_answers(tokenizer, ["Tom"], ["Tom"]).pad_id == tokenizer.eos_token_id


def test_invalid_examples_are_explained():
    tokenizer = word_problem_tokenizer()
    with pytest.raises(ValueError, match="need as many prompts as answers, at least one; got 1 and 2"):
        encode_answers(tokenizer, ["Tom"], ["Tom", "Anna"])
    with pytest.raises(ValueError, match="got 0 and 0"):
        encode_answers(tokenizer, [], [])
    with pytest.raises(ValueError, match="row 1 has 2053 tokens with its answer, at most 2048 are supported"):
        encode_answers(tokenizer, ["Tom", "Tom"], ["Tom", "1" * 2050])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no end token"):
        encode_answers(tokenizer, ["Tom"], ["Tom"])


# The loss.


def mean_loss(params, batch):
    total, count = jitted_loss(toy, params, batch)
    return float(total / count)


jitted_loss = jax.jit(answer_loss, static_argnums=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_loss_is_the_mean_over_answer_tokens_in_float32(start, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), start)
    (batch,) = answer_batches(counting(5), 5, seed=0, epoch=0)
    logits = toy(params, batch["input_ids"], batch["attention_mask"]).logits
    expected = []
    for b, t in zip(*np.nonzero(batch["loss_mask"]), strict=True):
        before = np.asarray(logits[b, t - 1], np.float64)
        expected.append(np.log(np.exp(before).sum()) - before[batch["input_ids"][b, t]])
    total, count = answer_loss(toy, params, batch)
    loss = total / count
    assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(np.mean(expected), rel=1e-5)


def test_prompts_padding_and_rows_that_fill_up_do_not_count(start):
    data = counting(16)
    (batch,) = answer_batches(data, 16, seed=0, epoch=0)
    (filled,) = answer_batches(data, 24, seed=0, epoch=0)
    loss = mean_loss(start, batch)
    assert mean_loss(start, filled) == pytest.approx(loss, rel=1e-5)
    tokens = {name: x for name, x in batch.items() if x.ndim == 2}
    wider = {name: np.pad(x, ((0, 0), (0, 9)), constant_values=PAD) for name, x in tokens.items()}
    assert mean_loss(start, wider) == pytest.approx(loss, rel=1e-5)
    # In the toy model, tokens before a prompt's last one can only matter as targets.
    other = batch["input_ids"].copy()
    other[:, 0] = 9
    lengths = batch["attention_mask"].sum(1) - batch["loss_mask"].sum(1)
    assert (lengths >= 2).all()
    assert mean_loss(start, batch | {"input_ids": other}) == pytest.approx(loss, rel=1e-6)


def test_a_token_without_a_finite_loss_is_not_ranked_first(start):
    (batch,) = answer_batches(counting(5), 5, seed=0, epoch=0)
    batch["input_ids"][:, -3:] = 0  # the argmax of NaN is token 0
    batch["loss_mask"][:, 1:] = 1
    broken = {**start, "head": {"weight": start["head"]["weight"] * jnp.nan}}
    scores = answer_scores(toy, broken, [batch])
    assert np.isnan(scores.loss) and scores.tokens == scores.answers == 0.0


# Training.


def test_a_toy_learns_to_count_and_leaves_the_start_alone(start):
    before = jax.tree.map(np.array, start)
    seen = []
    trained, history = run(start, steps=120, on_step=seen.append)
    assert seen == history and [r.step for r in history] == list(range(120))
    assert history[-1].loss < 0.05 < 1 < history[0].loss
    (batch,) = answer_batches(counting(40, seed=1), 40, seed=0, epoch=0)
    best = np.argmax(toy(trained, batch["input_ids"], batch["attention_mask"]).logits, axis=-1)[:, :-1]
    answered = batch["loss_mask"][:, 1:] == 1
    assert (best[answered] == batch["input_ids"][:, 1:][answered]).all()
    scores = answer_scores(toy, trained, [batch])
    assert scores.tokens == scores.answers == 1.0
    assert scores.loss == pytest.approx(mean_loss(trained, batch), rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, start, before)


def test_scores_count_tokens_and_whole_answers(start):
    (batch,) = answer_batches(counting(40, seed=1), 48, seed=0, epoch=0)  # eight padding rows
    best = np.argmax(toy(start, batch["input_ids"], batch["attention_mask"]).logits, axis=-1)[:, :-1]
    rows = [
        (guess == ids[1:])[counted[1:] == 1]
        for guess, ids, counted in zip(best, batch["input_ids"], batch["loss_mask"], strict=True)
        if counted.any()
    ]
    scores = answer_scores(toy, start, [batch])
    assert len(rows) == 40
    assert scores.tokens == pytest.approx(np.concatenate(rows).mean())
    assert scores.answers == pytest.approx(np.mean([row.all() for row in rows]))
    assert scores.loss == pytest.approx(mean_loss(start, batch), rel=1e-5)


def test_a_repeat_is_bit_identical(start):
    (first, history), (second, again) = run(start), run(start)
    assert history == again
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert [r.loss for r in run(start, key=jax.random.key(4))[1]] != [r.loss for r in history]


def test_epochs_are_counted_and_wrong_arguments_explained(start):
    assert len(run(start, steps=None, epochs=1.5, batch_size=64)[1]) == 3  # 100 rows are 2 batches of 64
    with pytest.raises(ValueError, match="give either steps or epochs"):
        run(start, epochs=1.0)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        run(start, batch_size=0)
    broken = {**start, "head": {"weight": start["head"]["weight"] * jnp.inf}}
    with pytest.raises(FloatingPointError, match="training diverged at step 0 of 8"):
        run(broken)

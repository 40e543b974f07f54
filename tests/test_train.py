"""Fine-tuning and evaluation on a tiny BERT with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from darex_jax.cli import main
from darex_jax.core.errors import DarexError
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation import classification, outputs
from darex_jax.evaluation.classification import evaluate, predict, pruned_params
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.models import BertConfig, init_model
from darex_jax.tasks import load_task
from darex_jax.tasks.batching import Encoded, evaluation_batches
from darex_jax.training.fine_tune import example_losses, fine_tune
from darex_jax.training.loop import Recipe, decay_mask, warmup_linear

LOOP = {"key", "on_step", "pretrained", "frozen", "mesh", "checkpoints", "validate"}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "initializer_range": 0.1,
    "layer_norm_eps": 1e-12,
}


@pytest.fixture(scope="module")
def tiny():
    return init_model(BertConfig.from_hf(CONFIG), jax.random.key(0))


def sentences(n: int, seed: int, longest: int = 16) -> Encoded:
    """Rows of 5 to `longest` ids; the label is whether the second id is from the upper half."""
    rng = np.random.default_rng(seed)
    ids = [[1, *rng.integers(2, 40, rng.integers(4, longest)).tolist()] for _ in range(n)]
    labels = np.array([row[1] >= 21 for row in ids], np.int32)
    return Encoded(ids, [[0] * len(row) for row in ids], labels, pad_id=0)


def train(tiny, **changes):
    """A short run with a fixed recipe except for `changes`, some of which are arguments of the loop."""
    loop = {name: changes.pop(name) for name in LOOP & changes.keys()}
    recipe = Recipe(**({"learning_rate": 3e-3, "batch_size": 16, "steps": 6} | changes))
    return fine_tune(*tiny, sentences(200, seed=0), recipe, **({"key": jax.random.key(7)} | loop))


# Training.


def test_learns_a_learnable_task_and_leaves_the_start_alone(tiny):
    model, base = tiny
    before = jax.tree.map(np.array, base)
    fine, history = train(tiny, steps=150)
    losses = [record.loss for record in history]
    assert [record.step for record in history] == list(range(150))
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
    task = load_task("opinions")  # for its metric, accuracy
    test = sentences(100, seed=1)
    assert evaluate(model, fine, test, task) == {
        "metric": task.metric(predict(model, fine, evaluation_batches(test)), test.labels),
        "metric_name": "accuracy",
        "n": 100,
    }
    assert evaluate(model, fine, test, task)["metric"] > 0.9
    jax.tree.map(np.testing.assert_array_equal, base, before)  # donated copies, not the caller's arrays


def test_a_repeat_is_bit_identical(tiny):
    (first, history), (second, again) = train(tiny), train(tiny)
    assert history == again
    jax.tree.map(np.testing.assert_array_equal, first, second)
    _, other = train(tiny, key=jax.random.key(8))
    assert [r.loss for r in other] != [r.loss for r in history]
    _, still = train(tiny, dropout=False)
    assert [r.loss for r in still] != [r.loss for r in history]


def test_the_callback_sees_every_step_and_epochs_are_counted(tiny):
    seen = []
    _, history = train(tiny, steps=None, epochs=1.5, batch_size=64, on_step=seen.append)
    assert seen == history and len(history) == 6  # 200 rows are 4 batches of 64
    assert max(r.learning_rate for r in history) == pytest.approx(3e-3)


def test_regression_learns_a_score(tiny):
    model, params = init_model(
        BertConfig.from_hf(CONFIG | {"id2label": {"0": "score"}, "label2id": {"score": 0}}), jax.random.key(0)
    )
    data = sentences(200, seed=0)
    scores = dataclasses.replace(data, labels=data.labels.astype(np.float32) * 2 - 1)
    recipe = Recipe(learning_rate=3e-3, steps=150, batch_size=16)
    _, history = fine_tune(model, params, scores, recipe, key=jax.random.key(0))
    assert np.mean([r.loss for r in history[-5:]]) < 0.5 * np.mean([r.loss for r in history[:5]])
    with pytest.raises(ValueError, match="need a model with 1 output, this one has 2"):
        fine_tune(*tiny, scores, Recipe(learning_rate=1e-3, steps=1), key=jax.random.key(0))


def test_rows_that_fill_up_a_batch_do_not_count(tiny):
    """16 rows alone, and 16 rows in a batch of 24, give the same first loss."""
    model, params = tiny
    data = sentences(16, seed=0)
    losses = [
        fine_tune(
            model,
            params,
            data,
            Recipe(learning_rate=1e-3, steps=1, batch_size=b, dropout=False),
            key=jax.random.key(0),
        )
        for b in (16, 24)
    ]
    assert losses[0][1][0].loss == pytest.approx(losses[1][1][0].loss, rel=1e-5)


def test_the_schedule_rises_and_falls_in_lines():
    rate = warmup_linear(1.0, steps=10, warmup_ratio=0.3)
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0]
    np.testing.assert_allclose([rate(t) for t in range(11)], expected, rtol=1e-6)
    flat_start = warmup_linear(2.0, steps=4, warmup_ratio=0.0)
    np.testing.assert_allclose([flat_start(t) for t in range(5)], [2.0, 1.5, 1.0, 0.5, 0.0])


def test_the_rate_is_the_hosts_and_a_float32s():
    """Computed without device operations, which would wait for queued steps."""
    for steps, ratio in ((7, 0.3), (1000, 0.1), (333, 0.0)):
        rate = warmup_linear(3e-4, steps, ratio)
        warmup = int(ratio * steps)
        for t in range(steps):
            share = jnp.minimum((t + 1) / (warmup + 1), (steps - t) / (steps - warmup))
            assert type(rate(t)) is float and rate(t) == float(3e-4 * share)


def test_rematerialisation_trains_the_same(tiny):
    """Including dropout, which uses the same key in both passes."""
    (a, history), (b, again) = (train(tiny, remat=remat, steps=3) for remat in (False, True))
    assert [h.loss for h in history] == pytest.approx([h.loss for h in again], rel=1e-6)
    a, b = flatten_names(a), flatten_names(b)
    for name, leaf in a.items():
        if not name.endswith("key.bias"):  # its gradient is only rounding: softmax is invariant to it
            # Adam divides by the size of a gradient, and so shows how small ones were rounded.
            np.testing.assert_allclose(leaf, b[name], atol=3e-5, err_msg=name)


def test_the_command_passes_all_options_on(monkeypatch, tmp_path):
    seen = {}

    def train_run(base, out, recipe, **options):
        seen.update(options, recipe=recipe)
        raise DarexError("enough")

    monkeypatch.setattr("darex_jax.runs.train.train_run", train_run)
    for options, remat, ignored in (
        ((), False, ()),
        (("--remat", "--ignore-config-field", "x"), True, ("x",)),
    ):
        done = CliRunner().invoke(main, ["train", "base", str(tmp_path / "out"), *options])
        assert done.exit_code == 1 and "enough" in done.output
        assert seen["recipe"].remat is remat and seen["ignore_config_fields"] == ignored


def test_matrices_decay_and_vectors_do_not(tiny):
    names = flatten_names(decay_mask(tiny[1]))
    assert not any(on for name, on in names.items() if name.endswith("bias") or "LayerNorm" in name)
    assert all(on for name, on in names.items() if name.endswith("weight") and "LayerNorm" not in name)
    (plain, _), (decayed, _) = (train(tiny, weight_decay=w, steps=1, warmup_ratio=0.0) for w in (0.0, 0.5))
    for name, leaf in flatten_names(plain).items():
        base = flatten_names(tiny[1])[name]
        expected = leaf - 3e-3 * 0.5 * base if names[name] else leaf
        np.testing.assert_allclose(flatten_names(decayed)[name], expected, atol=1e-7)


def test_example_losses_match_explicit_values():
    logits = jnp.array([[0.0, 0.0], [2.0, 0.0]])
    expected = [np.log(2), np.log(1 + np.exp(2))]
    np.testing.assert_allclose(example_losses(logits, jnp.array([0, 1])), expected, rtol=1e-6)
    np.testing.assert_allclose(example_losses(jnp.array([[1.0], [3.0]]), jnp.array([1.0, 5.0])), [0.0, 4.0])


def test_divergence_and_wrong_arguments_are_explained(tiny):
    model, params = tiny
    leaves = flatten_names(params)
    leaves["classifier.weight"] = leaves["classifier.weight"] * jnp.inf
    with pytest.raises(
        FloatingPointError, match=r"training diverged at step 0 of 6 .* lower learning rate than 0.003"
    ):
        train((model, unflatten_names(leaves)))
    for wrong in ({"steps": None}, {"epochs": 1.0}):
        with pytest.raises(ValueError, match="give either steps or epochs"):
            train(tiny, **wrong)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        train(tiny, batch_size=0)
    with pytest.raises(ValueError, match="there are no examples to train on"):
        Recipe(learning_rate=1e-3, steps=1).total_steps(0)
    with pytest.raises(ValueError, match="need steps >= 1 and warmup_ratio in"):
        warmup_linear(1.0, 0)


def test_parts_of_a_batch_add_up_to_the_batch(tiny):
    """Without dropout, accumulation gives the same step up to rounding, also with padding rows."""
    (whole, one), (parts, four) = (
        train(tiny, accumulate=n, batch_size=128, steps=4, dropout=False) for n in (1, 4)
    )
    for a, b in zip(one, four, strict=True):
        assert (a.loss, a.gradient_norm) == pytest.approx((b.loss, b.gradient_norm), rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), whole, parts)
    with pytest.raises(ValueError, match="batch_size 16 is not divisible by accumulate = 3"):
        train(tiny, accumulate=3)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(tiny):
    (wide, one), (narrow, other) = (train(tiny, dtype=d, dropout=False) for d in ("float32", "bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.float32)}
    assert one[0].loss != other[0].loss == pytest.approx(one[0].loss, rel=2e-2)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (wide, narrow)), strict=True)]
    assert 0 < max(moved) < 6 * 2 * 3e-3  # six steps of Adam, in opposite directions at worst


def without_head(params):
    return {name: leaf for name, leaf in params.items() if name != "classifier"}


def test_adamr_keeps_the_delta_small_and_leaves_a_fresh_head_alone(tiny):
    _, base = tiny
    runs = {
        w: train(
            tiny, steps=40, optimizer="adamr", weight_decay=w, pretrained=without_head(base), dropout=False
        )
        for w in (0.0, 0.1, 1.0)
    }
    sizes = [history[-1].delta_rms for _, history in runs.values()]
    assert sizes[0] > 1.3 * sizes[1] > 1.3 * 1.3 * sizes[2] > 0
    heads = [
        np.abs(params["classifier"]["weight"] - base["classifier"]["weight"]).max()
        for params, _ in runs.values()
    ]
    assert min(heads) > 0.02  # as much as without a pull
    with pytest.raises(ValueError, match="optimizer is adamw or adamr, got 'sgd'"):
        train(tiny, optimizer="sgd")


def test_the_delta_is_measured_where_there_is_a_pretrained_value(tiny):
    _, base = tiny
    params, history = train(tiny, steps=12, pretrained=without_head(base))
    measured = [r.step for r in history if r.delta_rms is not None]
    assert measured == [0, 10, 11]
    deltas = [
        np.asarray(leaf, np.float64) - np.asarray(flatten_names(base)[name], np.float64)
        for name, leaf in flatten_names(params).items()
        if not name.startswith("classifier")
    ]
    entries = np.concatenate([d.ravel() for d in deltas])
    assert history[-1].delta_rms == pytest.approx(np.sqrt(np.mean(entries**2)), rel=1e-4)
    assert history[-1].delta_max == pytest.approx(np.abs(entries).max(), rel=1e-5)


def test_frozen_parameters_are_used_and_unchanged(tiny):
    model, base = tiny
    head, body = {"classifier": base["classifier"]}, without_head(base)
    recipe = Recipe(learning_rate=3e-3, steps=5, batch_size=16, dropout=False)
    data = sentences(200, seed=0)
    trained, history = fine_tune(model, head, data, recipe, key=jax.random.key(7), frozen=body)
    assert set(flatten_names(trained)) == {"classifier.weight", "classifier.bias"}
    assert history[0].loss == pytest.approx(train(tiny, steps=1, dropout=False)[1][0].loss, rel=1e-6)
    assert np.abs(trained["classifier"]["weight"] - base["classifier"]["weight"]).max() > 0


# Evaluation.


@pytest.fixture(scope="module")
def changed(tiny):
    """A delta on every parameter but the head, and batches of two widths whose last one is short."""
    _, base = tiny
    names = [n for n in flatten_names(base) if not n.startswith("classifier")]
    keys = dict(zip(names, jax.random.split(jax.random.key(1), len(names)), strict=True))
    delta = {n: 0.1 * jax.random.normal(keys[n], flatten_names(base)[n].shape) for n in names}
    return unflatten_names(delta), evaluation_batches(sentences(70, seed=2, longest=20), batch_size=32)


def test_predictions_come_in_the_order_of_the_data(tiny):
    model, params = tiny
    data = sentences(70, seed=2, longest=20)
    together = predict(model, params, evaluation_batches(data, 32))
    assert together.shape == (70, 2) and together.dtype == np.float32
    for i in (0, 69):
        alone = jax.jit(model)(params, jnp.asarray([data.input_ids[i]])).logits[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


def test_pruned_params_rescale_what_has_a_delta(tiny, changed):
    _, base = tiny
    delta, _ = changed
    key = jax.random.key(0)
    pruned = flatten_names(pruned_params(base, delta, key, 0.0, 0.25))
    for name, leaf in flatten_names(base).items():
        d = flatten_names(delta).get(name)
        np.testing.assert_allclose(pruned[name], leaf if d is None else leaf + 4 * d, rtol=1e-6, atol=1e-6)
    by_name = {name: 0.5 for name in flatten_names(delta)} | {"bert.pooler.dense.bias": 0.25}
    mixed = flatten_names(pruned_params(base, delta, key, 0.0, by_name))
    np.testing.assert_array_equal(mixed["bert.pooler.dense.bias"], pruned["bert.pooler.dense.bias"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    narrow = pruned_params(half, delta, key, 0.0, 0.5)
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}


def test_another_q_does_not_recompile(tiny, changed):
    model, base = tiny
    delta, batches = changed
    reference = reference_outputs(model, base, batches)

    def sweep(q):
        pruned = pruned_params(base, delta, jax.random.key(0), 0.0, q)
        return predict(model, pruned, batches), output_change(model, pruned, batches, reference)

    sweep(0.5)
    programs = (classification._pruned_leaf, classification._logits, outputs.output_change_sums)
    compiled = [f._cache_size() for f in programs]
    (first, near), (second, far) = sweep(0.7), sweep(0.1)
    assert compiled == [f._cache_size() for f in programs]
    assert far > near > 0 and np.abs(first - second).max() > 0


def test_output_change_is_the_mean_over_real_tokens(tiny, changed):
    model, base = tiny
    delta, batches = changed
    pruned = pruned_params(base, delta, jax.random.key(0), 0.0, 0.5)
    assert output_change(model, base, batches, reference_outputs(model, base, batches)) == 0.0
    total, count, run = 0.0, 0, jax.jit(model)
    for batch in batches:  # the same sum over rows and tokens without padding, explicitly
        near, far = (run(p, *(batch[n] for n in INPUTS)).last_hidden_state for p in (base, pruned))
        for b in range(len(batch["weight"])):
            if batch["weight"][b]:
                length = batch["attention_mask"][b].sum()
                total += np.abs(near[b, :length] - far[b, :length]).sum()
                count += length * near.shape[-1]
    assert output_change(model, pruned, batches, reference_outputs(model, base, batches)) == pytest.approx(
        total / count, rel=1e-5
    )

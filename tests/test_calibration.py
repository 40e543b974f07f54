"""Statistics of linear layers' inputs, against the raw inputs in float64; per-layer q."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.errors import DarexError
from darex_jax.core.sharding import batch_sharding
from darex_jax.core.tree import combine, flatten_names
from darex_jax.evaluation.calibration import (
    input_statistics,
    load_statistics,
    save_statistics,
    squared_influences,
    token_counts,
)
from darex_jax.evaluation.curvature import curvature
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.models import init_model, read_model_config
from darex_jax.q.per_layer import bias_of, layer_q, row_sums, spread_q

ENCODER = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 48, "type_vocab_size": 2,
    "initializer_range": 0.3, "layer_norm_eps": 1e-5, "pad_token_id": 1,
}  # fmt: skip
DECODER = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu", "max_position_embeddings": 64,
    "initializer_range": 0.3, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "bert": ENCODER | {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
    "roberta": ENCODER | {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]},
    "llama": DECODER | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen2": DECODER | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
}


def make(family):
    return init_model(read_model_config(FAMILIES[family]), jax.random.key(0))


def make_batches(count=3, rows=8, width=12, seed=0):
    """Right-padded rows; the last two of the last batch are padding rows."""
    rng = np.random.default_rng(seed)
    batches = []
    for i in range(count):
        lengths = rng.integers(3, width + 1, rows)
        mask = (np.arange(width) < lengths[:, None]).astype(np.int32)
        weight = np.ones(rows, np.float32)
        if i == count - 1:
            weight[-2:] = 0
        ids = rng.integers(2, 40, (rows, width)).astype(np.int32)
        batches.append({"input_ids": np.where(mask, ids, 1), "attention_mask": mask, "weight": weight})
    return batches


def raw_inputs(model, params, batches):
    """Every layer's inputs without padding in float64, [tokens, D], from a plain forward pass."""

    def inputs_of(batch):
        seen = {}
        model(params, batch["input_ids"], batch["attention_mask"], observe=seen.__setitem__)
        return seen

    found, compiled = {}, jax.jit(inputs_of)
    for batch in batches:
        for name, x in compiled(batch).items():
            real = batch["weight"] > 0
            if x.ndim == 3:
                real = (batch["attention_mask"] > 0) & real[:, None]
            found.setdefault(name, []).append(np.asarray(x, np.float64)[real])
    return {name: np.concatenate(rows) for name, rows in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_raw_inputs(family):
    model, params = make(family)
    batches = make_batches()
    found = input_statistics(model, params, batches, lambda name: "mlp" in name or "dense" in name)
    expected = raw_inputs(model, params, batches)
    linear = {
        name
        for name, leaf in flatten_names(params).items()
        if leaf.ndim == 2 and "embed" not in name and name.endswith("weight")
    }
    assert set(found) == set(expected) == linear
    for name, x in expected.items():
        seen = found[name]
        assert int(seen.tokens) == len(x)
        scale = np.sqrt(np.mean(x**2))
        np.testing.assert_allclose(seen.mean, x.mean(0), atol=1e-5 * scale)
        np.testing.assert_allclose(seen.square, (x**2).mean(0), rtol=1e-4, atol=1e-5 * scale**2)
        if "mlp" in name or "dense" in name:
            np.testing.assert_allclose(seen.second_moment, x.T @ x / len(x), atol=1e-4 * scale**2)
        else:
            assert seen.second_moment is None


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_influences_are_those_of_the_raw_inputs(family):
    model, params = make(family)
    batches = make_batches()
    delta = jax.tree.map(lambda x: 0.1 * jnp.cos(100 * x), params)
    named = flatten_names(delta)
    found = squared_influences(model, params, delta, batches)
    for name, x in raw_inputs(model, params, batches).items():
        weights = np.asarray(named[name], np.float64)
        energy, square = found[name]
        np.testing.assert_allclose(square, ((x @ weights.T) ** 2).mean(0), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(energy, weights**2 @ (x**2).mean(0), rtol=1e-4)


def test_padding_changes_nothing_and_observing_neither():
    model, params = make("bert")
    batches = make_batches()
    wider = [{k: np.pad(v, ((0, 0), (0, 5))) if v.ndim == 2 else v for k, v in b.items()} for b in batches]
    one, other = (input_statistics(model, params, b) for b in (batches, wider))
    for name in one:
        np.testing.assert_allclose(one[name].mean, other[name].mean, atol=1e-5)
    with pytest.raises(ValueError, match="calibration needs at least one batch"):
        input_statistics(model, params, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_counted(family):
    model, params = make(family)
    batches = make_batches()
    found = {name: np.asarray(counts) for name, counts in token_counts(model, params, batches).items()}
    (name,) = found  # not those of positions and types
    assert name.rpartition(".")[0].endswith(("word_embeddings", "embed_tokens"))
    real = [(b["attention_mask"] > 0) & (b["weight"] > 0)[:, None] for b in batches]
    ids = np.concatenate([b["input_ids"][kept] for b, kept in zip(batches, real, strict=True)])
    np.testing.assert_array_equal(found[name], np.bincount(ids, minlength=40))


def test_no_tokens_are_counted_for_a_table_that_is_the_head_as_well():
    config = FAMILIES["llama"] | {"tie_word_embeddings": True}
    model, params = init_model(read_model_config(config), jax.random.key(0))
    assert token_counts(model, params, make_batches()) == {}


def test_many_tokens_in_float32_stay_near_float64():
    model, params = make("llama")
    batches = make_batches(count=100, rows=8, width=32)
    found, expected = input_statistics(model, params, batches), raw_inputs(model, params, batches)
    for name, x in expected.items():
        scale = np.sqrt(np.mean(x**2))
        assert np.abs(found[name].mean - x.mean(0)).max() < 1e-5 * scale
        assert np.abs(found[name].square - (x**2).mean(0)).max() < 1e-5 * (x**2).mean(0).max()


def test_a_sharded_model_gives_the_same():
    model, params = make("llama")
    mesh = dx.make_mesh(data=4)
    sharded = jax.device_put(params, dx.param_shardings(mesh, params))
    batches = make_batches()
    placed = [jax.device_put(b, batch_sharding(mesh)) for b in batches]
    one, other = input_statistics(model, params, batches), input_statistics(model, sharded, placed)
    for name in one:
        np.testing.assert_allclose(one[name].mean, other[name].mean, atol=1e-5)
        np.testing.assert_allclose(one[name].square, other[name].square, rtol=1e-4, atol=1e-6)


def test_statistics_round_trip_through_a_file(tmp_path):
    model, params = make("bert")
    seen = input_statistics(model, params, make_batches(), lambda name: "query" in name)
    save_statistics(tmp_path / "s", seen, {"model": "a", "data": "b"})
    again = load_statistics(tmp_path / "s", {"model": "a", "data": "b"})
    assert again.keys() == seen.keys()
    for name, one in seen.items():
        assert (one.second_moment is None) == (again[name].second_moment is None) == ("query" not in name)
        for x, y in zip(one, again[name], strict=True):
            assert x is y is None or np.array_equal(x, y)


def test_statistics_of_other_inputs_are_refused(tmp_path):
    model, params = make("bert")
    file = tmp_path / "s"
    save_statistics(file, input_statistics(model, params, make_batches()), {"model": "a", "data": "b"})
    with pytest.raises(ValueError, match="s: was made from another data; write a new one"):
        load_statistics(file, {"model": "a", "data": "c"})
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="s: "):
        load_statistics(file, {"model": "a", "data": "b"})
    dx.save_params(tmp_path / "m", params, model.config.to_hf())
    with pytest.raises(ValueError, match="is not a file of activation statistics"):
        load_statistics(tmp_path / "m" / "model.safetensors", {})


# Per-layer q.


def test_row_sums_match_explicit_sums():
    deltas = {"a.weight": jnp.array([[1.0, -2.0], [0.5, 0.0]]), "a.bias": jnp.array([3.0, 0.0])}
    found = row_sums(deltas, {"a.weight": jnp.array([2.0, 1.0])})
    np.testing.assert_allclose(found["a.weight"][0], [2 - 2 + 3, 1.0])
    np.testing.assert_allclose(found["a.weight"][1], [4 + 4 + 9, 1.0])
    no_bias = row_sums({"a.weight": deltas["a.weight"]}, {"a.weight": jnp.array([2.0, 1.0])})
    np.testing.assert_allclose(no_bias["a.weight"][1], [8.0, 1.0])


def test_layers_have_the_mean_of_their_rows_and_others_the_mean_of_layers():
    sums = {"a.weight": (np.array([0.0, -5.0]), np.array([0.0, 1.0])), "b.weight": ([1.0], [2.0])}
    by_layer = layer_q(sums, 0.99, 0.4)
    rows = dx.analytic_q(*sums["a.weight"], 0.99, 0.4)
    assert by_layer["a.weight"] == pytest.approx(rows.mean()) and rows[0] == pytest.approx(0.01)
    q = spread_q(by_layer, ["a.weight", "a.bias", "b.weight", "norm.weight"])
    assert q["a.bias"] == q["a.weight"] == by_layer["a.weight"] != q["b.weight"]
    assert q["norm.weight"] == pytest.approx(np.mean(list(by_layer.values())))
    assert bias_of("x.dense.weight") == "x.dense.bias"
    # A layer without output has no q of its own, and does not affect the others'.
    q = spread_q(
        {"a.weight": 0.2, "b.weight": 0.4, "c.weight": np.inf}, ["a.bias", "c.weight", "norm.weight"]
    )
    assert q == {"a.bias": 0.2, "c.weight": pytest.approx(0.3), "norm.weight": pytest.approx(0.3)}
    for nothing in ({}, {"a": np.inf}):
        with pytest.raises(ValueError, match="no layer has a finite q"):
            spread_q(nothing, ["a"])


# Output change.


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_decoders_change_is_that_of_its_top_logits(family):
    model, params = make(family)
    moved = jax.tree.map(lambda x: x + 0.02 * jnp.cos(100 * x), params)
    batches = make_batches()
    references = reference_outputs(model, params, batches)
    assert output_change(model, params, batches, references) == 0.0
    total, count = 0.0, 0
    for batch in batches:
        before, after = (
            np.asarray(model(p, batch["input_ids"], batch["attention_mask"]).logits, np.float64)
            for p in (params, moved)
        )
        top = np.argsort(-before, axis=-1, kind="stable")[..., :5]
        square = (np.take_along_axis(after, top, -1) - np.take_along_axis(before, top, -1)) ** 2
        real = (batch["attention_mask"] > 0) & (batch["weight"] > 0)[:, None]
        total, count = total + square.mean(-1)[real].sum(), count + real.sum()
    assert output_change(model, moved, batches, references) == pytest.approx(total / count, rel=1e-4)


def per_row(batches):
    """One batch per row: the square of a single example's gradient is exact."""
    for batch in batches:
        for i in np.flatnonzero(batch["weight"]):
            yield {name: x[i : i + 1] for name, x in batch.items()}


def test_curvature_of_a_score_is_the_square_of_its_gradient():
    hf = FAMILIES["bert"] | {"num_labels": 1, "problem_type": "regression"}
    model, params = init_model(read_model_config(hf), jax.random.key(0))
    name, rows = "bert.encoder.layer.0.output.dense.weight", list(per_row(make_batches(2, rows=4)))

    def score(leaf, row):
        return model(combine(params, {name: leaf}), row["input_ids"], row["attention_mask"]).logits[0, 0]

    square = jax.jit(lambda leaf, row: jnp.mean(jnp.square(jax.grad(score)(leaf, row))))
    expected = sum(float(square(flatten_names(params)[name], row)) for row in rows)
    assert len(rows) == 6 and expected > 0
    found = curvature(model, params, [name, "classifier.bias"], rows, jax.random.key(1))
    np.testing.assert_allclose(found[name], expected, rtol=1e-4)
    np.testing.assert_allclose(found["classifier.bias"], 6.0, rtol=1e-6)
    with pytest.raises(DarexError, match="at least one batch"):
        curvature(model, params, [name], [], jax.random.key(1))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_curvature_is_the_expectation_over_the_models_own_answers(family):
    """For the last layer in closed form: for logits z = W h the diagonal is p (1 - p) h^2."""
    model, params = make(family)
    batches = make_batches(2, rows=4)
    head = {"bert": "classifier.bias", "llama": "lm_head.weight"}[family]
    total, count = 0.0, 0
    for batch in batches:
        out = model(params, batch["input_ids"], batch["attention_mask"])
        p = jax.nn.softmax(out.logits, axis=-1)
        real = batch["weight"] if family == "bert" else batch["attention_mask"] * batch["weight"][:, None]
        of_answers = jnp.sum(p * (1 - p), axis=-1)
        inputs = 1.0 if family == "bert" else jnp.sum(jnp.square(out.last_hidden_state), axis=-1)
        total, count = total + float(jnp.sum(of_answers * inputs * real)), flatten_names(params)[head].size
    draws = [curvature(model, params, [head], batches, jax.random.key(i))[head] for i in range(300)]
    error = np.std(draws) / np.sqrt(len(draws))
    assert error < 0.05 * total / count
    assert abs(np.mean(draws) - total / count) < 4 * error

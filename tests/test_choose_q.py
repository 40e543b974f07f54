"""Choosing q on tiny models: objectives, one q, one a layer, in closed form, learned; find-q and prune."""

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.choosing.choice import Choice
from darex_jax.choosing.choose import choose_q, without_labels
from darex_jax.choosing.learned import LearnedQ, Learning, hold_out_quarter, learn_q
from darex_jax.choosing.pair import Pair, load_pair, open_pair, split_in_scope
from darex_jax.choosing.searched import eta_grid, find_q, layer_rule, q_grid
from darex_jax.choosing.table import WAYS
from darex_jax.choosing.two_point import two_point
from darex_jax.cli import main
from darex_jax.core.delta import apply_delta, drop, rescale
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation.calibration import input_statistics, squared_influences
from darex_jax.evaluation.classification import _logits, _pruned_leaf, predict
from darex_jax.evaluation.objectives import (
    Objective,
    answer_objective,
    label_objective,
    output_objective,
    prediction_objective,
)
from darex_jax.evaluation.outputs import output_change, output_change_sums, reference_outputs
from darex_jax.files.atomic import only_one
from darex_jax.models import init_model, logits, read_model_config
from darex_jax.q.closed_form import closed_form, two_point_q
from darex_jax.tasks import Examples, Task, load_task
from darex_jax.tasks.answers import encode_problems, load_problems
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.tasks.source import Source
from darex_jax.training.causal_lm import answer_loss, answer_scores
from darex_jax.training.checkpoints import Checkpoints
from tests.test_calibration import FAMILIES, make, make_batches, raw_inputs

DROP_RATE = 0.9


def pair(family):
    """A model, a fine-tune of it, and the delta of its linear layers, norms and embeddings."""
    model, base = make(family)
    fine = jax.tree.map(lambda x: x + 0.1 * jnp.sin(200 * x), base)
    if family == "bert":
        fine = of_two_classes(model, fine, with_labels(make_batches()))
    head = ("classifier.", "lm_head.", "score.")
    in_scope = {name: leaf for name, leaf in flatten_names(base).items() if not name.startswith(head)}
    start, delta = split_in_scope(fine, unflatten_names(in_scope))
    return model, fine, start, delta


def of_two_classes(model, fine, batches):
    """The classifier with its bias moved so that it predicts one class as often as the other."""
    logits = predict(model, fine, batches)
    bias = {"classifier.bias": jnp.array([np.median(logits[:, 1] - logits[:, 0]), 0.0], jnp.float32)}
    return unflatten_names(flatten_names(fine) | bias)


def with_labels(batches):
    """Batches as `evaluation_batches` makes them, of a task with two classes."""
    rng, first = np.random.default_rng(1), 0
    places = rng.permutation(sum(len(batch["weight"]) for batch in batches)).astype(np.int32)
    for batch in batches:
        rows = len(batch["weight"])
        batch["labels"] = rng.integers(0, 2, rows).astype(np.int32)
        batch["index"] = places[first : first + rows]
        batch["loss_mask"] = batch["attention_mask"] * batch["weight"][:, None]
        first += rows
    return batches


EMPTY = Examples((), None, np.zeros(0, np.int32))
TASK = Task("pairs", "classification", ("a", "b"), "accuracy", EMPTY, EMPTY, EMPTY)


def test_objectives_of_a_classifier_by_hand():
    model, fine, start, _ = pair("bert")
    batches = with_labels(make_batches())
    real = np.concatenate([b["weight"] > 0 for b in batches])
    classes = {}
    for name, params in (("fine", fine), ("start", start)):
        logits = [jax.jit(model)(params, b["input_ids"], b["attention_mask"]).logits for b in batches]
        classes[name] = np.concatenate(logits)[real].argmax(-1)
    labels = np.concatenate([b["labels"] for b in batches])[real]
    by_labels = label_objective(model, TASK, batches)
    assert by_labels.measure(start) == pytest.approx((classes["start"] == labels).mean())
    assert (by_labels.examples, by_labels.labels, by_labels.name) == (22, 22, "validation accuracy")
    for metric in (None, TASK.metric):
        by_predictions = prediction_objective(model, fine, batches, metric)
        assert by_predictions.measure(fine) == 1.0 and by_predictions.labels == 0
        assert by_predictions.measure(start) == pytest.approx((classes["start"] == classes["fine"]).mean())
    assert output_objective(model, fine, batches).measure(fine) == 0.0


def test_objectives_of_a_decoder_by_hand():
    model, fine, start, _ = pair("llama")
    batches, run = with_labels(make_batches()), jax.jit(model)
    same = total = 0
    for b in batches:
        first = [
            np.asarray(run(p, b["input_ids"], b["attention_mask"]).logits).argmax(-1) for p in (fine, start)
        ]
        real = (b["attention_mask"] > 0) & (b["weight"] > 0)[:, None]
        same, total = same + (first[0] == first[1])[real].sum(), total + real.sum()
    by_predictions = prediction_objective(model, fine, batches)
    assert by_predictions.measure(fine) == 1.0
    assert by_predictions.measure(start) == pytest.approx(same / total)
    by_answers = answer_objective(model, batches)
    assert (by_answers.examples, by_answers.labels) == (22, 22)
    shares = []
    for params in (fine, start):
        right = total = 0
        for b in batches:
            scores = np.asarray(run(params, b["input_ids"], b["attention_mask"]).logits)[:, :-1]
            counts = b["loss_mask"][:, 1:] > 0
            right += (scores.argmax(-1) == b["input_ids"][:, 1:])[counts].sum()
            total += counts.sum()
        shares.append(right / total)
        assert by_answers.measure(params) == pytest.approx(shares[-1])
    # Shifted to what it ranks first itself, a batch has the answers that the model knows.
    first = np.asarray(run(fine, batches[0]["input_ids"], batches[0]["attention_mask"]).logits).argmax(-1)
    last = batches[0]["attention_mask"].sum(1) - 1
    known = {name: x.copy() for name, x in batches[0].items()}
    known["loss_mask"][:] = 0
    for row, t in enumerate(last):  # the last token alone, which no other token comes after
        known["input_ids"][row, t], known["loss_mask"][row, t] = first[row, t - 1], 1
    assert answer_objective(model, [known]).measure(fine) == 1.0 > max(shares)


def broken(params):
    """The same with one NaN in a layer that every token passes."""
    named = flatten_names(params)
    name = next(n for n in named if n.endswith(("output.dense.weight", "down_proj.weight")))
    return unflatten_names(named | {name: named[name].at[0, 0].set(jnp.nan)})


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_outputs_that_are_not_finite_agree_with_nothing(family):
    """NaN's argmax is class or token 0: neither agreement nor an error, but no value."""
    model, fine, start, delta = pair(family)
    batches = with_labels(make_batches())
    goals = [prediction_objective(model, fine, batches), output_objective(model, fine, batches)]
    if family == "bert":
        goals += [
            prediction_objective(model, fine, batches, TASK.metric),
            label_objective(model, TASK, batches),
        ]
    else:
        goals += [answer_objective(model, batches)]
    for goal in goals:
        assert (
            goal.blind is None and np.isfinite(goal.measure(start)) and np.isnan(goal.measure(broken(start)))
        )
    with pytest.raises(ValueError, match="the fine-tuned model's own outputs are NaN or infinite"):
        prediction_objective(model, broken(fine), batches)
    # Such a q is passed over, and the search goes on.
    (sound,) = Pair(model, fine, start, delta, DROP_RATE, (0,)).models
    models = [lambda q: broken(start) if q < 0.3 else sound(q)]
    found = find_q(goals[0], models, [0.1, 0.2, 0.4, 0.8])
    assert found.q >= 0.3 and np.isnan(found.curve[0][1])
    with pytest.raises(ValueError, match="the objective is finite at none of the 2 visited q"):
        find_q(goals[0], [lambda q: broken(start)], [0.1, 0.2])


def test_an_objective_says_that_it_is_blind():
    model, fine, _, _ = pair("bert")
    batches = with_labels(make_batches())
    for batch in batches:
        batch["labels"][:] = 1
    assert label_objective(model, TASK, batches).blind == "the labels of the 22 examples are all the same"
    head = {"classifier.bias": jnp.array([50.0, 0.0])}
    one_class = unflatten_names(flatten_names(fine) | head)
    blind = prediction_objective(model, one_class, batches).blind
    assert blind == "the fine-tuned model's predictions for the 22 examples are all the same"
    decoder, params, _, _ = pair("llama")
    for batch in batches:
        batch["input_ids"][:] = 7
    assert "answer tokens of the 22 examples" in answer_objective(decoder, batches).blind
    assert "predictions for the 22 examples" in prediction_objective(decoder, params, batches).blind


# Logits in chunks.


def test_chunks_of_logits_give_what_all_logits_give(monkeypatch):
    whole_model, fine, start, _ = pair("llama")
    batches = with_labels(make_batches(width=11))

    def everything(entries):
        """With at most so many logits at a time; as an option of the model it makes programs of its own."""
        monkeypatch.setattr(logits, "CHUNK_ENTRIES", entries)
        model = replace(whole_model, options=((str(entries), True),))
        goals = prediction_objective(model, fine, batches), answer_objective(model, batches)
        change = output_objective(model, fine, batches)
        loss, gradient = jax.jit(jax.value_and_grad(lambda p: answer_loss(model, p, batches[0])[0]))(start)
        values = [goal.measure(start) for goal in (*goals, change)]
        return [*values, *answer_scores(model, start, batches), loss, *jax.tree.leaves(gradient)]

    whole = everything(1 << 26)
    for entries in (8 * 40 * 5, 1):  # 5 of 11 positions: three chunks of 4, the last filled up; or 1 each
        for one, other in zip(whole, everything(entries), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_chunks_of_logits_take_less_memory(monkeypatch):
    """Of a compiled program: 4 x 64 x 4,096 logits are 4 MiB, and their gradient as much."""
    config = FAMILIES["llama"] | {"vocab_size": 4096, "tie_word_embeddings": True}
    model, params = init_model(read_model_config(config), jax.random.key(0))
    ids = jnp.zeros((4, 64), jnp.int32)

    def scratch(entries):
        monkeypatch.setattr(logits, "CHUNK_ENTRIES", entries)

        def loss(params):
            def of(scores, target):
                return jax.nn.logsumexp(scores, axis=-1) - scores[..., 0] + target

            inputs = {"input_ids": ids, "attention_mask": ids + 1}
            return logits.of_logits(of, model, params, inputs, ids).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, pieces = scratch(1 << 20), scratch(1 << 16)
    assert whole > 2**22 > 2 * pieces


# Algorithm 3, two points.


def test_layers_follow_the_means_of_their_inputs():
    model, fine, _, delta = pair("bert")
    batches = make_batches()
    deltas, inputs = flatten_names(delta), raw_inputs(model, fine, batches)
    q = layer_rule(input_statistics(model, fine, batches), delta, DROP_RATE, "exact")(1.0)
    by_layer = {}
    for name in inputs.keys() & deltas.keys():
        c = np.asarray(deltas[name], np.float64) * inputs[name].mean(0)
        bias = np.asarray(deltas[name.replace("weight", "bias")], np.float64)
        sums, energies = c.sum(1) + bias, (c**2).sum(1) + bias**2
        by_layer[name] = dx.analytic_q(sums, energies, DROP_RATE, 1.0).mean()
        assert q[name] == pytest.approx(by_layer[name], rel=1e-3)
    assert len({round(x, 3) for x in by_layer.values()}) > 5
    others = q["bert.embeddings.word_embeddings.weight"]
    assert others == pytest.approx(np.mean(list(by_layer.values())), rel=1e-3)


def test_a_model_with_one_output_is_compared_by_its_tasks_metric():
    config = FAMILIES["bert"] | {"num_labels": 1}
    model, params = init_model(read_model_config(config), jax.random.key(0))
    batches = with_labels(make_batches())
    task = Task("scores", "regression", (), "pearson_and_spearman", EMPTY, EMPTY, EMPTY)
    assert prediction_objective(model, params, batches, task.metric).measure(params) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="needs its task's metric to compare scores"):
        prediction_objective(model, params, batches)


def test_a_sweep_over_values_and_masks_compiles_once():
    model, fine, start, delta = pair("bert")
    models = Pair(model, fine, start, delta, DROP_RATE, (0, 1, 2)).models
    assert all(pruned.args[1] is delta for pruned in models)  # one delta, and no copy of it a mask
    goal = label_objective(model, TASK, with_labels(make_batches()))
    goal.measure(models[0](0.1))
    before = _pruned_leaf._cache_size(), _logits._cache_size()
    found = find_q(goal, models, q_grid(DROP_RATE))
    others = Pair(model, fine, start, delta, 0.8, (9,)).models
    find_q(goal, others, [0.3], q_of=lambda q: dict.fromkeys(flatten_names(delta), q))
    assert len(found.curve) > 6 and (_pruned_leaf._cache_size(), _logits._cache_size()) == before
    with pytest.raises(ValueError, match=r"there is no q for bert\.embeddings"):
        models[0]({"bert.pooler.dense.bias": 0.5})


@jax.jit
def by_masked_delta(start, masked, q):
    """The pruned model from a delta that was masked beforehand: what `pruned_params` was, once."""
    return apply_delta(start, rescale(masked, q))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_mask_drawn_on_the_way_gives_the_bits_of_one_drawn_beforehand(dtype):
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = {"a.weight": (33, 100), "a.bias": (100,), "b": (7, 5, 3), "head": (4,)}
    named = {n: jax.random.normal(k, shape) for k, (n, shape) in zip(keys, shapes.items(), strict=True)}
    start = unflatten_names({name: x.astype(dtype) for name, x in named.items()})
    delta = unflatten_names({name: 0.01 * jnp.sin(100 * x) for name, x in named.items() if name != "head"})
    delta["b"] = delta["b"].at[0].set(0.0)
    opened = Pair(None, None, start, delta, DROP_RATE, (0, 7))
    for seed, pruned in zip(opened.seeds, opened.models, strict=True):
        masked = drop(dx.random_mask(jax.random.key(seed), delta, DROP_RATE), delta)
        for q in (0.1, 0.37, jnp.float32(0.8), {"a.weight": 0.1, "a.bias": 0.2, "b": 0.3}):
            ours, before = flatten_names(pruned(q)), flatten_names(by_masked_delta(start, masked, q))
            assert ours.keys() == before.keys() and ours["a.weight"].dtype == dtype
            assert all(np.asarray(ours[n]).tobytes() == np.asarray(before[n]).tobytes() for n in ours)


def test_masks_are_averaged_as_the_objective_says():
    model, fine, start, delta = pair("bert")
    models = Pair(model, fine, start, delta, DROP_RATE).models
    kept = [dx.prune(jax.random.key(seed), delta, DROP_RATE, 1.0) for seed in range(4)]
    sizes = [float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(m))) for m in kept]

    def size(params):  # of what was added to the base: the masked delta over q
        moved = jax.tree.map(lambda a, b: jnp.abs(a - b).sum(), params, start)
        return float(sum(jax.tree.leaves(moved)))

    seen = []
    goal = Objective("size", size, True, lambda values: seen.append(values) or max(values), 0)
    found = find_q(goal, models, [0.5, 1.0])
    assert found.q == 0.5 and found.value == pytest.approx(2 * max(sizes), rel=1e-4)
    np.testing.assert_allclose(seen[0], [2 * s for s in sizes], rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["exact", "published"])
def test_layers_by_outputs(family, rule):
    model, fine, start, delta = pair(family)
    batches = make_batches()
    q_of = layer_rule(input_statistics(model, fine, batches), delta, DROP_RATE, rule)
    names = set(flatten_names(delta))
    goal = output_objective(model, fine, batches)
    found = find_q(goal, Pair(model, fine, start, delta, DROP_RATE).models, eta_grid(), q_of=q_of)
    q = q_of(found.q)
    assert set(q) == names and all(1 - DROP_RATE - 1e-9 <= x <= 1.0 for x in q.values())
    assert found.value == min(value for _, value in found.curve)


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_is_that_of_the_raw_inputs(family):
    model, fine, _, delta = pair(family)
    batches = make_batches()
    found = closed_form(squared_influences(model, fine, delta, batches), DROP_RATE)
    named = flatten_names(delta)
    total = np.zeros(2)
    for name, x in raw_inputs(model, fine, batches).items():
        if name in named:
            weights = np.asarray(named[name], np.float64)
            sums = np.array([weights**2 @ (x**2).mean(0), ((x @ weights.T) ** 2).mean(0)])
            np.testing.assert_allclose(found.rows[name], 0.1 + 0.9 * sums[0] / sums[1], rtol=1e-3)
            layer = sums.sum(1)
            assert found.layers[name] == pytest.approx(0.1 + 0.9 * layer[0] / layer[1], rel=1e-3)
            total += layer
    assert found.q == pytest.approx(0.1 + 0.9 * total[0] / total[1], rel=1e-3)
    with pytest.raises(ValueError, match="no linear layer is in scope"):
        closed_form(squared_influences(model, fine, {"other": jnp.ones((2, 2))}, batches), DROP_RATE)


def test_two_points_give_the_minimum_of_a_linear_model():
    """E(q) = a (1 - (1-p)/q)^2 + b / q^2, measured at q = infinity and elsewhere, against a fine scan."""
    rng = np.random.default_rng(0)
    for p in (0.5, 0.9, 0.999):
        a, b = rng.uniform(0.1, 10, 2) * [1.0, (1 - p) ** 2]

        def error(q, a=a, b=b, p=p):
            return a * (1 - (1 - p) / q) ** 2 + b / q**2

        q = two_point_q(a, error(1 - p), p)
        scan = np.linspace(0.5 * q, 2 * q, 200_001)
        assert q == pytest.approx(scan[error(scan).argmin()], rel=1e-4)
        assert two_point_q(a, error(3 * (1 - p)), p, 3 * (1 - p)) == pytest.approx(q)
    assert two_point_q(1.0, 1.5, 0.9, 0.2) > 0.4
    for wrong in (
        (0.0, 1.0, 0.9),
        (-1.0, 1.0, 0.9),
        (1.0, -1.0, 0.9),
        (1.0, np.nan, 0.9),
        (1.0, 1.0, 1.0),
        (1.0, 1.0, 0.5, 0.0),
    ):
        with pytest.raises(ValueError, match=r"errors are finite|need 0 <= drop_rate"):
            two_point_q(*wrong)


def squared_change(model, fine, batches, params):
    total = count = 0
    for b in batches:
        mask = (b["attention_mask"] > 0) & (b["weight"] > 0)[:, None]
        run = jax.jit(model)
        hidden = [np.asarray(run(x, b["input_ids"], b["attention_mask"])[0]) for x in (params, fine)]
        square = ((hidden[0] - hidden[1]) ** 2).mean(-1)
        total, count = total + square[mask].sum(), count + mask.sum()
    return total / count


def test_two_point_measures_the_squared_change_of_base_and_dare():
    model, fine, start, delta = pair("bert")
    batches, told = make_batches(), []
    opened = Pair(model, fine, start, delta, DROP_RATE, (0, 1))
    q, visited = two_point(opened, batches, on_value=lambda *point: told.append(point))
    assert told == visited[1:]
    (_, without), (first, dare), *later = visited
    assert first == 0.1 and len(later) >= 1
    assert without == pytest.approx(squared_change(model, fine, batches, start), rel=1e-4)
    pruned = [squared_change(model, fine, batches, pruned(0.1)) for pruned in opened.models]
    assert dare == pytest.approx(np.mean(pruned), rel=1e-4)
    assert later[0][0] == pytest.approx(0.1 * (1 + dare / without))
    assert q == later[-1][0] and later[-1][1] <= 1.1 * without


def test_two_point_leaves_where_outputs_are_saturated(monkeypatch):
    """A change that cannot exceed 3 hides how large the noise is: q grows until it is better than none."""
    p, a, b = 0.999, 1.0, 1e-4  # in the linear model, E(1 - p) is 100 and the best q 0.101
    q, visited = two_point_of(
        monkeypatch, lambda q: a if q is None else min(3.0, a * (1 - (1 - p) / q) ** 2 + b / q**2), p
    )
    values = [q for q, _ in visited[1:]]
    assert all(2 * low <= high for low, high in pairwise(values[1:]))
    assert 0.03 < q < 0.102 and q == values[-1] and visited[-1][1] <= 1.1


def two_point_of(monkeypatch, change, drop_rate):
    """`two_point` where the squared output change is a function of q, of None without a delta."""
    from darex_jax.choosing import pair
    from darex_jax.choosing import two_point as module

    monkeypatch.setattr(module, "output_change", lambda model, q, *_, squared: change(q))
    monkeypatch.setattr(module, "reference_outputs", lambda *_: None)
    monkeypatch.setattr(pair, "pruned_params", lambda start, delta, key, drop_rate, q: q)
    return two_point(Pair(None, None, None, None, drop_rate, (0,)), [])


def test_two_point_measures_every_q_it_gives(monkeypatch):
    # Worse than no delta up to the end: the last q is 1 or more, and measured.
    q, visited = two_point_of(monkeypatch, lambda q: 1.0 if q is None else 3.0, 0.9)
    assert q == visited[-1][0] >= 1.0 and visited[-1][1] == 3.0
    # DARE's own error is 0: measured again where it solves to, not for ever.
    q, visited = two_point_of(monkeypatch, lambda q: 1.0 if q is None else 0.0, 0.9)
    assert q == pytest.approx(0.1) and len(visited) == 3
    # What is not finite is passed over.
    q, visited = two_point_of(monkeypatch, lambda q: 1.0 if q is None else np.nan if q < 0.3 else 0.5, 0.9)
    assert q == visited[-1][0] and [q for q, _ in visited[1:4]] == [0.1, 0.2, 0.4] and visited[-1][1] == 0.5


def test_two_point_says_where_there_is_nothing_to_solve(monkeypatch):
    assert two_point_of(monkeypatch, lambda q: 0.0, 0.99) == (0.01, [(np.inf, 0.0)])
    with pytest.raises(ValueError, match="outputs of the base or of the fine-tuned model are not finite"):
        two_point_of(monkeypatch, lambda q: np.nan, 0.99)
    with pytest.raises(
        ValueError, match=r"the pruned model's outputs are finite at none of the q up to 1\.28"
    ):
        two_point_of(monkeypatch, lambda q: 1.0 if q is None else np.nan, 0.99)


# Learned.


def learning(family, **options):
    model, fine, start, delta = pair(family)
    layers = [name for name in flatten_names(delta) if name.endswith("weight") and "orm" not in name
              and "embed" not in name]  # fmt: skip
    batches = make_batches(3)
    masked = dx.prune(jax.random.key(0), delta, DROP_RATE, 1.0)
    opened = Pair(model, fine, start, delta, DROP_RATE)
    return learn_q(opened, masked, layers, batches[:2], batches[2:], Learning(**options))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_learning_lowers_the_held_out_change(family):
    found = learning(family, epochs=15)
    assert found.change < 0.95 * found.history[0][1]
    assert found.change == min(held_out for _, held_out in found.history)
    by_layer = {name: q for name, q in found.q.items() if "query" in name or "q_proj" in name}
    assert all(q >= 0.1 - 1e-6 for q in found.q.values()) and len(set(by_layer.values())) == 2
    if family == "bert":
        name = "bert.encoder.layer.0.attention.self.query"
        assert found.q[f"{name}.bias"] == found.q[f"{name}.weight"]


def test_learning_has_the_right_gradient():
    """Of the output change in one layer's q, against the difference quotient."""
    model, fine, start, delta = pair("bert")
    (pruned,) = Pair(model, fine, start, delta, DROP_RATE, (0,)).models
    batch = make_batches(1)[0]
    reference = reference_outputs(model, fine, [batch])[0]
    names = list(flatten_names(delta))

    def change(q):
        by_name = {name: q if "layer.1.output.dense" in name else jnp.float32(0.3) for name in names}
        total, count = output_change_sums(model, True, pruned(by_name), batch, reference)
        return total / count

    slope = jax.grad(change)(jnp.float32(0.3))
    quotient = (change(jnp.float32(0.305)) - change(jnp.float32(0.295))) / 0.01
    assert slope != 0 and float(slope) == pytest.approx(float(quotient), rel=0.02)


def test_learning_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    whole = learning("bert", epochs=6)

    class Stop(Exception):
        pass

    def stop(epoch, change, held_out):
        if epoch == 4:
            raise Stop

    checkpoints = Checkpoints(tmp_path / "run", every=1)
    with pytest.raises(Stop):
        learning("bert", epochs=6, checkpoints=checkpoints, on_epoch=stop)
    epochs = []
    again = learning(
        "bert", epochs=6, checkpoints=checkpoints, on_epoch=lambda epoch, *_: epochs.append(epoch)
    )
    assert epochs == [4, 5, 6] and again == whole


def test_learning_ends_without_improvement():
    found = learning("bert", epochs=50, learning_rate=3.0, patience=2)
    best = int(np.argmin([held_out for _, held_out in found.history]))
    assert len(found.history) - 1 == best + 2 < 50
    with pytest.raises(ValueError, match="at least one layer"):
        model, fine, start, delta = pair("bert")
        opened = Pair(model, fine, start, delta, DROP_RATE)
        learn_q(opened, delta, [], make_batches(1), make_batches(1), Learning())


# At the terminal.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Base and fine-tune of a tiny BERT and a tiny Llama, with tokenizers made on the spot."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("pairs")
    for family in ("bert", "llama"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        config = FAMILIES[family] | {"vocab_size": 259, "max_position_embeddings": 512}
        model, base = init_model(read_model_config(config), jax.random.key(0))
        fine = jax.tree.map(lambda x: x + 0.1 * jnp.sin(200 * x), base)
        if family == "bert":
            some = load_task("opinions").validation.select(slice(6))
            batches = evaluation_batches(encode(fast, some))
            fine = of_two_classes(model, fine, batches)
            by_class = np.array(some.texts)[predict(model, fine, batches).argmax(-1).argsort()]
        for name, params in (("base", base), ("fine", fine)):
            dx.save_params(root / family / name, params, model.config.to_hf())
            fast.save_pretrained(root / family / name)
    (root / "text").write_text(f"{by_class[0]}\n\n{by_class[1]}\n{by_class[-1]}\n", encoding="utf-8")
    return root


def darex(*arguments, json_too=True):
    result = CliRunner().invoke(main, [*map(str, arguments), *(["--json"] if json_too else [])])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout) if json_too else result.stdout


RUNS = [
    ("bert", "--objective", "labels", "--task", "opinions", "--masks", 2),
    ("bert", "--objective", "auto"),
    ("bert", "--objective", "outputs", "--grid", 0.1, 0.5, 0.1),
    ("bert", "--objective", "labels", "--task", "opinions", "--scope", "layer", "--rule", "published"),
    ("bert", "--objective", "learned", "--scope", "layer"),
    ("bert", "--objective", "two-point"),
    ("llama", "--objective", "labels", "--task", "word-problems"),
    ("llama", "--objective", "outputs", "--scope", "layer"),
    ("llama", "--objective", "closed-form"),
    ("llama", "--objective", "closed-form", "--scope", "layer"),
]


def digest_of_six(fine, objective):
    """Of the first six examples that an objective may see: held-out ones or those that train, no test's."""
    held_out, tokenizer = objective in ("labels", "predictions"), load_tokenizer(fine)
    if fine.parent.name == "llama":
        return encode_problems(tokenizer, load_problems("word-problems")[held_out][:6]).digest()
    task = load_task("opinions")
    return encode(tokenizer, (task.validation if held_out else task.train).select(slice(6))).digest()


@pytest.mark.parametrize("way", RUNS, ids=lambda way: "-".join(map(str, way[::2])))
def test_find_q_writes_what_prune_takes(folders, tmp_path, way):
    family, *way = way
    base, fine, q_file = folders / family / "base", folders / family / "fine", tmp_path / "q.json"
    search = ("find-q", base, fine, "-p", 0.9, "--limit", 6, "--out", q_file, *way)
    report = darex(*search)
    assert report == json.loads(q_file.read_text())
    assert report["manifest"]["inputs"]["data"] == digest_of_six(fine, report["objective"])
    names = set(flatten_names(dx.load_params(fine)))
    values = report["q"].values() if isinstance(report["q"], dict) else [report["q"]]
    assert (set(report["q"]) <= names) if "layer" in way else isinstance(report["q"], float)
    assert all(q > 0 for q in values)
    assert report["labels"] == (6 if "labels" in way else 0) and report["evaluations"] > 0
    if "curve" in report:
        assert q_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    pruned = darex("prune", base, fine, tmp_path / "delta", "-p", 0.9, "--q", q_file)
    assert pruned["survivors"] > 0
    before = q_file.read_bytes()
    text = darex(*search, json_too=False)
    assert q_file.read_bytes() == before  # the same command, the same file
    assert "passes over 6 examples" in text and f"--q {q_file}" in text


def test_the_masks_are_those_of_the_seed(folders):
    """What is measured is what `prune` with that key leaves, of the examples by hand."""
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"
    pair = open_pair(base, fine, 0.9)
    model, params = pair.model, pair.params
    tokenizer = load_tokenizer(fine)
    batches = evaluation_batches(encode(tokenizer, load_task("opinions").train.select(slice(6))))
    references = reference_outputs(model, params, batches)
    how = {"objective": "outputs", "grid": (0.1, 0.1, 0.1), "masks": 1}
    for seed in (0, 5):
        found = choose_q(base, fine, 0.9, Choice(seed=seed, **how), Source(limit=6))
        pruned = dx.apply_delta(pair.start, dx.prune(jax.random.key(seed), pair.delta, 0.9, 0.1))
        assert found["mask_seeds"] == [seed] and found["curve"][0][0] == 0.1
        assert found["curve"][0][1] == pytest.approx(output_change(model, pruned, batches, references))
    assert choose_q(base, fine, 0.9, Choice(seed=0, **how), Source(limit=6))["curve"][0] != found["curve"][0]


def test_where_examples_tell_nothing_q_stays_dares(folders, tmp_path):
    base, fine, q_file = folders / "bert" / "base", folders / "bert" / "fine", tmp_path / "q.json"

    def warned(*arguments, why):
        report = darex("find-q", *arguments, "-p", 0.9, "--out", q_file)
        q = report["q"] if isinstance(report["q"], dict) else {"": report["q"]}
        assert all(x == pytest.approx(0.1) for x in q.values()) and why in report["warning"]
        assert "do not tell one q from another, and q stays at DARE's" in report["warning"]
        json.loads(q_file.read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
        return report

    labels = ("--objective", "labels", "--task", "opinions", "--limit", 1)
    one_class = warned(base, fine, *labels, why="the labels of the 1 examples are all the same")
    assert one_class["evaluations"] == 0 and "curve" not in one_class
    warned(base, fine, *labels, "--scope", "layer", why="the labels of the 1 examples")
    assert darex("prune", base, fine, tmp_path / "d", "-p", 0.9, "--q", q_file)["survivors"] > 0
    some = ("--limit", 6, "--masks", 1)
    flat = warned(base, base, "--objective", "outputs", *some, why="output change is the same at every point")
    assert flat["curve"][0] == [0.1, 0.0] and flat["curve"][-1] == [1.0, 0.0]
    warned(
        base, base, "--objective", "outputs", "--grid", 0.2, 0.4, 0.1, *some, why="the same at every point"
    )
    warned(base, base, "--objective", "two-point", *some, why="the base gives the fine-tuned model's outputs")
    warned(base, base, "--objective", "closed-form", *some[:2], why="the delta changes no layer's output")
    learned = ("--objective", "learned", "--scope", "layer", "--limit", 6)
    warned(base, base, *learned, why="no epoch was better than the first q")
    find = ("find-q", base, base, "-p", 0.9, "--objective", "two-point", *some, "--out", q_file)
    assert "do not tell one q from another" in " ".join(darex(*find, json_too=False).split())
    text = ("--q", "outputs", "--text", folders / "text")
    assert (
        "outputs, to no avail: "
        in darex("prune", base, base, tmp_path / "d", "-p", 0.9, *text)["q_chosen_by"]
    )


def test_what_json_has_no_number_for_is_null(monkeypatch, folders, tmp_path):
    """A q whose outputs overflow is passed over; the file and the terminal say so."""
    from darex_jax.choosing import searched as module

    plain = output_objective

    def overflowing(model, fine, batches):
        goal = plain(model, fine, batches)
        return goal._replace(over_masks=lambda values: np.nan if values[0] > 1.0 else values[0])

    monkeypatch.setattr(module, "output_objective", overflowing)
    base, fine, q_file = folders / "bert" / "base", folders / "bert" / "fine", tmp_path / "q.json"
    find = ("find-q", base, fine, "-p", 0.99, "--objective", "outputs", "--limit", 6, "--masks", 1)
    text = darex(*find, "--out", q_file, json_too=False)
    report = json.loads(q_file.read_text(), parse_constant=pytest.fail)
    assert "not finite" in text and report["curve"][0] == [0.01, None] and report["q"] > 0.01
    assert "warning" not in report

    def flat(model, fine, batches):
        goal = overflowing(model, fine, batches)
        return goal._replace(over_masks=lambda values: np.nan if values[0] > 1.0 else 0.5)

    monkeypatch.setattr(module, "output_objective", flat)
    report = darex(*find, "--out", q_file)
    finite = [q for q, value in report["curve"] if value is not None]
    assert report["q"] == min(finite) > 0.01
    assert report["warning"].endswith("and the smallest with finite outputs is kept")


def test_what_decides_when_learning_stops_is_drawn_by_the_seed():
    for count in (2, 3, 4, 7, 200):
        rest, held_out = hold_out_quarter(count, 0)
        assert sorted([*rest, *held_out]) == list(range(count)) and len(held_out) == max(1, count // 4)
        assert len(rest) > 0
    first, other = hold_out_quarter(200, 0)[1], hold_out_quarter(200, 1)[1]
    assert first.tolist() != other.tolist() and not np.isin(np.arange(50), first).all()
    assert 60 < first.mean() < 140


def test_learning_gets_texts_of_all_lengths_and_counts_its_passes(folders, monkeypatch):
    from darex_jax.choosing import learned as module

    seen = {}

    def learn(pair, masked, layers, batches, held_out, how):
        seen.update(rest=batches, held_out=held_out, masked=masked)
        history = [(3.0, 3.0), (2.5, 2.0), (2.0, 1.0)]
        return LearnedQ(dict.fromkeys(flatten_names(masked), 0.2), 1.0, history)

    monkeypatch.setattr(module, "learn_q", learn)
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"
    choice = Choice(objective="learned", scope="layer", seed=3)
    found = choose_q(base, fine, 0.9, choice, Source(limit=40))
    examples = encode(load_tokenizer(fine), load_task("opinions").train.select(slice(40)))

    def texts(batches):
        return sorted(
            tuple(ids[mask > 0])
            for b in batches
            for ids, mask, w in zip(b["input_ids"], b["attention_mask"], b["weight"], strict=True)
            if w
        )

    rest, held_out = (texts(seen[part]) for part in ("rest", "held_out"))
    assert len(held_out) == 10 and sorted(rest + held_out) == sorted(map(tuple, examples.input_ids))
    assert max(map(len, held_out)) > np.median([len(ids) for ids in examples.input_ids])
    # At first the 10; in each of two epochs 30 forwards and backwards, which is 90, and the 10.
    assert found["evaluations"] == (10 + 2 * (90 + 10)) / 40 and found["examples"] == 40
    _, params, in_scope = load_pair(base, fine)
    masked = dx.prune(jax.random.key(3), split_in_scope(params, in_scope)[1], 0.9, 1.0)
    jax.tree.map(np.testing.assert_array_equal, seen["masked"], masked)
    with pytest.raises(ValueError, match="learned takes two examples or more"):
        choose_q(base, fine, 0.9, replace(choice, seed=0), Source(limit=1))


def test_float16_is_searched_in_float32(folders, tmp_path):
    for name in ("base", "fine"):
        source = folders / "bert" / name
        half = jax.tree.map(lambda x: x.astype(jnp.float16), dx.load_params(source))
        config = json.loads((source / "config.json").read_text())
        dx.save_params(tmp_path / name, half, config, companions_from=source)
    _, params, base = load_pair(tmp_path / "base", tmp_path / "fine")
    assert {x.dtype for x in jax.tree.leaves((params, base))} == {jnp.dtype(jnp.float32)}
    told = []
    found = choose_q(
        tmp_path / "base", tmp_path / "fine", 0.9, Choice(objective="two-point", masks=1), Source(limit=4),
        on_value=lambda q, change: told.append([q, change]),
    )  # fmt: skip
    assert told == found["changes"] and found["q"] == told[-1][0]  # what is shown, and what is measured


def test_a_narrow_base_is_widened_to_its_fine_tune(folders, tmp_path):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dx.load_params(folders / "bert" / "base"))
    config = json.loads((folders / "bert" / "base" / "config.json").read_text())
    dx.save_params(tmp_path / "base", narrow, config)
    _, _, base = load_pair(tmp_path / "base", folders / "bert" / "fine")
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype(jnp.float32)}


def test_text_grid_and_task_are_checked_before_a_model_is_loaded(folders, tmp_path, monkeypatch):
    from darex_jax.choosing import choose as module

    monkeypatch.setattr(module, "open_pair", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "latin").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "empty").write_text("\n")
    models = folders / "bert" / "base", folders / "bert" / "fine"
    for wrong, source, told in (
        ({}, {"text": tmp_path / "latin"}, "latin: line 1 is not UTF-8 text"),
        ({}, {"text": tmp_path / "empty"}, "empty: has no line of text"),
        ({"grid": (0.5, 0.1, 0.1)}, {}, "need 0 < low <= high and step > 0"),
        ({"objective": "two-point", "grid": (0.1, 0.5, 0.1)}, {}, "two-point searches no grid"),
        ({}, {"task": "gsm8k"}, "gsm8k is for decoders"),
        ({}, {"task": "nonsense"}, "unknown task 'nonsense'"),
        ({"objective": "labels"}, {}, "labels are those of the model's own task: name it"),
        ({}, {"text": tmp_path / "none"}, "none: No such file or directory"),
    ):
        with pytest.raises(ValueError, match=told):
            choose_q(*models, 0.9, Choice(**({"objective": "outputs"} | wrong)), Source(**source))


@pytest.mark.parametrize("changed", ["base", "fine"])
def test_a_q_file_is_for_its_pair_mask_and_scope(folders, tmp_path, changed):
    pair = {name: folders / "bert" / name for name in ("base", "fine")}
    q_file, out = tmp_path / "q.json", tmp_path / "d"
    how = ("--objective", "outputs", "--masks", 1, "--limit", 4, "--grid", 0.1, 0.1, 0.1, "--out", q_file)
    darex("find-q", *pair.values(), "-p", 0.9, *how)

    def prune(*options, base=pair["base"], fine=pair["fine"]):
        arguments = ("prune", base, fine, out, "-p", 0.9, "--q", q_file, *options)
        result = CliRunner().invoke(main, [*map(str, arguments)])
        assert (result.exit_code == 0) == out.exists()
        out.unlink(missing_ok=True)
        return result.stderr

    assert "warning" not in prune() and "warning" not in prune("--json")
    assert "chosen with the mask of seed 0, not of 3" in prune("--seed", 3)
    assert "chosen with --exclude not given, not with ['pooler']" in prune("--exclude", "pooler")
    other = tmp_path / "other"
    moved = flatten_names(dx.load_params(pair[changed]))
    name = "bert.encoder.layer.1.output.dense.weight"  # one entry, by one bit
    moved[name] = moved[name].at[3, 5].set(jnp.nextafter(moved[name][3, 5], jnp.float32(9)))
    config = json.loads((pair[changed] / "config.json").read_text())
    dx.save_params(other, unflatten_names(moved), config)
    kind = {"base": "base", "fine": "fine-tuned model"}[changed]
    assert f"was chosen for another {kind} than {other}" in prune(**{changed: other})
    # Files without a manifest, or with one of another kind, are taken as before.
    for content in ({"q": 0.2}, {"q": 0.2, "manifest": []}, {"q": 0.2, "manifest": {"inputs": 3}}):
        q_file.write_text(json.dumps(content))
        assert prune(**{changed: other}) == ""


def test_without_a_task_no_label_is_looked_at(folders, tmp_path):
    """find-q by itself searches by predictions, or in two points where a model has no classes."""
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"
    some = ("-p", 0.9, "--limit", 2, "--masks", 1, "--out", tmp_path / "q.json")
    report = darex("find-q", base, fine, *some)
    assert (report["objective"], report["labels"], report["data"]) == (
        "predictions",
        0,
        "opinions (generated)",
    )
    assert without_labels(folders / "llama" / "fine", "model") == "predictions"
    for name, changes in (("one", {"num_labels": 1}), ("body", {"architectures": ["BertForMaskedLM"]})):
        (tmp_path / name).mkdir()
        config = json.loads((fine / "config.json").read_text()) | changes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert without_labels(tmp_path / name, "model") == "two-point"
        assert without_labels(tmp_path / name, "layer") == "outputs"


def test_statistics_are_kept_and_checked(folders, tmp_path):
    file = tmp_path / "statistics.safetensors"
    models = folders / "bert" / "base", folders / "bert" / "fine"
    options = ("--objective", "outputs", "--scope", "layer", "--statistics", file)
    search = ("find-q", *models, "-p", 0.9, *options, "--out", tmp_path / "q.json")
    first = darex(*search, "--limit", 6)
    written = file.stat().st_mtime_ns
    assert darex(*search, "--limit", 6) == first and file.stat().st_mtime_ns == written
    result = CliRunner().invoke(main, [*map(str, search), "--limit", "7"])
    assert result.exit_code == 1 and "made from another data; write a new one" in result.stderr


def test_learning_does_not_go_on_from_something_else(folders, tmp_path):
    models = folders / "bert" / "base", folders / "bert" / "fine"
    way = ("--objective", "learned", "--scope", "layer", "--limit", 6, "--out", tmp_path / "q.json")
    kept = ("--checkpoints", tmp_path / "run")
    first = darex("find-q", *models, "-p", 0.9, *way, *kept)
    (place,) = (tmp_path / "run").iterdir()
    with only_one(place / "lock", ""):  # as if the same search were under way; others do not mind
        same = CliRunner().invoke(main, [str(x) for x in ("find-q", *models, "-p", 0.9, *way, *kept)])
        other = darex("find-q", *models, "-p", 0.8, *way, *kept)
    assert same.exit_code == 1 and "the same search is under way with its checkpoints in" in same.stderr
    assert other["curve"][0] != first["curve"][0] and min(other["q"].values()) >= 0.2 - 1e-6
    slow = darex("find-q", *models, "-p", 0.9, *way, *kept, "--learning-rate", 1e-3)
    assert slow["curve"][0] == first["curve"][0] and slow["curve"][1] != first["curve"][1]
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert darex("find-q", *models, "-p", 0.9, *way, *kept) == first


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_prune_chooses_q_by_what_is_at_hand(folders, tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, fine = folders / family / "base", folders / family / "fine"
    prune = ("prune", base, fine, tmp_path / "delta", "-p", 0.9, "--q", "auto")
    task = {"bert": "opinions", "llama": "word-problems"}[family]
    nothing = darex(*prune)
    assert nothing["q_chosen_by"].startswith("nothing: ")
    assert darex("inspect", tmp_path / "delta")["q"] == [pytest.approx(0.1)]
    texts = darex(*prune, "--text", folders / "text")
    assert "predictions: agreement" in texts["q_chosen_by"] and "on 3 examples" in texts["q_chosen_by"]
    assert darex("inspect", tmp_path / "delta")["q"] == [texts["q"]]
    if family == "bert":  # 500 labelled problems would take a while
        labels = darex(*prune, "--task", task)
        assert labels["q_chosen_by"].startswith("labels: validation accuracy")
    solved = darex(*prune[:-1], "closed-form", "--text", folders / "text")
    assert solved["q_chosen_by"] == "closed-form: solved on 3 examples" and solved["q"] > 0.1
    text = darex(*prune, "--text", folders / "text", json_too=False)
    assert "chosen by" in text and "predictions: agreement" in text
    learned = darex(*prune[:-1], "learned", "--text", folders / "text")
    assert learned["q_chosen_by"].startswith("learned: held-out output change")
    find = ("find-q", base, fine, "-p", 0.9, "--objective", "closed-form", "--text", folders / "text")
    some = ("--exclude", "layers?[.]0", "--seed", 3, "--out", tmp_path / "some q.json")
    use = shlex.split(darex(*find, *some, json_too=False).split("Use it: ")[1])
    assert use[0] == "darex" and use[-4:] == ["--seed", "3", "--exclude", "layers?[.]0"]
    assert darex(*use[1:])["survivors"] > 0 and (Path.cwd() / "OUT").exists()


def test_the_terminal_names_every_objective():
    (option,) = (option for option in main.commands["find-q"].params if option.name == "objective")
    assert list(option.type.choices) == ["auto", *WAYS]
    assert all(f"{name}: {way.what}" in option.help for name, way in WAYS.items())


@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_where_the_table_says(name):
    assert WAYS[name].find.__module__ == f"darex_jax.choosing.{WAYS[name].place.split('.')[0]}"
    assert WAYS[name].find.__doc__


def test_mistakes_are_told(folders, tmp_path):
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"

    def fails(*arguments):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code != 0 and "Traceback" not in result.output
        return result.stderr

    find = ("find-q", base, fine, "-p", 0.9, "--out", tmp_path / "q.json")
    assert "say --scope layer" in fails(*find, "--objective", "learned")
    assert "say --scope model" in fails(*find, "--objective", "two-point", "--scope", "layer")
    assert "texts have no labels" in fails(*find, "--objective", "labels", "--text", folders / "text")
    assert "gsm8k is for decoders" in fails(*find, "--task", "gsm8k")
    assert "from a task or from a text file" in fails(
        *find, "--objective", "outputs", "--task", "sst2", "--text", folders / "text"
    )
    (tmp_path / "empty").write_text("\n")
    assert "has no line of text" in fails(*find, "--objective", "outputs", "--text", tmp_path / "empty")
    assert "name it (--task)" in fails(*find, "--objective", "labels")
    assert "there is no q to choose" in fails("find-q", base, fine, "-p", 0.0)
    assert "--task, --data-dir and --text are for --q auto or an objective" in fails(
        "prune", base, fine, tmp_path / "d", "-p", 0.9, "--task", "sst2"
    )
    assert "is a directory; a regular file is needed" in fails(*find[:-1], tmp_path)
    assert "it is a picture" in fails(*find[:-1], tmp_path / "q.png")
    (tmp_path / "other.json").write_text('{"q": 0.02, "drop_rate": 0.99}')
    assert "chosen for a drop rate of 0.99, not of 0.9" in fails(
        "prune", base, fine, tmp_path / "d", "-p", 0.9, "--q", tmp_path / "other.json"
    )
    assert not (tmp_path / "q.json").exists() and not (tmp_path / "d").exists()


# Methods that train what they keep: the whole way from the terminal.


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_prune_trains_a_delta_of_the_size_asked_for(folders, tmp_path, family):
    base, fine = folders / family / "base", folders / family / "fine"
    texts = tmp_path / "texts"
    texts.write_text("".join(f"{'abc'[i % 3]}{i % 7} some words\n" for i in range(40)))
    line = ["prune", base, fine, tmp_path / "d", "--method", "distilled", "--size", "1.3x", "--steps", 6]
    report = darex(*line, "--text", texts)
    assert report["method"] == "distilled" and report["bytes"] <= report["fine_bytes"] / 1.3
    assert darex(*line, "--text", texts)["digest"] == report["digest"]  # a repeat gives the same file
    named = flatten_names(dx.load_delta(tmp_path / "d"))
    assert any(np.any(np.asarray(x)) for name, x in named.items() if name.endswith("weight"))
    (tmp_path / "one").write_text("a single line\n")
    refused = CliRunner().invoke(main, list(map(str, [*line, "--text", tmp_path / "one"])))
    assert refused.exit_code == 1 and "takes two texts or more" in refused.stderr


def test_prune_finds_the_smallest_file_within_a_loss(folders, tmp_path, monkeypatch):
    from darex_jax.runs import prune as module

    monkeypatch.setattr(module, "SIZES", (0.05, 1.5))
    monkeypatch.setattr(module, "PLACES", 4)
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"
    texts = tmp_path / "texts"
    texts.write_text("".join(f"{'abc'[i % 3]}{i % 7} some words\n" for i in range(40)))
    line = ["prune", base, fine, tmp_path / "d", "--method", "distilled", "--text", texts, "--steps", 9]
    loose, strict = (darex(*line, "--max-loss", loss) for loss in (0.9, 0.2))
    for loss, report in ((0.9, loose), (0.2, strict)):
        assert 1 - report["agreement"] <= loss and report["held_out"] == 20
    assert (tmp_path / "d").stat().st_size == strict["bytes"] >= loose["bytes"]
    for wrong, text in (
        (("--max-loss", 0.1, "--size", "3x"), "one of them"),
        (("--max-loss", 0.1, "--method", "svd"), "svd measures no loss"),
        (("--size", "3x", "--method", "svd", "--checkpoints", tmp_path / "c"), "svd does not train"),
        (("--size", "3x", "--method", "sign", "--bits", 4), "sign has bits of its own"),
    ):
        refused = CliRunner().invoke(main, list(map(str, [*line, *wrong])))
        assert refused.exit_code == 2 and text in refused.stderr
    own = fine / "model.safetensors"
    before = own.read_bytes()
    over = [own if x == tmp_path / "d" else x for x in line]
    refused = CliRunner().invoke(main, list(map(str, [*over, "--max-loss", 0.9])))
    assert refused.exit_code == 1 and own.read_bytes() == before
    monkeypatch.setattr(module, "SIZES", (0.001, 0.002))
    refused = CliRunner().invoke(main, list(map(str, [*line, "--max-loss", 0.0])))
    assert refused.exit_code == 1 and "allow a larger loss" in refused.stderr

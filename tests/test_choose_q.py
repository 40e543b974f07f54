"""Choosing q on tiny models: objectives, one q, q per layer, closed form, learned."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.choosing.learned import Learning, learn_q
from darex_jax.choosing.pair import Pair, split_in_scope
from darex_jax.choosing.searched import eta_grid, find_q, layer_rule, q_grid
from darex_jax.choosing.two_point import two_point
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
from darex_jax.evaluation.outputs import output_change_sums, reference_outputs
from darex_jax.models import init_model, logits, read_model_config
from darex_jax.q.closed_form import closed_form, two_point_q
from darex_jax.tasks import Examples, Task
from darex_jax.training.causal_lm import answer_loss, answer_scores
from darex_jax.training.checkpoints import Checkpoints
from tests.test_calibration import FAMILIES, make, make_batches, raw_inputs

DROP_RATE = 0.9


def pair(family):
    """A base, a fine-tuned model, and the delta of its linear layers, norms and embeddings."""
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
    """Batches like those of `evaluation_batches`, of a task with two classes."""
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


def test_objectives_of_a_classifier_match_explicit_values():
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


def test_objectives_of_a_decoder_match_explicit_values():
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
    # With labels set to its own first-ranked tokens, all answers are correct.
    first = np.asarray(run(fine, batches[0]["input_ids"], batches[0]["attention_mask"]).logits).argmax(-1)
    last = batches[0]["attention_mask"].sum(1) - 1
    known = {name: x.copy() for name, x in batches[0].items()}
    known["loss_mask"][:] = 0
    for row, t in enumerate(last):  # only the last token, which has no successor
        known["input_ids"][row, t], known["loss_mask"][row, t] = first[row, t - 1], 1
    assert answer_objective(model, [known]).measure(fine) == 1.0 > max(shares)


def broken(params):
    """The same with one NaN in a layer that affects every token."""
    named = flatten_names(params)
    name = next(n for n in named if n.endswith(("output.dense.weight", "down_proj.weight")))
    return unflatten_names(named | {name: named[name].at[0, 0].set(jnp.nan)})


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_outputs_that_are_not_finite_agree_with_nothing(family):
    """The argmax of NaN is class or token 0, which must not count: the value is NaN."""
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
    # Such a q is skipped, and the search continues.
    (sound,) = Pair(model, fine, start, delta, DROP_RATE, (0,)).models
    models = [lambda q: broken(start) if q < 0.3 else sound(q)]
    found = find_q(goals[0], models, [0.1, 0.2, 0.4, 0.8])
    assert found.q >= 0.3 and np.isnan(found.curve[0][1])
    with pytest.raises(ValueError, match="the objective is finite at none of the 2 visited q"):
        find_q(goals[0], [lambda q: broken(start)], [0.1, 0.2])


def test_uninformative_objectives_are_reported():
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
        """Everything with at most `entries` logits at a time."""
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
    """In a compiled program: 4 x 64 x 4,096 logits are 4 MiB, and so is their gradient."""
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
    assert all(pruned.args[1] is delta for pruned in models)  # one delta, without a copy per mask
    goal = label_objective(model, TASK, with_labels(make_batches()))
    goal.measure(models[0](0.1))
    before = _pruned_leaf._cache_size(), _logits._cache_size()
    found = find_q(goal, models, q_grid(DROP_RATE))
    others = Pair(model, fine, start, delta, 0.8, (9,)).models
    find_q(goal, others, [0.3], q_of=lambda q: dict.fromkeys(flatten_names(delta), q))
    assert len(found.curve) > 6 and (_pruned_leaf._cache_size(), _logits._cache_size()) == before
    with pytest.raises(ValueError, match=r"q has no entry for bert\.embeddings"):
        models[0]({"bert.pooler.dense.bias": 0.5})


@jax.jit
def by_masked_delta(start, masked, q):
    """The pruned model from a delta that is masked in advance: the former `pruned_params`."""
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

    def size(params):  # of the added masked delta over q
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
        with pytest.raises(ValueError, match=r"errors must be finite|need 0 <= drop_rate"):
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
    """A change bounded by 3 hides the size of the noise: q grows until it is better than no delta."""
    p, a, b = 0.999, 1.0, 1e-4  # in the linear model, E(1 - p) is 100 and the best q 0.101
    q, visited = two_point_of(
        monkeypatch, lambda q: a if q is None else min(3.0, a * (1 - (1 - p) / q) ** 2 + b / q**2), p
    )
    values = [q for q, _ in visited[1:]]
    assert all(2 * low <= high for low, high in pairwise(values[1:]))
    assert 0.03 < q < 0.102 and q == values[-1] and visited[-1][1] <= 1.1


def two_point_of(monkeypatch, change, drop_rate):
    """`two_point` with the squared output change given as a function of q (None: no delta)."""
    from darex_jax.choosing import pair
    from darex_jax.choosing import two_point as module

    monkeypatch.setattr(module, "output_change", lambda model, q, *_, squared: change(q))
    monkeypatch.setattr(module, "reference_outputs", lambda *_: None)
    monkeypatch.setattr(pair, "pruned_params", lambda start, delta, key, drop_rate, q: q)
    return two_point(Pair(None, None, None, None, drop_rate, (0,)), [])


def test_two_point_measures_every_q_it_gives(monkeypatch):
    # Worse than no delta throughout: the last q is 1 or more, and measured.
    q, visited = two_point_of(monkeypatch, lambda q: 1.0 if q is None else 3.0, 0.9)
    assert q == visited[-1][0] >= 1.0 and visited[-1][1] == 3.0
    # DARE's own error is 0: measured once more at the solution.
    q, visited = two_point_of(monkeypatch, lambda q: 1.0 if q is None else 0.0, 0.9)
    assert q == pytest.approx(0.1) and len(visited) == 3
    # Non-finite values are skipped.
    q, visited = two_point_of(monkeypatch, lambda q: 1.0 if q is None else np.nan if q < 0.3 else 0.5, 0.9)
    assert q == visited[-1][0] and [q for q, _ in visited[1:4]] == [0.1, 0.2, 0.4] and visited[-1][1] == 0.5


def test_two_point_reports_when_there_is_nothing_to_solve(monkeypatch):
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
    """The gradient of the output change in one layer's q, against a difference quotient."""
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


def test_learning_resumes_bit_for_bit(tmp_path):
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


def test_learning_stops_without_improvement():
    found = learning("bert", epochs=50, learning_rate=3.0, patience=2)
    best = int(np.argmin([held_out for _, held_out in found.history]))
    assert len(found.history) - 1 == best + 2 < 50
    with pytest.raises(ValueError, match="at least one layer"):
        model, fine, start, delta = pair("bert")
        opened = Pair(model, fine, start, delta, DROP_RATE)
        learn_q(opened, delta, [], make_batches(1), make_batches(1), Learning())

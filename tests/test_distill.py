"""Distillation on tiny models: values trained on the fine-tuned model's outputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_calibration import FAMILIES, make_batches

import darex_jax as dx
from darex_jax.core.delta import apply_delta
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.methods.svd import decompose, low_rank
from darex_jax.methods.vectors import whole
from darex_jax.models import init_model, read_model_config
from darex_jax.parts.random import Random
from darex_jax.parts.sparse import Sparse
from darex_jax.parts.total import Parts
from darex_jax.training import distill as training
from darex_jax.training.distill import distill

STEPS = 60


def pair(family, **more):
    """A model, its fine-tuned and its base's parameters, and the delta of the matrices, by name."""
    model, fine = init_model(
        read_model_config(FAMILIES[family] | {"num_hidden_layers": 1} | more), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    named = flatten_names(fine)
    moved = {
        name: 0.2 * rng.standard_normal(x.shape).astype(np.float32)
        for name, x in named.items()
        if x.ndim == 2 and "classifier" not in name and "head" not in name
    }
    start = unflatten_names({name: x - moved.get(name, 0.0) for name, x in named.items()})
    return model, fine, start, moved


def texts(epoch):
    return make_batches(seed=100 + epoch)


def distilled(family, prune, steps=STEPS, learning_rate=3e-3, **options):
    model, fine, start, delta = pair(family, **options.pop("config", {}))
    held_out = make_batches(seed=1)
    found = distill(
        model, fine, start, prune(delta), texts, held_out, steps=steps, learning_rate=learning_rate, **options
    )
    return found, (model, fine, start, held_out)


def dare(delta):
    return dx.dare(delta, dx.Budget(drop_rate=0.7), key=jax.random.key(1))


def largest(delta):
    return dx.magnitude(delta, dx.Budget(drop_rate=0.7))


def factors(delta):
    return dx.svd(delta, dx.Budget(drop_rate=0.7))


@pytest.mark.parametrize(
    ("family", "prune"), [("bert", dare), ("roberta", factors), ("llama", largest), ("llama", dare)]
)
def test_outputs_approach_the_fine_tuned_models(family, prune):
    found, (model, fine, start, held_out) = distilled(family, prune)
    first, last = found.looks[0], found.looks[-1]
    assert last.loss < 0.75 * first.loss
    assert last.step == STEPS and last.agreement >= first.agreement
    params = apply_delta(start, found.parts)
    if family == "llama":  # its loss uses only logits
        return
    closer = []
    for batch in held_out:
        inputs = (batch["input_ids"], batch["attention_mask"])
        wanted, without, with_it = (model(p, *inputs).last_hidden_state for p in (fine, start, params))
        real = (batch["attention_mask"] * batch["weight"][:, None] > 0)[..., None]
        closer.append(float(np.sum((wanted - with_it) ** 2 * real) / np.sum((wanted - without) ** 2 * real)))
    assert np.mean(closer) < 0.8


def test_only_numbers_change_and_are_rounded_as_they_are_stored():
    delta = pair("bert")[3]
    before = dare(delta)
    found, _ = distilled("bert", dare, steps=6)
    for name, parts in found.parts.items():
        (part,), (old,) = parts.parts, before[name].parts
        assert isinstance(part, Random) and part.values.numbers.dtype == jnp.bfloat16
        assert len(part.values) == len(old.values) and float(part.q) == 1.0
        assert np.array_equal(part.key, old.key) and part.drop_rate == old.drop_rate
        kept = np.asarray(part.to_dense()) != 0
        assert not np.any(kept & (np.asarray(old.to_dense()) == 0))


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_integers_are_trained_through_the_rounding(bits, monkeypatch):
    monkeypatch.setattr(training, "APART", 1)
    found, _ = distilled("bert", largest, bits=bits)
    numbers = [part.values for parts in found.parts.values() for part in parts.parts]
    most = {4: 7, 2: 1, 1: 1}[bits]
    for values in numbers:
        assert values.bits == bits and values.numbers.dtype == jnp.int8
        assert np.abs(values.numbers).max() <= most
        assert bits != 1 or np.all(values.numbers != 0)
    rounded = next(i for i, look in enumerate(found.looks) if look.step > STEPS * 2 / 3)
    assert found.looks[-1].loss <= found.looks[rounded].loss
    assert found.looks[-1].loss < found.looks[0].loss


def test_the_same_texts_give_the_same_values_and_another_start_is_measured():
    first, second = (distilled("bert", largest, steps=9)[0] for _ in range(2))
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), first.parts, second.parts)
    assert all(jax.tree.leaves(same)) and first.looks == second.looks
    assert first.multiple == 1.0
    far = distilled("bert", lambda delta: largest({n: -d for n, d in delta.items()}), steps=9)[0]
    assert far.multiple == 0.0  # a delta in the wrong direction is not used as the start


def test_distillation_resumes_bit_for_bit(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop_after(looks):
        seen = itertools.count(1)

        def on_look(look):
            if next(seen) > looks:
                raise Stopped

        return on_look

    monkeypatch.setattr(training, "APART", 1)
    options = {"steps": 24, "bits": 4}
    whole, _ = distilled("bert", largest, **options)
    for looks in (3, 11):  # in each of the two halves
        with pytest.raises(Stopped):
            distilled("bert", largest, checkpoints=tmp_path, on_look=stop_after(looks), **options)
    resumed, _ = distilled("bert", largest, checkpoints=tmp_path, **options)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), whole.parts, resumed.parts)
    assert all(jax.tree.leaves(same)) and whole.looks[-1] == resumed.looks[-1]


@pytest.mark.parametrize(("rank", "size"), [(1, 1.0), (8, 1.0), (8, 0.01)])
def test_factors_move_in_proportion_to_their_size_and_by_all_ranks_together(rank, size):
    model, fine, _, delta = pair("bert")
    name = "bert.encoder.layer.0.output.dense.weight"
    start = apply_delta(fine, {name: whole(-size * delta[name], np.float32)})
    part = low_rank(decompose(0.5 * size * delta[name]), rank, None, np.float32)
    parts = {name: Parts((part,), part.shape)}
    steps, rate = 3, 0.1
    found = distill(model, fine, start, parts, texts, make_batches(seed=1), steps=steps, factor_rate=rate)
    for before, after, axis in zip(part.factors(), found.parts[name].parts[0].factors(), (0, 1), strict=True):
        moved = np.abs(np.asarray(after) - before).max(axis) / np.sqrt(np.mean(np.square(before), axis))
        assert 0.1 * rate / rank < moved.max() < steps * rate / rank + 0.02  # up to rounding to bfloat16


def test_one_output_is_compared_by_its_score():
    found, _ = distilled("bert", largest, config={"num_labels": 1})
    assert found.looks[-1].loss < 0.6 * found.looks[0].loss and found.looks[-1].agreement > 0.5


def test_whole_vectors_and_sums_of_parts_are_trained_too():
    model, fine, start, delta = pair("bert")
    name = "bert.encoder.layer.0.output.dense.weight"
    low, sparse = factors({name: delta[name]})[name], largest({name: delta[name]})[name]
    both = type(low)((*low.parts, *sparse.parts), low.shape)
    found = distill(
        model, fine, start, {name: both}, texts, make_batches(seed=1), steps=9, learning_rate=1e-3
    )
    (a, b) = found.parts[name].parts
    assert a.kind == "low_rank" and isinstance(b, Sparse)
    for part, old in ((a.a, low.parts[0].a), (b.values, sparse.parts[0].values)):
        assert not np.array_equal(part.numbers, old.numbers)


def signs(delta):
    return {name: dx.sign({name: leaf}, dx.Budget(drop_rate=0.5))[name] for name, leaf in delta.items()}


@pytest.mark.parametrize("bits", [None, 4])
def test_scales_of_signs_are_trained_and_their_signs_kept(bits):
    """BitDelta. A sum with factors, which `bits` rounds and which the scales' own rate must not reach."""
    model, fine, start, delta = pair("bert")
    chosen = signs(delta)
    name = next(iter(chosen))
    low = dx.svd({name: delta[name]}, dx.Budget(drop_rate=0.9))[name]
    chosen[name] = Parts((*chosen[name].parts, *low.parts), chosen[name].shape)
    held_out = make_batches(seed=1)
    found = distill(model, fine, start, chosen, texts, held_out, steps=STEPS, learning_rate=3e-3, bits=bits)
    assert found.looks[-1].loss < 0.95 * found.looks[0].loss
    assert found.parts[name].parts[1].a.bits == bits
    for own, parts in ((chosen[name], found.parts[name]) for name in chosen):
        np.testing.assert_array_equal(parts.parts[0].packed, own.parts[0].packed)
        assert parts.parts[0].scales.dtype == jnp.bfloat16 and parts.parts[0].scales.shape == (1,)
    moved = [abs(float(found.parts[n].parts[0].scales[0] / chosen[n].parts[0].scales[0]) - 1) for n in chosen]
    assert 0.005 < max(moved) < 1.0


def test_wrong_arguments_are_explained():
    model, fine, start, _ = pair("bert")
    with pytest.raises(dx.DarexError, match="distillation needs at least one part"):
        distill(model, fine, start, {}, texts, make_batches(), steps=9)
    few = dx.magnitude(pair("bert")[3], dx.Budget(drop_rate=0.7), bits=4)
    with pytest.raises(dx.DarexError, match="parts with float values"):
        distill(model, fine, start, few, texts, make_batches(), steps=9)
    for changes, told in (
        ({"problem_type": "multi_label_classification"}, "multi-label"),
        ({"problem_type": "regression", "id2label": {"0": "a", "1": "b", "2": "c"}}, "several scores"),
    ):
        many, params = init_model(read_model_config(FAMILIES["bert"] | changes), jax.random.key(0))
        with pytest.raises(dx.DarexError, match=told):
            distill(many, params, params, largest(pair("bert")[3]), texts, make_batches(), steps=9)


def test_texts_that_end_are_reported_and_do_not_wait_for_ever():
    model, fine, start, delta = pair("bert")
    once = iter(make_batches())
    for batches in (lambda epoch: [], lambda epoch: once):
        with pytest.raises(dx.DarexError, match=r"batches\([01]\) has no batch"):
            distill(model, fine, start, largest(delta), batches, make_batches(seed=1), steps=30)


def test_parts_may_be_nested_as_a_method_returns_them():
    model, fine, start, delta = pair("bert")
    line = (texts, make_batches(seed=1))
    flat, nested = (
        distill(model, fine, start, largest(tree), *line, steps=3).parts
        for tree in (delta, unflatten_names(delta))
    )
    assert flat.keys() == nested.keys() == delta.keys()


def test_no_training_is_worse_than_its_start_and_without_a_head_nothing_agrees():
    found, _ = distilled("bert", largest, steps=9, learning_rate=3.0)  # far too large a rate
    assert found.looks[-1].loss <= found.looks[0].loss + 1e-3  # up to rounding to bfloat16
    found, _ = distilled("bert", largest, steps=9, config={"architectures": ["BertModel"]})
    assert np.isnan(found.looks[-1].agreement) and found.looks[-1].loss < found.looks[0].loss

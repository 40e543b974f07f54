"""A bank of deltas: each row of a mixed batch matches the model restored from its own file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.core.errors import DarexError
from darex_jax.core.sharding import make_mesh
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.files.artifact import DeltaFile
from darex_jax.models import classifier_from_pretrained, init_model, read_model_config
from darex_jax.parts.mixed import Mixed, rounded_up, stack_parts
from darex_jax.parts.total import Parts
from tests.test_calibration import FAMILIES
from tests.test_parts import DELTA, FORMS, SHAPE, make

METHODS = {
    "dare": ["-p", "0.9"],
    "magnitude": ["--bits", "4", "-p", "0.9"],
    "structured": ["-p", "0.5"],
    "svd": ["--bits", "4", "-p", "0.5"],
    "sign": ["--bytes-per-parameter", "1.0"],
    "sign-svd": ["--bytes-per-parameter", "1.5"],
}
run = jax.jit(lambda model, params, ids: model(params, ids), static_argnums=0)


def saved(folder, model, params):
    dx.save_params(folder, params, model.config.to_hf())
    return folder


def pruned(base, fine, out, *options):
    result = CliRunner().invoke(main, ["prune", *map(str, (base, fine, out)), *options])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A body and, for every method, a classifier with a different number of labels."""
    root = tmp_path_factory.mktemp("encoders")
    hf = FAMILIES["bert"] | {"architectures": ["BertModel"], "vocab_size": 97}
    body, params = init_model(read_model_config(hf), jax.random.key(0))
    base, files = saved(root / "base", body, params), {}
    for i, (method, options) in enumerate(METHODS.items()):
        model, own = classifier_from_pretrained(body, params, 1 + i % 3, jax.random.key(i))
        moved = jax.tree.map(lambda x, i=i: x + 0.1 * jnp.sin((99 + i) * x + i), own)
        fine = saved(root / method, model, moved)
        files[method] = pruned(base, fine, root / f"{method}.safetensors", "--method", method, *options)
    return base, files


def filled(base, files):
    bank = dx.DeltaBank(*dx.load_model(base))
    for name, file in files.items():
        bank.add(name, file)
    return bank


def test_every_row_is_the_model_of_its_own_file(encoders):
    base, files = encoders
    bank = filled(base, files)
    assert bank.names == tuple(files)
    names = [*files, "sign", "dare", None]
    ids = jax.random.randint(jax.random.key(1), (len(names), 12), 0, 97)
    out = run(bank.model, bank.mixed(names), ids)
    for i, name in enumerate(names):
        model, params = dx.load_model(base, delta=files.get(name))
        alone = run(model, params, ids[i : i + 1])
        np.testing.assert_allclose(out.last_hidden_state[i], alone.last_hidden_state[0], atol=2e-5)
        if name is not None:
            labels = model.config.num_labels
            np.testing.assert_allclose(out.logits[i, :labels], alone.logits[0], atol=2e-5)
            assert np.all(np.asarray(out.logits[i, labels:]) == -np.inf)


def test_activating_restores_the_file_s_model_and_then_the_base(encoders):
    base, files = encoders
    model, params = dx.load_model(base)
    before = jax.tree.map(np.array, params)
    bank = dx.DeltaBank(model, params)
    for name, file in files.items():
        bank.add(name, file)
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 97)
    for name in (*files, None, *reversed(files), None):
        given = bank.activate(name)
        if name is None:
            assert flatten_names(given).keys() == flatten_names(before).keys()
            assert jax.tree.all(jax.tree.map(np.array_equal, given, before))
            continue
        own, restored = dx.load_model(base, delta=files[name])
        assert bank.model_of(name) == own
        assert flatten_names(given).keys() == flatten_names(restored).keys()
        for leaf, right in zip(jax.tree.leaves(given), jax.tree.leaves(restored), strict=True):
            np.testing.assert_allclose(leaf, right, atol=1e-6)
            if name in ("dare", "magnitude", "structured"):
                assert np.array_equal(leaf, right)
        assert np.isfinite(run(own, given, ids).logits).all()
    assert jax.tree.all(jax.tree.map(np.array_equal, params, before))


def test_what_a_delta_keeps_whole_is_its_own_bits(tmp_path, encoders):
    """A base of 1 and a fine-tuned value of 1e-9: their float32 difference has lost the latter."""
    body, params = dx.load_model(encoders[0])
    model, own = classifier_from_pretrained(body, params, 2, jax.random.key(0))
    norm = own["bert"]["encoder"]["layer"]["0"]["output"]["LayerNorm"]["weight"]
    own["bert"]["encoder"]["layer"]["0"]["output"]["LayerNorm"]["weight"] = jnp.full_like(norm, 1e-9)
    fine = saved(tmp_path / "fine", model, own)
    delta = pruned(
        encoders[0], fine, tmp_path / "d", "--method", "svd", "-p", "0.5", "--exclude", "LayerNorm"
    )
    bank = dx.DeltaBank(body, params)
    bank.add("a", delta)
    bank.activate(None)
    given = flatten_names(bank.activate("a"))["bert.encoder.layer.0.output.LayerNorm.weight"]
    assert np.all(given == np.float32(1e-9))


def test_bodies_with_and_without_a_pooler_do_not_mix(tmp_path):
    hf = FAMILIES["bert"] | {"architectures": ["BertModel"], "vocab_size": 97}
    body, params = init_model(read_model_config(hf), jax.random.key(0))
    base = saved(tmp_path / "base", body, {n: x for n, x in params.items() if n != "pooler"})
    bank, deltas = dx.DeltaBank(*dx.load_model(base)), {}
    for name, own in (("without", {n: x for n, x in params.items() if n != "pooler"}), ("with", params)):
        fine = saved(tmp_path / name, body, jax.tree.map(lambda x: x + 0.01, own))
        deltas[name] = pruned(base, fine, tmp_path / f"{name}.d", "-p", "0.5")
    bank.add("without", deltas["without"])
    with pytest.raises(DarexError, match="differs from that of 'without' in pooler"):
        bank.add("with", deltas["with"])


def test_a_bank_of_sparse_deltas_writes_only_their_entries(encoders):
    base, files = encoders
    bank = filled(base, {name: files[name] for name in ("dare", "magnitude")})
    first = bank.activate("dare")["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["weight"]
    for name in ("magnitude", "dare", "magnitude"):
        given, restored = bank.activate(name), dx.load_model(base, delta=files[name])[1]
        assert jax.tree.all(jax.tree.map(np.array_equal, given, restored))
    assert first.is_deleted()  # its buffer was reused


def test_another_delta_of_the_same_size_does_not_recompile(encoders):
    base, files = encoders
    bank = filled(base, {"a": files["svd"], "b": files["svd"], "c": files["svd"]})
    ids = jnp.ones((4, 12), jnp.int32)
    fresh = jax.jit(lambda model, params, ids: model(params, ids).logits, static_argnums=0)
    fresh(bank.model, bank.mixed(["a", "b", "c", "a"]), ids)
    bank.remove("b")
    bank.add("d", files["svd"])
    logits = fresh(bank.model, bank.mixed(["d", "c", "a", None]), ids)
    assert fresh._cache_size() == 1
    np.testing.assert_array_equal(logits[0], logits[1])


def test_a_decoder_generates_for_each_row_what_its_own_model_generates(tmp_path, folders):
    base, files = folders / "llama" / "base", {}
    for method in ("dare", "svd", "structured"):
        out = tmp_path / f"{method}.safetensors"
        files[method] = pruned(base, folders / "llama" / "fine", out, "--method", method, *METHODS[method])
    bank = filled(base, files)
    names = ["svd", None, "dare", "structured", "dare"]
    ids = jax.random.randint(jax.random.key(2), (5, 6), 3, 259)
    mask = jnp.asarray([[0, 1, 1, 1, 1, 1]] * 2 + [[1] * 6] * 3)
    together = dx.generate(bank.model, bank.mixed(names), ids, mask, max_new_tokens=8)
    for i, name in enumerate(names):
        model, params = dx.load_model(base, delta=files.get(name))
        alone = dx.generate(model, params, ids[i : i + 1], mask[i : i + 1], max_new_tokens=8)
        np.testing.assert_array_equal(together[i : i + 1], alone)


def test_on_a_mesh_it_is_the_same(encoders):
    base, files = encoders
    mesh = make_mesh(data=2, model=4)
    banks = [dx.DeltaBank(*dx.load_model(base, mesh=m)) for m in (None, mesh)]
    names = [*files, None, None]
    ids = jax.random.randint(jax.random.key(1), (len(names), 12), 0, 97)
    logits = []
    for bank in banks:
        for name, file in files.items():
            bank.add(name, file)
        logits.append(np.asarray(run(bank.model, bank.mixed(names), ids).logits))
    np.testing.assert_allclose(*logits, atol=2e-5)
    given = banks[1].activate("svd")
    ids = ids[:2]
    np.testing.assert_allclose(
        run(banks[1].model_of("svd"), given, ids).logits,
        run(banks[0].model_of("svd"), banks[0].activate("svd"), ids).logits,
        atol=2e-5,
    )


def test_incompatible_deltas_are_refused(tmp_path, encoders, folders):
    base, files = encoders
    bank = filled(base, {"svd": files["svd"]})
    with pytest.raises(DarexError, match="no delta 'other' in the bank, which has: svd"):
        bank.activate("other")
    with pytest.raises(DarexError, match="no delta 'other'"):
        bank.mixed(["svd", "other"])
    with pytest.raises(DarexError, match="no delta 'other'"):
        bank.remove("other")
    model, params = dx.load_model(base)
    name = "encoder.layer.0.output.dense.weight"
    flat = flatten_names(params)
    changed = jax.tree.map(lambda x: x + 1 if x is flat[name] else x, params)
    with pytest.raises(DarexError, match=r"another base: '.*layer\.0\.output\.dense\.weight' differs"):
        dx.DeltaBank(model, changed).add("svd", files["svd"])
    wider = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with pytest.raises(DarexError, match="another base"):
        dx.DeltaBank(model, wider).add("svd", files["svd"])
    damaged = tmp_path / "damaged"
    content = bytearray(files["svd"].read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DarexError, match="damaged"):
        bank.add("damaged", damaged)
    assert bank.names == ("svd",)
    with pytest.raises(DarexError, match="the batch has 3 rows, its parameters are for 2 deltas"):
        run(bank.model, bank.mixed(["svd", None]), jnp.ones((3, 12), jnp.int32))
    other = dataclasses.replace(model.config, layer_norm_eps=1e-3)
    fine = classifier_from_pretrained(dataclasses.replace(model, config=other), params, 2, jax.random.key(0))
    out = pruned(base, saved(tmp_path / "fine", *fine), tmp_path / "delta", "--method", "svd", "-p", "0.5")
    with pytest.raises(DarexError, match="config differs from that of 'svd' in layer_norm_eps"):
        bank.add("other", out)


def test_a_base_of_numpy_arrays_and_an_empty_bank(encoders):
    base, files = encoders
    model, params = dx.load_model(base)
    bank = dx.DeltaBank(model, jax.tree.map(np.asarray, params))
    ids = jnp.ones((2, 12), jnp.int32)
    right = run(model, params, ids).last_hidden_state
    np.testing.assert_array_equal(run(bank.model, bank.mixed([None, None]), ids).last_hidden_state, right)
    bank.add("svd", files["svd"])
    assert np.isfinite(run(bank.model_of("svd"), bank.activate("svd"), ids).logits).all()


def test_a_decoder_with_another_vocabulary_is_refused(tmp_path, folders):
    model, params = dx.load_model(folders / "llama" / "base")
    config = dataclasses.replace(model.config, vocab_size=model.config.vocab_size + 1)
    more = {n: jnp.concatenate([x, x[:1]]) if n in ("model.embed_tokens.weight", "lm_head.weight") else x
            for n, x in flatten_names(params).items()}  # fmt: skip
    dx.save_params(tmp_path / "fine", unflatten_names(more), config.to_hf())
    delta = pruned(folders / "llama" / "base", tmp_path / "fine", tmp_path / "d", "-p", "0.5")
    with pytest.raises(DarexError, match=r"which the base has as .* which a bank does not support"):
        filled(folders / "llama" / "base", {"d": delta})


def test_a_random_part_has_as_many_values_as_its_mask(encoders):
    part = make("random", FORMS[0])
    short = dataclasses.replace(
        part, values=dataclasses.replace(part.values, numbers=part.values.numbers[:-1])
    )
    with pytest.raises(DarexError, match="the mask has"):
        short.located()


def classifier_pair(root, name, labels, start, options=("--method", "svd", "-p", "0.5")):
    """A fine-tuned model with `labels` labels, and its delta, from the directory `start`."""
    model, params = dx.load_model(start)
    own, fresh = classifier_from_pretrained(model, params, labels, jax.random.key(labels))
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.sin((90 + labels) * x + labels), fresh)
    fine = saved(root / name, own, moved)
    return pruned(start, fine, root / f"{name}.safetensors", *options)


def test_a_base_with_a_head_of_its_own(tmp_path, encoders):
    """Deltas with fewer, as many and more labels than the base, and one whose head is pruned."""
    body, params = dx.load_model(encoders[0])
    three = classifier_from_pretrained(body, params, 3, jax.random.key(9))
    base = saved(tmp_path / "base", *three)
    files = {str(n): classifier_pair(tmp_path, str(n), n, base) for n in (1, 2, 3, 5)}
    whole = ("--method", "svd", "-p", "0.1", "--include", ".")
    files["pruned head"] = classifier_pair(tmp_path, "pruned", 3, base, whole)
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 97)
    for chosen in (["2"], ["1", "3"], ["3", "pruned head"], list(files)):
        bank = filled(base, {name: files[name] for name in chosen})
        for name in (*chosen, None):
            model, restored = dx.load_model(base, delta=files.get(name))
            right = run(model, restored, ids).logits
            mixed = run(bank.model, bank.mixed([name, name]), ids).logits
            np.testing.assert_allclose(mixed[:, : right.shape[1]], right, atol=2e-5)
            assert np.all(np.asarray(mixed[:, right.shape[1] :]) == -np.inf)
            given = bank.activate(name)
            np.testing.assert_allclose(run(model, given, ids).logits, right, atol=2e-5)


def test_a_small_delta_is_not_lost_in_a_narrow_base(tmp_path, folders):
    model, params = dx.load_model(folders / "bert" / "base", jnp.bfloat16)
    base = saved(tmp_path / "base", model, params)
    moved = jax.tree.map(lambda x: x.astype(jnp.float32) * (1 + 1e-3), params)
    delta = pruned(
        base, saved(tmp_path / "fine", model, moved), tmp_path / "d", "--method", "svd", "-p", "0.5"
    )
    with pytest.raises(DarexError, match="restored in float32, the base was loaded in bfloat16"):
        filled(base, {"d": delta})
    bank = dx.DeltaBank(*dx.load_model(base, jnp.float32))
    bank.add("d", delta)
    restored = dx.load_model(base, delta=delta)[1]
    for leaf, right in zip(jax.tree.leaves(bank.activate("d")), jax.tree.leaves(restored), strict=True):
        np.testing.assert_allclose(leaf, right, atol=1e-6)


def test_bytes_are_those_of_the_parts(encoders):
    base, files = encoders
    bank = filled(base, files)
    dense = sum(x.nbytes for x in jax.tree.leaves(dx.load_model(base)[1]))
    with DeltaFile(files["dare"]) as file:
        survivors = sum(
            len(v) for n in file.recipe.parameters for p in file.parts(n).parts for v in [p.values]
        )
    heads = sum(x.nbytes for x in jax.tree.leaves(dx.load_kept(files["dare"])))
    assert bank.nbytes("dare") - heads > 8 * survivors  # values and indices
    assert bank.nbytes("sign") < dense / 10 and bank.nbytes("dare") < dense / 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kinds", [["sparse"], ["random"], ["columns"], ["low_rank"], ["sign"], ["dense"],
                                   ["sign", "low_rank"], ["sparse", "sparse"]])  # fmt: skip
def test_a_mixed_matrix_is_the_sum_of_base_and_parts(kinds, form):
    own = Parts(tuple(make(kind, form) for kind in kinds), SHAPE)
    other = Parts((make("sparse", FORMS[0]), make("low_rank", FORMS[0])), SHAPE)
    stack = stack_parts([None, own, other, None])
    numbers = [1, 0, 2, 3, 1, 2]
    mixed = Mixed(jnp.asarray(DELTA), stack, jnp.asarray(numbers))
    dense = [np.zeros(SHAPE), np.asarray(own.to_dense()), np.asarray(other.to_dense()), np.zeros(SHAPE)]
    rng = np.random.default_rng(5)
    for x in (rng.normal(size=(6, 3, SHAPE[1])), rng.normal(size=(6, SHAPE[1]))):
        right = np.stack([row @ dense[n].T for row, n in zip(x, numbers, strict=True)])
        np.testing.assert_allclose(mixed.product(x.astype(np.float32)), right, atol=1e-5)
    ids = rng.integers(0, SHAPE[0], (6, 9))
    right = np.stack([dense[n][row] for row, n in zip(ids, numbers, strict=True)])
    np.testing.assert_allclose(mixed.rows(jnp.asarray(ids)), right, atol=1e-7)
    for n in range(4):
        np.testing.assert_allclose(stack.delta(n), dense[n], atol=1e-7)


def test_sizes_are_rounded_up_by_half_at_most():
    sizes = [rounded_up(n) for n in range(2000)]
    assert sizes[:14] == [0, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert all(n <= size <= max(n, 1.5 * n) for n, size in enumerate(sizes))
    assert len(set(sizes)) < 25


@pytest.fixture(scope="module")
def stored(tmp_path_factory, folders):
    """Two deltas on a tiny classifier and two on a tiny decoder."""
    root, found = tmp_path_factory.mktemp("stored"), {}
    for family in ("bert", "llama"):
        for method in ("magnitude", "structured"):
            out = root / f"{family}-{method}.safetensors"
            pair = (folders / family / "base", folders / family / "fine")
            found[family, method] = pruned(*pair, out, "--method", method, *METHODS[method])
    return found


def darex(*arguments, code=0):
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_base_confirms_the_shapes_of_a_small_file(stored, folders, monkeypatch):
    """The limit is for files that are read alone."""
    monkeypatch.setattr("darex_jax.files.artifact.ENTRIES_PER_BYTE", 0)
    file = stored["bert", "magnitude"]
    with pytest.raises(DarexError, match="without the base at most 0 are accepted"):
        dx.load_delta(file)
    assert filled(folders / "bert" / "base", {"a": file}).names == ("a",)


def test_eval_takes_several_deltas(stored, folders):
    files = [stored["bert", method] for method in ("magnitude", "structured")]
    options = ("--limit", 40, "--json")
    deltas = [x for file in files for x in ("--delta", file)]
    report = json.loads(darex("eval", folders / "bert" / "base", *deltas, *options).output)
    together, inputs = report["deltas"], report["manifest"]["inputs"]
    assert {f"delta {row['name']}": row["digest"] for row in together}.items() <= inputs.items()
    assert len(inputs["base_weights"]) == 64 and len(inputs) == 1 + 2 * len(together)
    beside = json.loads(darex("eval", folders / "bert" / "base", *deltas[:2], "--beside", *options).output)
    assert beside["deltas"][0]["metric"] == together[0]["metric"]
    for row, file in zip(together, files, strict=True):
        alone = json.loads(darex("eval", folders / "bert" / "base", "--delta", file, *options).output)
        assert row["name"] == file.stem and row["bytes"] == file.stat().st_size
        assert {k: row[k] for k in ("metric", "metric_name", "n")} == {
            k: alone[k] for k in ("metric", "metric_name", "n")
        }
    table = darex("eval", folders / "bert" / "base", *deltas, "--limit", 40).output
    assert all(f"{row['metric']:.4f}" in table for row in together)


def test_generate_takes_several_deltas(stored, folders):
    files = [stored["llama", method] for method in ("magnitude", "structured")]
    deltas = [x for file in files for x in ("--delta", file)]
    options = ("--max-new-tokens", 9, "--json")
    base = folders / "llama" / "base"
    together = json.loads(darex("generate", base, "A text", *deltas, *options).output)["texts"]
    for text, file in zip(together, files, strict=True):
        assert text == json.loads(darex("generate", base, "A text", "--delta", file, *options).output)["text"]
    shown = darex("generate", base, "A text", *deltas, "--max-new-tokens", 9).output
    assert all(file.stem in shown for file in files)


@pytest.mark.parametrize("arguments, message", [
    (["--task", "opinions", "--task", "opinions"], "several --task need as many --delta"),
    (["--delta", "bert-magnitude", "--delta", "bert-magnitude"], "a delta is given twice"),
    (["--delta", "bert-magnitude", "--delta", "bert-structured", "--dtype", "bfloat16"], "--dtype supports"),
    (["--delta", "bert-magnitude", "--delta", "bert-structured", *["--task", "x"] * 3], "3 tasks for 2"),
    (["--delta", "bert-magnitude", "--delta", "llama-structured"], "this one has no 'model.layers"),
    (["--delta", "bert-magnitude", "--delta", "bert-structured", "--task", "gsm8k"], "gsm8k is for decoders"),
])  # fmt: skip
def test_options_for_one_delta_are_refused_with_several(stored, folders, arguments, message):
    files = {f"{family}-{method}": file for (family, method), file in stored.items()}
    chosen = [files.get(argument, argument) for argument in arguments]
    assert message in darex("eval", folders / "bert" / "base", *chosen, code=1).output

"""Merging deltas, against the published algorithms in NumPy and against peft's functions."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.core.lora import LoraConfig
from darex_jax.core.tree import flatten_names, leaf_key, unflatten_names
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.safetensors import write_tensors
from darex_jax.merging.table import MERGES
from darex_jax.models import classifier_from_pretrained, init_model, read_model_config
from tests.test_calibration import FAMILIES

NAME, SHAPE, KEY = "layer.weight", (12, 20), jax.random.key(3)
DELTAS = [np.random.default_rng(i).normal(0, 1e-2, SHAPE).astype(np.float32) for i in range(3)]
WEIGHTS = [1.0, 0.5, 2.0]
OPTIONS = {
    "task-arithmetic": {},
    "linear": {},
    "ties": {"drop_rate": 0.75},
    "dare-linear": {"drop_rate": 0.75, "key": KEY},
    "dare-ties": {"drop_rate": 0.75, "key": KEY, "q": 0.4},
    "breadcrumbs": {"drop_rate": 0.75, "outliers": 0.05},
    "della": {"drop_rate": 0.6, "key": KEY, "window": 0.4},
}


def trees(leaves=DELTAS):
    return [{"layer": {"weight": leaf, "bias": leaf[0]}} for leaf in leaves]


def merged(method, leaves=DELTAS, **more):
    found = dx.merge(trees(leaves), method, **(OPTIONS[method] | {"weights": WEIGHTS[: len(leaves)]} | more))
    return np.asarray(found["layer"]["weight"])


def thinned(method, number, delta):
    """The sparsification of each paper, implemented independently."""
    flat = np.abs(delta).reshape(-1)
    order = np.argsort(flat, kind="stable")
    options = OPTIONS[method]
    own = leaf_key(jax.random.fold_in(KEY, number), NAME)
    if method in ("linear", "task-arithmetic"):
        return delta
    if method == "ties":
        kept = np.zeros(flat.size, bool)
        kept[order[-60:]] = True  # a quarter of 240
        return np.where(kept.reshape(SHAPE), delta, 0)
    if method.startswith("dare"):
        mask = jax.random.bits(own, SHAPE, jnp.uint32) < round(0.25 * 2**32)
        return np.where(mask, delta, 0) * np.float32(1 / options.get("q", 0.25))
    if method == "breadcrumbs":
        kept = np.zeros(flat.size, bool)
        kept[order[-72:-12]] = True  # below the largest 12 a quarter of all
        return np.where(kept.reshape(SHAPE), delta, 0)
    ranks = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)  # della: 0.8 for the smallest, 0.4
    rates = 0.8 - ranks * 0.4 / 19
    kept = np.asarray(jax.random.bits(own, SHAPE, jnp.uint32)) / 2**32 < 1 - rates
    return np.where(kept, delta / (1 - rates), 0)


@pytest.mark.parametrize("method", MERGES)
def test_merges_are_the_published_ones(method):
    parts = np.stack([thinned(method, i, delta) for i, delta in enumerate(DELTAS)])
    weights = np.array(WEIGHTS)[:, None, None]
    if method in ("linear", "task-arithmetic", "dare-linear", "breadcrumbs"):
        expected = (weights * parts).sum(0)
    else:
        sign = np.where(parts.sum(0) >= 0, 1, -1)
        agrees = np.sign(parts) == sign
        expected = (weights * parts * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
    np.testing.assert_allclose(merged(method), expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["linear", "ties", "dare-linear", "dare-ties"])
def test_merges_are_pefts(method, monkeypatch):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("peft.utils.merge_utils")
    ours = iter(thinned(method, i, delta) for i, delta in enumerate(DELTAS))
    monkeypatch.setattr(theirs, "random_pruning", lambda *_, **__: torch.from_numpy(np.array(next(ours))))
    name = {"linear": "task_arithmetic"}.get(method, method.replace("-", "_"))
    density = {} if method == "linear" else {"density": 0.25}
    tensors = [torch.from_numpy(delta) for delta in DELTAS]
    found = getattr(theirs, name)(tensors, torch.tensor(WEIGHTS), **density)
    np.testing.assert_allclose(merged(method), found.numpy(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", MERGES)
def test_a_leaf_alone_compiled_or_as_parts_gives_the_same(method):
    whole = merged(method)
    alone = dx.merge([{NAME: delta} for delta in DELTAS], method, weights=WEIGHTS, **OPTIONS[method])
    np.testing.assert_array_equal(alone[NAME], whole)
    compiled = jax.jit(partial(dx.merge, method=method, weights=WEIGHTS, **OPTIONS[method]))(trees())
    np.testing.assert_allclose(compiled["layer"]["weight"], whole, rtol=1e-6, atol=1e-9)
    parts = [dx.magnitude({NAME: delta}, dx.Budget(drop_rate=0.5)) for delta in DELTAS]
    dense = [{NAME: np.asarray(part[NAME].to_dense())} for part in parts]
    both = [dx.merge(some, method, **OPTIONS[method])[NAME] for some in (parts, dense)]
    np.testing.assert_array_equal(*both)


def test_dellas_mask_is_the_same_compiled():
    """Of 512 ranks compiled differently some thresholds would move by one."""
    delta = {"w": np.random.default_rng(0).normal(size=(1024, 512)).astype(np.float32)}
    della = partial(dx.merge, method="della", drop_rate=0.5, key=KEY)
    np.testing.assert_array_equal(*(np.asarray(run([delta])["w"]) for run in (della, jax.jit(della))))


@given(st.sampled_from(["linear", "ties", "dare-ties"]), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_one_delta_of_which_nothing_is_dropped_is_itself(method, seed):
    delta = np.random.default_rng(seed).normal(size=(3, 5)).astype(np.float32)
    options = {"linear": {}, "ties": {"drop_rate": 0.0}, "dare-ties": {"drop_rate": 0.0, "key": KEY}}
    np.testing.assert_array_equal(dx.merge([{"w": delta}], method, **options[method])["w"], delta)


@pytest.mark.parametrize("method", MERGES)
def test_empty_leaves_stay_empty(method):
    for shape in ((0,), (3, 0), (0, 3)):
        found = dx.merge([{"w": np.zeros(shape, np.float32)}] * 2, method, **OPTIONS[method])
        assert found["w"].shape == shape


def test_a_drop_rate_out_of_range_is_named_as_such():
    with pytest.raises(dx.DarexError, match=r"drop_rate is a probability in \[0, 1\), got -0.5"):
        dx.merge(trees(), "breadcrumbs", drop_rate=-0.5)


def test_a_q_by_name_is_for_the_leaves_that_there_are():
    options = {"drop_rate": 0.5, "key": KEY}
    by_name = dx.merge(trees(), "dare-linear", q={"layer": {"weight": 0.5, "bias": 0.25}}, **options)
    one = dx.merge(trees(), "dare-linear", q=0.5, **options)
    np.testing.assert_array_equal(by_name["layer"]["weight"], one["layer"]["weight"])
    np.testing.assert_array_equal(by_name["layer"]["bias"], 2 * one["layer"]["bias"])
    for wrong in ({NAME: 0.5}, {NAME: 0.5, "layer.bias": 0.5, "more": 0.5}):
        with pytest.raises(dx.DarexError, match="q by name does not match"):
            dx.merge(trees(), "dare-linear", q=wrong, **options)


def test_q_is_one_or_one_for_each_delta():
    one, each = merged("dare-linear", q=0.5), merged("dare-linear", q=[0.5, 0.25, 0.1])
    parts = [np.asarray(thinned("dare-linear", i, d)) * 0.25 for i, d in enumerate(DELTAS)]
    np.testing.assert_allclose(one, sum(w * p / 0.5 for w, p in zip(WEIGHTS, parts, strict=True)), rtol=1e-5)
    expected = sum(w * p / q for w, p, q in zip(WEIGHTS, parts, (0.5, 0.25, 0.1), strict=True))
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-8)


def test_della_has_the_stated_drop_rates_and_keeps_the_mean():
    delta = np.sort(np.random.default_rng(0).normal(size=(4000, 10)).astype(np.float32), axis=1)
    own = {"drop_rate": 0.6, "window": 0.4, "key": KEY}
    found = np.asarray(dx.merge([{"w": delta}], "della", **own)["w"])
    one, named = (dx.merge([{"w": delta}], "della", **own, q=q)["w"] for q in (0.5, {"w": 0.5}))
    np.testing.assert_array_equal(one, named)
    np.testing.assert_array_equal(one, np.where(found == 0, 0, delta / np.float32(0.5)))
    ranks = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
    for rank in range(10):
        rate = 0.8 - 0.4 * rank / 9
        dropped = np.mean(found[ranks == rank] == 0)
        assert abs(dropped - rate) < 4 * np.sqrt(rate * (1 - rate) / 4000)
    assert abs(found.mean() - delta.mean()) < 0.02


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "slerp"}, "'slerp' is not a merging method; choose from task-arithmetic, linear"),
        ({"method": "ties"}, "ties requires drop_rate"),
        ({"method": "dare-ties", "drop_rate": 0.5}, "dare-ties requires key"),
        ({"method": "linear", "drop_rate": 0.5}, "linear does not accept drop_rate"),
        ({"method": "linear", "weights": [1.0]}, "3 deltas need 3 weights, got 1"),
        (
            {"method": "breadcrumbs", "drop_rate": 0.5, "outliers": 0.6},
            "outliers must lie between 0 and the drop rate",
        ),
        ({"method": "della", "drop_rate": 0.95, "key": KEY, "window": 0.2}, "leave \\[0, 1\\)"),
        (
            {"method": "della", "drop_rate": 0.5, "key": KEY, "q": 0.0},
            "must be a positive float32 number, got 0.0",
        ),
        ({"method": "dare-linear", "drop_rate": 0.5, "key": KEY, "q": [0.1]}, "one q or 3, got 1"),
    ],
)
def test_invalid_arguments_are_explained(arguments, text):
    with pytest.raises(ValueError, match=text):
        dx.merge(trees(), **arguments)


def test_deltas_of_other_names_or_shapes_are_refused():
    with pytest.raises(ValueError, match=r"'layer.bias' is only in the first delta"):
        dx.merge([trees()[0], {NAME: DELTAS[1]}], "linear")
    with pytest.raises(ValueError, match="at least one delta, got none"):
        dx.merge([], "linear")


# On disk: deltas given in three ways.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base BERT without a head, two fine-tuned models with heads, the first one's artifact, an adapter."""
    folder = tmp_path_factory.mktemp("merging")
    config = FAMILIES["bert"] | {"architectures": ["BertModel"], "num_hidden_layers": 1}
    body, base = init_model(read_model_config(config), KEY)
    dx.save_params(folder / "base", base, body.config.to_hf())
    named = flatten_names(base)
    for i, labels in enumerate((2, 3)):
        model, params = classifier_from_pretrained(body, base, labels, jax.random.key(i))
        moved = {
            n: x + 0.01 * jnp.sin(100 * (i + 1) * x) if not n.startswith("classifier") else x
            for n, x in flatten_names(params).items()
        }
        dx.save_params(folder / f"fine-{i}", moved, model.config.to_hf())
    layer = "encoder.layer.0.output.dense"
    lora = LoraConfig(rank=2, alpha=4, targets=(layer,))
    out_features, in_features = named[f"{layer}.weight"].shape
    factors = {"lora_A": jnp.ones((2, in_features)), "lora_B": 0.01 * jnp.ones((out_features, 2))}
    adapter = unflatten_names({f"{layer}.{factor}.weight": x for factor, x in factors.items()})
    dx.save_adapter(folder / "adapter", lora, adapter)
    run("prune", folder / "base", folder / "fine-0", folder / "fine-0.safetensors", "-p", 0.5)
    return folder


def run(*arguments, fails=None):
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == (0 if fails is None else 1), done.output
    assert fails is None or fails in done.stderr
    return done.stdout


def body_of(path, prefix="bert."):
    return {
        n.removeprefix(prefix): np.asarray(x)
        for n, x in flatten_names(dx.load_params(path)).items()
        if not n.startswith("classifier")
    }


def test_deltas_in_every_form_are_merged_as_their_trees(files, tmp_path):
    base = body_of(files / "base")
    deltas = [files / "fine-0.safetensors", files / "fine-1", files / "adapter"]
    run("merge", files / "base", *deltas, tmp_path / "m", "--method", "linear",
        "--weight", 1, "--weight", 0.5, "--weight", 2)  # fmt: skip
    trees = [
        {n.removeprefix("bert."): np.asarray(x) for n, x in flatten_names(dx.load_delta(deltas[0])).items()}
    ]
    trees.append({n: x - base[n] for n, x in body_of(files / "fine-1").items()})
    layer = "encoder.layer.0.output.dense.weight"
    expected = {n: base[n] + trees[0][n] + 0.5 * trees[1][n] for n in base}
    expected[layer] = expected[layer] + 2 * 2 * 0.02  # alpha / rank, and two products of 0.01
    found = [tmp_path / "m" / name for name in ("fine-0", "fine-1", "adapter")]
    for path in found:
        merged_body = body_of(path)
        assert merged_body.keys() == base.keys()
        for name in base:
            np.testing.assert_allclose(merged_body[name], expected[name], atol=1e-6)
    files_of = [{file.name: file.stat().st_ino for file in path.glob("model-body*")} for path in found]
    assert files_of[0] == files_of[1] != {}  # one body, linked
    assert dx.load_model(found[2])[0].config.headless  # an adapter's model has the base's names
    for i in (0, 1):
        model, params = dx.load_model(found[i])
        assert model.config.num_labels == i + 2
        own = dx.load_params(files / f"fine-{i}")["classifier"]["weight"]
        np.testing.assert_array_equal(params["classifier"]["weight"], own)


@pytest.mark.parametrize("method", ["ties", "dare-ties", "breadcrumbs"])
def test_a_streamed_merge_is_that_of_the_trees(files, tmp_path, method):
    paths = [files / "fine-0", files / "fine-0.safetensors"]  # one head: one directory
    line = [
        "merge",
        files / "base",
        *paths,
        tmp_path / "m",
        "--method",
        method,
        "-p",
        0.75,
        "--seed",
        3,
        "--json",
    ]
    line += ["--q", 0.4] if method == "dare-ties" else []
    report = json.loads(run(*line))
    assert report["out"] == [str(tmp_path / "m")]
    named = flatten_names(dx.load_params(files / "fine-0"))
    base = body_of(files / "base")
    direct = {
        n: np.asarray(x) - base[n.removeprefix("bert.")] for n, x in named.items() if "classifier" not in n
    }
    stored = flatten_names(dx.load_delta(files / "fine-0.safetensors"))
    options = {"drop_rate": 0.75} | ({"key": jax.random.key(3), "q": 0.4} if method == "dare-ties" else {})
    expected = dx.merge([direct, {n: stored[n] for n in direct}], method, **options)
    for name, x in flatten_names(dx.load_params(tmp_path / "m")).items():
        if name in direct:
            sum_of = base[name.removeprefix("bert.")] + np.asarray(expected[name])
            np.testing.assert_array_equal(np.asarray(x), sum_of)
    assert dx.load_model(tmp_path / "m")[0].config.num_labels == 2


def test_deltas_of_another_base_are_refused(files, tmp_path):
    other = flatten_names(dx.load_params(files / "base"))
    dx.save_params(tmp_path / "other", {n: x + 1 for n, x in other.items()}, companions_from=files / "base")
    out = tmp_path / "m"
    run("merge", tmp_path / "other", files / "fine-0.safetensors", out, "--method", "linear",
        fails="not the base that")  # fmt: skip
    run("merge", files / "base", tmp_path / "none", out, "--method", "linear", fails="No such file")
    run(
        "merge",
        files / "base",
        files / "fine-0",
        files / "fine-0",
        "--method",
        "linear",
        fails="would replace",
    )
    far = ["--method", "linear", "--weight", 1e38, "--dtype", "float16"]
    run("merge", files / "base", files / "fine-0", out, *far, fails="would hold infinity or NaN")
    assert not out.exists()
    done = CliRunner().invoke(main, list(map(str, ["merge", files / "base", files / "fine-0", out])))
    assert done.exit_code == 2 and "needs --drop-rate" in done.stderr


def changed(params, factor):
    """A fine-tuned model: every floating entry changed."""
    return {
        n: x + x.dtype.type(factor) * np.sin(100 * x) if x.dtype.kind == "f" else x
        for n, x in ((n, np.asarray(x)) for n, x in flatten_names(params).items())
    }


@pytest.mark.parametrize("labels", [2, 3])
def test_heads_that_the_base_has_otherwise_and_layers_that_fine_tunes_lack(tmp_path, labels):
    """The base is a classifier of two labels with a layer for pretraining and a counter."""
    config = FAMILIES["bert"] | {"num_hidden_layers": 1, "num_labels": 2}
    model, base = init_model(read_model_config(config), KEY)
    named = {n: np.asarray(x) for n, x in flatten_names(base).items()}
    more = {
        "cls.predictions.bias": np.ones(4, np.float32),
        "bert.embeddings.position_ids": np.arange(3)[None],
    }
    dx.save_params(tmp_path / "base", unflatten_names(named | more), model.config.to_hf())
    own, start = classifier_from_pretrained(model, base, labels, jax.random.key(1))
    for i in (0, 1):
        dx.save_params(tmp_path / f"fine-{i}", changed(start, 0.01 * (i + 1)), own.config.to_hf())
    run("prune", tmp_path / "base", tmp_path / "fine-1", tmp_path / "delta", "-p", 0)
    outs = []
    for second in ("fine-1", "delta"):
        line = ["merge", tmp_path / "base", tmp_path / "fine-0", tmp_path / second, tmp_path / f"m-{second}"]
        outs.append(json.loads(run(*line, "--method", "linear", "--weight", 0.5, "--json"))["out"])
    assert [len(places) for places in outs] == ([1, 1] if labels == 2 else [2, 2])
    for places in outs:
        for place, one in zip(places, ("fine-0", "fine-1"), strict=False):
            _, params = dx.load_model(place)
            params = flatten_names(params)
            assert params.keys() == flatten_names(start).keys()
            alone = flatten_names(dx.load_params(tmp_path / one))["classifier.weight"]
            merged_head = np.array_equal(params["classifier.weight"], alone)
            assert merged_head == (labels == 3)  # of the same shape it is merged, otherwise kept


def test_tied_heads_stay_tied_and_scalars_and_float64_are_merged(tmp_path):
    config = FAMILIES["llama"] | {"num_hidden_layers": 1, "tie_word_embeddings": True}
    model, base = init_model(read_model_config(config), KEY)
    table = {"lm_head": {"weight": base["model"]["embed_tokens"]["weight"]}}
    dx.save_params(tmp_path / "base", base | table, model.config.to_hf())
    moved = unflatten_names(changed(base, 0.01))
    copy = {"lm_head": {"weight": moved["model"]["embed_tokens"]["weight"]}}
    dx.save_params(tmp_path / "fine", moved | copy, model.config.to_hf())
    line = ["merge", tmp_path / "base", tmp_path / "fine", tmp_path / "fine", tmp_path / "m"]
    run(*line, "--method", "dare-linear", "-p", 0.5)
    assert dx.load_model(tmp_path / "m")[0].config.tie_word_embeddings

    plain = {"a": np.float64(1) + np.arange(6.0).reshape(2, 3) / 3, "b": np.asarray(0.1, np.float32)}
    write_tensors(tmp_path / "plain.safetensors", plain, {})
    (tmp_path / "wide").mkdir()
    moved = changed(plain, 1e-12) | {"b": np.asarray(0.2, np.float32)}
    write_tensors(tmp_path / "wide/model.safetensors", moved, {})
    run("merge", tmp_path / "plain.safetensors", tmp_path / "wide", tmp_path / "w", "--method", "linear")
    with Checkpoint(tmp_path / "w") as found, Checkpoint(tmp_path / "wide") as wide:
        a, b = (found.tensors[name].read() for name in "ab")
        assert a.dtype == np.float64 and b.shape == () and abs(b - 0.2) < 1e-7
        np.testing.assert_allclose(a, wide.tensors["a"].read(), rtol=1e-15)


def test_a_head_of_its_own_is_kept_bit_for_bit(tmp_path):
    """Also where the base has one of the same shape, and another fine-tune has not."""
    layers = {f"layers.{i}.w": np.full((3, 4), i, np.float32) for i in range(2)}
    rng = np.random.default_rng(0)
    heads = {"base": 10 * rng.normal(size=(2, 4)), "a": 0.001 * rng.normal(size=(2, 4)), "b": np.ones((3, 4))}
    for name, head in heads.items():
        leaves = layers | {"classifier.weight": head.astype(np.float32)}
        dx.save_params(tmp_path / name, leaves, {"model_type": "bert"})
    run("merge", *(tmp_path / name for name in ("base", "a", "b", "m")), "--method", "linear")
    for name in "ab":
        found = flatten_names(dx.load_params(tmp_path / "m" / name))["classifier.weight"]
        np.testing.assert_array_equal(found, heads[name].astype(np.float32))


def test_an_adapters_tokenizer_comes_with_it(files, tmp_path):
    shutil.copytree(files / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/tokenizer_config.json").write_text("{}")
    shutil.copytree(files / "base", tmp_path / "base")
    for name in ("vocab.txt", "generation_config.json"):
        (tmp_path / "base" / name).write_text("{}")
    line = (tmp_path / "base", tmp_path / "adapter")
    run("merge", *line, tmp_path / "m", "--method", "linear")
    run("merge-adapter", *line, tmp_path / "n")
    for out in (tmp_path / "m", tmp_path / "n"):
        found = {file.name for file in out.iterdir()}
        assert {"tokenizer_config.json", "generation_config.json"} < found and "vocab.txt" not in found


@pytest.mark.parametrize("order", [("tied", "untied"), ("untied", "tied")])
def test_a_head_that_one_fine_tune_has_is_its_own(tmp_path, order):
    """Its directory holds body and head, in whatever order; the other one's is a single file."""
    config = FAMILIES["llama"] | {"num_hidden_layers": 1, "tie_word_embeddings": True}
    model, base = init_model(read_model_config(config), KEY)
    dx.save_params(tmp_path / "base", base, model.config.to_hf())
    moved = unflatten_names(changed(base, 0.01))
    head = {"lm_head": {"weight": 2 * moved["model"]["embed_tokens"]["weight"]}}
    dx.save_params(tmp_path / "tied", moved, model.config.to_hf())
    dx.save_params(tmp_path / "untied", moved | head, model.config.to_hf() | {"tie_word_embeddings": False})
    paths = [tmp_path / name for name in order]
    run("merge", tmp_path / "base", *paths, tmp_path / "m", "--method", "linear")
    for name in order:
        merged, params = dx.load_model(tmp_path / "m" / name)
        assert merged.config.tie_word_embeddings == (name == "tied")
        if name == "untied":
            np.testing.assert_array_equal(params["lm_head"]["weight"], head["lm_head"]["weight"])
    assert [file.name for file in (tmp_path / "m/tied").glob("*.safetensors*")] == ["model.safetensors"]


def test_no_input_is_replaced(files, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("x", "y"):
        (folder / f"{name}.safetensors").write_bytes((files / "fine-0.safetensors").read_bytes())
    line = ["merge", files / "base", folder / "x.safetensors", folder / "y.safetensors", folder]
    run(*line, "--method", "linear", "--overwrite", fails="would replace")
    assert len(list(folder.iterdir())) == 2


def test_an_adapter_with_a_head_must_be_merged_first(files, tmp_path):
    layer = "encoder.layer.0.output.dense"
    lora = LoraConfig(rank=1, alpha=1, targets=(layer,))
    shape = flatten_names(dx.load_params(files / "base"))[f"{layer}.weight"].shape
    factors = {"lora_A": jnp.ones((1, shape[1])), "lora_B": jnp.ones((shape[0], 1))}
    adapter = unflatten_names({f"{layer}.{factor}.weight": x for factor, x in factors.items()})
    head = {"classifier": {"weight": jnp.ones((2, shape[0])), "bias": jnp.ones(2)}}
    dx.save_adapter(tmp_path / "adapter", lora, adapter, head)
    run("merge", files / "base", tmp_path / "adapter", tmp_path / "m", "--method", "linear",
        fails="darex merge-adapter makes from it")  # fmt: skip


def test_the_dtype_is_the_widest_or_the_requested_one(files, tmp_path):
    run(
        "merge", files / "base", files / "fine-0", tmp_path / "m", "--method", "linear", "--dtype", "bfloat16"
    )
    params = dx.load_params(tmp_path / "m")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert dx.load_model(tmp_path / "m")[0].config.num_labels == 2

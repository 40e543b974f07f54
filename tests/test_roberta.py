"""RoBERTa against transformers: differences from BERT, and the workflow on a tiny one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.models import BertConfig, classifier_from_pretrained, init_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {
    "model_type": "roberta",
    "architectures": ["RobertaForSequenceClassification"],
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 22,
    "type_vocab_size": 1,
    "initializer_range": 0.3,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
}


def original(hf, path, **options):
    torch.manual_seed(0)
    kinds = {"bert": "BertConfig", "roberta": "RobertaConfig", "xlm-roberta": "XLMRobertaConfig"}
    kind = getattr(transformers, kinds[hf["model_type"]])
    config = kind(**{k: v for k, v in hf.items() if k != "architectures"})
    model = getattr(transformers, hf["architectures"][0])(config, **options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(path)
    return model


def batch(length=20):
    """A full row, one padded on the right, one on the left, with the padding id, which positions depend
    on."""
    ids = np.random.default_rng(0).integers(2, 60, (3, length))
    mask = np.ones((3, length), int)
    mask[1, 13:], mask[2, :6] = 0, 0
    return np.where(mask, ids, 1), mask


@pytest.mark.parametrize("pooler", [True, False])
def test_body_matches_transformers(tmp_path, pooler):
    hf = TINY | {"architectures": ["RobertaModel"]}
    theirs = original(hf, tmp_path, add_pooling_layer=pooler)
    model, params = dx.load_model(tmp_path)
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask))
    out = model(params, ids, mask)
    real = mask == 1
    hidden = expected.last_hidden_state.numpy()
    np.testing.assert_allclose(np.asarray(out.last_hidden_state)[real], hidden[real], atol=1e-5)
    assert (out.pooler_output is not None) == pooler
    if pooler:
        np.testing.assert_allclose(out.pooler_output, expected.pooler_output.numpy(), atol=1e-5)


def test_classifier_and_its_gradients_match_transformers(tmp_path):
    theirs = original(TINY, tmp_path)
    model, params = dx.load_model(tmp_path)
    ids, mask = batch()
    logits = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    out = model(params, ids, mask)
    np.testing.assert_allclose(out.logits, logits.detach().numpy(), atol=1e-5)
    dense = theirs.classifier.dense(theirs.roberta(torch.tensor(ids), torch.tensor(mask))[0][:, 0])
    np.testing.assert_allclose(out.head_hidden, dense.detach().numpy(), atol=1e-5)
    (logits**2).sum().backward()
    squares = jax.jit(jax.grad(lambda p: jnp.square(model(p, ids, mask).logits).sum()))
    grads = flatten_names(squares(params))
    for name, weight in theirs.named_parameters():
        expected = np.zeros(weight.shape) if weight.grad is None else weight.grad.numpy()
        tolerance = 1e-5 + 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(grads[name], expected, atol=tolerance, err_msg=name)


def test_padding_ids_among_the_tokens_take_no_position(tmp_path):
    """Positions depend on the ids only: a padding id is skipped anywhere, masked or not."""
    theirs = original(TINY | {"architectures": ["RobertaModel"]}, tmp_path)
    model, params = dx.load_model(tmp_path)
    ids, _ = batch()
    ids[:, 3] = ids[0, 9:12] = 1
    with torch.no_grad():
        expected = theirs(
            torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=int)
        ).last_hidden_state
    out = model(params, ids)
    np.testing.assert_allclose(out.last_hidden_state, expected.numpy(), atol=1e-5)
    zeros = model(params, ids, np.ones_like(ids), np.zeros_like(ids))  # as a tokenizer may return them
    np.testing.assert_array_equal(out.last_hidden_state, zeros.last_hidden_state)


def test_names_shapes_and_buffers_are_transformers(tmp_path):
    weights = {name: jnp.asarray(x.numpy()) for name, x in original(TINY, tmp_path).state_dict().items()}
    _, params = dx.load_model(tmp_path)
    assert {n: x.shape for n, x in flatten_names(params).items()} == {n: x.shape for n, x in weights.items()}
    weights["roberta.embeddings.position_ids"] = jnp.arange(22)[None]  # from an old file
    dx.save_params(tmp_path, unflatten_names(weights), TINY, overwrite=True)
    _, again = dx.load_model(tmp_path)
    assert flatten_names(again).keys() == flatten_names(params).keys()


def test_config():
    config = BertConfig.from_hf(TINY)
    out = config.to_hf()
    assert {name: out[name] for name in TINY} == TINY and BertConfig.from_hf(out) == config
    without = {name: value for name, value in TINY.items() if name != "pad_token_id"}
    assert BertConfig.from_hf(without).pad_token_id == 1
    with pytest.raises(ValueError, match="RoBERTa config: pad_token_id is missing"):
        BertConfig.from_hf(TINY | {"pad_token_id": None})
    with pytest.raises(ValueError, match="any RoBERTa's body as RobertaModel"):
        BertConfig.from_hf(TINY | {"architectures": ["RobertaForMaskedLM"]})
    model, params = init_model(config, jax.random.key(0))
    assert model(params, batch()[0]).logits.shape == (3, 3)  # 20 tokens: two positions are the padding's
    with pytest.raises(ValueError, match="input_ids has 21 positions, the model 20; truncate the text"):
        model(params, np.full((1, 21), 5))


def test_padding_id_counts():
    model, params = init_model(BertConfig.from_hf(TINY), jax.random.key(0))
    other, _ = init_model(BertConfig.from_hf(TINY | {"pad_token_id": 0}), jax.random.key(0))
    ids, mask = batch()
    assert (np.asarray(model(params, ids, mask).logits) != np.asarray(other(params, ids, mask).logits)).all()


def test_config_as_transformers_writes_it(tmp_path):
    original(TINY, tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert BertConfig.from_hf(hf).to_hf() == hf
    classic = {name: x for name, x in TINY.items() if not name.endswith(("2label", "2id"))}
    classic |= {"architectures": ["RobertaModel"], "bos_token_id": 0, "eos_token_id": 2}
    classic |= {"gradient_checkpointing": False, "position_embedding_type": "absolute", "use_cache": True}
    assert BertConfig.from_hf(classic).to_hf() == classic | {"classifier_dropout": None}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"is_decoder": True}, "is_decoder is True, supported: False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"adapters": {"x": 1}}, "adapters is unknown"),
        ({"type_vocab_size": None}, "type_vocab_size is missing"),
        ({"pad_token_id": 60}, "pad_token_id is 60, the vocabulary has 60 rows"),
        ({"num_labels": 2}, "num_labels is 2, id2label has 3"),
        ({"architectures": ["BertModel"]}, r"\['BertModel'\], supported: RobertaModel, RobertaForSeq"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_config_refusals(changes, text):
    with pytest.raises(ValueError, match=f"RoBERTa config: .*{text}"):
        BertConfig.from_hf(TINY | changes)


def test_every_field_changes_something():
    """Other shapes, another output, another training step, or another start."""
    ids, mask = batch()
    _, standard_params = init_model(BertConfig.from_hf(TINY), jax.random.key(0))

    def behaviour(**changes):
        model, params = init_model(BertConfig.from_hf(TINY | changes), jax.random.key(0))
        shapes = jax.tree.map(jnp.shape, params)
        if shapes != jax.tree.map(jnp.shape, standard_params):
            return shapes
        runs = [model(standard_params, ids, mask, dropout_key=key) for key in (None, jax.random.key(3))]
        start = params["classifier"]["out_proj"]["weight"]
        return [float(x) for x in (*(run.logits.sum() for run in runs), start.sum())]

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
        "max_position_embeddings": 23,
        "type_vocab_size": 2,
        "initializer_range": 0.2,
        "layer_norm_eps": 1e-2,
        "pad_token_id": 0,
    }
    fields = {f.name for f in dataclasses.fields(BertConfig)}
    assert fields - changed.keys() == {"model_type", "architectures", "num_labels", "notes"}
    standard = behaviour()
    for name, value in changed.items():
        assert behaviour(**{name: value}) != standard, name
    assert behaviour(bos_token_id=7, use_cache=False) == standard


def test_the_head_drops_what_enters_and_what_leaves_its_dense_layer():
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    config = BertConfig.from_hf(TINY | off | {"classifier_dropout": 0.5})
    model, params = init_model(config, jax.random.key(0))
    ids, mask = batch()
    a, b = (model(params, ids, mask, dropout_key=jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(a.last_hidden_state, b.last_hidden_state)
    assert not np.allclose(a.head_hidden, b.head_hidden)
    params["classifier"]["dense"]["weight"] *= 0  # its input has no effect now
    params["classifier"]["dense"]["bias"] += 1
    a, b = (model(params, ids, mask, dropout_key=jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(a.head_hidden, b.head_hidden)
    assert not np.allclose(a.logits, b.logits)


@pytest.mark.parametrize("architecture", ["RobertaModel", "RobertaForSequenceClassification"])
def test_fresh_classifier_is_read_by_transformers(tmp_path, architecture):
    body = BertConfig.from_hf(TINY | {"architectures": [architecture]})
    model, params = init_model(body, jax.random.key(0))
    model, params = classifier_from_pretrained(model, params, 2, jax.random.key(1))
    assert flatten_names(params)["classifier.out_proj.weight"].shape == (2, 32)
    assert not any("pooler" in name for name in flatten_names(params))
    dx.save_params(tmp_path, params, model.config.to_hf())
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, mask = batch()
    with torch.no_grad():
        logits = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    np.testing.assert_allclose(model(params, ids, mask).logits, logits, atol=1e-5)


def test_output_change_is_measured_at_the_heads_dense_layer():
    model, params = init_model(BertConfig.from_hf(TINY), jax.random.key(0))
    ids, mask = batch()
    weight = np.array([1, 1, 0], np.float32)
    data = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids), "weight": weight}
    reference = reference_outputs(model, params, [data])
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    expected = np.abs(model(moved, ids, mask).head_hidden - model(params, ids, mask).head_hidden)[:2].mean()
    np.testing.assert_allclose(output_change(model, moved, [data], reference), expected, rtol=1e-5)


def test_the_workflow_from_the_terminal(tmp_path):
    """train, find-q, check, prune, apply, eval on a tiny RoBERTa with a byte-level tokenizer made here."""
    from tokenizers import ByteLevelBPETokenizer

    base = tmp_path / "base"
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(["the soup was superb", "we disliked the show"], 300, special_tokens=special)
    trained.save_model(str(tmp_path))
    tokenizer = transformers.RobertaTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    hf = TINY | {"architectures": ["RobertaModel"], "vocab_size": 300, "max_position_embeddings": 130}
    model, params = init_model(BertConfig.from_hf(hf), jax.random.key(0))
    dx.save_params(base, params, model.config.to_hf())
    tokenizer.save_pretrained(base)

    def darex(*arguments):
        result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output + repr(result.exception)
        return json.loads(result.stdout)

    fine, delta, out = tmp_path / "fine", tmp_path / "delta", tmp_path / "out"
    darex("train", base, fine, "--steps", 2, "--batch-size", 8, "--limit", 16)
    assert darex("check", base, fine)["dense_names"] == [
        "classifier.dense.bias",
        "classifier.dense.weight",
        "classifier.out_proj.bias",
        "classifier.out_proj.weight",
    ]
    search = ("--drop-rate", 0.5, "--limit", 8, "--objective", "outputs", "--out", tmp_path / "q.json")
    assert 0.5 <= darex("find-q", base, fine, *search)["q"] <= 1.0
    darex("prune", base, fine, delta, "--drop-rate", 0.5, "--q", tmp_path / "q.json")
    darex("apply", base, delta, out)
    assert darex("eval", out, "--limit", 16)["n"] == 16
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert theirs.config.num_labels == 2


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForPreTraining"),
        ("roberta", "RobertaForMaskedLM"),
        ("xlm-roberta", "XLMRobertaForMaskedLM"),
    ],
)
def test_published_checkpoints_give_their_body(tmp_path, family, architecture):
    """Pretrained models on the hub have a masked-language-model head; fine-tuning starts from the body."""
    hf = TINY | {"model_type": family, "architectures": [architecture]}
    theirs = original(hf, tmp_path / "base")
    model, params = dx.load_model(tmp_path / "base")
    ids, mask = batch()
    with torch.no_grad():
        body = theirs.base_model(torch.tensor(ids), attention_mask=torch.tensor(mask))
    real = mask == 1
    hidden = body.last_hidden_state.numpy()[real]
    np.testing.assert_allclose(
        np.asarray(model(params, ids, mask).last_hidden_state)[real], hidden, atol=1e-5
    )
    fine, start = classifier_from_pretrained(model, params, 2, jax.random.key(0))
    dx.save_params(tmp_path / "fine", jax.tree.map(lambda x: x + 0.01, start), fine.config.to_hf())
    folders = [str(tmp_path / name) for name in ("base", "fine", "delta", "out")]
    for command in (["prune", *folders[:3], "-p", "0.5"], ["apply", folders[0], *folders[2:]]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output + repr(result.exception)
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    dx.load_model(tmp_path / "out")

"""ModernBERT against transformers, its config, and the workflow on a tiny one."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.errors import DarexError
from darex_jax.core.tree import flatten_names
from darex_jax.models import classifier_from_pretrained, init_model, read_model_config
from darex_jax.models.modernbert import READ, ModernBertConfig
from tests.test_bank import darex

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {
    "model_type": "modernbert", "architectures": ["ModernBertForSequenceClassification"], "vocab_size": 60,
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3, "norm_eps": 1e-5, "local_attention": 8,
    "global_attn_every_n_layers": 3, "global_rope_theta": 200.0, "local_rope_theta": 30.0,
    "pad_token_id": 1, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2},
    "classifier_pooling": "mean",
}  # fmt: skip


def original(hf, path):
    torch.manual_seed(0)
    fields = copy.deepcopy({k: v for k, v in hf.items() if k not in ("architectures", "model_type")})
    config = transformers.ModernBertConfig(
        **fields, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
    )
    model = getattr(transformers, hf["architectures"][0])(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(path)
    return model


def batch(length=40):
    ids = np.random.default_rng(0).integers(2, 60, (3, length))
    mask = np.ones((3, length), int)
    mask[1, length - 9 :], mask[2, length // 3 :] = 0, 0
    return np.where(mask, ids, 1), mask


CASES = {
    "mean": TINY,
    "cls": TINY | {"classifier_pooling": "cls"},
    "biases": TINY | {"attention_bias": True, "mlp_bias": True, "classifier_bias": True},
    "others": TINY | {"hidden_activation": "silu", "classifier_activation": "relu", "local_attention": 13},
    "body": TINY | {"architectures": ["ModernBertModel"]},
}


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(tmp_path, case):
    theirs = original(CASES[case], tmp_path)
    model, params = dx.load_model(tmp_path)
    ids, mask = batch()
    with torch.no_grad():
        out = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
    ours = model(params, ids, mask)
    real = mask == 1
    body = out.last_hidden_state if case == "body" else theirs.model(torch.tensor(ids), torch.tensor(mask))[0]
    hidden = np.asarray(ours.last_hidden_state)[real]
    np.testing.assert_allclose(hidden, body.detach().numpy()[real], atol=1e-4)
    if case != "body":
        np.testing.assert_allclose(ours.logits, out.logits.numpy(), atol=1e-4)
    saved = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert {name: x.shape for name, x in flatten_names(params).items()} == saved


def test_gradients_match_torch(tmp_path):
    theirs = original(TINY, tmp_path).train()
    model, params = dx.load_model(tmp_path)
    ids, mask = batch()
    grads = flatten_names(
        jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model(p, ids, mask).logits))))(params)
    )
    torch.sum(theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits ** 2).backward()
    for name, weight in theirs.named_parameters():
        expected = weight.grad.numpy()
        np.testing.assert_allclose(grads[name], expected, atol=5e-4 * np.abs(expected).max(), err_msg=name)


def test_rematerialisation_and_padding_change_nothing():
    model, params = init_model(read_model_config(TINY), jax.random.key(0))
    ids, mask = batch()

    def loss(model, ids):
        return lambda p: jnp.sum(jnp.square(model(p, ids, mask).logits))

    plain = jax.grad(loss(model, ids))(params)
    again = jax.grad(loss(dataclasses.replace(model, remat=True), ids))(params)
    other = jax.grad(loss(model, np.where(mask, ids, 5)))(params)
    for one in (again, other):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    seen = []
    model(params, ids, mask, observe=lambda name, x: seen.append(name))
    assert len(seen) == 4 * 4 + 2 and "model.layers.3.attn.Wqkv.weight" in seen


def test_every_field_changes_something():
    ids, mask = batch()

    def behaviour(**changes):
        """Shapes, an output, one with dropout, the padding row's gradient: each when it is asked for."""
        model, params = init_model(read_model_config(TINY | changes), jax.random.key(0))
        yield sorted((name, x.shape) for name, x in flatten_names(params).items())
        moved = jax.tree.map(lambda x: x + 0.01, params)
        yield float(jnp.sum(model(moved, ids, mask).logits))
        yield float(jnp.sum(model(moved, ids, mask, dropout_key=jax.random.key(1)).logits))
        row = jax.grad(lambda p: model(p, jnp.ones((1, 3), int)).logits.sum())(moved)
        yield float(jnp.abs(row["model"]["embeddings"]["tok_embeddings"]["weight"][1]).sum())

    standard = list(behaviour())
    changed = {
        "vocab_size": 61, "hidden_size": 40, "intermediate_size": 20, "num_hidden_layers": 3,
        "num_attention_heads": 2, "initializer_range": 0.1, "pad_token_id": 0, "hidden_activation": "relu",
        "norm_eps": 1e-2, "attention_bias": True, "mlp_bias": True, "local_attention": 4,
        "embedding_dropout": 0.5, "mlp_dropout": 0.5, "classifier_pooling": "cls", "classifier_dropout": 0.5,
        "classifier_bias": True, "classifier_activation": "silu", "global_rope_theta": 100.0,
        "local_rope_theta": 20.0, "global_attn_every_n_layers": 2,
    }  # fmt: skip
    known = {f.name for f in dataclasses.fields(ModernBertConfig)} - {*ModernBertConfig.COMPUTED}
    rest = {"model_type", "architectures", "max_position_embeddings"}
    assert known - rest == changed.keys() - READ.keys()
    for name, value in changed.items():
        changes = zip(behaviour(**{name: value}), standard, strict=True)
        assert any(other != own for other, own in changes), name


def test_config_is_read_strictly_and_written_as_it_was(tmp_path):
    for hf in CASES.values():
        out = read_model_config(hf).to_hf()
        assert {name: out.get(name) for name in hf} == hf and read_model_config(out) == read_model_config(hf)
        json.dumps(out)
    original(TINY, tmp_path)  # as the installed transformers writes it
    written = read_model_config(json.loads((tmp_path / "config.json").read_text()))
    config = read_model_config(TINY)
    assert (written.rope, written.local_rope, written.local) == (config.rope, config.local_rope, config.local)
    assert config.local == (False, True, True, False)
    for changes, text in (
        ({"norm_bias": True}, "norm_bias is True, supported: False"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, supported: 0.0"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max', supported: cls, mean"),
        ({"hidden_activation": "mish"}, "hidden_activation is 'mish', supported"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*, expected 4 of"),
        ({"global_rope_theta": "a"}, "global_rope_theta is 'a', expected a finite number above 0"),
        ({"mlp_dropout": 1.0}, "mlp_dropout is 1.0, it must be in"),
        ({"hidden_size": 12}, "the head size is odd"),
        ({"rope_parameters": {"full_attention": {"rope_type": "x"}}}, "rope_type is 'x', supported"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "rope_parameters has 'rope_type', supp",
        ),
        ({"unheard": 3}, "unheard is unknown"),
    ):
        with pytest.raises(DarexError, match=f"ModernBERT config: .*{text}"):
            read_model_config(TINY | changes)


def test_a_body_takes_a_delta_in_a_bank(tmp_path):
    model, params = init_model(read_model_config(CASES["body"]), jax.random.key(0))
    moved = jax.tree.map(lambda x: x + 0.05 * jnp.sin(99 * x), params)
    for name, tree in (("base", params), ("fine", moved)):
        dx.save_params(tmp_path / name, tree, model.config.to_hf())
    darex("prune", tmp_path / "base", tmp_path / "fine", tmp_path / "d", "--method", "magnitude", "-p", 0.5)
    bank = dx.DeltaBank(model, params)
    bank.add("d", tmp_path / "d")
    ids, mask = batch()
    mixed = bank.model(bank.mixed(["d", None, "d"]), ids, mask).last_hidden_state
    restored, weights = dx.load_model(tmp_path / "base", delta=tmp_path / "d")
    for row, (of, own) in enumerate(((restored, weights), (model, params), (restored, weights))):
        alone = of(own, ids, mask).last_hidden_state[row]
        np.testing.assert_allclose(mixed[row], alone, atol=1e-4)


def test_from_a_published_model_to_a_pruned_classifier(tmp_path):
    theirs = original(TINY | {"architectures": ["ModernBertForMaskedLM"]}, tmp_path / "base")
    model, params = dx.load_model(tmp_path / "base")
    ids, mask = batch()
    body = theirs.model(torch.tensor(ids), torch.tensor(mask))[0].detach().numpy()
    real = mask == 1
    np.testing.assert_allclose(
        np.asarray(model(params, ids, mask).last_hidden_state)[real], body[real], atol=1e-4
    )
    fine, start = classifier_from_pretrained(model, params, 2, jax.random.key(0), label_names=("no", "yes"))
    assert fine.config.to_hf()["label2id"] == {"no": 0, "yes": 1}
    dx.save_params(tmp_path / "fine", jax.tree.map(lambda x: x + 0.01, start), fine.config.to_hf())
    darex("prune", tmp_path / "base", tmp_path / "fine", tmp_path / "d", "-p", 0.5)
    darex("apply", tmp_path / "base", tmp_path / "d", tmp_path / "out")
    restored, weights = dx.load_model(tmp_path / "out")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = again(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    np.testing.assert_allclose(restored(weights, ids, mask).logits, expected.numpy(), atol=1e-4)

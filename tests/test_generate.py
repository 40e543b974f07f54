"""Generation against transformers and against itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.models import init_model, read_model_config
from darex_jax.models.generate import decode, padding_token, prefill, stop_tokens
from tests.test_decoders import CASES, LLAMA, STRETCHED, original

torch = pytest.importorskip("torch")


def prompts(rows=3, length=9):
    """Left-padded prompts of different lengths."""
    ids = np.random.default_rng(2).integers(3, 97, (rows, length))
    mask = np.ones((rows, length), int)
    mask[1, :4], mask[2, :7] = 0, 0
    return ids, mask


@pytest.mark.parametrize(
    "case", ["llama", "tied", "llama3", "qwen2 tied", "windows", "qwen2 yarn", "mistral", "qwen3", "gemma3"]
)
def test_greedy_tokens_are_those_of_transformers(tmp_path, case):
    theirs = original(CASES[case], tmp_path)
    model, params = dx.load_model(tmp_path)
    ids, mask = prompts()
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    expected = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options)
    expected = expected[:, ids.shape[1] :].numpy()
    out = np.asarray(dx.generate(model, params, ids, mask, max_new_tokens=20, eos_token_id=2))
    assert out.shape == (3, 20) and out.dtype == np.int32
    for ours, row in zip(out, expected, strict=True):
        end = int(np.argmax(row == 2)) + 1 if 2 in row else len(row)
        assert ours[:end].tolist() == row[:end].tolist()
        assert set(ours[end:].tolist()) <= {2}  # no pad_token_id in this config: the end token


def test_tokens_of_dynamic_positions_are_those_of_transformers_for_each_row_alone(tmp_path):
    """Frequencies change with every token beyond 16 positions; cached keys keep their own."""
    theirs = original(STRETCHED, tmp_path)
    model, params = dx.load_model(tmp_path)
    ids, mask = prompts()
    out = np.asarray(dx.generate(model, params, ids, mask, max_new_tokens=20))
    plain, _ = init_model(read_model_config(STRETCHED | {"max_position_embeddings": 64}), jax.random.key(0))
    assert (out != np.asarray(dx.generate(plain, params, ids, mask, max_new_tokens=20))).any()
    for row in range(3):
        fresh = type(theirs)(theirs.config).eval()  # without state of an earlier, longer text
        fresh.load_state_dict(theirs.state_dict())
        alone = torch.tensor(ids[row : row + 1, mask[row] == 1])
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        expected = fresh.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert out[row].tolist() == expected[0, alone.shape[1] :].tolist()


def make(**changes):
    return init_model(read_model_config(LLAMA | changes), jax.random.key(0))


def test_rows_end_on_their_own_and_are_padded():
    model, params = make(pad_token_id=0)
    ids, mask = prompts()
    free = np.asarray(dx.generate(model, params, ids, mask, max_new_tokens=12))
    stop = [int(free[0, 3]), int(free[1, 5])]
    out = np.asarray(dx.generate(model, params, ids, mask, max_new_tokens=12, eos_token_id=stop))
    for row, unstopped in zip(out, free, strict=True):
        ends = [i for i, token in enumerate(unstopped) if token in stop]
        end = ends[0] + 1 if ends else 12
        assert row[:end].tolist() == unstopped[:end].tolist() and (row[end:] == 0).all()
    assert (out == 0).any()


def test_a_batch_is_its_rows():
    model, params = make()
    ids, mask = prompts()
    together = np.asarray(dx.generate(model, params, ids, mask, max_new_tokens=8))
    for i in range(3):
        alone = ids[i : i + 1, mask[i].argmax() :]
        out = dx.generate(model, params, alone, np.ones_like(alone), max_new_tokens=8)
        assert np.asarray(out)[0].tolist() == together[i].tolist()


def test_pieces_are_the_whole_and_the_loop_ends_early():
    model, params = make()
    ids, mask = prompts()
    whole = np.asarray(dx.generate(model, params, ids, mask, max_new_tokens=10))
    stops = stop_tokens(None)
    state = prefill(model, params, ids, mask, slots=30, stops=stops)
    pieces = [np.asarray(state.token)[:, None]]
    for steps in (4, 1, 4):
        tokens, state = decode(model, params, state, steps, stops=stops, pad=0)
        pieces.append(np.asarray(tokens))
    assert np.concatenate(pieces, axis=1).tolist() == whole.tolist()
    length = int(state.cache.length)
    assert length == 9 + 9
    state = state._replace(done=jnp.ones(3, bool))
    tokens, state = decode(model, params, state, 4, stops=stops, pad=7)
    assert (np.asarray(tokens) == 7).all() and int(state.cache.length) == length


def test_sampling_follows_its_key_and_temperature():
    model, params = make()
    ids, mask = prompts()

    def draw(seed, temperature):
        options = {"max_new_tokens": 16, "key": jax.random.key(seed), "temperature": temperature}
        return np.asarray(dx.generate(model, params, ids, mask, **options))

    assert (draw(0, 1.0) == draw(0, 1.0)).all() and (draw(0, 1.0) != draw(1, 1.0)).any()
    greedy = np.asarray(dx.generate(model, params, ids, mask, max_new_tokens=16))
    assert (draw(0, 1e-4) == greedy).all() and (draw(0, 5.0) != greedy).any()


def test_first_tokens_are_drawn_with_their_probabilities():
    model, params = make()
    ids = np.full((4000, 2), 5)
    logits = np.asarray(model(params, ids[:1], None).logits)[0, -1] / 2.0
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    options = {"max_new_tokens": 1, "key": jax.random.key(3), "temperature": 2.0}
    drawn = np.asarray(dx.generate(model, params, ids, np.ones_like(ids), **options))[:, 0]
    share = np.bincount(drawn, minlength=97) / 4000
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-3).all()


def test_another_prompt_of_the_same_shape_does_not_recompile():
    model, params = make()
    ids, mask = prompts()
    dx.generate(model, params, ids, mask, max_new_tokens=5, eos_token_id=2)
    size = decode._cache_size()
    dx.generate(model, params, ids[::-1], np.ones_like(mask), max_new_tokens=5, eos_token_id=3)
    assert decode._cache_size() == size


def test_padding_that_is_no_row_of_the_embedding_does_not_reach_it():
    """Configs of early Llamas say -1; prompts are padded with this token before they are read."""
    ids, mask = prompts()
    tokens = []
    for pad in (0, -1):
        model, params = init_model(read_model_config(LLAMA | {"pad_token_id": pad}), jax.random.key(0))
        padded = np.where(mask, ids, padding_token(model, None))
        tokens.append(np.asarray(dx.generate(model, params, padded, mask, max_new_tokens=6)))
    np.testing.assert_array_equal(*tokens)
    assert tokens[0].any()


def test_a_temperature_too_small_to_divide_by_is_greedy():
    model, params = make()
    ids, mask = prompts()
    greedy = dx.generate(model, params, ids, mask, max_new_tokens=4, eos_token_id=np.int64(2))
    cold = dx.generate(model, params, ids, mask, max_new_tokens=4, eos_token_id=2, key=jax.random.key(0),
                       temperature=1e-38)  # fmt: skip
    np.testing.assert_array_equal(greedy, cold)


def test_wrong_arguments_are_explained():
    model, params = make()
    ids, mask = prompts()
    for arguments, text in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2, "temperature": 1.0}, r"pass key=jax.random.key\(seed\)"),
        ({"max_new_tokens": 2, "temperature": -1.0}, "temperature is -1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            dx.generate(model, params, ids, mask, **arguments)
    with pytest.raises(ValueError, match=r"attention_mask \(3, 8\) must be"):
        dx.generate(model, params, ids, mask[:, 1:], max_new_tokens=2)
    body, weights = make(architectures=["LlamaModel"])
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        dx.generate(body, weights, ids, mask, max_new_tokens=2)

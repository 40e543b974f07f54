"""Text generation from strings: tokenisation, the generation loop, decoding."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from darex_jax.core.errors import DarexError
from darex_jax.models import Model, Params
from darex_jax.models.generate import decode, end_tokens, padding_token, prefill, sampling_of, stop_tokens
from darex_jax.tasks.answers import encode_prompts, start_tokens

# Prompts are padded to these lengths, so that a data set compiles few programs.
PROMPT_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
PIECE = 32  # tokens generated per compiled call, after which stop strings are checked
SAMPLED = 32  # texts drawn at a time


def left_padded(rows: Sequence[Sequence[int]], pad: int, batch: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Token ids and mask [batch, bucket] of prompts, padded on the left; missing rows repeat the first.

    Raises: ValueError for a prompt without tokens, or longer than the largest bucket.
    """
    shortest, longest = min(map(len, rows)), max(map(len, rows))
    if not shortest or longest > PROMPT_BUCKETS[-1]:
        wrong = longest if shortest else 0
        raise DarexError(f"a prompt has {wrong} tokens, expected 1 to {PROMPT_BUCKETS[-1]}.")
    width = next(bucket for bucket in PROMPT_BUCKETS if longest <= bucket)
    ids, mask = np.full((batch, width), pad, np.int32), np.zeros((batch, width), np.int32)
    for i in range(batch):
        row = rows[i if i < len(rows) else 0]
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def stream_text(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    piece: int = 4,
) -> Iterator[str]:
    """Continues one prompt; yields text while it is generated, up to the end token or a stop string.

    Args:
      tokenizer: the Hugging Face tokenizer of the model.
      stop: strings that end the text; they are not part of it.
      piece: tokens generated at a time.
    """
    shown = text = ""
    rows = encode_prompts(tokenizer, [prompt])
    for tokens in _pieces(model, params, rows, 1, max_new_tokens, eos_token_id, key, temperature, piece):
        text, ended = _text(tokenizer, tokens[0], eos_token_id, stop)
        # The last characters may still change: an incomplete character, or the start of a stop string.
        safe = text if ended else text.rstrip("\N{REPLACEMENT CHARACTER}")
        held = 0 if ended else max(_held(safe, word) for word in ("", *stop))
        new = safe[: len(safe) - held]
        if new.startswith(shown):
            yield new[len(shown) :]
            shown = new
        if ended:
            return
    yield text[len(shown) :]


def complete(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    batch_size: int | None = None,
    stop: Sequence[str] = (),
    key: jax.Array | None = None,
    temperature: float = 0.0,
) -> list[str]:
    """Continues a batch of prompts; each text ends before its end token or the first stop string.

    Args:
      batch_size: rows computed, at least the number of prompts: use the same for all batches of a data set,
        so that the last one does not recompile.
      key, temperature: as for `generate`.
    """
    texts: list[tuple[str, bool]] = []
    rows = encode_prompts(tokenizer, prompts)
    for tokens in _pieces(
        model, params, rows, batch_size or len(rows), max_new_tokens, eos_token_id, key, temperature
    ):
        texts = [_text(tokenizer, row, eos_token_id, stop) for row in tokens[: len(prompts)]]
        if all(ended for _, ended in texts):
            break
    return [text for text, _ in texts]


def sample_texts(
    model: Model,
    params: Params,
    tokenizer: Any,
    count: int,
    *,
    prompts: Sequence[str] = (),
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    key: jax.Array,
    temperature: float = 1.0,
    on_texts: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Texts that a model writes itself, such as training values on its own answers takes.

    The first texts are the same for every `count`.

    Args:
      prompts: the texts continue them, in turn, and begin with them; without any, they continue the start
        token, or of a tokenizer without one the end token, behind which another document begins.
      key: typed key of everything drawn.
      on_texts: called with the number of texts so far.
    Returns: `count` texts, none of them blank. Special tokens within a text are written out, so that the
      tokenizer reads them again; those that it adds itself, and the end token, are left out.
    Raises: DarexError without prompts if the tokenizer has neither token, or the model writes nothing.
    Source: data-free distillation from samples, arXiv:2305.17888.
    """
    rows, hidden = encode_prompts(tokenizer, prompts), len(start_tokens(tokenizer))
    if not rows:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        rows = [start_tokens(tokenizer) or [first]]
        if rows == [[None]]:
            raise DarexError("the tokenizer has no start or end token to begin a text with: pass prompts.")
        if tokenizer.bos_token_id is None:  # the end of another document is not of this text
            hidden = len(rows[0])
    texts: list[str] = []
    ends, batch = end_tokens(eos_token_id), 0
    while len(texts) < count:
        given = [rows[i % len(rows)] for i in range(batch * SAMPLED, (batch + 1) * SAMPLED)]
        own = jax.random.fold_in(key, batch)
        *_, drawn = _pieces(model, params, given, SAMPLED, max_new_tokens, eos_token_id, own, temperature)
        for prompt, new in zip(given, drawn, strict=True):
            length = next((i for i, token in enumerate(new) if token in ends), None)
            text = tokenizer.decode([*prompt[hidden:], *new[:length]], clean_up_tokenization_spaces=False)
            if length is None:  # it may end within a character
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            texts += [text] if text.strip() else []
        batch += 1
        if not texts:
            raise DarexError(f"{SAMPLED} texts of the model ended at their first token: pass prompts.")
        on_texts(min(len(texts), count))
    return texts[:count]


def _pieces(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    batch: int,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    key: jax.Array | None,
    temperature: float,
    piece: int = PIECE,
) -> Iterator[list[list[int]]]:
    """Yields all new tokens so far, by row, after each piece."""
    stops, sampling = stop_tokens(eos_token_id), sampling_of(key, temperature)
    pad = padding_token(model, eos_token_id)
    ids, mask = left_padded(prompts, pad, batch)
    slots = ids.shape[1] + 1 + -(-(max_new_tokens - 1) // piece) * piece
    state = prefill(model, params, ids, mask, slots=slots, stops=stops, sampling=sampling)
    columns = [np.asarray(state.token)[:, None]]
    yield columns[0].tolist()
    while (given := sum(c.shape[1] for c in columns)) < max_new_tokens and not bool(state.done.all()):
        new, state = decode(model, params, state, piece, stops=stops, pad=pad, sampling=sampling)
        columns.append(np.asarray(new)[:, : max_new_tokens - given])
        yield np.concatenate(columns, axis=1).tolist()


def _text(
    tokenizer: Any, tokens: Sequence[int], eos_token_id: int | Sequence[int] | None, stop: Sequence[str]
) -> tuple[str, bool]:
    """The text of a row's new tokens, and whether it has ended."""
    ends = end_tokens(eos_token_id)
    length = next((i for i, token in enumerate(tokens) if token in ends), None)
    text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
    cuts = [text.index(word) for word in stop if word in text]
    return text[: min(cuts)] if cuts else text, length is not None or bool(cuts)


def _held(text: str, word: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `word`."""
    return next((n for n in range(min(len(word), len(text)), 0, -1) if text.endswith(word[:n])), 0)

"""Tokenises texts and batches them as NumPy arrays with few different shapes, to limit compilation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from darex_jax.core.errors import DarexError, first_line
from darex_jax.files.model import companions
from darex_jax.files.paths import check_entries
from darex_jax.tasks import Examples

BUCKETS = (16, 24, 32, 48, 64, 96, 128)  # the lengths that batches are padded to
MAX_LENGTH = BUCKETS[-1]
EVALUATION_ROWS = 16  # per batch: rows are sorted by length, and on a CPU larger batches are slower per row
# Without any of these, transformers creates a tokenizer with an empty vocabulary.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
Batch = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, unpadded.

    Attributes:
      input_ids, token_type_ids: N lists of equal lengths, at most `MAX_LENGTH` each.
      labels: [N], int32 classes or float32 scores.
      pad_id: padding token.
    """

    input_ids: list[list[int]]
    token_type_ids: list[list[int]]
    labels: NDArray[Any]
    pad_id: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, rows: Sequence[int] | NDArray[Any]) -> Encoded:
        """The given rows, in the given order."""
        types = [self.token_type_ids[i] for i in rows]
        return Encoded([self.input_ids[i] for i in rows], types, self.labels[np.asarray(rows)], self.pad_id)

    def digest(self) -> str:
        """SHA-256 of the tokens and labels, in order."""
        digest = hashlib.sha256(json.dumps([self.input_ids, self.token_type_ids]).encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()


def load_tokenizer(
    path: str | os.PathLike[str],
    delta: str | os.PathLike[str] | None = None,
    *,
    allow_changed_files: bool = False,
) -> Any:
    """The Hugging Face tokenizer saved at `path`; with an artifact made from that model, the fine-tuned
    model's.

    Args: allow_changed_files: with an artifact, use the files of `path` even if they have changed.
    Raises: ValueError if it is missing or unreadable, or has changed since the artifact was made.
    """
    from transformers import AutoTokenizer

    with companions(path, delta, allow_changed_files=allow_changed_files) as folder:
        if not any((folder / name).exists() for name in TOKENIZER_FILES):
            raise DarexError(f"{path}: has no tokenizer ({', '.join(TOKENIZER_FILES)}).")
        check_entries(folder)
        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # from parsers of several formats
            raise DarexError(f"{path}: its tokenizer cannot be read ({first_line(error)})") from error


def encode(tokenizer: Any, examples: Examples, max_length: int = MAX_LENGTH) -> Encoded:
    """Tokenises texts (or pairs of texts), truncated to `max_length` tokens, special tokens included."""
    if not 0 < max_length <= MAX_LENGTH:
        raise DarexError(f"max_length must be between 1 and {MAX_LENGTH}, got {max_length}.")
    if not len(examples):
        raise DarexError("there are no examples to encode.")
    rows = tokenizer(
        list(examples.texts),
        None if examples.pairs is None else list(examples.pairs),
        truncation=True,
        max_length=max_length,
        return_token_type_ids=True,
        return_attention_mask=False,
    )
    return Encoded(rows["input_ids"], rows["token_type_ids"], examples.labels, tokenizer.pad_token_id or 0)


INPUTS = ("input_ids", "attention_mask", "token_type_ids", "hidden", "target")


def model_inputs(batch: Batch) -> dict[str, Any]:
    """A model's inputs in a batch: input_ids, attention_mask, token_type_ids; a `LayerModel`'s hidden states
    and target."""
    return {name: batch[name] for name in INPUTS if name in batch}


def real_parts(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Float32 weights of rows [B] and tokens [B, T]: 0 for padding tokens and rows with `weight` 0, else
    1."""
    mask = jnp.asarray(batch["attention_mask"] != 0, jnp.float32)
    rows = jnp.asarray(batch.get("weight", jnp.ones(len(mask))), jnp.float32)
    return rows, mask * rows[:, None]


def row_count(batches: Sequence[Batch]) -> int:
    """The number of rows, excluding padding rows."""
    return sum(int(np.sum(batch["weight"] > 0)) for batch in batches)


def evaluation_batches(encoded: Encoded, batch_size: int = EVALUATION_ROWS) -> list[Batch]:
    """All rows, sorted by length to reduce padding; `index` has their original indices. See `_batch`."""
    order = np.argsort([len(ids) for ids in encoded.input_ids], kind="stable")
    batch_size = min(batch_size, len(encoded))
    return [_batch(encoded, order[i : i + batch_size], batch_size) for i in range(0, len(order), batch_size)]


def training_batches(encoded: Encoded, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """One epoch: every row once, in the order of `training_rows`. See `_batch`."""
    lengths = [len(ids) for ids in encoded.input_ids]
    for rows in training_rows(lengths, batch_size, seed, epoch):
        yield _batch(encoded, rows, batch_size)


def training_rows(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> Iterator[NDArray[Any]]:
    """The row indices of one epoch's batches, every row once, in an order determined by (seed, epoch).

    Rows are shuffled, then sorted by length within pools of 16 batches, which reduces padding and keeps the
    order random. The last batch may be smaller.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths))
    pools = np.arange(len(lengths)) // (16 * batch_size)
    order = shuffled[np.lexsort((np.asarray(lengths)[shuffled], pools))]  # stable; the last key is primary
    cuts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for i in rng.permutation(len(cuts)):
        yield cuts[i]


def _batch(encoded: Encoded, rows: NDArray[Any], batch_size: int) -> Batch:
    """Arrays of exactly `batch_size` rows, padded to the shortest bucket that fits the longest row.

    Returns: input_ids, attention_mask, token_type_ids: int32 [B, T]; labels [B]; weight: float32 [B], 1 for a
      real row and 0 for padding rows of the last batch (repeats of its first row, so that they are not
      degenerate); index: int32 [B], the row's index in `encoded`.
    """
    real = len(rows)
    rows = np.concatenate([rows, np.full(batch_size - real, rows[0])])
    input_ids = [encoded.input_ids[i] for i in rows]
    return {
        "input_ids": right_padded(input_ids, encoded.pad_id),
        "attention_mask": right_padded([[1] * len(ids) for ids in input_ids], 0),
        "token_type_ids": right_padded([encoded.token_type_ids[i] for i in rows], 0),
        "labels": encoded.labels[rows],
        "weight": (np.arange(batch_size) < real).astype(np.float32),
        "index": rows.astype(np.int32),
    }


def right_padded(rows: Sequence[Sequence[int]], fill: int, buckets: Sequence[int] = BUCKETS) -> NDArray[Any]:
    """Rows as int32 [B, T], right-padded to T, the shortest bucket that fits the longest row."""
    longest = max(map(len, rows))
    padded = np.full((len(rows), next(bucket for bucket in buckets if longest <= bucket)), fill, np.int32)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return padded

"""Tokenises and batches prompts with answers for causal language models."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darex_jax.core.errors import DarexError
from darex_jax.tasks import hold_out_tenth
from darex_jax.tasks.batching import BUCKETS, Batch, right_padded, training_rows
from darex_jax.tasks.gsm8k import Problem, gsm8k_prompt, load_gsm8k, metamath_solution
from darex_jax.tasks.word_problems import word_problems

PROBLEM_TASKS = ("gsm8k", "word-problems")

ANSWER_BUCKETS = (*BUCKETS, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # the lengths batches are padded to
TEXT_LENGTH = 512  # of a plain text, in tokens


@dataclass(frozen=True)
class EncodedAnswers:
    """Tokenised prompts with their answers, unpadded.

    Attributes:
      input_ids: N lists: the prompt, the answer, the end token.
      prompt_lengths: N integers, number of prompt tokens of each row.
      pad_id: padding token.
    """

    input_ids: list[list[int]]
    prompt_lengths: list[int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, rows: Sequence[int] | NDArray[Any]) -> EncodedAnswers:
        """The given rows, in the given order."""
        lengths = [self.prompt_lengths[i] for i in rows]
        return EncodedAnswers([self.input_ids[i] for i in rows], lengths, self.pad_id)

    def digest(self) -> str:
        """SHA-256 of the tokens and prompt lengths, in order."""
        rows = json.dumps([self.input_ids, self.prompt_lengths])
        return hashlib.sha256(rows.encode()).hexdigest()


def start_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text."""
    whole, own = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    return list(whole[: next((i for i in range(len(whole)) if whole[i : i + len(own)] == own), 0)])


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Prompts as they are continued: behind the tokenizer's start tokens, without its end tokens.

    A prompt that begins with the start tokens itself, as chat templates write them, does not get them twice.
    """
    start = start_tokens(tokenizer)
    own = tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []
    return [list(ids) if ids[: len(start)] == start else [*start, *ids] for ids in own]


def encode_answers(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> EncodedAnswers:
    """Tokenises prompts by `encode_prompts`, and answers without special tokens but for the end token.

    Nothing is truncated: half a solution would teach a model to stop early.

    Raises: ValueError for no prompts, a tokenizer without an end token, or a row longer than the largest
      bucket.
    """
    if not prompts or len(prompts) != len(answers):
        raise DarexError(
            f"need as many prompts as answers, at least one; got {len(prompts)} and {len(answers)}."
        )
    if tokenizer.eos_token_id is None:
        raise DarexError(
            "the tokenizer has no end token (eos_token), so the model would never learn to stop."
        )
    before = encode_prompts(tokenizer, prompts)
    after = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    rows = [[*p, *a, tokenizer.eos_token_id] for p, a in zip(before, after, strict=True)]
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[longest]) > ANSWER_BUCKETS[-1]:
        raise DarexError(
            f"row {longest} has {len(rows[longest])} tokens with its answer, at most {ANSWER_BUCKETS[-1]} "
            "are supported; remove it."
        )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return EncodedAnswers(rows, [len(ids) for ids in before], pad)


def encode_problems(tokenizer: Any, problems: Sequence[Problem]) -> EncodedAnswers:
    """`encode_answers` of word problems: the protocol's prompts, and the solutions in MetaMath's form."""
    prompts = [gsm8k_prompt(problem.question) for problem in problems]
    return encode_answers(tokenizer, prompts, [metamath_solution(problem.solution) for problem in problems])


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> EncodedAnswers:
    """Plain texts, truncated to `TEXT_LENGTH` tokens; all tokens but the first are the answer."""
    rows = tokenizer(list(texts), truncation=True, max_length=TEXT_LENGTH)["input_ids"]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return EncodedAnswers(rows, [1] * len(rows), pad or 0)


def load_problems(
    task: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    difficulty: int = 3,
    seed: int = 0,
) -> tuple[Problem, ...]:
    """The problems of a split (train, validation or test) of one of `PROBLEM_TASKS`.

    GSM8K's validation split is a tenth of its training split. Args, Raises: see `load_gsm8k` and
    `word_problems`.
    """
    if task == "word-problems":
        return getattr(word_problems(seed, difficulty), split)
    if split == "test":
        return load_gsm8k("test", data_dir)
    every = load_gsm8k("train", data_dir)
    rows, held_out = hold_out_tenth(len(every))
    return tuple(every[i] for i in (rows if split == "train" else held_out))


def answer_batches(encoded: EncodedAnswers, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """One epoch: every row once, in the order of `darex_jax.tasks.batching.training_rows`.

    Returns: batches of exactly `batch_size` rows, padded on the right to a bucket: input_ids, attention_mask:
      int32 [B, T]; loss_mask: float32 [B, T], 1 at the tokens of an answer and its end token, 0 everywhere in
      padding rows of the last batch (repeats of its first row); weight: float32 [B], 0 for padding rows.
    """
    lengths = [len(ids) for ids in encoded.input_ids]
    for rows in training_rows(lengths, batch_size, seed, epoch):
        filled = [*rows, *[rows[0]] * (batch_size - len(rows))]
        answered = [
            [0] * encoded.prompt_lengths[i] + [int(b < len(rows))] * (lengths[i] - encoded.prompt_lengths[i])
            for b, i in enumerate(filled)
        ]
        ids = [encoded.input_ids[i] for i in filled]
        yield {
            "input_ids": right_padded(ids, encoded.pad_id, ANSWER_BUCKETS),
            "attention_mask": right_padded([[1] * len(row) for row in ids], 0, ANSWER_BUCKETS),
            "loss_mask": right_padded(answered, 0, ANSWER_BUCKETS).astype(np.float32),
            "weight": (np.arange(batch_size) < len(rows)).astype(np.float32),
        }

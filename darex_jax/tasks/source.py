"""Selects and loads examples: a task, a file of texts, a user's table, or a generated task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from darex_jax.core.errors import DarexError
from darex_jax.core.scope import DECODERS
from darex_jax.files.checkpoint import read_config
from darex_jax.models.encoder import class_names
from darex_jax.tasks import Examples, Task, load_task
from darex_jax.tasks.answers import (
    PROBLEM_TASKS,
    EncodedAnswers,
    answer_batches,
    encode_answers,
    encode_problems,
    encode_texts,
    load_problems,
)
from darex_jax.tasks.batching import (
    EVALUATION_ROWS,
    Batch,
    Encoded,
    encode,
    evaluation_batches,
    load_tokenizer,
    training_batches,
)
from darex_jax.tasks.gsm8k import gsm8k_prompt
from darex_jax.tasks.lines import read_lines
from darex_jax.tasks.table import Table, read_completions, read_task, read_texts

TRAINING_ROWS = 16  # per step


@dataclass(frozen=True, kw_only=True)
class Source:
    """The user's choice of examples.

    Attributes:
      task: a GLUE task or opinions for encoders, gsm8k or word-problems for decoders; None is the family's
        generated task. data_dir: folder of its files. difficulty: of generated word problems.
      text: a file with one text per line, instead of a task.
      table: the user's own examples, instead of both.
      limit: maximum number of examples. seed: of the order of a training's epochs.
    Raises: DarexError for more than one of task, text and table.
    """

    task: str | None = None
    data_dir: Path | None = None
    difficulty: int = 3
    text: Path | None = None
    table: Table | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.task, self.text, self.table)) > 1:
            raise DarexError("examples come from one place: a task, a text file, or --data.")

    @property
    def labelled(self) -> bool:
        """Whether the examples have labels: a task, or a table with labels or completions."""
        own = self.table
        return self.task is not None or (own is not None and (own.label or own.completion) is not None)


class Material(NamedTuple):
    """Tokenised examples.

    Attributes:
      encoded: the tokens.
      task: the task of a classifier's labels; None for plain texts and a decoder's answers.
      source: their origin.
      seed: of the order of epochs.
      metric: the table's, of completions.
    """

    encoded: Encoded | EncodedAnswers
    task: Task | None
    source: str
    seed: int = 0
    metric: str | None = None

    def batches(self, rows: int = EVALUATION_ROWS) -> list[Batch]:
        """Evaluation batches of `rows` rows; 8 for decoders."""
        if isinstance(self.encoded, EncodedAnswers):
            return list(answer_batches(self.encoded, 8, 0, 0))
        return evaluation_batches(self.encoded, rows)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The training batches of an epoch, in its own order, of 16 rows (8 for decoders)."""
        if isinstance(self.encoded, EncodedAnswers):
            return answer_batches(self.encoded, 8, self.seed, number)
        return training_batches(self.encoded, TRAINING_ROWS, self.seed, number)

    def select(self, rows: NDArray[Any]) -> Material:
        return self._replace(encoded=self.encoded.select(rows))

    def first(self, most: int) -> Material:
        """The first rows, at most this many."""
        return self.select(np.arange(min(most, len(self.encoded))))


def hold_out(count: int, held: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Row indices for training, and `held` held-out ones drawn with the seed; both ascending."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def read_material(fine: Path, source: Source, split: str) -> Material:
    """The first examples of a source's split: train, validation or test. Reads no weights.

    Args: fine: the directory of the model, with its tokenizer. split: a file of texts has none.
    Raises: DarexError for a task for another kind of model, or a file without texts.
    """
    return _material(fine, source, split)._replace(seed=source.seed)


def _material(fine: Path, source: Source, split: str) -> Material:
    family = read_config(fine).get("model_type")
    decoder = family in DECODERS
    if source.text is not None:
        lines = read_lines(source.text)[: source.limit]
        tokenizer = load_tokenizer(fine)
        if decoder:
            return Material(encode_texts(tokenizer, lines), None, str(source.text))
        examples = Examples(tuple(lines), None, np.zeros(len(lines), np.int32))
        return Material(encode(tokenizer, examples), None, str(source.text))
    if source.table is not None:
        return _of_table(fine, source.table, decoder, split, source.limit)
    generated = "word-problems" if decoder else "opinions"
    task, name = source.task or generated, source.task or f"{generated} (generated)"
    if decoder != (task in PROBLEM_TASKS):
        kind = "decoders" if task in PROBLEM_TASKS else "encoders"
        raise DarexError(f"{task} is for {kind}, but {fine} is a {family}.")
    if decoder:
        problems = load_problems(task, split, source.data_dir, source.difficulty)[: source.limit]
        return Material(encode_problems(load_tokenizer(fine), problems), None, name)
    loaded = load_task(task, source.data_dir)
    chosen = getattr(loaded, split).select(slice(source.limit))
    return Material(encode(load_tokenizer(fine), chosen), loaded, name)


def read_prompts(source: Source) -> list[str]:
    """The texts of a source's training split, of problems the prompts alone: for a decoder to continue.

    Returns: [] for no task, text or table. Raises: DarexError for a task without prompts.
    """
    if source.text is not None:
        return read_lines(source.text)[: source.limit]
    if source.table is not None:
        return list(read_texts(source.table, "train").texts[: source.limit])
    if source.task is None:
        return []
    if source.task not in PROBLEM_TASKS:
        raise DarexError(f"{source.task} has no prompts; the tasks with prompts: {', '.join(PROBLEM_TASKS)}.")
    problems = load_problems(source.task, "train", source.data_dir, source.difficulty)
    return [gsm8k_prompt(problem.question) for problem in problems[: source.limit]]


def _of_table(fine: Path, table: Table, decoder: bool, split: str, limit: int | None) -> Material:
    """Examples of a user's table; without labels if no label column is given."""
    tokenizer = load_tokenizer(fine)
    if decoder and table.prompt is not None:
        prompts, completions = (column[:limit] for column in read_completions(table, (split,))[split])
        encoded = encode_answers(tokenizer, prompts, completions)
        return Material(encoded, None, table.data, metric=table.metric)
    if table.text is None:
        raise DarexError(f"{fine} is an encoder: pass the text column (--text).")
    if table.label is None or decoder:
        examples = read_texts(table, split).select(slice(limit))
        if decoder:
            return Material(encode_texts(tokenizer, examples.texts), None, table.data)
        return Material(encode(tokenizer, examples), None, table.data)
    task = read_task(table, (split,), class_names(read_config(fine)))
    chosen = getattr(task, split).select(slice(limit))
    return Material(encode(tokenizer, chosen), task, table.data)

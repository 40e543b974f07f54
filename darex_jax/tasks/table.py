"""A user's own examples: files, a folder or a data set of the hub, and the roles of their columns."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darex_jax.core.errors import DarexError, first_line
from darex_jax.files.paths import check_file
from darex_jax.models.config import shown
from darex_jax.tasks import Examples, Task
from darex_jax.tasks.metrics import METRICS
from darex_jax.tasks.parquet import Split

NO_WORDS = {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are classes and texts like others
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {  # suffix -> name of the `datasets` reader, and its options
    ".parquet": ("parquet", {}), ".csv": ("csv", NO_WORDS),
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE} | NO_WORDS),  # as GLUE's: a quote is a quote
    ".json": ("json", {}), ".jsonl": ("json", {}), ".arrow": ("arrow", {}),
}  # fmt: skip
SPLITS = {  # the words that file names begin with, or names of splits on the hub
    "train": "train|training", "validation": "validation|valid|val|dev|development",
    "test": "test|tests|testing",
}  # fmt: skip
TENTH = 10  # one row in ten is held out for a missing split
ANSWER_METRICS = ("exact_match", "token_accuracy", "loss")
LARGEST_LABEL = 100_000
LARGEST_SCORE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The user's description of their own examples.

    Attributes:
      data: a file of parquet, CSV, TSV (without quoting), JSON (lines) or Arrow; a folder of such files,
        whose names begin with the word train, validation (valid, val, dev) or test, also as testing or
        testset, or with none of these, to be split; or a data set of the hub. Without a training split
        nothing is held out: a validation split is tested on too, a test split is for tests alone.
      text, pair: columns of an encoder's texts; pair is the second text.
      label: column to predict: strings or integers for classes, other numbers for a score.
      prompt, completion: columns of a decoder's texts; the completion is trained and scored.
      metric: None is accuracy for classes, the mean of Pearson and Spearman for scores, exact match for
        completions.
    Raises: DarexError for an invalid combination of columns.
    """

    data: str
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise DarexError(
                "--prompt and --completion must be given together: the columns of a decoder's texts."
            )
        if (self.text is None) == (self.prompt is None):
            raise DarexError(
                "give the columns of --data: --text and, to train or score, --label; or for a decoder "
                "--prompt and --completion."
            )
        if self.text is None and (self.pair or self.label):
            raise DarexError("--pair and --label need --text.")
        known = (*METRICS, *ANSWER_METRICS)
        if self.metric is not None and self.metric not in known:
            raise DarexError(f"unknown metric {self.metric!r}; the metrics are {', '.join(known)}.")
        if self.metric is not None and (self.metric in METRICS) == (self.text is None):
            fitting = METRICS if self.text is not None else ANSWER_METRICS
            raise DarexError(f"{self.metric} is not a metric for these columns; use {', '.join(fitting)}.")

    @property
    def name(self) -> str:
        return Path(self.data).stem or self.data

    @property
    def columns(self) -> tuple[str, ...]:
        named = (self.text, self.pair, self.label, self.prompt, self.completion)
        return tuple(column for column in named if column is not None)


def read_task(
    table: Table, needs: Collection[str], known: Sequence[str] | None = None, *, fixed: bool = True
) -> Task:
    """Loads a classification task, or with numeric labels a regression task.

    A missing split is held out from the training rows: a tenth, always the same rows.

    Args:
      needs: splits that must have examples; others may be empty.
      known: class names of a model, in order: labels with these names get these indices. None: of no model,
        strings are numbered as the data set's features say, else in alphabetical order.
      fixed: whether the model's classes are those; otherwise other labels are numbered as for no model.
    Raises: DarexError that names file, column and row of an invalid text or label, or a label not in `known`;
      for strings where a model's classes have no names; for a table without labels, or without a split of
      `needs`; FileNotFoundError if there is no data.
    """
    if table.text is None or table.label is None:
        raise DarexError("an encoder is trained and scored on labels: pass their column (--label).")
    splits = _read(table, needs)
    values = {
        name: [v for part in parts for v in _labels(part, table.label)] for name, parts in splits.items()
    }
    every = [value for split in values.values() for value in split]
    kind_of = {name: isinstance(split[0], str) for name, split in values.items() if split}
    if len(set(kind_of.values())) > 1:
        texts = next(name for name, is_text in kind_of.items() if is_text)
        numbers_in = next(name for name, is_text in kind_of.items() if not is_text)
        raise DarexError(
            f"{table.data}: {table.label!r} has strings in {texts} and numbers in {numbers_in}; labels must "
            "be of one kind."
        )
    names: tuple[str, ...] = ()
    if isinstance(every[0], str):
        names = _numbered(table, every, _stated(splits, table.label), known, fixed)
        numbers = {name: i for i, name in enumerate(names)}
        values = {split: [numbers[value] for value in own] for split, own in values.items()}
    elif all(isinstance(value, int) for value in every):
        if min(every) < 0 or max(every) > LARGEST_LABEL:
            raise DarexError(
                f"{table.data}: {table.label!r} has {min(every)} to {max(every)}; classes must start at 0. "
                "Write scores with a decimal point: 3.0."
            )
        given = tuple(known or ())
        count = max(2, len(given), max(every) + 1)
        names = given if len(given) == count else tuple(f"LABEL_{i}" for i in range(count))
    kind: Any = "classification" if names else "regression"
    default = "accuracy" if names else "pearson_and_spearman"
    if table.metric is not None and (table.metric == "pearson_and_spearman") == bool(names):
        raise DarexError(f"{table.metric} is not a metric for {'classes' if names else 'scores'}.")
    dtype = np.int32 if names else np.float32
    examples = {
        name: _examples(table, parts, np.asarray(values[name], dtype)) for name, parts in splits.items()
    }
    return Task(
        name=table.name, kind=kind, label_names=names, metric_name=table.metric or default, **examples
    )


def read_texts(table: Table, split: str) -> Examples:
    """The texts of a split, without labels (zeros). Raises: as `read_task`."""
    parts = _read(table, (split,))[split]
    return _examples(table, parts, np.zeros(sum(len(part) for part in parts), np.int32))


def share_of_right(metric: str) -> str:
    """The metric of completions. Raises: DarexError for the loss, which falls where the others rise."""
    if metric == "loss":
        raise DarexError("pass --metric exact_match or token_accuracy of completions here, not loss.")
    return metric


def read_completions(
    table: Table, needs: Collection[str]
) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Prompts and completions of the splits of `needs`. Raises: as `read_task`."""
    if table.prompt is None or table.completion is None:
        raise DarexError("a decoder is trained and scored on completions: pass --prompt and --completion.")
    splits, found = _read(table, needs), {}
    for name in needs:
        prompts, completions = (
            tuple(text for part in splits[name] for text in part.texts(column))
            for column in (table.prompt, table.completion)
        )
        found[name] = prompts, completions
    return found


@dataclass(frozen=True)
class _Rows:
    """Some rows of one file, or of one split on the hub."""

    split: Split
    rows: NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, column: str) -> list[str]:
        every = self.split.texts(column)
        return [every[i] for i in self.rows]


def _examples(table: Table, parts: Sequence[_Rows], labels: NDArray[Any]) -> Examples:
    if table.text is None:
        raise DarexError("an encoder needs texts: pass their column (--text).")
    texts = tuple(text for part in parts for text in part.texts(table.text))
    pairs = None
    if table.pair is not None:
        pairs = tuple(text for part in parts for text in part.texts(table.pair))
    return Examples(texts, pairs, labels)


def _labels(part: _Rows, column: str) -> list[Any]:
    """Strings, integers (or booleans) or floats, all of one kind."""
    feature = part.split.rows.features[column]
    values = list(part.split.rows[column])
    names = getattr(feature, "names", None)  # a class label of `datasets`
    if names:
        values = [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values]
    kind: Any = str if names or isinstance(values[0], str) else int | float
    expected = "a string like those before it" if kind is str else "a finite number like those before it"
    for row, value in enumerate(values):
        if not isinstance(value, kind) or (kind is not str and not abs(value) <= LARGEST_SCORE):
            raise DarexError(f"{part.split.place(row)}: {column!r} is {shown(value)}, expected {expected}.")
    if kind is not str and any(isinstance(value, float) for value in values):
        values = [float(value) for value in values]
    elif kind is not str:
        values = [int(value) for value in values]
    return [values[i] for i in part.rows]


def _numbered(
    table: Table, every: Sequence[str], stated: tuple[str, ...], known: Sequence[str] | None, fixed: bool
) -> tuple[str, ...]:
    """The class names, in order, of labels that are strings. Args: as of `read_task`; stated: by the data."""
    if known and set(every) <= set(known):
        return tuple(known)
    if known is None or not fixed:
        return stated or tuple(sorted(set(every)))
    if not is_unnamed(known):
        strange = next(value for value in every if value not in known)
        raise DarexError(
            f"{table.data}: {table.label!r} has {shown(strange)}, the model's classes are {', '.join(known)}."
        )
    if stated:
        return stated
    raise DarexError(
        f"{table.data}: {table.label!r} has {shown(every[0])}, but the model's classes have no names to tell "
        "which is which: name them in its config.json (id2label), or give labels as integers."
    )


def _stated(splits: Mapping[str, Sequence[_Rows]], column: str) -> tuple[str, ...]:
    """The class names of a column that the data set itself numbers."""
    part = next(part for parts in splits.values() for part in parts)
    return tuple(getattr(part.split.rows.features[column], "names", None) or ())


def is_unnamed(names: Sequence[str]) -> bool:
    """Whether these are no class names, or those that transformers makes up."""
    return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def _read(table: Table, needs: Collection[str]) -> dict[str, list[_Rows]]:
    """The rows of all three splits, at least those of `needs`."""
    found = _open(table)
    whole = {name: [_Rows(s, np.arange(len(s.rows))) for s in found.get(name, ())] for name in SPLITS}
    if not whole["train"]:
        whole["test"] = whole["test"] or whole["validation"]
        if missing := [name for name in SPLITS if name in needs and not whole[name]]:
            raise DarexError(
                f"{table.data} has {' and '.join(found)} rows only, {missing[0]} rows are needed: what tests "
                "a model never makes it. Add a file train..., or pass one without such a name to split."
            )
        return whole
    missing = [name for name in ("validation", "test") if not whole[name]]
    train = whole["train"]
    order = np.random.RandomState(0).permutation(sum(map(len, train)))
    tenth = len(order) // TENTH
    if missing and not tenth:
        raise DarexError(
            f"{table.data} has {len(order)} training rows; at least ten are needed to hold out rows for "
            f"{' and '.join(missing)}."
        )
    for i, name in enumerate(missing):
        whole[name] = _select(train, np.sort(order[i * tenth : (i + 1) * tenth]))
    whole["train"] = _select(train, np.sort(order[len(missing) * tenth :]))
    return whole


def _select(parts: Sequence[_Rows], rows: NDArray[Any]) -> list[_Rows]:
    """Selects rows by ascending indices over all parts."""
    chosen, start = [], 0
    for part in parts:
        own = rows[(rows >= start) & (rows < start + len(part))] - start
        start += len(part)
        if len(own):
            chosen.append(_Rows(part.split, part.rows[own]))
    return chosen


def _open(table: Table) -> dict[str, list[Split]]:
    path = Path(table.data)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in FORMATS]
        if not files:
            raise FileNotFoundError(f"{path} has no file of {', '.join(FORMATS)}.")
        named = {file: _split_of(file.stem) for file in files}
        if None in named.values() and set(named.values()) != {None}:
            stray = next(file for file, split in named.items() if split is None)
            raise DarexError(
                f"{stray}: belongs to no split; all names begin with train, validation or test, or none does."
            )
        found: dict[str, list[Split]] = {}
        for file, split in named.items():
            found.setdefault(split or "train", []).append(_read_file(file, table.columns))
        return found
    if path.exists() or path.suffix.lower() in FORMATS:
        return {_split_of(path.stem) or "train": [_read_file(path, table.columns)]}
    return _from_hub(table)


def _split_of(name: str) -> str | None:
    for split, words in SPLITS.items():
        if re.match(rf"({words})(set|data|split)?(?![a-z])", name.lower()):
            return split
    return None


def _read_file(file: Path, columns: Sequence[str]) -> Split:
    import datasets

    if file.suffix.lower() not in FORMATS:
        raise DarexError(f"{file}: unknown suffix; supported are {', '.join(FORMATS)}.")
    if not file.exists():
        raise FileNotFoundError(f"{file}: does not exist.")
    check_file(file)
    reader, options = FORMATS[file.suffix.lower()]
    try:
        files = [glob.escape(os.fspath(file))]
        rows = datasets.load_dataset(reader, data_files=files, split="train", **options)
    except Exception as error:  # damaged files cause many kinds of parser errors
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise DarexError(f"{file}: cannot be read as {reader}: {first_line(cause)}") from error
    return _checked(rows, f"'{file}'", columns)


def _from_hub(table: Table) -> dict[str, list[Split]]:
    import datasets

    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(table.data)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"{table.data}: is not a local file or folder, and cannot be loaded from the Hugging Face hub "
            f"({type(error).__name__})."
        ) from error
    found: dict[str, list[Split]] = {}
    for name, rows in loaded.items():
        split = _split_of(name)
        if split is not None:
            found.setdefault(split, []).append(_checked(rows, f"{name!r} of '{table.data}'", table.columns))
    if not found:
        raise DarexError(f"{table.data}: has the splits {', '.join(loaded)}; none is train or test.")
    return found


def _checked(rows: Any, name: str, columns: Sequence[str]) -> Split:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise DarexError(f"{name} lacks the column {missing[0]!r}; it has {', '.join(rows.column_names)}.")
    if not len(rows):
        raise DarexError(f"{name} has no rows.")
    return Split(rows, (), name)

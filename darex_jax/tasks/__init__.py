"""Tasks: labelled texts in three splits, and their metric."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darex_jax.core.errors import DarexError
from darex_jax.tasks.metrics import METRICS

GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb")
TASKS = ("opinions", *GLUE_TASKS)


@dataclass(frozen=True)
class Examples:
    """The columns of one split.

    Attributes:
      texts: the sentences.
      pairs: the second sentences, or None for a task of single sentences.
      labels: [N]; int32 class indices, or float32 scores for regression.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.texts)

    def digest(self) -> str:
        """SHA-256 of the texts and labels, in order."""
        digest = hashlib.sha256()
        for column in (self.texts, self.pairs or ()):
            for text in column:
                digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()

    def select(self, rows: Sequence[int] | NDArray[Any] | slice) -> Examples:
        """The given rows, in the given order; `slice(n)` is the first n."""
        chosen = np.arange(len(self))[rows]
        pairs = None if self.pairs is None else tuple(self.pairs[i] for i in chosen)
        return Examples(tuple(self.texts[i] for i in chosen), pairs, self.labels[chosen])


@dataclass(frozen=True)
class Task:
    """A task: `train` is for training, `validation` for choosing q, `test` for reported results.

    Attributes:
      label_names: one name per class; empty for regression.
      metric_name: one of `darex_jax.tasks.metrics.METRICS`; larger is better.
    """

    name: str
    kind: Literal["classification", "regression"]
    label_names: tuple[str, ...]
    metric_name: str
    train: Examples
    validation: Examples
    test: Examples

    @property
    def num_labels(self) -> int:
        """Width of the model's output: the number of classes, 1 for regression."""
        return len(self.label_names) or 1

    def metric(self, logits: ArrayLike, labels: ArrayLike) -> float:
        """The task's headline metric of `logits` [N, num_labels] against `labels` [N].

        Raises: ValueError if the number of logits differs, or they are not finite.
        """
        if np.shape(logits)[-1] != self.num_labels:
            raise DarexError(
                f"{self.name!r} has {self.num_labels} outputs, this model has {np.shape(logits)[-1]}: "
                "it was fine-tuned for another task."
            )
        return METRICS[self.metric_name](logits, labels)


def hold_out_tenth(count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Splits the row indices of a training split: those to train on, and a held-out tenth for choosing q.

    Source: the protocol of DAREx (arXiv:2410.09344), the first tenth of `RandomState(0).permutation`.
    """
    order, tenth = np.random.RandomState(0).permutation(count), count // 10
    return order[tenth:], order[:tenth]


def load_task(name: str, data_dir: str | os.PathLike[str] | None = None, seed: int = 0) -> Task:
    """Loads one of `TASKS`.

    Args:
      name: "opinions" (generated, needs no data) or a GLUE task: "cola", "sst2", "mrpc", "stsb".
      data_dir: for GLUE, a folder with the task's parquet files, or one with a folder per task; None
        downloads from the Hugging Face hub.
      seed: of the generated task; ignored for GLUE, whose splits are fixed by the protocol.
    Raises: ValueError for an unknown name or unexpected columns; FileNotFoundError if there is no data.
    """
    if name == "opinions":
        from darex_jax.tasks.opinions import opinions

        return opinions(seed)
    if name in GLUE_TASKS:
        from darex_jax.tasks.glue import load_glue

        return load_glue(name, data_dir)
    raise DarexError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}.")

"""Four GLUE tasks under the protocol of DAREx (arXiv:2410.09344)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from darex_jax.tasks import Examples, Task, hold_out_tenth
from darex_jax.tasks.parquet import find_parquet, read_split

HUB_NAME = "nyu-mll/glue"
_SENTENCE, _PAIR = ("sentence",), ("sentence1", "sentence2")
_LAYOUT: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {  # text columns, label names, metric
    "cola": (_SENTENCE, ("unacceptable", "acceptable"), "matthews"),
    "sst2": (_SENTENCE, ("negative", "positive"), "accuracy"),
    "mrpc": (_PAIR, ("not_equivalent", "equivalent"), "accuracy_and_f1"),
    "stsb": (_PAIR, (), "pearson_and_spearman"),
}


def load_glue(name: str, data_dir: str | os.PathLike[str] | None = None) -> Task:
    """Loads a GLUE task from a folder of parquet files, or from the hub when `data_dir` is None.

    The first tenth of `np.random.RandomState(0).permutation` of the official train split is the validation
    set for choosing q, the rest is for training; the official validation split is the test set.

    Args:
      name: "cola", "sst2", "mrpc" or "stsb".
      data_dir: folder of `train*.parquet` and `validation*.parquet`, or one that contains such a folder
        `name`.
    Raises: FileNotFoundError if there is no data; ValueError for files with another layout.
    """
    columns, label_names, metric_name = _LAYOUT[name]
    files = None if data_dir is None else find_parquet(name, data_dir, ("train", "validation"))
    train, test = (_read(name, split, columns, label_names, files) for split in ("train", "validation"))
    rows, held_out = hold_out_tenth(len(train))
    return Task(
        name=name,
        kind="classification" if label_names else "regression",
        label_names=label_names,
        metric_name=metric_name,
        train=train.select(rows),
        validation=train.select(held_out),
        test=test,
    )


def _read(
    name: str,
    split: str,
    columns: Sequence[str],
    label_names: Sequence[str],
    files: Mapping[str, Sequence[str]] | None,
) -> Examples:
    of_split = None if files is None else files[split]
    read = read_split(
        name, split, (*columns, "label"), files=of_split, hub=(HUB_NAME, name), generated="opinions"
    )
    labels = read.classes("label", len(label_names)) if label_names else read.scores("label")
    texts, *pairs = map(read.texts, columns)
    return Examples(texts, pairs[0] if pairs else None, labels)

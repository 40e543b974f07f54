"""Four GLUE tasks under the protocol of DAREx (arXiv:2410.09344)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from darex_jax.tasks import Examples, Task

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
    set that a search for q may see, the rest trains; the official validation split is the test set.

    Args:
      name: "cola", "sst2", "mrpc" or "stsb".
      data_dir: folder of `train*.parquet` and `validation*.parquet`, or one that holds such a folder `name`.
    Raises: FileNotFoundError where there is no data; ValueError for files of another layout.
    """
    columns, label_names, metric_name = _LAYOUT[name]
    files = None if data_dir is None else _parquet_files(name, Path(data_dir))
    train, test = (_read(name, split, columns, label_names, files) for split in ("train", "validation"))
    order = np.random.RandomState(0).permutation(len(train))
    held_out = len(train) // 10
    return Task(
        name=name,
        kind="classification" if label_names else "regression",
        label_names=label_names,
        metric_name=metric_name,
        train=train.select(order[held_out:]),
        validation=train.select(order[:held_out]),
        test=test,
    )


def _parquet_files(name: str, data_dir: Path) -> dict[str, list[str]]:
    for folder in (data_dir / name, data_dir):
        files = {s: sorted(map(str, folder.glob(f"{s}*.parquet"))) for s in ("train", "validation")}
        if all(files.values()):
            return files
    raise FileNotFoundError(
        f"train*.parquet and validation*.parquet of {name!r} are not in '{data_dir / name}' or '{data_dir}'."
    )


def _read(
    name: str,
    split: str,
    columns: Sequence[str],
    label_names: Sequence[str],
    files: dict[str, list[str]] | None,
) -> Examples:
    import datasets

    source = HUB_NAME if files is None else files[split][0]
    try:
        if files is None:
            rows = datasets.load_dataset(HUB_NAME, name, split=split)
        else:
            rows = datasets.load_dataset("parquet", data_files={split: files[split]}, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if files is not None:
            raise ValueError(f"'{source}' cannot be read as parquet: {error}") from error
        raise FileNotFoundError(
            f"the Hugging Face hub did not give {HUB_NAME!r} ({type(error).__name__}). Name a folder with "
            f"the parquet files of {name!r} (data_dir, --data-dir), or take 'opinions', which needs no data."
        ) from error
    missing = [c for c in (*columns, "label") if c not in rows.column_names]
    if missing:
        raise ValueError(
            f"'{source}' lacks the column {missing[0]!r} of {name!r}; it has {rows.column_names}."
        )
    labels = np.asarray(rows["label"], dtype=np.int32 if label_names else np.float32)
    if label_names and not np.isin(labels, range(len(label_names))).all():
        raise ValueError(f"'{source}' has labels other than 0 to {len(label_names) - 1} in {split!r}.")
    texts, *pairs = (tuple(rows[c]) for c in columns)
    return Examples(texts, pairs[0] if pairs else None, labels)

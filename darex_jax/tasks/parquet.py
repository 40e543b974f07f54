"""A split of a data set, from a folder of parquet files or from the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from darex_jax.core.errors import DarexError
from darex_jax.files.paths import check_file


def find_parquet(
    name: str, data_dir: str | os.PathLike[str], splits: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The files `{split}*.parquet` of each split, in `data_dir/name` or in `data_dir` itself.

    Raises: FileNotFoundError unless one of the two folders has files of every split; FileError for a pipe or
      a device among them.
    """
    data_dir = Path(data_dir)
    for folder in (data_dir / name, data_dir):
        files = {split: tuple(sorted(map(str, folder.glob(f"{split}*.parquet")))) for split in splits}
        if all(files.values()):
            for file in chain.from_iterable(files.values()):
                check_file(file)
            return files
    wanted = " and ".join(f"{split}*.parquet" for split in splits)
    raise FileNotFoundError(f"{wanted} of {name!r} are not in '{data_dir / name}' or '{data_dir}'.")


def read_split(
    name: str,
    split: str,
    columns: Sequence[str],
    *,
    files: Sequence[str] | None,
    hub: tuple[str, str],
    generated: str,
) -> Any:
    """One split as a `datasets.Dataset`.

    Args:
      name: of the task, for messages.
      columns: what the split has to have.
      files: its parquet files, from `find_parquet`; None asks the hub.
      hub: repository and configuration there.
      generated: the task that needs no data, offered where the hub is out of reach.
    Raises: FileNotFoundError if the hub does not give it; ValueError for no parquet or a missing column.
    """
    import datasets

    source = hub[0] if files is None else files[0]
    try:
        if files is None:
            rows = datasets.load_dataset(*hub, split=split)
        else:
            rows = datasets.load_dataset("parquet", data_files={split: list(files)}, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if files is not None:
            raise DarexError(f"'{source}' cannot be read as parquet: {error}") from error
        raise FileNotFoundError(
            f"the Hugging Face hub did not give {source!r} ({type(error).__name__}). Name a folder with "
            f"the parquet files of {name!r} (data_dir, --data-dir), or take {generated!r}, which needs "
            "no data."
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise DarexError(
            f"'{source}' lacks the column {missing[0]!r} of {name!r}; it has {rows.column_names}."
        )
    return rows

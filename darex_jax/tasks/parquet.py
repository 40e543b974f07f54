"""A split of a data set, from a folder of parquet files or from the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darex_jax.core.errors import DarexError
from darex_jax.models.config import shown


def find_parquet(
    name: str, data_dir: str | os.PathLike[str], splits: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The files `{split}*.parquet` of each split, in `data_dir/name` or in `data_dir` itself.

    Raises: FileNotFoundError unless one of the two folders has files of every split.
    """
    data_dir = Path(data_dir)
    for folder in (data_dir / name, data_dir):
        files = {split: tuple(sorted(map(str, folder.glob(f"{split}*.parquet")))) for split in splits}
        if all(files.values()):
            return files
    wanted = " and ".join(f"{split}*.parquet" for split in splits)
    raise FileNotFoundError(f"{wanted} of {name!r} are not in '{data_dir / name}' or '{data_dir}'.")


@dataclass(frozen=True)
class Split:
    """One split: a `datasets.Dataset`, and how its rows are called in messages.

    Attributes:
      files: its parquet files; none where the hub gave it.
      name: of the split and where it comes from.
    """

    rows: Any
    files: tuple[str, ...]
    name: str

    def texts(self, column: str) -> tuple[str, ...]:
        """Raises: ValueError that names file, column and row of the first value that is no text."""
        values = list(self.rows[column])
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise DarexError(f"{self.place(row)}: {column} is {shown(value)}, expected a text.")
        return tuple(values)

    def classes(self, column: str, count: int) -> NDArray:
        """Labels from 0 to `count - 1`, int32. Raises: as `texts`."""
        values = list(self.rows[column])
        for row, value in enumerate(values):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
                raise DarexError(
                    f"{self.place(row)}: {column} is {shown(value)}, expected an integer from 0 to {count - 1}."
                )
        return np.asarray(values, np.int32)

    def scores(self, column: str) -> NDArray:
        """Labels that are numbers, float32. Raises: as `texts`."""
        values = list(self.rows[column])
        for row, value in enumerate(values):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not abs(value) <= np.finfo(np.float32).max:
                raise DarexError(f"{self.place(row)}: {column} is {shown(value)}, expected a finite number.")
        return np.asarray(values, np.float32)

    def place(self, row: int) -> str:
        """A row's file, and its number in that file, counted from 0."""
        from pyarrow.parquet import read_metadata

        for file in self.files:
            count = read_metadata(file).num_rows
            if row < count:
                return f"'{file}', row {row} (counted from 0)"
            row -= count
        return f"{self.name}, row {row} (counted from 0)"


def read_split(
    name: str,
    split: str,
    columns: Sequence[str],
    *,
    files: Sequence[str] | None,
    hub: tuple[str, str],
    generated: str,
) -> Split:
    """One split, with all the columns that it has to have.

    Args:
      name: of the task, for messages.
      columns: what the split has to have.
      files: its parquet files, from `find_parquet`; None asks the hub.
      hub: repository and configuration there.
      generated: the task that needs no data, offered where the hub is out of reach.
    Raises: FileNotFoundError if the hub does not give it; ValueError for no parquet, no row or a missing
      column.
    """
    import datasets

    source = hub[0] if files is None else files[0]
    try:
        if files is None:
            rows = datasets.load_dataset(*hub, split=split)
        else:
            rows = datasets.load_dataset("parquet", data_files={split: list(files)}, split=split)
    except Exception as error:  # what a damaged file meets in pyarrow and datasets is of many kinds
        if files is not None:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise DarexError(f"'{source}' cannot be read as parquet: {why:.200}") from error
        if not isinstance(error, (OSError, ValueError, datasets.exceptions.DatasetsError)):
            raise
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
    if not len(rows):
        raise DarexError(f"'{source}' has no rows.")
    return Split(rows, tuple(files or ()), f"{split!r} of '{source}'")

"""Loads a data set's splits from a folder of parquet files or from the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darex_jax.core.errors import DarexError, first_line
from darex_jax.files.paths import check_file
from darex_jax.models.config import shown


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


@dataclass(frozen=True)
class Split:
    """One split: a `datasets.Dataset`, and the names of its rows in messages.

    Attributes:
      files: its parquet files; empty if it is from the hub.
      name: of the split and its source.
    """

    rows: Any
    files: tuple[str, ...]
    name: str

    def texts(self, column: str) -> tuple[str, ...]:
        """Raises: ValueError that names file, column and row of the first value that is not a string."""
        return tuple(self._column(column, lambda value: isinstance(value, str), "a string"))

    def classes(self, column: str, count: int) -> NDArray[Any]:
        """Labels from 0 to `count - 1`, int32. Raises: as `texts`."""

        def fits(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count

        return np.asarray(self._column(column, fits, f"an integer from 0 to {count - 1}"), np.int32)

    def scores(self, column: str) -> NDArray[Any]:
        """Labels that are numbers, float32. Raises: as `texts`."""

        def fits(value: Any) -> bool:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return number and abs(value) <= float(np.finfo(np.float32).max)

        return np.asarray(self._column(column, fits, "a finite number"), np.float32)

    def _column(self, column: str, fits: Callable[[Any], bool], expected: str) -> list[Any]:
        values = list(self.rows[column])
        wrong = next((row for row, value in enumerate(values) if not fits(value)), None)
        if wrong is not None:
            raise DarexError(
                f"{self.place(wrong)}: {column!r} is {shown(values[wrong])}, expected {expected}."
            )
        return values

    def place(self, row: int) -> str:
        """A row's file, and its index in that file, counted from 0."""
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
    """Loads one split and checks its columns.

    Args:
      name: of the task, for messages.
      columns: the required columns.
      files: its parquet files, from `find_parquet`; None downloads from the hub.
      hub: its repository and configuration there.
      generated: a task that needs no data, suggested if the hub is unreachable.
    Raises: FileNotFoundError if it cannot be downloaded; ValueError for invalid parquet, no rows or a missing
      column.
    """
    import datasets
    from pyarrow.parquet import read_metadata

    source = hub[0] if files is None else files[0]
    try:
        if files is None:
            rows = datasets.load_dataset(*hub, split=split)
        elif any(read_metadata(file).num_rows for file in files):
            rows = datasets.load_dataset("parquet", data_files={split: list(files)}, split=split)
        else:
            raise DarexError(f"'{source}' has no rows.")
    except DarexError:
        raise
    except Exception as error:  # damaged files cause many kinds of errors in pyarrow and datasets
        if files is not None:
            raise DarexError(f"'{source}' cannot be read as parquet: {first_line(error)}") from error
        if not isinstance(error, (OSError, ValueError, datasets.exceptions.DatasetsError)):
            raise
        raise FileNotFoundError(
            f"{source!r} cannot be loaded from the Hugging Face hub ({type(error).__name__}). Pass a folder "
            f"with the parquet files of {name!r} (data_dir, --data-dir), or use {generated!r}, which needs "
            "no data."
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise DarexError(
            f"'{source}' lacks the column {missing[0]!r} of {name!r}; it has {rows.column_names}."
        )
    return Split(rows, tuple(files or ()), f"{split!r} of '{source}'")

"""Texts in files: a user's, one per line, and a model's own, as JSON lines."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable

from darex_jax.core.errors import DarexError
from darex_jax.files.atomic import write_whole
from darex_jax.files.paths import read_text


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The non-blank lines of a UTF-8 file, without a byte order mark.

    Raises: FileError for a file that cannot be read or is not UTF-8, naming the line; ValueError if it has no
      text.
    """
    lines = re.split(r"\r\n|\n|\r", read_text(path).removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}"))
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise DarexError(f"{path}: has no line of text.")
    return texts


def write_texts(path: str | os.PathLike[str], texts: Iterable[str]) -> None:
    """Writes JSON lines with one column, `text`, atomically: they may contain line breaks."""
    write_whole(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))

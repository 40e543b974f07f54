"""What may lie under a path that a person names: regular files and directories.

A pipe would be waited for, a device read without end or replaced by a file: these are refused.
"""

import os
import stat
from pathlib import Path

from darex_jax.core.errors import FileError

AnyPath = str | os.PathLike[str]

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: AnyPath) -> int:
    """A descriptor of a regular file, to read from.

    Raises: FileError if there is none, or something else.
    """
    check_file(path)
    # What is opened may be another thing by now: no waiting for a pipe's writer, and a second look.
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}.") from error
    try:
        _check_mode(path, os.fstat(file).st_mode)
    except BaseException:
        os.close(file)
        raise
    return file


def check_file(path: AnyPath) -> None:
    """For a file that another library is going to open. Raises: what `open_file` raises."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise FileError(f"{path}: {getattr(error, 'strerror', None) or error}.") from error
    _check_mode(path, mode)


def check_entries(folder: AnyPath) -> None:
    """For a folder that another library is going to read from.

    Raises: FileError if there is something in it that is neither a regular file nor a directory.
    """
    for entry in sorted(Path(folder).iterdir()):
        if entry.exists() and not entry.is_dir():
            check_file(entry)


def check_output(path: AnyPath) -> None:
    """Raises: FileError if there is something under `path` that a file must not replace."""
    if os.path.exists(path):
        check_file(path)


def _check_mode(path: AnyPath, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise FileError(f"{path}: is {kind}; a regular file is needed.")


def read_bytes(path: AnyPath) -> bytes:
    """A regular file's content. Raises: FileError if it cannot be read."""
    with open(open_file(path), "rb") as file:
        try:
            return file.read()
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}.") from error


def read_text(path: AnyPath) -> str:
    """The same as text. Raises: FileError also if it is not UTF-8, saying in which line."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileError(f"{path}: line {line} is not UTF-8 text; convert the file.") from error

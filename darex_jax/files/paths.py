"""Checks of user-supplied paths: only regular files and directories are accepted.

A pipe could block, a device could be endless or be replaced by a file: these are refused.
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
    """Opens a regular file for reading; returns its descriptor.

    Raises: FileError if it does not exist or is not a regular file.
    """
    check_file(path)
    # The path may have changed since: open without blocking on a pipe, and check again.
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
    """Checks a file that another library will open. Raises: as `open_file`."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise FileError(f"{path}: {getattr(error, 'strerror', None) or error}.") from error
    _check_mode(path, mode)


def check_entries(folder: AnyPath) -> None:
    """Checks a folder that another library will read from.

    Raises: FileError if it contains anything but regular files and directories.
    """
    for entry in sorted(Path(folder).iterdir()):
        if entry.exists() and not entry.is_dir():
            check_file(entry)


def check_output(path: AnyPath) -> None:
    """Raises: FileError if `path` exists and is not a regular file, so that it must not be replaced."""
    if os.path.exists(path):
        check_file(path)


def _check_mode(path: AnyPath, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise FileError(f"{path}: is {kind}; a regular file is needed.")


def read_bytes(path: AnyPath) -> bytes:
    """The content of a regular file. Raises: FileError if it cannot be read."""
    with open(open_file(path), "rb") as file:
        try:
            return file.read()
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}.") from error


def read_text(path: AnyPath) -> str:
    """The content as text. Raises: FileError if it cannot be read, or is not UTF-8 (with the line)."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileError(f"{path}: line {line} is not UTF-8 text; convert the file.") from error

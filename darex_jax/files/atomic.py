"""Atomic writing of files and directories: complete or not at all, even if the process is killed.

Unfinished output has a hidden name, `.NAME.RANDOM.partial`, and a lock held by its writer, which the system
releases however the writer ends. The next writer of NAME removes unlocked leftovers. Process ids would not
identify the writer: two containers that share a volume may have the same ones.
"""

import ctypes
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from darex_jax.core.errors import FileError
from darex_jax.files.paths import AnyPath, check_output

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h


@contextmanager
def atomic_file(path: AnyPath) -> Iterator[int]:
    """A file descriptor to write to; the file is moved to `path` when complete.

    Raises: FileError if `path` is a directory, a device or a pipe.
    """
    path = Path(path)
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(path)
    with _temporary(path, _new_file) as (temporary, file):
        yield file
        os.fsync(file)
        os.replace(temporary, path)


def write_whole(path: AnyPath, content: str | bytes) -> None:
    """Writes a small file atomically, text as UTF-8."""
    with atomic_file(path) as file, open(file, "wb", closefd=False) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_directory(path: AnyPath, overwrite: bool = False) -> Iterator[Path]:
    """A new directory to fill; it is moved to `path` when complete.

    When replacing, old and new are exchanged in one step, so that `path` always exists. If the system cannot
    do that, a process killed in between leaves the old one under a hidden name, and the next writer of `path`
    restores it.

    Raises: FileError if `path` exists and `overwrite` is not set, or if it is not a model directory (one that
      contains other folders, for example), which is never deleted.
    """
    path = Path(path).resolve()
    check_replaceable(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path, _new_directory) as (folder, _):
        yield folder
        check_replaceable(path, overwrite)  # it may have been created meanwhile
        if path.exists() and any(path.iterdir()):
            _exchange(folder, path)
        else:
            os.replace(folder, path)


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Checks that `atomic_directory` would write to a path; raises what it would raise.

    A directory that a killed process left under a hidden name is restored first.
    """
    _clean_up(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not overwrite:
            raise FileError(f"{path}: already exists; choose another path, or pass --overwrite.")
        if not _is_model_directory(path):
            raise FileError(f"{path}: is not a model directory and is not replaced; choose another path.")


def _is_model_directory(path: Path) -> bool:
    entries = list(path.iterdir()) if path.is_dir() else []
    folders = {entry.name for entry in entries if not entry.is_file()}
    return is_model({entry.name for entry in entries} - folders, folders)


def is_model(files: set[str], folders: set[str]) -> bool:
    """Whether a directory with these entries is a model directory, which may be replaced: safetensors or
    config.json and only files, or an orbax checkpoint."""
    weights = any(name.endswith(".safetensors") or name == "config.json" for name in files)
    return "_METADATA" in files or (weights and not folders)


@contextmanager
def only_one(lock: Path, message: str) -> Iterator[None]:
    """Holds a lock on the file `lock` while the block runs; the file is created if missing and never removed.

    Raises: FileError with the message if another process holds it.
    """
    check_output(lock)
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
    try:
        if not _lock(file, where_there_are_none=True):
            raise FileError(message)
        yield
    finally:
        os.close(file)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)  # never follows a link


def _new_directory(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


@contextmanager
def _temporary(path: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """Creates and locks a hidden file or folder beside `path`, removed at exit. Yields name and descriptor.

    Args: make: creates and opens it; FileExistsError if it exists.
    """
    while True:
        temporary = _hidden_name(path, "partial")
        try:
            file = make(temporary)
        except FileExistsError:
            continue
        try:
            # Another process may have removed it between the two lines above.
            if _lock(file, where_there_are_none=True) and _names(temporary, file):
                yield temporary, file
                return
        except OSError as error:  # a failed write to a descriptor (disk full) names no file
            error.filename = error.filename or str(path)
            raise
        finally:
            _remove(temporary)
            os.close(file)


def _hidden_name(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{ending}")


def _exchange(new: Path, old: Path) -> None:
    """Exchanges the names of two directories."""
    if _exchange_at_once(new, old):
        return
    aside = _hidden_name(old, "replaced")
    lock = os.open(old, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(lock, where_there_are_none=True)
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except BaseException:
            os.rename(aside, old)
            raise
        os.rename(aside, new)
    finally:
        os.close(lock)


def _exchange_at_once(new: Path, old: Path) -> bool:
    """Exchanges atomically; False if the system or file system does not support it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(new), os.fsencode(old)
    return bool(renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def _clean_up(path: Path) -> None:
    """Cleans up after killed processes: restores a directory that was set aside, removes leftovers."""
    hidden = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.(partial|replaced)")
    if not path.parent.is_dir():
        return
    for stray in [entry for entry in path.parent.iterdir() if hidden.fullmatch(entry.name)]:
        try:
            file = os.open(stray, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:  # it is gone, or a link, which no writer creates
            continue
        try:
            if not (_lock(file, where_there_are_none=False) and _names(stray, file)):
                continue
            if stray.suffix == ".replaced" and not path.exists():
                os.rename(stray, path)
            else:
                _remove(stray)
        finally:
            os.close(file)


def _lock(file: int, where_there_are_none: bool) -> bool:
    """Locks an open file until it is closed; False if another process holds the lock.

    Args: where_there_are_none: the result on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return where_there_are_none
    return True


def _names(path: Path, file: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

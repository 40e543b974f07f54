"""Other stores: what an fsspec URL (`gs://`, `s3://`, ...) names is copied here to be read, and sent there
once it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from darex_jax.core.errors import DarexError, FileError

LAST = ("config.json", "_METADATA")  # a directory without them is no model: they are sent last
Progress = Callable[[int], None]


def is_url(path: str) -> bool:
    return "://" in path


def fetch(url: str, folder: Path, progress: Progress = lambda _: None) -> Path:
    """Copies a file, or a directory with all that is in it, into `folder`, under its own name.

    Raises: FileError where there is nothing or it cannot be read; DarexError for a store that no installed
      package knows.
    """
    store, place = _open(url)
    name = PurePosixPath(place).name
    try:
        if not store.exists(place):
            raise FileError(f"{url}: there is nothing.")
        if not store.isdir(place):
            store.get_file(place, str(folder / name))
            progress((folder / name).stat().st_size)
            return folder / name
        for found in store.find(place):
            relative = PurePosixPath(found).relative_to(place)
            if ".." in relative.parts:
                raise FileError(f"{url}: holds a file called {str(relative)!r}.")
            target = folder / name / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(found, str(target))
            progress(target.stat().st_size)
    except FileError:
        raise
    except Exception as error:  # every store has its own
        raise FileError(f"{url}: cannot be read ({_line(error)}).") from error
    return folder / name


def send(local: Path, url: str, *, overwrite: bool = True, progress: Progress = lambda _: None) -> None:
    """Copies a file or a directory to where a URL says.

    A file takes the place of an older one at once where the store puts whole objects (gs, s3) and by renaming
    elsewhere. A directory of an object store has no such moment: what made it a model, config.json, is taken
    away first and sent last, so that one that was left half sent is not taken for whole.

    Raises: FileError if something is there and may not be replaced, or it cannot be written.
    """
    store, place = _open(url)
    try:
        if not overwrite and store.exists(place):
            raise FileError(f"{url}: already exists; --overwrite replaces it.")
        if local.is_file():
            _put(store, local, place)
            progress(local.stat().st_size)
            return
        files = sorted(p for p in local.rglob("*") if p.is_file())
        files.sort(key=lambda p: p.name in LAST)
        before = set(store.find(place)) if store.exists(place) else set()
        for name in LAST:
            if f"{place}/{name}" in before:
                store.rm_file(f"{place}/{name}")
        sent = set()
        for file in files:
            target = f"{place}/{file.relative_to(local).as_posix()}"
            _put(store, file, target)
            sent.add(target)
            progress(file.stat().st_size)
        for old in before - sent:
            if store.exists(old):
                store.rm_file(old)
    except FileError:
        raise
    except Exception as error:  # every store has its own
        raise FileError(f"{url}: cannot be written ({_line(error)}).") from error


def _put(store: Any, local: Path, place: str) -> None:
    store.makedirs(store._parent(place), exist_ok=True)
    if {"file", "local"} & set(_protocols(store)):
        store.put_file(str(local), f"{place}.part")
        store.mv(f"{place}.part", place)
    else:
        store.put_file(str(local), place)


def _protocols(store: Any) -> tuple[str, ...]:
    return (store.protocol,) if isinstance(store.protocol, str) else tuple(store.protocol)


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        store, place = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DarexError(f"{url}: {error}") from error
    except ValueError as error:
        raise DarexError(f"{url}: no store is called so ({_line(error)}).") from error
    return store, str(place).rstrip("/")


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

"""Remote storage: copies from and to fsspec URLs (`gs://`, `s3://`, ...)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from darex_jax.core.errors import DarexError, FileError, first_line
from darex_jax.files.atomic import is_model

# Removed first and uploaded last: a directory without them is not a model.
LAST = ("config.json", "model.safetensors", "model.safetensors.index.json", "_METADATA")
# Stores that put whole objects: until one is complete, the older one is there.
WHOLE = frozenset({"abfs", "abfss", "adl", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a"})


def is_url(path: str) -> bool:
    return "://" in path


def fetch(url: str, folder: Path) -> Path:
    """Downloads a file or directory into `folder`, under its own name.

    Raises: FileError if it does not exist or cannot be read; DarexError for a protocol that no installed
      package supports.
    """
    store, place = _open(url)
    name = PurePosixPath(place).name or "root"
    try:
        if not store.exists(place):
            raise FileError(f"{url}: does not exist.")
        if not store.isdir(place):
            store.get_file(place, str(folder / name))
            return folder / name
        for found in store.find(place):
            relative = PurePosixPath(found).relative_to(place)
            if ".." in relative.parts:
                raise FileError(f"{url}: has a file named {str(relative)!r}, which is not a valid name here.")
            target = folder / name / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(found, str(target))
    except FileError:
        raise
    except Exception as error:  # every store has its own exceptions
        raise FileError(f"{url}: cannot be read ({first_line(error)}).") from error
    return folder / name


def check_target(url: str, read: Iterable[str], *, overwrite: bool | None) -> None:
    """Checks that a command may write there.

    Args: overwrite: whether it may replace what is there; None for a file only.
    Raises: FileError if it may not, or would replace an input or a directory that is not a model's.
    """
    store, place = _open(url)
    try:
        for other in read:
            store_of, source = _open(other)
            same = set(_protocols(store)) & set(_protocols(store_of))
            if same and (place == source or _inside(place, source) or _inside(source, place)):
                raise FileError(f"{url}: writing this would replace {other}; choose another path.")
        folder = store.isdir(place)
        before = [PurePosixPath(found).relative_to(place) for found in store.find(place)] if folder else []
        there = bool(before) or (not folder and overwrite is False and store.exists(place))
    except FileError:
        raise
    except Exception as error:  # every store has its own exceptions
        raise FileError(f"{url}: cannot be accessed ({first_line(error)}).") from error
    if there and not overwrite:
        raise FileError(f"{url}: already exists; choose another path, or pass --overwrite.")
    if before and not is_model({p.parts[0] for p in before if len(p.parts) == 1},
                               {p.parts[0] for p in before if len(p.parts) > 1}):  # fmt: skip
        raise FileError(f"{url}: is not a model directory and is not replaced; choose another path.")


def _inside(place: str, folder: str) -> bool:
    return place.startswith(f"{folder}/")


def send(local: Path, url: str) -> None:
    """Uploads a file or directory to a URL, replacing what is there: see `check_target`.

    A file is replaced atomically: object stores (`WHOLE`) put whole objects, elsewhere it is renamed. A
    directory cannot be replaced atomically: what makes it a model (`LAST`) is removed first and uploaded
    last, so that a partial upload is not mistaken for one.

    Raises: FileError if it cannot be written.
    """
    store, place = _open(url)
    try:
        if local.is_file():
            _put(store, local, place)
            return
        files = sorted(p for p in local.rglob("*") if p.is_file())
        files.sort(key=lambda p: p.name in LAST)
        before = set(store.find(place)) if store.isdir(place) else set()
        for name in LAST:
            if f"{place}/{name}" in before:
                store.rm_file(f"{place}/{name}")
        sent = set()
        for file in files:
            target = f"{place}/{file.relative_to(local).as_posix()}"
            _put(store, file, target)
            sent.add(target)
        for old in before - sent:
            if store.exists(old):
                store.rm_file(old)
    except Exception as error:  # every store has its own exceptions
        raise FileError(f"{url}: cannot be written ({first_line(error)}).") from error


def _put(store: Any, local: Path, place: str) -> None:
    store.makedirs(store._parent(place), exist_ok=True)
    if WHOLE & set(_protocols(store)):
        store.put_file(str(local), place)
    else:
        store.put_file(str(local), f"{place}.part")
        store.mv(f"{place}.part", place)


def _protocols(store: Any) -> tuple[str, ...]:
    return (store.protocol,) if isinstance(store.protocol, str) else tuple(store.protocol)


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        store, place = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DarexError(f"{url}: {error}") from error
    except ValueError as error:
        raise DarexError(f"{url}: unknown protocol ({first_line(error)}).") from error
    return store, str(place).rstrip("/")

"""Path arguments that may be fsspec URLs, downloaded before a command and uploaded after it."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import click

from darex_jax.core.errors import FileError

STORES = "darex_jax.stores"  # key in a context's meta: the URLs of a command line


class Stored(NamedTuple):
    """A URL of a command line; folder: its temporary folder; local: the local path that replaces the URL."""

    use: str
    url: str
    folder: Path
    local: Path


class StorePath(click.Path):
    """A local path, or an fsspec URL, which is replaced by a local path while the command runs.

    Args: use: "read"; "write"; or "here", for local paths that a command resumes from.
    """

    def __init__(self, use: str) -> None:
        super().__init__(path_type=Path)
        self.use = use

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        from darex_jax.files.remote import is_url

        if not is_url(str(value)) or ctx is None or ctx.resilient_parsing:
            return super().convert(value, param, ctx)
        url, mark, branch = str(value).partition("#")
        if self.use == "here":
            self.fail(f"{url}: must be a local path; copy it first.", param, ctx)
        folder = Path(tempfile.gettempdir()) / f"darex-{uuid.uuid4().hex}"
        stored = Stored(self.use, url, folder, folder / (PurePosixPath(url).name or "root"))
        ctx.meta.setdefault(STORES, []).append(stored)
        return Path(f"{stored.local}{mark}{branch}")


PATH, OUT, HERE = StorePath("read"), StorePath("write"), StorePath("here")


def with_stores(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a command so that its URLs are downloaded before, and outputs uploaded after it."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        with _staged(click.get_current_context()):
            return command(*args, **options)

    return run


@contextmanager
def _staged(ctx: click.Context) -> Iterator[None]:
    from darex_jax.files.remote import check_target, fetch, send

    stores: list[Stored] = ctx.meta.get(STORES, [])
    overwrite = ctx.params.get("overwrite")
    try:
        for out in (s for s in stores if s.use == "write"):
            check_target(out.url, [s.url for s in stores if s.use == "read"], overwrite=overwrite)
        for stored in stores:
            stored.folder.mkdir(mode=0o700)
            if stored.use == "read":
                fetch(stored.url, stored.folder)
        yield
        for out in (s for s in stores if s.use == "write" and os.path.lexists(s.local)):
            try:
                send(out.local, out.url)
            except FileError as error:
                stores.remove(out)
                raise FileError(f"{error} The output is kept in {out.local}.") from error
            click.echo(f"uploaded to {out.url}", err=True)
    finally:
        for stored in stores:
            shutil.rmtree(stored.folder, ignore_errors=True)


def as_given(text: str) -> str:
    """Replaces local paths in a text by the URLs of the command line."""
    ctx = click.get_current_context(silent=True)
    for stored in ctx.meta.get(STORES, []) if ctx is not None else ():
        text = text.replace(str(stored.local), stored.url)
    return text

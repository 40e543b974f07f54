"""Checkpoints of a training run: the newest few and the best, written atomically."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blake3
import jax

from darex_jax.core.errors import DarexError, FileError
from darex_jax.files.atomic import only_one, write_whole
from darex_jax.files.checkpoint import read_json
from darex_jax.files.paths import read_bytes

State = Any  # a PyTree of arrays


class Checkpoints:
    """A folder of checkpoints, written by orbax: `STEP/` is a state, `STEP.json` its metadata.

    The metadata has a digest of the files, to detect damage, and the validation metric. It is written last,
    and a checkpoint without it is ignored, so that a killed process leaves no partial one.

    Args:
      folder: created at the first save.
      every: steps between checkpoints.
      keep: number of newest ones to keep; the best by validation metric is kept as well.
      warn: called for a damaged checkpoint.
    Raises: ValueError for numbers out of range.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2, warn: Callable[[str], None] = warnings.warn):
        if every < 1 or keep < 1:
            raise DarexError(f"need every >= 1 and keep >= 1, got {every} and {keep}.")
        self.folder, self.every, self.keep, self._warn = folder.resolve(), every, keep, warn

    def steps(self) -> list[int]:
        """The steps of all checkpoints, the newest last."""
        return sorted(int(note.stem) for note in self.folder.glob("*.json") if note.stem.isdigit())

    def save(self, step: int, state: State, validation: float | None = None) -> None:
        """Writes the state after `step` steps; removes checkpoints that are neither among the newest nor
        best.

        Raises: FileError if it cannot be written, e.g. because the disk is full; the other checkpoints are
          kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()  # left by a killed process
        try:
            with _orbax() as checkpointer:
                checkpointer.save(self.folder / str(step), state, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            fault = self._why_not_written(error, state)
            self._remove_unfinished()
            raise FileError(
                f"{self.folder}: the checkpoint after step {step} cannot be written ({fault}). Free disk "
                "space and run the same command again: it resumes from the one before."
            ) from error
        note = json.dumps({"digest": _digest(self.folder / str(step)), "validation": validation})
        write_whole(self.folder / f"{step}.json", note)
        kept = {*self.steps()[-self.keep :], *self._by_validation()[:1]}
        for old in set(self.steps()) - kept:
            (self.folder / f"{old}.json").unlink()
            shutil.rmtree(self.folder / str(old))

    def _remove_unfinished(self) -> None:
        for rest in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(rest, ignore_errors=True)

    def _why_not_written(self, error: Exception, state: State) -> str:
        """The reason of a failed save. Orbax reports a full disk in many ways, e.g. "Event loop is
        closed"."""
        free = shutil.disk_usage(self.folder).free
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        stated = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(stated[1]) if stated else getattr(error, "errno", None)
        if number == errno.ENOSPC or (number is None and free < size):
            return f"the disk is full: {free:,} bytes are free, the state has {size:,}"
        return os.strerror(number) if number else str(error).partition("\n")[0][:160]

    def restore(self, like: State) -> tuple[int, State] | None:
        """The step and state of the newest undamaged checkpoint; None if there is none.

        A damaged one is set aside with a warning, and recomputed by the training.

        Args: like: a state of the same structure, shapes, dtypes and shardings.
        """
        return self._first_sound(self.steps()[::-1], like)

    def best(self, like: State) -> tuple[int, State] | None:
        """The step and state of the best checkpoint by validation metric; ties give the newest."""
        return self._first_sound(self._by_validation(), like)

    def _by_validation(self) -> list[int]:
        """The steps of all checkpoints that have a validation metric, the best first."""
        values = {step: _read_note(self.folder / f"{step}.json").get("validation") for step in self.steps()}
        known = {step: value for step, value in values.items() if isinstance(value, int | float)}
        return sorted(known, key=lambda step: (known[step], step), reverse=True)

    def _first_sound(self, steps: list[int], like: State) -> tuple[int, State] | None:
        for step in steps:
            try:
                return step, self._read(step, like)
            except (ValueError, OSError, LookupError) as error:
                fault = str(error).partition("\n")[0][:160] or type(error).__name__
            self._warn(
                f"{self.folder / str(step)} is damaged and set aside; the one before is used ({fault})"
            )
            for name in (str(step), f"{step}.json"):
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / f"{name}.damaged", ignore_errors=True)
                    os.replace(self.folder / name, self.folder / f"{name}.damaged")
        return None

    def _read(self, step: int, like: State) -> State:
        import orbax.checkpoint as ocp

        # Checked before orbax opens it, whose background threads keep logging errors after a failure.
        if _digest(self.folder / str(step)) != _read_note(self.folder / f"{step}.json").get("digest"):
            raise DarexError("its content does not match its digest")
        with _orbax() as checkpointer:
            return checkpointer.restore(
                self.folder / str(step), jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            )


@contextmanager
def own_place(folder: Path | None, made_from: Any, what: str) -> Iterator[Path | None]:
    """The checkpoint subfolder for a training defined by `made_from`, locked for this process.

    Args: folder: None gives None; made_from: JSON; what: name of the training in errors.
    Raises: FileError if another process is using it.
    """
    if folder is None:
        yield None
        return
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    place = folder / digest[:16]
    busy = (
        f"the same {what} is already running with its checkpoints in {place}; "
        "wait for it, or choose another folder."
    )
    with only_one(place / "lock", busy):
        yield place


@contextmanager
def _orbax() -> Iterator[Any]:
    """Orbax's checkpointer; waits for its background work at exit."""
    import orbax.checkpoint as ocp

    with _quiet(), ocp.StandardCheckpointer() as checkpointer:
        yield checkpointer
        checkpointer.wait_until_finished()


@contextmanager
def _quiet() -> Iterator[None]:
    """Disables logging: orbax logs every file that it writes.

    After a failure logging stays disabled: orbax closes its event loop at the first failed write, and reports
    errors of the others later.
    """
    loud = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loud]
    hook = sys.unraisablehook

    def only_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    for logger in loud:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = only_others
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    sys.unraisablehook = hook
    for logger, level in zip(loud, levels, strict=True):
        logger.setLevel(level)


def _read_note(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except FileError:
        return {}


def _digest(folder: Path) -> str:
    """BLAKE3 over the names and contents of all files in a folder."""
    digest = blake3.blake3()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = read_bytes(file)
        head = f"{file.relative_to(folder).as_posix()}\0{len(content)}\0"
        digest.update(head.encode() + content)
    return digest.hexdigest()

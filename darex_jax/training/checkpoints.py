"""Checkpoints of a training under way: the newest few and the best, each whole or not there at all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from darex_jax.files.manifest import params_digest

State = Any  # a PyTree of arrays


class Checkpoints:
    """A folder of checkpoints, written by orbax.

    One appears under its final name once it is whole, so that a killed process leaves none that is half
    written; and each has a digest of its content beside it, so that a damaged one is known.

    Args:
      folder: made at the first use.
      every: steps between two.
      keep: how many of the newest are kept; the best by validation metric is kept beside them.
      warn: told of a damaged checkpoint.
    Raises: ValueError for numbers out of range.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2, warn: Callable[[str], None] = warnings.warn):
        if every < 1 or keep < 1:
            raise ValueError(f"need every >= 1 and keep >= 1, got {every} and {keep}.")
        self.folder, self.every, self.keep, self._warn = folder.resolve(), every, keep, warn

    @cached_property
    def _manager(self) -> Any:
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every file; a bar is there to read
        newest = policy.LatestN(self.keep)
        best = policy.BestN(get_metric_fn=_validation, n=1, keep_checkpoints_without_metrics=False)
        return ocp.CheckpointManager(
            self.folder,
            item_names=("state", "note"),
            options=ocp.CheckpointManagerOptions(
                best_fn=_validation,
                preservation_policy=policy.AnyPreservationPolicy([newest, best]),
                enable_async_checkpointing=False,  # the next step is given the arrays that are written
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, state: State, validation: float | None = None) -> None:
        """Writes the state after `step` steps; what is neither among the newest nor the best goes."""
        import orbax.checkpoint as ocp

        note = {"step": step, "digest": _digest(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), note=ocp.args.JsonSave(note))
        metrics = None if validation is None else {"validation": validation}
        self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(self, like: State) -> tuple[int, State] | None:
        """After how many steps the newest sound checkpoint was taken, and its state; None if there is none.

        Damaged ones are deleted with a warning: the training comes by them again.

        Args: like: a state of the same structure, shapes, dtypes and shardings.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self.read(step, like)
            except Exception as error:  # orbax and what is under it raise all kinds for a damaged file
                fault = str(error).partition("\n")[0] or type(error).__name__
                self._warn(f"{self.folder / str(step)} is damaged, the one before is taken ({fault[:200]})")
                self._manager.delete(step)
        return None

    @property
    def best_step(self) -> int | None:
        """After how many steps the best checkpoint was taken; None where none has a validation metric."""
        return self._manager.best_step()

    def read(self, step: int, like: State) -> State:
        """The state of one checkpoint. Raises: whatever a damaged file brings about."""
        import orbax.checkpoint as ocp

        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), note=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=args)
        if found.note != {"step": step, "digest": _digest(found.state)}:
            raise ValueError("its content does not have the digest it was written with")
        return found.state


def _validation(metrics: Any) -> float:
    return metrics["validation"]


def _digest(state: State) -> str | None:
    """None where parts lie with other processes."""
    leaves = jax.tree.leaves(state)
    return params_digest(state) if all(leaf.is_fully_addressable for leaf in leaves) else None

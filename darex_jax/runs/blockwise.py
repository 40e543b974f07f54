"""Pruning a decoder by distillation one layer at a time: memory holds a layer of both models."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.choosing.pair import base_leaf
from darex_jax.core.delta import compute_delta
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import UNUSED
from darex_jax.core.tree import flatten_names, seed_key, unflatten_names
from darex_jax.files.atomic import write_whole
from darex_jax.files.blocks import pack
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.manifest import weights_digest
from darex_jax.files.match import Match
from darex_jax.files.prune import Job, PruneSummary, prune_parts
from darex_jax.files.stream import keep_inputs
from darex_jax.methods.budget import Budget, TooSmall
from darex_jax.methods.distilled import Support, distilled
from darex_jax.methods.evidence import Evidence
from darex_jax.models import Config, read_model_config
from darex_jax.models.layerwise import embedded, layer_models
from darex_jax.parts.total import Parts
from darex_jax.runs.evidence import HELD_OUT
from darex_jax.runs.prune import pruned_entries
from darex_jax.tasks.batching import Batch
from darex_jax.tasks.source import Material, Source, hold_out, read_material
from darex_jax.training.blockwise import Block, States, distill_blocks
from darex_jax.training.checkpoints import own_place
from darex_jax.training.distill import STEPS, Look, distill

LAYER = re.compile(r"^(?:model\.)?layers\.([0-9]+)\.(.+)$")
TABLE = re.compile(r"(?:^|\.)embed_tokens\.weight$")
MARGIN = 0.01  # of a file's size, for what its recipe says of the parts
ATTEMPTS, CLOSE = 3, 0.95  # to come to a size: how often, and the share of it that is near enough


class Blockwise(NamedTuple):
    """Attributes: summary: of the file; held_out: how many texts; error: the relative squared error of the
    last layer's output on them."""

    summary: PruneSummary
    held_out: int
    error: float


def prune_blockwise(
    job: Job,
    source: Source,
    budget: Budget | int,
    *,
    seed: int = 0,
    bits: int | None = 4,
    support: Support = "low-rank",
    steps: int = STEPS,
    checkpoints: Path | None = None,
    ignore_config_fields: Collection[str] = (),
    on_block: Callable[[int, int, Look], None] = lambda done, count, look: None,
) -> Blockwise:
    """Prunes by `distilled`, the parts of each layer trained on that layer alone: see `distill_blocks`.

    Args:
      budget: the same share of the entries for every layer; with an int the whole file has at most so many
        bytes: what parts cost is seen on the first layer; where the file is over, all are trained again.
      source: texts; seed, bits, support, steps: of `distilled` and `distill`.
      checkpoints: a folder from which an interrupted run resumes with the same values.
      on_block: called after each layer with the layers done, their number, and the look at held-out texts.
    Raises: DarexError for an encoder, parameters pruned outside of the layers, fewer than two texts; TooSmall
      for a size out of reach; else as `prune_parts`.
    """
    match = job.match()
    config = read_model_config(job.fine.config, ignore_config_fields)
    layers = layer_models(config)
    by_layer = _by_layer(match, len(layers))
    material = read_material(job.fine.path, source, "train")
    if len(material.encoded) < 2:
        raise DarexError("training parts requires two texts or more: some to train on, some held out.")
    rows, held = hold_out(len(material.encoded), min(HELD_OUT, len(material.encoded) // 2), 0)
    digests = {"fine_weights": weights_digest(job.fine), "data": material.encoded.digest()}
    key = seed_key(seed)
    # A layer's input is the output of those before it: all that any of them is made from.
    made_from: list[Any] = [
        digests,
        weights_digest(job.base),
        sorted(match.pruned),
        seed,
        bits,
        support,
        steps,
    ]

    def read(index: int) -> Block:
        fine, start = {}, {}
        for name, own in by_layer[index].items():
            leaf = _wide(job.fine.tensors[name].read())
            fine[own] = start[own] = leaf
            if name in match.pruned:
                start[own] = base_leaf(job.base, match.base_names[name], leaf.dtype)
        return Block(index, layers[index], unflatten_names(fine), unflatten_names(start))

    def keep(block: Block, budget: Budget, train: Any = None) -> dict[str, Parts]:
        """The parts of a layer by full names; without `train` their values are rounded only."""
        named = {name: own for name, own in by_layer[block.number].items() if name in match.pruned}
        if not named:
            return {}
        deltas = _deltas(block, named)
        evidence = Evidence(linear_layers=deltas.keys(), train=train)
        return dict(distilled(deltas, budget, evidence, key=key, support=support, bits=bits))

    def prune(budget: Budget, out: Path) -> Blockwise:
        parts: dict[str, Parts] = {}

        def train(
            block: Block, epoch: Callable[[int], Iterable[Batch]], others: Sequence[Batch]
        ) -> dict[str, Parts]:
            names = by_layer[block.number]

            def through(chosen: Mapping[str, Parts], bits: int | None) -> dict[str, Parts]:
                folder = None if checkpoints is None else checkpoints / f"layer-{block.number}"
                with own_place(folder, [*made_from, vars(budget), block.number], "training") as place:
                    found = distill(
                        block.model, {}, block.start, {names[name]: each for name, each in chosen.items()},
                        epoch, others, steps=steps, bits=bits, checkpoints=place,
                    )  # fmt: skip
                return {name: found.parts[names[name]] for name in chosen}

            chosen = keep(block, budget, through)
            parts.update(chosen)
            return {names[name]: each for name, each in chosen.items() if each.parts}

        states, others = (_embedded(job.fine, config, material.select(some)) for some in (rows, held))
        look = Look(0, 0.0, 0.0)
        looks = distill_blocks(map(read, range(len(layers))), states, others, train)
        for done, look in enumerate(looks, 1):
            on_block(done, len(layers), look)
        made_by = {
            "method": "distilled", "key": (0, seed), "evidence": digests,
            "budget": {name: value for name, value in vars(budget).items() if value is not None},
            "options": {"bits": bits, "support": support, "steps": steps, "blockwise": True},
        }  # fmt: skip
        own = replace(job, out=out)

        def kept(deltas: Mapping[str, np.ndarray]) -> dict[str, Parts]:
            """Of every parameter, also of those of which nothing is kept."""
            return {name: parts.get(name, Parts((), np.shape(delta))) for name, delta in deltas.items()}

        summary = prune_parts(own, kept, leafwise=True, made_by=made_by)
        return Blockwise(summary, len(held), look.loss)

    if isinstance(budget, Budget):
        return prune(budget, Path(job.out))
    keep_inputs(job.out, job.base, job.fine)
    with tempfile.TemporaryDirectory() as folder:
        room = _room(job, budget, Path(folder)) / pruned_entries(job)
        first = read(next(i for i, layer in enumerate(by_layer) if layer.keys() & set(match.pruned)))
        rate = _fitting(room, lambda rate: keep(first, Budget(bytes_per_parameter=rate)))
        for attempt in range(ATTEMPTS):
            found = prune(Budget(bytes_per_parameter=rate), path := Path(folder) / str(attempt))
            over = found.summary.file_bytes - budget
            if over <= 0:
                write_whole(job.out, path.read_bytes())
                return found
            rate *= 1 - 1.5 * over / (room * pruned_entries(job))
            if rate <= 0:
                break
    raise TooSmall(f"no file of {budget:,} bytes was found: ask for more, or choose another support.")


def _room(job: Job, file_bytes: int, folder: Path) -> float:
    """How many bytes parts may take in a file of `file_bytes`: all else is written once to see."""
    made_by: dict[str, Any] = {
        "method": "distilled", "key": (0, 0), "evidence": {}, "budget": {}, "options": {}
    }  # fmt: skip
    empty = prune_parts(
        replace(job, out=folder / "empty"),
        lambda deltas: {name: Parts((), np.shape(delta)) for name, delta in deltas.items()},
        leafwise=True, made_by=made_by,
    ).file_bytes  # fmt: skip
    room = (1 - MARGIN) * file_bytes - empty
    if room <= 0:
        raise TooSmall(
            f"without any part the file is {empty:,} bytes; {file_bytes:,} were asked for: ask for more."
        )
    return room


def _fitting(room: float, keep: Callable[[float], dict[str, Parts]]) -> float:
    """The budget, in bytes per parameter, with which coded parts take about `room` bytes per parameter.

    Args: keep: from a budget to the parts of one layer, untrained; the others are like it.
    """
    rate, fits = room, 0.0
    for _ in range(ATTEMPTS):
        parts = keep(rate)
        entries = sum(math.prod(each.shape) for each in parts.values())
        coded = len(pack(parts)[1]) / entries
        if coded <= room:
            fits = max(fits, rate)
            if coded >= CLOSE * room:
                break
        rate *= room / max(coded, 1e-12)
    return fits or rate


def _by_layer(match: Match, count: int) -> list[dict[str, str]]:
    """For each layer the fine-tuned names of its parameters, and their names within the layer."""
    found: list[dict[str, str]] = [{} for _ in range(count)]
    outside = []
    for name in [*match.pruned, *match.dense]:
        at = LAYER.match(name)
        if at is not None and int(at[1]) < count:
            if not UNUSED.search(name):
                found[int(at[1])][name] = at[2]
        elif name in match.pruned:
            outside.append(name)
    if outside:
        raise DarexError(
            f"layer by layer only parameters of layers are pruned, not '{outside[0]}': leave it out with "
            "--exclude."
        )
    return found


def _deltas(block: Block, named: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The float32 deltas of a layer by full names."""
    fine, start = flatten_names(block.fine), flatten_names(block.start)
    return {name: np.asarray(compute_delta(fine[own], start[own])) for name, own in named.items()}


def _embedded(fine: Checkpoint, config: Config, material: Material) -> list[States]:
    (name,) = [name for name in fine.tensors if TABLE.search(name)]
    table = _wide(fine.tensors[name].read())
    found = []
    for batch in material.batches():
        hidden = np.asarray(embedded(config, table, jnp.asarray(batch["input_ids"])))
        kept = {name: batch[name] for name in ("attention_mask", "weight")}
        found.append(States(hidden, hidden, kept))
    return found


def _wide(leaf: np.ndarray) -> jax.Array:
    """Float16 becomes float32, as everywhere where models are run."""
    return jnp.asarray(leaf, np.float32 if leaf.dtype == np.float16 else None)

"""Pruning a decoder by distillation one layer at a time: memory holds a layer of both models."""

from __future__ import annotations

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
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.manifest import weights_digest
from darex_jax.files.match import Match
from darex_jax.files.prune import Job, PruneSummary, prune_parts
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
        bytes.
      source: texts; seed, bits, support, steps: of `distilled` and `distill`.
      checkpoints: a folder from which an interrupted run resumes with the same values.
      on_block: called after each layer with the layers done, their number, and the look at held-out texts.
    Raises: DarexError for an encoder, parameters pruned outside of the layers, fewer than two texts; TooSmall
      for a size out of reach; else as `prune_parts`.
    """
    match = job.match()
    match.raise_if_faulty()
    config = read_model_config(job.fine.config, ignore_config_fields)
    layers = layer_models(config)
    by_layer = _by_layer(match, len(layers))
    material = read_material(job.fine.path, source, held_out=False)
    if len(material.encoded) < 2:
        raise DarexError("training parts requires two texts or more: some to train on, some held out.")
    rows, held = hold_out(len(material.encoded), min(HELD_OUT, len(material.encoded) // 2), 0)
    digests = {"fine_weights": weights_digest(job.fine), "data": material.encoded.digest()}
    budget = budget if isinstance(budget, Budget) else _of_size(job, budget)
    key = jax.random.key(seed)
    parts: dict[str, Parts] = {}
    made_from: list[Any] = [digests, weights_digest(job.base), vars(budget), seed, bits, support, steps]

    def read(index: int) -> Block:
        fine, start = {}, {}
        for name, own in by_layer[index].items():
            leaf = _wide(job.fine.tensors[name].read())
            fine[own] = start[own] = leaf
            if name in match.pruned:
                start[own] = base_leaf(job.base, match.base_names[name], leaf.dtype)
        return Block(index, layers[index], unflatten_names(fine), unflatten_names(start))

    def train(
        block: Block, epoch: Callable[[int], Iterable[Batch]], others: Sequence[Batch]
    ) -> dict[str, Parts]:
        named = {name: own for name, own in by_layer[block.number].items() if name in match.pruned}

        def through(chosen: Mapping[str, Parts], bits: int | None) -> dict[str, Parts]:
            folder = None if checkpoints is None else checkpoints / f"layer-{block.number}"
            own = {named[name]: each for name, each in chosen.items()}
            with own_place(folder, [*made_from, block.number], "training") as place:
                found = distill(
                    block.model, {}, block.start, own, epoch, others,
                    steps=steps, bits=bits, checkpoints=place,
                )  # fmt: skip
            return {name: found.parts[own] for name, own in named.items() if own in found.parts}

        deltas = _deltas(block, named)
        evidence = Evidence(input_norms=dict.fromkeys(deltas, np.ones(1)), train=through)
        chosen = distilled(deltas, budget, evidence, key=key, support=support, bits=bits)
        parts.update(chosen)
        return {named[name]: each for name, each in chosen.items() if each.parts}

    states, others = (_embedded(job.fine, config, material.select(some)) for some in (rows, held))
    look = Look(0, 0.0, 0.0)
    for done, look in enumerate(distill_blocks(map(read, range(len(layers))), states, others, train), 1):
        on_block(done, len(layers), look)
    made_by = {
        "method": "distilled", "key": (0, seed), "evidence": digests,
        "budget": {name: value for name, value in vars(budget).items() if value is not None},
        "options": {"bits": bits, "support": support, "steps": steps, "blockwise": True},
    }  # fmt: skip
    summary = prune_parts(
        job, lambda deltas: {name: parts[name] for name in deltas}, leafwise=True, made_by=made_by
    )
    return Blockwise(summary, len(held), look.loss)


def _by_layer(match: Match, count: int) -> list[dict[str, str]]:
    """For each layer the fine-tuned names of its parameters, and their names within the layer."""
    found: list[dict[str, str]] = [{} for _ in range(count)]
    outside = []
    for name in [*match.pruned, *match.dense]:
        at = LAYER.match(name)
        if at is not None and int(at[1]) < count:
            if not name.endswith("inv_freq"):  # a buffer of old Llamas that nothing reads
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


def _of_size(job: Job, file_bytes: int) -> Budget:
    """The budget of parts with which the file has at most `file_bytes`: all else is written once to see."""
    with tempfile.TemporaryDirectory() as folder:
        made_by: dict[str, Any] = {
            "method": "distilled", "key": (0, 0), "evidence": {}, "budget": {}, "options": {}
        }  # fmt: skip
        empty = prune_parts(
            replace(job, out=Path(folder) / "empty"),
            lambda deltas: {name: Parts((), np.shape(delta)) for name, delta in deltas.items()},
            leafwise=True, made_by=made_by,
        ).file_bytes  # fmt: skip
    room = (1 - MARGIN) * file_bytes - empty
    if room <= 0:
        raise TooSmall(
            f"without any part the file is {empty:,} bytes; {file_bytes:,} were asked for: ask for more."
        )
    return Budget(bytes_per_parameter=room / pruned_entries(job))

"""Distillation of a decoder one layer at a time, for models that do not fit in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.delta import apply_delta
from darex_jax.models.layerwise import LayerModel
from darex_jax.parts.total import Parts
from darex_jax.tasks.batching import Batch
from darex_jax.training.distill import Look, look_at

Params = Any
Delta = dict[str, Parts]


class Block(NamedTuple):
    """A layer of both models, read when it is its turn.

    Attributes:
      number: of the layer, from 0; model: runs it.
      fine: its fine-tuned parameters; start: the same with the base's values of those that are pruned; nested
        dicts.
    """

    number: int
    model: LayerModel
    fine: Params
    start: Params


class States(NamedTuple):
    """Hidden states of a batch at a layer's input: the pruned model's and the fine-tuned one's [B, T, D].

    Attributes: batch: what else belongs to it, attention_mask and weight.
    """

    pruned: np.ndarray
    fine: np.ndarray
    batch: Batch


def distill_blocks(
    blocks: Iterable[Block],
    states: Sequence[States],
    held_out: Sequence[States],
    train: Callable[[Block, Callable[[int], Iterable[Batch]], Sequence[Batch]], Delta],
) -> Iterator[Look]:
    """Prunes layer after layer so that each one reproduces the fine-tuned layer's output.

    The input of a pruned layer is the output of the pruned layers before it, so that it can make up for
    their errors; its target is what the fine-tuned layer makes of the fine-tuned model's hidden states. The
    window is a whole layer, attention and feed-forward with what is not linear between them. Memory holds one
    layer of both models, and the hidden states.

    Args:
      blocks: the layers from first to last.
      states, held_out: of the texts that train and of others, before the first layer.
      train: of a block, batches by epoch and held-out batches makes the parts of its parameters, by names
        within the layer: `distilled` with `distill`.
    Returns: after each layer the look at the held-out states behind it: `loss` is the relative squared error
      of its output.
    Source: a window with a non-linear part, arXiv:2510.14444.
    """
    states, held_out = list(states), list(held_out)
    for block in blocks:
        batches, others = ([_batch(block, each) for each in some] for some in (states, held_out))
        parts = train(block, partial(_epoch, batches), others)
        params = apply_delta(block.start, parts)
        yield look_at(block.model, {}, params, others)
        states, held_out = (
            [_after(block.model, params, batch) for batch in some] for some in (batches, others)
        )


def _batch(block: Block, states: States) -> Batch:
    """A batch of the layer: the pruned model's states, and the fine-tuned layer's output as the target."""
    inputs = {"hidden": states.fine, "attention_mask": states.batch["attention_mask"], "target": states.fine}
    target = _run(block.model, block.fine, inputs)
    return {**states.batch, "hidden": states.pruned, "target": np.asarray(target)}


def _after(model: LayerModel, params: Params, batch: Batch) -> States:
    inputs = {name: batch[name] for name in ("hidden", "attention_mask", "target")}
    rest = {name: value for name, value in batch.items() if name not in ("hidden", "target")}
    return States(np.asarray(_run(model, params, inputs)), batch["target"], rest)


@partial(jax.jit, static_argnums=0)
def _run(model: LayerModel, params: Params, inputs: dict[str, Any]) -> jax.Array:
    return model(params, **jax.tree.map(jnp.asarray, inputs)).last_hidden_state


def _epoch(batches: Sequence[Batch], epoch: int) -> Iterator[Batch]:
    """The batches in an order of their own for each epoch."""
    for i in np.random.default_rng(epoch).permutation(len(batches)):
        yield batches[i]

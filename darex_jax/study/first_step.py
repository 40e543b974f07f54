"""The first training step of a study's models at their true shapes, before anyone pays for the whole."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import unflatten_names
from darex_jax.models import DecoderConfig, build_model, init_model, read_model_config
from darex_jax.study.fine_tunes import RECIPE
from darex_jax.study.plan import FineTune
from darex_jax.training.causal_lm import answer_loss
from darex_jax.training.fine_tune import summed_loss
from darex_jax.training.loop import Recipe, step_program, train

TOKENS = 128  # of each example
BYTES = 24  # a parameter: weights, pretrained weights, two moments, gradients, and a copy to compute in
REGRESSIONS = ("stsb",)


def first_step(fine_tune: FineTune) -> dict[str, Any]:
    """One training step with random weights and tokens: computed, or compiled where memory does not allow.

    Returns: model, optimizer, parameters, how ("computed" or "compiled"), seconds, and the loss or the bytes
      that the compiled program needs.
    Raises: DarexError for a model without a config in `fine_tunes.toml`.
    """
    hf = fine_tune.source.get("config")
    if hf is None:
        raise DarexError(f"model {fine_tune.model}: fine_tunes.toml has no config of it.")
    options = {name: value for name, value in fine_tune.options.items() if name in RECIPE}
    recipe = Recipe(**{**options, "steps": 1, "epochs": None})
    config = read_model_config(_with_head(hf, fine_tune.task))
    decoder = isinstance(config, DecoderConfig)
    loss = answer_loss if decoder else summed_loss
    model, shapes = build_model(config)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    batch = _batch(config.vocab_size, recipe.batch_size, decoder, fine_tune.task)
    key = jax.random.key(1) if recipe.dropout and not decoder else None
    fits = BYTES * parameters < 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "model": fine_tune.model, "optimizer": fine_tune.optimizer, "parameters": parameters,
        "batch": f"{recipe.batch_size} x {TOKENS}", "how": "computed" if fits else "compiled",
    }  # fmt: skip
    begun = time.monotonic()
    if fits:
        model, params = init_model(config, jax.random.key(0))
        _, history = train(
            loss, model, params, lambda epoch: [batch], recipe, steps=1, dropout_key=key
        )  # fmt: skip
        found["loss"] = history[0].loss
    else:
        abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        program = step_program(loss, model, recipe, unflatten_names(abstract), batch, key).compile()
        if (memory := program.memory_analysis()) is not None:
            found["program_bytes"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return found | {"seconds": round(time.monotonic() - begun, 1)}


def _with_head(hf: Any, task: str) -> dict[str, Any]:
    """A config with the head that a task is trained with; a decoder keeps its own."""
    architecture = hf["architectures"][0]
    if not architecture.endswith("Model"):
        return dict(hf)
    head = architecture.removesuffix("Model") + "ForSequenceClassification"
    regression = task in REGRESSIONS
    labels = {"0": "LABEL_0"} if regression else {"0": "LABEL_0", "1": "LABEL_1"}
    problem = "regression" if regression else "single_label_classification"
    return {
        **hf, "architectures": [head], "problem_type": problem,
        "id2label": labels, "label2id": {name: int(i) for i, name in labels.items()},
    }  # fmt: skip


def _batch(vocabulary: int, rows: int, decoder: bool, task: str) -> dict[str, Any]:
    """Random tokens in the form of the task's batches."""
    rng = np.random.default_rng(0)
    shape = rows, TOKENS
    batch: dict[str, Any] = {
        "input_ids": rng.integers(10, vocabulary, shape, np.int32),
        "attention_mask": np.ones(shape, np.int32),
        "weight": np.ones(rows, np.float32),
    }
    if decoder:
        return batch | {"loss_mask": np.ones(shape, np.float32)}
    labels = rng.random(rows, np.float32) if task in REGRESSIONS else rng.integers(0, 2, rows, np.int32)
    return batch | {"token_type_ids": np.zeros(shape, np.int32), "labels": labels}

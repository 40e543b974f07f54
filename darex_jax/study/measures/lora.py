"""A LoRA fine-tune of a decoder pruned both ways: its merged delta, and its factors A and B."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from darex_jax.core.delta import apply_delta, prune
from darex_jax.core.errors import DarexError
from darex_jax.core.lora import adapter_delta
from darex_jax.core.tree import seed_key
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.files.adapter import load_adapter
from darex_jax.files.manifest import params_digest
from darex_jax.files.model import load_model
from darex_jax.models import DecoderConfig
from darex_jax.study.fine_tunes import Place, obtain
from darex_jax.study.measures.tested import texts_of
from darex_jax.study.plan import FineTune, Plan
from darex_jax.tasks.answers import answer_batches, encode_problems, load_problems
from darex_jax.tasks.batching import load_tokenizer
from darex_jax.training.causal_lm import answer_scores

ROWS = 8  # of a batch of problems


def begin(
    plan: Plan, fine_tunes: Sequence[FineTune], place: Place
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Ways: `pruned = "merged"` or `pruned = "factors"`, with DARE's divisor or `q`.

    Measured on `test_examples` held-out problems: the loss of a solution's tokens, the share of them ranked
    first, and the output change of `darex_jax.evaluation.outputs`; means over the masks.

    Returns: as `methods.begin`. Raises: DarexError for an encoder, or a training without `lora_rank`.
    """
    (fine_tune,) = fine_tunes
    if "lora_rank" not in fine_tune.options:
        raise DarexError(f"{fine_tune.name}: the measure lora needs a training with lora_rank.")
    base_path, path = obtain(fine_tune, place)
    model, base = load_model(base_path)
    if not isinstance(model.config, DecoderConfig):
        raise DarexError(f"{fine_tune.name}: the measure lora is for decoders.")
    config, adapter, _ = load_adapter(path)
    scales = config.scales(adapter)
    difficulty = texts_of(fine_tune, place).difficulty
    held_out = load_problems(fine_tune.task, "validation", place.data_dir, difficulty, fine_tune.seed)
    problems = held_out[: plan.test_examples]
    batches = list(answer_batches(encode_problems(load_tokenizer(base_path), problems), ROWS, 0, 0))
    delta = adapter_delta(adapter, scales)
    references = reference_outputs(model, apply_delta(base, delta), batches)

    def scored(deltas: Sequence[Any]) -> dict[str, float]:
        found: dict[str, list[float]] = {"loss": [], "tokens": [], "change": []}
        for each in deltas:
            params = apply_delta(base, each)
            scores = answer_scores(model, params, batches)
            change = output_change(model, params, batches, references)
            for name, value in (("loss", scores.loss), ("tokens", scores.tokens), ("change", change)):
                found[name].append(float(value))
        spread = {"loss_std": float(np.std(found["loss"], ddof=1))} if len(deltas) > 1 else {}
        return {name: float(np.mean(values)) for name, values in found.items()} | spread

    def measured(way: str, told: Mapping[str, Any], at: float) -> dict[str, float]:
        keys = [seed_key(seed) for seed in range(plan.masks)]
        q = told.get("q")
        if told["pruned"] == "merged":
            return scored([prune(key, delta, at, q) for key in keys])
        return scored([adapter_delta(prune(key, adapter, at, q), scales) for key in keys])

    zero = jax.tree.map(jax.numpy.zeros_like, delta)
    without = {f"{name}_without": value for name, value in scored([zero]).items()}
    return {**scored([delta]), **without, "weights": params_digest(adapter)}, measured

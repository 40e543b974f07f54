"""Chooses q for a fine-tuned model and its base: `darex find-q` and `darex prune --q auto`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from darex_jax.choosing.choice import Choice, OnValue
from darex_jax.choosing.one_copy import open_one_copy
from darex_jax.choosing.pair import open_pair
from darex_jax.choosing.table import SCOPES, WAYS
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import DECODERS, choose_scope
from darex_jax.files.checkpoint import Checkpoint, read_config
from darex_jax.files.manifest import run_manifest, weights_digest
from darex_jax.models import EncoderConfig, read_model_config
from darex_jax.q.search import check_bounds
from darex_jax.tasks.source import Source, read_material

RECORDED = (  # settings that the manifest records
    "drop_rate", "objective", "scope", "rule", "task", "data_dir", "difficulty", "text", "table", "limit",
    "masks",
    "grid", "learning_rate", "include", "exclude", "seed",
)  # fmt: skip


def choose_q(
    base: Path,
    fine: Path,
    drop_rate: float,
    choice: Choice,
    source: Source,
    on_value: OnValue = lambda point, value: None,
) -> dict[str, Any]:
    """Chooses one q for the model or one per linear layer; the same arguments give the same q.

    Args:
      base, fine: Hugging Face directories.
      choice: the way and its settings.
      source: of the examples; without a limit, the way's default.
      on_value: called with every (q or eta, value); for learned, with every (epoch, held-out change).
    Returns: the content of the q file, valid JSON: q, value, objective, scope, curve (over q, eta with rule,
      or epochs; None for values that are not finite), plateau, cost (evaluations, examples, labels used),
      manifest. With a `warning` the examples are uninformative, and q is DARE's 1 - p (or the smallest
      visited with finite outputs).
    Raises: ValueError for invalid arguments; FileError for a damaged file.
    """
    if choice.objective == "auto":
        labelled, ignored = source.labelled, choice.ignore_config_fields
        objective = "labels" if labelled else without_labels(fine, choice.scope, ignored)
        choice = replace(choice, objective=objective)
    _check(choice, source, drop_rate)
    way = WAYS[choice.objective]
    scope = choose_scope(read_config(fine).get("model_type"), choice.include, choice.exclude)
    source = replace(source, limit=way.limit if source.limit is None else source.limit)
    material = read_material(fine, source, way.split)  # before reading weights
    if way.learns and len(material.encoded) < 2:
        raise DarexError(f"{choice.objective} needs at least two examples, to train and to hold out.")
    seeds = [choice.seed + i for i in range((choice.masks or way.masks) if way.masks else 0)]
    open_it = open_one_copy if choice.one_copy else open_pair
    pair = open_it(base, fine, drop_rate, seeds, scope, choice.ignore_config_fields)
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        inputs = {"base_weights": weights_digest(b), "fine_weights": weights_digest(f)}
    inputs["data"] = material.encoded.digest()
    head = {
        "objective": choice.objective, "scope": choice.scope, "drop_rate": drop_rate, "mask_seeds": seeds,
        "data": material.source, "labels": 0,
    }  # fmt: skip
    found = way.find(pair, material, choice, inputs, on_value)
    table = source.table and vars(source.table)
    settings = vars(choice) | vars(source) | {"drop_rate": drop_rate, "table": table}
    manifest = run_manifest("find-q", {name: settings[name] for name in RECORDED}, inputs, {})
    return _strict(head | found | {"manifest": manifest})


def without_labels(fine: Path, scope: str, ignore_config_fields: Collection[str] = ()) -> str:
    """The default objective without a task."""
    hf = read_config(fine)
    if hf.get("model_type") in DECODERS:
        return "predictions"
    if "ForSequenceClassification" in str(hf.get("architectures")):
        config = read_model_config(hf, ignore_config_fields)
        if isinstance(config, EncoderConfig) and config.num_labels > 1:
            return "predictions"
    return "outputs" if scope == "layer" else "two-point"


def _check(choice: Choice, source: Source, drop_rate: float) -> None:
    name = choice.objective
    if name not in WAYS or choice.scope not in SCOPES:
        raise DarexError(f"objective must be one of {', '.join(WAYS)}, scope {' or '.join(SCOPES)}.")
    way = WAYS[name]
    if not 0.0 < drop_rate < 1.0:
        raise DarexError(f"choosing q needs a drop rate between 0 and 1, got {drop_rate}.")
    if choice.scope not in way.scopes:
        own = way.scopes[0]
        raise DarexError(f"{name} finds {SCOPES[own]}; pass --scope {own}.")
    if way.labels and source.text is not None:
        raise DarexError("texts have no labels; choose another objective, or a task.")
    if way.labels and not source.labelled:
        raise DarexError(
            f"{name} needs the model's task: pass --task, or --data with --label, or choose "
            "another objective."
        )
    if choice.one_copy and (way.whole_delta or choice.scope == "layer"):
        supported = ", ".join(other for other, way in WAYS.items() if not way.whole_delta)
        raise DarexError(
            f"one copy of the model holds no delta; it supports one q for the model by {supported}."
        )
    if way.one_mask and choice.masks not in (None, 1):
        raise DarexError(f"{name} uses one mask; leave out --masks.")
    if not way.masks and choice.masks is not None:
        raise DarexError(f"{name} uses no mask; leave out --masks.")
    if choice.grid is not None:
        check_bounds(*choice.grid)
        if not way.searches:
            searched = ", ".join(other for other, way in WAYS.items() if way.searches)
            raise DarexError(f"{name} does not search a grid; {searched} do.")
    of_layers, default = way.searches and choice.scope == "layer", Choice()
    if not of_layers and (choice.statistics is not None or choice.rule != default.rule):
        raise DarexError("--statistics and --rule are for searches with --scope layer.")
    if not way.learns and (choice.checkpoints is not None or choice.learning_rate != default.learning_rate):
        raise DarexError("--checkpoints and --learning-rate are for --objective learned.")


def _strict(value: Any) -> Any:
    """Replaces numbers that JSON does not support by None."""
    if isinstance(value, Mapping):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

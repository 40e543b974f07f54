"""How the base, a restored model and the fine-tuned one do on the same examples."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.tasks.source import Source


class Scores(NamedTuple):
    """How models do on the same examples.

    Attributes:
      metric, agreement: what the numbers are, "" for none; examples: so many, of `source`.
      of: by the model: its metric and its agreement with the fine-tuned model, NaN where there is none.
    """

    metric: str
    agreement: str
    examples: int
    source: str
    of: dict[str, tuple[float, float]]


def score_models(
    delta: str | os.PathLike[str],
    base: str | os.PathLike[str],
    fine: str | os.PathLike[str] | None,
    source: Source,
    on_model: Callable[[str], None],
    **opening: Any,
) -> Scores:
    """One model after the other; beside it at most a parameter of another is held."""
    from darex_jax.core.tree import flatten_names, unflatten_names
    from darex_jax.evaluation.classification import predict
    from darex_jax.evaluation.objectives import prediction_objective
    from darex_jax.files.model import companions
    from darex_jax.models import DecoderConfig
    from darex_jax.tasks.opening import open_model
    from darex_jax.tasks.source import read_material
    from darex_jax.training.causal_lm import answer_scores

    changed = opening["allow_changed_files"]
    with companions(base, delta, allow_changed_files=changed) as folder:
        try:
            material = read_material(folder, source, "test")
        except DarexError as error:  # which names the folder that stands for the restored model
            raise DarexError(str(error).replace(str(folder), f"the model of {delta}")) from error
        task, batches = material.task, material.batches()
        count, labels = len(material.encoded), None if task is None else task.test.labels[: source.limit]
        where = f"{material.source if task is None else task.name}, test split"
    if source.text is not None:
        where = str(source.text)
    if task is None and fine is None and not source.labelled:
        raise DarexError(
            "texts without labels are compared with the fine-tuned model's answers: give --fine."
        )
    found: dict[str, tuple[float, float]] = {}
    names = {"metric": "", "agreement": ""}
    compare: Callable[[Any, Any], float] | None = None

    def measure(name: str, model: Any, params: Any) -> None:
        nonlocal compare
        if isinstance(model.config, DecoderConfig):
            own = material.metric or "token_accuracy"
            metric = answer_scores(model, params, batches).named()[own]
            names["metric"] = "share of right tokens" if own == "token_accuracy" else own.replace("_", " ")
            if name == "fine-tuned":
                agreement = prediction_objective(model, params, batches)
                names["agreement"], compare = "agreement of next tokens", lambda _, p: agreement.measure(p)
            found[name] = metric, math.nan if compare is None else compare(model, params)
            return
        logits = predict(model, params, batches)
        metric = math.nan
        if task is not None and labels is not None:
            metric, names["metric"] = task.metric(logits, labels), task.metric_name.replace("_", " ")
        if name == "fine-tuned":
            reference, one = logits, logits.shape[-1] == 1
            names["agreement"] = "correlation of scores" if one else "agreement of predictions"
            compare = lambda own, _: _agreement(own, reference)  # noqa: E731
        found[name] = metric, math.nan if compare is None else compare(logits, params)

    if fine is not None:
        on_model("fine-tuned")
        opened = open_model(fine, ignore_config_fields=opening["ignore_config_fields"])
        measure("fine-tuned", opened.model, opened.params)
        del opened
    on_model("restored")
    opened = open_model(base, delta=delta, **opening)
    measure("restored", opened.model, opened.params)
    on_model("base alone")
    own = flatten_names(opened.params)
    model = opened.model
    del opened
    with Checkpoint(base) as b, DeltaFile(delta) as d:
        for name in d.recipe.parameters:
            if name in own:
                numbers = b.tensors[d.base_name(name)].read().astype(own[name].dtype)
                own[name] = (
                    np.concatenate([numbers, np.asarray(own[name])[len(numbers) :]])
                    if numbers.ndim
                    else numbers
                )
    measure("base alone", model, unflatten_names(own))
    order = ("base alone", "restored", "fine-tuned")
    return Scores(
        names["metric"], names["agreement"], count, where, {n: found[n] for n in order if n in found}
    )


def _agreement(own: np.ndarray, reference: np.ndarray) -> float:
    """See `agreement`. Raises: DarexError for another number of outputs."""
    from darex_jax.evaluation.classification import agreement

    if own.shape != reference.shape:
        raise DarexError(
            f"the fine-tuned model has {reference.shape[-1]} outputs, the restored one {own.shape[-1]}."
        )
    return agreement(own, reference)

"""Evaluation and generation with several deltas of one base, in shared batches."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from darex_jax.bank.bank import DeltaBank
from darex_jax.core.errors import DarexError
from darex_jax.evaluation.classification import predict
from darex_jax.evaluation.text import complete
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.model import load_model
from darex_jax.files.restore import read_companions
from darex_jax.models import DecoderConfig
from darex_jax.tasks import Examples, Task
from darex_jax.tasks.batching import EVALUATION_ROWS, Encoded, encode, evaluation_batches, load_tokenizer
from darex_jax.tasks.opening import text_ends

CONFIGS = ("config.json", "generation_config.json")  # companion files that do not belong to the tokenizer


class Many(NamedTuple):
    """A bank, and the tokenizers and end tokens of its deltas by name."""

    bank: DeltaBank
    tokenizers: dict[str, Any]
    ends: dict[str, int | list[int] | None]


def open_many(
    base: str | os.PathLike[str],
    deltas: Sequence[str | os.PathLike[str]],
    *,
    allow_changed_files: bool = False,
    ignore_config_fields: Collection[str] = (),
) -> Many:
    """Opens a base directory and artifacts made from it. A delta is named after its file without the suffix,
    or by its full path if two files have the same name.

    Raises: as `load_model`, `DeltaBank.add` and `load_tokenizer`; ValueError if a file is given twice.
    """
    stems = Counter(Path(delta).stem for delta in deltas)
    paths = {Path(d).stem if stems[Path(d).stem] == 1 else os.fspath(d): d for d in deltas}
    if len(paths) < len(deltas):
        raise DarexError("a delta is given twice.")
    wide = jnp.float32 if any(map(_restores_float32, paths.values())) else None
    bank = DeltaBank(*load_model(base, wide, ignore_config_fields=ignore_config_fields))
    many = Many(bank, {}, {})
    loaded: dict[Any, Any] = {}  # by file content: most deltas share one
    for name, path in paths.items():
        bank.add(name, path, ignore_config_fields=ignore_config_fields)
        config = bank.model_of(name).config
        many.ends[name] = text_ends(base, path, config, allow_changed_files=allow_changed_files)
        with DeltaFile(path) as file:
            files = read_companions(Path(base), file, allow_changed_files=allow_changed_files)
        own = frozenset((n, content) for n, content in files.items() if n not in CONFIGS)
        if own not in loaded:
            loaded[own] = load_tokenizer(base, path, allow_changed_files=allow_changed_files)
        many.tokenizers[name] = loaded[own]
    return many


def _restores_float32(delta: str | os.PathLike[str]) -> bool:
    with DeltaFile(delta) as file:
        return any(entry.get("dtype") == "F32" for entry in file.recipe.parameters.values())


def predict_many(
    many: Many, examples: Mapping[str, Examples], batch_size: int = EVALUATION_ROWS
) -> dict[str, np.ndarray]:
    """The logits of each delta's model on its own examples, [N, its labels] float32, in shared batches."""
    encoded = {name: encode(many.tokenizers[name], rows) for name, rows in examples.items()}
    owners = np.repeat(list(encoded), [len(rows) for rows in encoded.values()])
    joined = Encoded(
        [ids for rows in encoded.values() for ids in rows.input_ids],
        [types for rows in encoded.values() for types in rows.token_type_ids],
        np.zeros(len(owners), np.float32),
        next(iter(encoded.values())).pad_id,
    )
    model, logits = many.bank.model, []
    for batch in (batches := evaluation_batches(joined, batch_size)):
        params = many.bank.mixed([str(owners[i]) for i in batch["index"]])
        in_order = batch | {"index": np.arange(len(batch["index"]), dtype=np.int32)}
        logits.append(predict(model, params, [in_order]))
    rows = np.concatenate([batch["index"][batch["weight"] > 0] for batch in batches])
    ordered = np.concatenate(logits)[np.argsort(rows)]
    return {name: ordered[owners == name][:, : _labels(many, name)] for name in encoded}


def _labels(many: Many, name: str) -> int:
    return int(getattr(many.bank.model_of(name).config, "num_labels", 0))


def evaluate_many(
    many: Many, tasks: Mapping[str, Task], examples: Mapping[str, Examples], batch_size: int | None = None
) -> dict[str, dict[str, Any]]:
    """The metric of each delta's model on its own task: {"metric", "metric_name", "n"} by name."""
    for name, task in tasks.items():
        if task.num_labels != _labels(many, name):
            raise DarexError(
                f"'{name}' has {_labels(many, name)} outputs, {task.name!r} has {task.num_labels}: "
                "it was fine-tuned for another task."
            )
    logits = predict_many(many, examples, batch_size or EVALUATION_ROWS)
    return {
        name: {
            "metric": task.metric(logits[name], examples[name].labels),
            "metric_name": task.metric_name,
            "n": len(examples[name]),
        }
        for name, task in tasks.items()
    }


def write_many(
    many: Many, prompt: str, *, max_new_tokens: int, stop: Sequence[str] = (), **sampling: Any
) -> dict[str, str]:
    """The continuation of one prompt by each delta's model, in one batch.

    Args: sampling: key and temperature, as for `generate`.
    Raises: ValueError for models that do not generate text, or that do not share a tokenizer and end tokens.
    """
    names = many.bank.names
    if not isinstance(many.bank.model.config, DecoderConfig):
        raise DarexError(f"a {many.bank.model.config.model_type} model does not generate text.")
    first = names[0]
    for name in names[1:]:
        if many.tokenizers[name] is not many.tokenizers[first] or many.ends[name] != many.ends[first]:
            raise DarexError(
                f"'{name}' has another tokenizer or other end tokens than '{first}'; run it alone."
            )
    texts = complete(
        many.bank.model,
        many.bank.mixed(names),
        many.tokenizers[first],
        [prompt] * len(names),
        max_new_tokens=max_new_tokens,
        eos_token_id=many.ends[first],
        stop=stop,
        **sampling,
    )
    return dict(zip(names, texts, strict=True))

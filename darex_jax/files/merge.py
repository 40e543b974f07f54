"""Merges an adapter into its base: writes an ordinary fine-tuned Hugging Face directory."""

from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.delta import apply_delta
from darex_jax.core.errors import DarexError
from darex_jax.core.lora import FACTORS, LoraConfig, adapter_delta, adapter_factors
from darex_jax.core.tree import flatten_names
from darex_jax.files.adapter import WEIGHTS, load_adapter
from darex_jax.files.atomic import check_replaceable
from darex_jax.files.checkpoint import (
    Checkpoint,
    companion_contents,
    read_config,
    save_params,
    with_inherited,
)
from darex_jax.files.model import load_model
from darex_jax.files.safetensors import SafetensorsFile
from darex_jax.files.stream import keep_inputs
from darex_jax.models import EncoderConfig, Model, build_model, classifier_from_pretrained
from darex_jax.models.encoder import class_names

HEAD_ROWS = ("classifier.weight", "classifier.out_proj.weight")  # BERT's and RoBERTa's: [labels, D]


class MergeSummary(NamedTuple):
    """The number of weights with a delta, the parameters replaced or added whole, and the total bytes."""

    merged: int
    replaced: list[str]
    bytes: int


def merge_adapter(
    base: str | PathLike[str],
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    overwrite: bool = False,
    ignore_config_fields: Collection[str] = (),
) -> MergeSummary:
    """Writes `base` with an adapter merged into it: each weight `W + scale * B @ A`, rounded once.

    In float32, or float64 if the base or the adapter has a float64 tensor, even without JAX's x64. Memory
    holds one model and the delta of one weight at a time.

    Args:
      base: Hugging Face directory of a BERT, RoBERTa, Llama or Qwen2. A classifier's adapter also matches the
        body of the classifier: the head is then the adapter's, with the names of its classes if it has a
        config.json, as `darex train` writes it, else LABEL_0 and so on.
      adapter: directory in PEFT's format.
      out: the new Hugging Face directory, with the base's dtypes, and the adapter's tokenizer if it has one,
        else the base's; written atomically.
      overwrite: replace what `out` holds.
      ignore_config_fields: see `read_model_config`.
    Raises: ValueError that names every parameter of the adapter which the base lacks or has in another shape,
      or a weight that would not be finite; FileError for unreadable files, an adapter that `load_adapter`
      refuses, or if `out` is an input or already exists.
    """
    loaded = load_adapter(adapter)
    with Checkpoint(base) as checkpoint, SafetensorsFile(Path(adapter) / WEIGHTS) as weights:
        keep_inputs(out, checkpoint, weights)
        infos = [*(tensor.info for tensor in checkpoint.tensors.values()), *weights.tensors.values()]
    check_replaceable(Path(out).resolve(), overwrite)
    if not any(info.dtype == np.float64 for info in infos):
        return _merge(base, adapter, loaded, out, overwrite, ignore_config_fields)
    with jax.enable_x64(True):  # otherwise JAX converts float64 to float32
        return _merge(base, adapter, load_adapter(adapter), out, overwrite, ignore_config_fields)


def _merge(
    base: str | PathLike[str],
    adapter: str | PathLike[str],
    read: tuple[LoraConfig, dict[str, Any], dict[str, Any]],
    out: str | PathLike[str],
    overwrite: bool,
    ignore_config_fields: Collection[str],
) -> MergeSummary:
    config, factors_tree, dense_tree = read
    factors, dense = adapter_factors(factors_tree), flatten_names(dense_tree)
    loaded = load_model(base, ignore_config_fields=ignore_config_fields)
    model, named = _with_head(*loaded, dense, read_config(adapter))
    shapes = {f"{layer}.weight": (b.shape[0], a.shape[1]) for layer, (a, b) in factors.items()}
    shapes |= {name: x.shape for name, x in dense.items()}
    wrong = [f"{name} is not in the base" for name in shapes if name not in named]
    wrong += [
        f"{name} is {list(named[name].shape)} in the base, {list(shape)} in the adapter"
        for name, shape in shapes.items()
        if name in named and named[name].shape != shape
    ]
    if wrong:
        raise DarexError(f"{adapter} does not match {base}: {'; '.join(sorted(wrong))}.")
    named |= {name: x.astype(named[name].dtype) for name, x in dense.items()}
    scales = config.scales(factors_tree)
    for layer, pair in factors.items():
        pieces = {f"{layer}.{factor}": x for factor, x in zip(FACTORS, pair, strict=True)}
        name = f"{layer}.weight"
        named |= apply_delta({name: named[name]}, adapter_delta(pieces, scales))
        if not bool(jnp.isfinite(named[name]).all()):
            raise DarexError(f"{adapter}: '{name}' of {base} would hold infinity or NaN.")
    companions = with_inherited(companion_contents(adapter), companion_contents(base))
    save_params(out, named, model.config.to_hf(), companions_from=companions, overwrite=overwrite)
    return MergeSummary(len(factors), sorted(dense), sum(x.nbytes for x in named.values()))


def _with_head(
    model: Model, params: dict[str, Any], dense: dict[str, Any], stated: Mapping[str, Any]
) -> tuple[Model, dict[str, Any]]:
    """The model with a head of the adapter's size and class names, and its parameters, by name.

    Args: stated: the adapter's own config.json, {} if it has none.
    Raises: ValueError if the adapter does not have all that the base lacks for it.
    """
    rows = next((dense[name].shape[0] for name in HEAD_ROWS if name in dense and dense[name].ndim), None)
    config = model.config
    if not isinstance(config, EncoderConfig) or rows is None:
        return model, flatten_names(params)
    names, problem = class_names(stated), stated.get("problem_type")
    names = names if len(names) == rows else ()
    if not config.headless and config.num_labels == rows and not (names or problem):
        return model, flatten_names(params)
    old = flatten_names(params)
    shapes = build_model(config.as_classifier(rows))[1]
    kept = {f"{config.prefix}.{name}" if config.headless else name for name in old}
    kept = {name for name in kept if not name.startswith("classifier.")}
    missing = sorted(shapes.keys() - kept - dense.keys())
    if missing:
        raise DarexError(f"a classifier also needs {', '.join(missing)}, which neither base nor adapter has.")
    # The adapter replaces the new weights, so the key does not matter.
    model, params = classifier_from_pretrained(model, params, rows, jax.random.key(0), problem, names)
    return model, flatten_names(params)

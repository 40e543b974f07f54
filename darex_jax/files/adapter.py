"""Reads and writes LoRA adapters in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`.

Needs neither PEFT nor any deep-learning library. Unsupported adapters are refused.
"""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from darex_jax.core.errors import DarexError, FileError
from darex_jax.core.lora import LoraConfig, adapter_factors
from darex_jax.core.scope import HEAD
from darex_jax.core.tree import PyTree, flatten_names
from darex_jax.files.atomic import atomic_directory
from darex_jax.files.card import CARD
from darex_jax.files.checkpoint import MANIFEST, StoredTensor, read_json, read_params
from darex_jax.files.safetensors import SafetensorsFile, write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's prefix of every tensor name
BASE_LAYER = ".base_layer."  # in the name of an adapted layer's own weight, if that is stored

# Fields that are read; of `bias` and `init_lora_weights` only values without effect are supported.
READ = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern bias init_lora_weights".split()  # noqa: SIM905
)
# Fields that change no output: origin, training, and target layers, which follow from the tensors.
INERT = frozenset(
    """
    auto_mapping base_model_name_or_path revision peft_version task_type inference_mode lora_dropout
    target_modules exclude_modules layers_to_transform layers_pattern modules_to_save
    loftq_config eva_config corda_config lora_ga_config qalora_group_size megatron_core runtime_config
    """.split()  # noqa: SIM905
)
# Other initialisations also change the base's weights, so the given base would be wrong.
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


def load_adapter(path: str | PathLike[str]) -> tuple[LoraConfig, dict[str, Any], dict[str, Any]]:
    """Reads an adapter of linear layers (not of embeddings) written by PEFT or `save_adapter`.

    Args: path: directory with adapter_config.json and adapter_model.safetensors.
    Returns:
      its config, whose `targets` are the full names of the adapted layers;
      the adapter, a nested dict of A [r, D] and B [O, r] in the file's dtypes;
      fully trained parameters that replace the base's (PEFT's `modules_to_save`, such as a classifier), a
      nested dict under the base's names, or {}.
    Raises: FileError for a missing or damaged file, an unsupported config (DoRA, biases, transposed layers,
      initialisations that change the base, ...), or a tensor that is not a factor of a linear layer, has no
      partner or another rank than in the config. Pickles are never read.
    """
    path = Path(path)
    stated = read_json(path / CONFIG)
    _refuse_unsupported(path / CONFIG, stated)
    if not (path / WEIGHTS).exists():
        pickled = (path / "adapter_model.bin").exists()
        hint = " It has adapter_model.bin, a pickle, which is never read: convert it." if pickled else ""
        raise FileError(f"{path}: has no {WEIGHTS}.{hint}")
    with SafetensorsFile(path / WEIGHTS) as file:
        adapter, dense = _sort_tensors(file)
        try:
            layers = adapter_factors({name: tensor.info for name, tensor in adapter.items()})
            config = LoraConfig(
                rank=stated.get("r", 8),  # PEFT's defaults
                alpha=stated.get("lora_alpha", 8),
                targets=tuple(sorted(layers)),
                rslora=stated.get("use_rslora", False),
                rank_pattern=stated.get("rank_pattern") or {},
                alpha_pattern=stated.get("alpha_pattern") or {},
            )
            config.scales({name: tensor.info for name, tensor in adapter.items()})
        except ValueError as error:
            raise FileError(f"{path}: {error}") from error
        return config, read_params(adapter, None, None), read_params(dense, None, None)


def save_adapter(
    path: str | PathLike[str],
    config: LoraConfig,
    adapter: PyTree,
    dense: PyTree | None = None,
    *,
    embeddings: Mapping[str, tuple[Any, Any]] | None = None,
    task_type: str | None = None,
    base: str | None = None,
    overwrite: bool = False,
    manifest: Mapping[str, Any] | None = None,
    card: str | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a directory that `PeftModel.from_pretrained` loads, atomically.

    Args:
      config, adapter: from `add_adapters`, `load_adapter`; the adapter may be pruned.
      dense: fully trained parameters under the base's names: `{"classifier": params["classifier"]}`.
      embeddings: A [r, rows] and B [features, r] of adapted embeddings, by layer name.
      task_type: PEFT's name of the model class: "SEQ_CLS", "CAUSAL_LM"; None leaves it open.
      base: path or name of the base, for information.
      overwrite: replace `path` if it exists.
      manifest: of the run that made the adapter; written as darex_manifest.json. card: written as README.md.
      model_config: config.json of the model with the adapter, whose classes may have other names than the
        base's; `merge_adapter` reads it.
    Raises: ValueError if a layer of the adapter is not in the config's targets, has another rank, or is in a
      module that is saved whole; FileError if `path` exists and `overwrite` is not set.
    """
    extra, own, whole = check_savable(config, adapter, dense, task_type)
    content = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }
    stored = {BASE_LAYER.join(n.rsplit(".", 1)) if n in own else n: x for n, x in extra.items()}
    tensors = {PREFIX + name: x for name, x in {**flatten_names(adapter), **stored}.items()}
    for name, factors in (embeddings or {}).items():
        tensors |= {f"{PREFIX}{name}.lora_embedding_{w}": x for w, x in zip("AB", factors, strict=True)}
    with atomic_directory(path, overwrite) as folder:
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        if model_config is not None:
            (folder / "config.json").write_text(json.dumps(dict(model_config), indent=2) + "\n")
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        if manifest is not None:
            (folder / MANIFEST).write_text(json.dumps(dict(manifest), indent=2) + "\n")
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def check_savable(
    config: LoraConfig, adapter: PyTree, dense: PyTree | None, task_type: str | None
) -> tuple[dict[str, Any], set[str], list[str]]:
    """Checks that `save_adapter` can save an adapter; raises what it would raise.

    Returns: `dense` by name; those of its names that belong to an adapted layer; the modules saved whole.
    """
    extra = flatten_names(dense or {})
    layers = config.scales(adapter)
    own = {name for name in extra if name.rpartition(".")[0] in layers}  # of a layer that also has an adapter
    whole = sorted({_module_of(name) for name in extra.keys() - own})
    # PEFT assumes that a classifier's head is saved whole.
    closed = [*whole, "classifier", "score"] if task_type == "SEQ_CLS" else whole
    wrong = []
    for layer in layers:
        if not config.matches(layer):
            wrong.append(f"'{layer}' is not among the config's targets, {config.targets!r}")
        wrong += [f"'{layer}' is part of '{m}', which is saved whole" for m in closed if _inside(layer, m)]
    wrong += [f"'{name}' is a LoRA factor, not a parameter of the base" for name in extra if _is_lora(name)]
    if wrong:
        raise DarexError(f"this adapter cannot be saved: {'; '.join(wrong)}.")
    return extra, own, whole


def _refuse_unsupported(file: Path, stated: Mapping[str, Any]) -> None:
    wrong = []
    if stated.get("peft_type") != "LORA":
        wrong.append(f"peft_type is {stated.get('peft_type')!r:.80}, supported: 'LORA'")
    if stated.get("bias", "none") != "none":
        wrong.append(f"bias is {stated['bias']!r:.80}, supported: 'none'")
    if stated.get("init_lora_weights", True) not in INITIALISATIONS:
        wrong.append(
            f"init_lora_weights is {stated['init_lora_weights']!r:.80}, which also changes the base; PEFT "
            "converts such an adapter with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if not isinstance(stated.get("use_rslora", False), bool):
        wrong.append(f"use_rslora is {stated['use_rslora']!r:.80}, expected true or false")
    wrong += [
        f"{name} is {stated[name]!r:.80}, expected an object"
        for name in ("rank_pattern", "alpha_pattern")
        if not isinstance(stated.get(name) or {}, dict)
    ]
    # Every other field changes the computation if it is set.
    wrong += [
        f"{name!r:.80} is {value!r:.80}, which is not supported"
        for name, value in stated.items()
        if name not in READ | INERT and value
    ]
    if wrong:
        raise FileError(f"{file}: {'; '.join(wrong)}.")


def _sort_tensors(file: SafetensorsFile) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The factors, and the parameters that replace the base's, under the base's names."""
    adapter, dense, wrong = {}, {}, []
    for stored_name, info in file.tensors.items():
        name = stored_name.removeprefix(PREFIX)
        tensor = StoredTensor(file, stored_name, info)
        if name == stored_name:
            wrong.append(f"'{stored_name}' does not begin with {PREFIX}")
        elif not tensor.floating:
            wrong.append(f"'{stored_name}' is {info.dtype}, not floating")
        elif name.endswith((".lora_A.weight", ".lora_B.weight")):
            adapter[name] = tensor
        elif _is_lora(name):  # an embedding's factors, DoRA's magnitudes, a factor's bias
            wrong.append(f"'{stored_name}' is not a factor of a linear layer, which is not supported")
        elif (name := name.replace(BASE_LAYER, ".")) in dense:
            wrong.append(f"'{name}' is stored twice")
        else:
            dense[name] = tensor
    if not adapter:
        wrong.append("it has no factors of linear layers")
    if wrong:
        raise FileError(f"{file.path}: {'; '.join(wrong)}.")
    return adapter, dense


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _module_of(name: str) -> str:
    """The module that is saved whole because of a parameter: its layer, or the entire task head."""
    return name.split(".")[0] if HEAD.search(name) else name.rpartition(".")[0]


def _inside(layer: str, module: str) -> bool:
    return f".{module}." in f".{layer}."

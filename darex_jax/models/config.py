"""Reading a config.json strictly: what the model computes is honoured, what it cannot compute is refused."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from darex_jax.core.errors import DarexError

# Fields of any family that change no number: carried along, never read.
INERT = frozenset(
    """
    transformers_version torch_dtype dtype
    tokenizer_class id2label label2id num_labels problem_type finetuning_task task_specific_params
    bos_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    use_cache gradient_checkpointing chunk_size_feed_forward tie_encoder_decoder
    output_attentions output_hidden_states output_past return_dict torchscript use_bfloat16
    """.split()  # noqa: SIM905
)


def read_fields(
    cls: Any,
    hf: Mapping[str, Any],
    *,
    computed: Collection[str],
    fixed: Mapping[str, Any],
    inert: Collection[str],
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Sorts the fields of a config.json.

    Args:
      cls: the config's dataclass; its field names are config.json's own, but for `computed`.
      computed: fields of `cls` that are made from others.
      fixed: fields with the one value the model computes.
      inert: fields that change no number.
    Returns: the values of the fields of `cls`; all other fields, to be carried along; and what is wrong, one
      sentence part each: required fields that are missing, unsupported values, unknown fields.
    """
    own = {f.name: f for f in dataclasses.fields(cls) if f.name not in computed}
    required = [name for name, f in own.items() if f.default is dataclasses.MISSING]
    wrong = [f"{name} is missing" for name in required if hf.get(name) is None]
    wrong += [
        f"{name} is {hf[name]!r}, supported: {value!r}"
        for name, value in fixed.items()
        if hf.get(name, value) != value
    ]
    known = {*own, *fixed, *inert}
    # A leading underscore marks what transformers notes for itself.
    wrong += [f"{name} is unknown" for name in hf if name not in known and not name.startswith("_")]
    values = {name: hf[name] for name in own if name in hf}
    if isinstance(values.get("architectures"), list):
        values["architectures"] = tuple(values["architectures"])
    return values, {name: value for name, value in hf.items() if name not in own}, wrong


def refuse(family: str, wrong: Collection[str]) -> None:
    """Raises: ValueError that names all that is wrong, if anything is."""
    if wrong:
        raise DarexError(f"{family} config: " + "; ".join(wrong) + ".")

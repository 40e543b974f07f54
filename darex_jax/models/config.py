"""Strict reading of config.json: every field is either supported, known to change no output, or refused."""

import dataclasses
import re
import sys
import types
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from darex_jax.core.errors import DarexError, DarexWarning

# Fields of all families that change no output: kept, never read.
INERT = frozenset(
    """
    transformers_version torch_dtype dtype
    tokenizer_class id2label label2id num_labels problem_type finetuning_task task_specific_params
    bos_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    use_cache gradient_checkpointing chunk_size_feed_forward tie_encoder_decoder
    output_attentions output_hidden_states output_past return_dict torchscript use_bfloat16
    """.split()  # noqa: SIM905
)
# String fields with such names describe a model's origin: version, date, path, author.
PROVENANCE = re.compile(
    r"(^|_)(version|date|time|timestamp|path|dir|url|uri|repo|revision|commit|licen[cs]e|author)$"
    r"|(^|_)name_or_path$|^((base_)?model|dataset|run|project|experiment|organi[sz]ation)_(name|id)$|^name$"
)
# Strings and booleans with such names are metadata of fine-tuning tools.
TOOLS = ("unsloth_", "axolotl_", "llamafactory_", "wandb_", "trl_")
WHOLE, WINDOWED = "full_attention", "sliding_attention"  # values of `layer_types`
SHOWN = 20  # most problems that one error lists


@dataclass(frozen=True)
class Bounds:
    """The valid range of a number in a config.json, and its description in errors."""

    low: float
    high: float
    description: str


_INT = 2**31 - 1  # largest axis of a model, and largest index on a device
Size = Annotated[int, Bounds(1, _INT, f"an integer from 1 to {_INT}")]
Depth = Annotated[int, Bounds(1, 10_000, "an integer from 1 to 10000")]  # layers; each is traced
Count = Annotated[int, Bounds(0, _INT, f"an integer from 0 to {_INT}")]
Token = Annotated[int, Bounds(-_INT, _INT, "a token id")]
Number = Annotated[float, Bounds(0.0, sys.float_info.max, "a finite number of at least 0")]
Positive = Annotated[float, Bounds(sys.float_info.min, sys.float_info.max, "a finite number above 0")]


def read_fields(
    cls: Any,
    hf: Mapping[str, Any],
    *,
    computed: Collection[str],
    fixed: Mapping[str, Any],
    inert: Collection[str],
    read: Collection[str],
    ignored: Collection[str],
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Sorts the fields of a config.json.

    Args:
      cls: the config's dataclass; its field names are config.json's, except `computed`, and its annotations
        define the valid values.
      computed: fields of `cls` that are derived from others.
      fixed: fields with the one supported value; null is equivalent to it.
      inert: fields that change no output.
      read: fields that the caller reads itself.
      ignored: fields that the user declares to change no output: not checked, whether `fixed` or unknown.
    Returns: the values of the fields of `cls`; all other fields, to be kept; and a list of problems: missing
      required fields, values of another type, unsupported values, unknown fields that may change an output.
    Warns: for unknown fields with an empty value.
    """
    own = {f.name: f for f in dataclasses.fields(cls) if f.name not in computed}
    required = [name for name, f in own.items() if f.default is dataclasses.MISSING]
    wrong = [f"{name} is missing" for name in required if hf.get(name) is None]
    kinds = {name: kind for name, kind in kinds_of(cls).items() if name in own}
    wrong += type_faults({name: hf[name] for name in own if hf.get(name) is not None}, kinds)
    # null for a field that cannot be null means its default, as if it were missing.
    absent = {name for name in own if name in hf and hf[name] is None and not _fits(None, kinds[name])}
    wrong += [
        f"{name} is read by the model and cannot be ignored" for name in ignored if name in {*own, *read}
    ]
    unsupported = [
        f"{name} is {shown(hf[name])}, supported: {value!r}"
        for name, value in fixed.items()
        if name not in ignored and hf.get(name) not in (None, value)
    ]
    known = {*own, *fixed, *inert, *read, *ignored}
    # A leading underscore marks transformers' internal fields.
    unknown = {name: value for name, value in hf.items() if name not in known and not name.startswith("_")}
    for name, value in unknown.items():
        if value is None or changes_nothing(name, value):
            continue
        if value is False or value in ("", [], {}):
            warnings.warn(
                f"config.json has the unknown field {shown(name)} = {shown(value)}, which is ignored.",
                DarexWarning,
                stacklevel=4,
            )
        else:
            unsupported.append(f"{name:.80} is unknown")
    if unsupported:
        unsupported[-1] += " (--ignore-config-field NAME accepts a field that changes no output)"
    wrong += unsupported
    values = {name: hf[name] for name in own if name in hf and name not in absent}
    if isinstance(values.get("architectures"), list):
        values["architectures"] = tuple(values["architectures"])
    return values, {name: value for name, value in hf.items() if name not in own or name in absent}, wrong


def changes_nothing(name: str, value: Any) -> bool:
    """Whether an unknown field only describes a model's origin."""
    tool = name.startswith(TOOLS) and isinstance(value, str | bool)
    return tool or (isinstance(value, str) and PROVENANCE.search(name) is not None)


def kinds_of(cls: Any) -> dict[str, Any]:
    """The annotated types of a dataclass's fields, by name."""
    return get_type_hints(cls, include_extras=True)


def type_faults(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[str]:
    """Type errors of values read from JSON, one message each.

    Args: kinds: by name; bool, str, the kinds above, lists or tuples of them, None, and unions.
    """
    return [
        f"{name} is {shown(value)}, expected {_description(kinds[name])}"
        for name, value in values.items()
        if not _fits(value, kinds[name])
    ]


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Annotated:
        plain, bounds = parts
        number = isinstance(value, int) or (plain is float and isinstance(value, float))
        return number and not isinstance(value, bool) and bounds.low <= value <= bounds.high
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    return isinstance(value, kind)


def _description(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_description(part) for part in parts if part is not types.NoneType)
    if origin is Annotated:
        return parts[1].description
    if origin in (list, tuple):
        return f"a list, each {_description(parts[0])}"
    return {bool: "true or false", str: "a string", dict: "an object"}[kind]


def layer_type_faults(types: Collection[str], layers: int) -> list[str]:
    """Problems with `layer_types`, the attention type of each of `layers` layers."""
    if set(types) <= {WHOLE, WINDOWED} and len(types) == layers:
        return []
    return [f"layer_types is {shown(types)}, expected {layers} of {WHOLE}, {WINDOWED}"]


def shown(value: Any) -> str:
    """A value from a file, cut to 80 characters for a message."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return "an integer of over 4,300 digits"


def refuse(family: str, wrong: Collection[str]) -> None:
    """Raises: ValueError that lists all problems, if there are any."""
    if wrong:
        listed = list(wrong)[:SHOWN]
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise DarexError(f"{family} config: " + "; ".join([*listed, *more]) + ".")

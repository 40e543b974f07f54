"""Reading a config.json strictly: what the model computes is honoured, what it cannot compute is refused."""

import dataclasses
import re
import sys
import types
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from darex_jax.core.errors import DarexError, DarexWarning

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
# Texts under such names say where a model comes from: a version, a date, a path, whose it is.
PROVENANCE = re.compile(
    r"(^|_)(version|date|time|timestamp|path|dir|url|uri|repo|revision|commit|licen[cs]e|author)$"
    r"|(^|_)name_or_path$|^((base_)?model|dataset|run|project|experiment|organi[sz]ation)_(name|id)$|^name$"
)
# Texts and switches under such names are notes of tools for fine-tuning about themselves.
TOOLS = ("unsloth_", "axolotl_", "llamafactory_", "wandb_", "trl_")
WHOLE, WINDOWED = "full_attention", "sliding_attention"  # what `layer_types` holds
SHOWN = 20  # faults that one error lists


@dataclass(frozen=True)
class Bounds:
    """What a number of a config.json may be, and how that is told."""

    low: float
    high: float
    told: str


_INT = 2**31 - 1  # an axis of a model, and what an index on a device may be
Size = Annotated[int, Bounds(1, _INT, f"an integer from 1 to {_INT}")]
Depth = Annotated[int, Bounds(1, 10_000, "an integer from 1 to 10000")]  # layers; each is traced
Count = Annotated[int, Bounds(0, _INT, f"an integer from 0 to {_INT}")]
Token = Annotated[int, Bounds(-_INT, _INT, "the number of a token")]
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
      cls: the config's dataclass; its field names are config.json's own, but for `computed`, and its
        annotations say what their values may be.
      computed: fields of `cls` that are made from others.
      fixed: fields with the one value the model computes; null is that value, too.
      inert: fields that change no number.
      read: fields that the caller reads itself.
      ignored: fields that somebody says change none: neither `fixed` nor unknown ones are then refused.
    Returns: the values of the fields of `cls`; all other fields, to be carried along; and what is wrong, one
      sentence part each: required fields that are missing, values of another type, unsupported values,
      unknown fields that may change what a model computes.
    Warns: of unknown fields that are set to nothing.
    """
    own = {f.name: f for f in dataclasses.fields(cls) if f.name not in computed}
    required = [name for name, f in own.items() if f.default is dataclasses.MISSING]
    wrong = [f"{name} is missing" for name in required if hf.get(name) is None]
    kinds = {name: kind for name, kind in kinds_of(cls).items() if name in own}
    wrong += type_faults({name: hf[name] for name in own if hf.get(name) is not None}, kinds)
    # null where a value is possible but null is not: the default, as if the field were absent.
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
    # A leading underscore marks what transformers notes for itself.
    unknown = {name: value for name, value in hf.items() if name not in known and not name.startswith("_")}
    for name, value in unknown.items():
        if value is None or changes_nothing(name, value):
            continue
        if value is False or value in ("", [], {}):
            warnings.warn(
                f"config.json has the unknown field {shown(name)}, which is {shown(value)}: it is not read.",
                DarexWarning,
                stacklevel=4,
            )
        else:
            unsupported.append(f"{name:.80} is unknown")
    if unsupported:
        unsupported[-1] += " (--ignore-config-field NAME takes a field that changes no output)"
    wrong += unsupported
    values = {name: hf[name] for name in own if name in hf and name not in absent}
    if isinstance(values.get("architectures"), list):
        values["architectures"] = tuple(values["architectures"])
    return values, {name: value for name, value in hf.items() if name not in own or name in absent}, wrong


def changes_nothing(name: str, value: Any) -> bool:
    """Whether an unknown field says where a model comes from, and nothing of what it computes."""
    tool = name.startswith(TOOLS) and isinstance(value, str | bool)
    return tool or (isinstance(value, str) and PROVENANCE.search(name) is not None)


def kinds_of(cls: Any) -> dict[str, Any]:
    """What the values of a dataclass may be, by their names."""
    return get_type_hints(cls, include_extras=True)


def type_faults(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[str]:
    """What is wrong with values that came from JSON, one sentence part each.

    Args: kinds: by name; bool, str, the kinds above, lists or tuples of them, None, and unions.
    """
    return [
        f"{name} is {shown(value)}, expected {_told(kinds[name])}"
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


def _told(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_told(part) for part in parts if part is not types.NoneType)
    if origin is Annotated:
        return parts[1].told
    if origin in (list, tuple):
        return f"a list, each {_told(parts[0])}"
    return {bool: "true or false", str: "a text", dict: "an object"}[kind]


def layer_type_faults(types: Collection[str], layers: int) -> list[str]:
    """What is wrong with `layer_types`, which says of each of so many layers how far it sees."""
    if set(types) <= {WHOLE, WINDOWED} and len(types) == layers:
        return []
    return [f"layer_types is {shown(types)}, expected {layers} of {WHOLE}, {WINDOWED}"]


def shown(value: Any) -> str:
    """A value of a file in a message: its first 80 characters."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


def refuse(family: str, wrong: Collection[str]) -> None:
    """Raises: ValueError that names all that is wrong, if anything is."""
    if wrong:
        listed = list(wrong)[:SHOWN]
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise DarexError(f"{family} config: " + "; ".join([*listed, *more]) + ".")

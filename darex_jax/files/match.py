"""Matches the parameters of a fine-tuned model with its base's, from file headers only."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from darex_jax.core.errors import FileError
from darex_jax.core.scope import (
    DECODERS,
    EMBEDDING,
    HEAD,
    NUMBER,
    OPTIONAL,
    TABLE,
    TIED,
    UNUSED,
    Scope,
    is_tied,
    known_family,
)
from darex_jax.files.checkpoint import Checkpoint

MOST_PREFIXES = 20  # most name prefixes that are tried


@dataclass
class Match:
    """The parameters of a fine-tuned model, by treatment. Names are the fine-tuned model's.

    `pruned` and `dense` hold floating parameters in and out of scope; `extra_rows` counts the rows that a
    pruned parameter has beyond its base; `base_names` gives a parameter's name in the base.
    """

    pruned: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    extra_rows: dict[str, int] = field(default_factory=dict)
    base_names: dict[str, str] = field(default_factory=dict)
    base_only: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def raise_if_faulty(self) -> None:
        """Raises: FileError with the first mismatches, in one line."""
        if self.faults:
            more = len(self.faults) - 5
            rest = f" And {more} more; darex check BASE FINE lists them." if more > 0 else ""
            raise FileError(f"the models do not match: {' '.join(self.faults[:5])}{rest}")


def match_checkpoints(
    base: Checkpoint, fine: Checkpoint, scope: Scope, rename: Callable[[str], str] | None = None
) -> Match:
    """Pairs the parameters of two checkpoints by name and shape, without reading weights.

    A base saved without its head model's prefix (`embeddings...`) matches a fine-tuned model that has it
    (`bert.embeddings...`), and vice versa.

    Args: rename: fine-tuned name -> base name; None detects a prefix that only one of them has.
    """
    match = Match()
    rename = rename or _base_name(base, fine)
    known = known_family(fine.config.get("model_type") or base.config.get("model_type"))
    copy = _pruned_copy(fine, scope)
    scales = _beside_codes(fine)
    if scales:
        match.warnings.append(
            f"it is quantised: {len(scales)} parameters beside whole numbers, such as '{min(scales)}', are "
            "kept as they are in the fine-tuned model."
        )
    for name, tensor in fine.tensors.items():
        if name == copy:
            continue
        base_name = rename(name)
        stored = base.tensors.get(base_name)
        if stored is not None:
            match.base_names[name] = base_name
        if stored is not None and stored.floating != tensor.floating:
            kinds = f"{stored.info.dtype} in the base and {tensor.info.dtype} in the fine-tuned model"
            match.faults.append(f"'{name}' is {kinds}: floating in only one of them.")
        elif not tensor.floating:
            match.buffers.append(name)
        elif stored is None:
            if _may_lack(name, known):
                match.dense.append(name)
            elif not UNUSED.search(name):
                match.faults.append(f"'{name}' is in the fine-tuned model only.")
        else:
            pruned = scope(name) and name not in scales
            _match_shapes(match, name, stored.info.shape, tensor.info.shape, pruned, _of_head(name, known))
    paired = Counter(match.base_names.values())
    for base_name, count in paired.items():
        if count > 1:
            twins = sorted(name for name, b in match.base_names.items() if b == base_name)
            match.faults.append(f"'{base_name}' of the base matches both '{twins[0]}' and '{twins[1]}'.")
    for name, tensor in base.tensors.items():
        if name not in paired:
            match.base_only.append(name)
            if tensor.floating and not (_may_lack(name, known) or UNUSED.search(name)):
                match.faults.append(f"'{name}' is in the base only.")
    _match_configs(match, base, fine)
    if not match.pruned and not match.faults:
        match.faults.append("nothing would be pruned: no parameter of both models is in scope.")
    return match


def _beside_codes(checkpoint: Checkpoint) -> set[str]:
    """The floating parameters that belong to quantised weights (FP8, GPTQ, bitsandbytes): scales and zeros,
    which have a meaning with the fine-tuned model's codes only.

    Codes are matrices of float8 or of integers of 8 or 32 bits. What is quantised with them has their module
    in its name, or their own name.
    """
    codes = {
        name
        for name, tensor in checkpoint.tensors.items()
        if not tensor.floating and len(tensor.info.shape) > 1 and _is_code(tensor.info.dtype)
    }
    owners = codes | {name.rpartition(".")[0] for name in codes if "." in name}
    return {
        name
        for name, tensor in checkpoint.tensors.items()
        if tensor.floating and name.rpartition(".")[0] in owners
    }


def _is_code(dtype: np.dtype) -> bool:
    return dtype.kind != "b" and (dtype.itemsize == 1 or dtype == np.int32)


def _of_head(name: str, known: bool) -> bool:
    """Whether a parameter may belong to a head; in unknown families, anything outside of numbered blocks."""
    return bool(HEAD.search(name)) or not (known or NUMBER.search(name))


def _may_lack(name: str, known: bool) -> bool:
    """Whether only one of two models may have this parameter: a head's or a pooler's."""
    return bool(OPTIONAL.search(name)) or _of_head(name, known)


def _pruned_copy(fine: Checkpoint, scope: Scope) -> str | None:
    """The name of a head that is stored although it is tied to embeddings that are pruned: one parameter."""
    tied = is_tied(fine.config) and fine.config.get("model_type") in DECODERS
    return TIED if tied and scope(TABLE) and {TIED, TABLE} <= fine.tensors.keys() else None


def _match_shapes(
    match: Match, name: str, base: tuple[int, ...], fine: tuple[int, ...], in_scope: bool, head: bool
) -> None:
    more_rows = len(base) == len(fine) == 2 and base[1] == fine[1] and fine[0] > base[0]
    if base == fine or (more_rows and EMBEDDING.search(name)):
        (match.pruned if in_scope else match.dense).append(name)
        if base != fine:
            match.extra_rows[name] = fine[0] - base[0]
    elif head:
        match.dense.append(name)
        del match.base_names[name]  # a different head: no delta
    else:
        match.faults.append(f"'{name}' is {list(base)} in the base and {list(fine)} in the fine-tuned model.")


def _base_name(base: Checkpoint, fine: Checkpoint) -> Callable[[str], str]:
    """The map from fine-tuned to base names, with the prefix that matches most names."""
    renames: list[Callable[[str], str]] = [lambda name: name]
    renames += [partial(_without, prefix) for prefix in _prefixes(fine)]
    renames += [prefix.__add__ for prefix in _prefixes(base)]
    return max(renames, key=lambda rename: sum(rename(name) in base.tensors for name in fine.tensors))


def _prefixes(checkpoint: Checkpoint) -> list[str]:
    """The most common name prefixes, such as `bert.`."""
    first = Counter(f"{name.split('.')[0]}." for name in checkpoint.tensors if "." in name)
    return [prefix for prefix, _ in first.most_common(MOST_PREFIXES)]


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _match_configs(match: Match, base: Checkpoint, fine: Checkpoint) -> None:
    kinds = base.config.get("model_type"), fine.config.get("model_type")
    if None not in kinds and kinds[0] != kinds[1]:
        match.faults.append(
            f"the base is a {kinds[0]!s:.80} model and the fine-tuned one a {kinds[1]!s:.80} model."
        )
    if is_tied(fine.config) and TIED in fine.tensors:
        kept = "both copies are kept" if TIED in (*match.dense, *match.pruned) else "the copy is left out"
        match.warnings.append(f"the head is tied to the embeddings but also stored: {kept}.")
    for key in ("hidden_act", "layer_norm_eps", "rms_norm_eps", "rope_theta", "num_attention_heads"):
        values = base.config.get(key), fine.config.get(key)
        if None not in values and values[0] != values[1]:
            match.warnings.append(f"config.json differs in {key}: {values[0]!r:.80} and {values[1]!r:.80}.")

"""Which parameters are pruned: predicates on Hugging Face names. No array is looked at."""

import re
from collections.abc import Callable, Iterable

from darex_jax.core.errors import DarexError

ENCODERS = ("bert", "roberta")
DECODERS = ("llama", "qwen2")

# Layers that belong to a task, so that one model may have them and the other not. A pooler counts for
# the matching only: where both models have one it is part of the body.
HEAD = re.compile(r"^(classifier|cls|lm_head|qa_outputs|score)(\.|$)")
OPTIONAL = re.compile(r"(^|\.)pooler\.")
DECODER_LAYER = re.compile(r"(^|\.)(mlp|self_attn)\.")

Scope = Callable[[str], bool]


def family_scope(model_type: str | None) -> Scope:
    """The default scope of a model family (spec, section 4): True for the parameters that are pruned.

    Encoders: everything but the task head. Decoders: `mlp` and `self_attn`.
    Raises: ValueError for another family.
    """
    if model_type in ENCODERS:
        return lambda name: not HEAD.search(name)
    if model_type in DECODERS:
        return lambda name: bool(DECODER_LAYER.search(name))
    known = ", ".join((*ENCODERS, *DECODERS))
    raise DarexError(
        f"no default scope for model_type {model_type!r} (known: {known}); "
        "say what to prune with --include REGEX."
    )


def choose_scope(model_type: str | None, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Scope:
    """The family's scope, overridden by patterns searched in the parameter's name.

    `exclude` wins over `include`; `include` given, only what it matches is pruned.
    Raises: ValueError for a pattern that is no regular expression.
    """
    try:
        included = [re.compile(pattern) for pattern in include]
        excluded = [re.compile(pattern) for pattern in exclude]
    except re.error as error:
        raise DarexError(f"{error.pattern!r} is not a regular expression: {error}.") from error
    default = (lambda name: True) if included else family_scope(model_type)

    def scope(name: str) -> bool:
        if any(pattern.search(name) for pattern in excluded):
            return False
        return any(p.search(name) for p in included) if included else default(name)

    return scope

"""Which parameters are pruned: predicates on Hugging Face names. No array is read."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from darex_jax.core.errors import DarexError

ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")

# Task-specific layers, which one model may have and the other not. A pooler is listed for the matching
# only: if both models have one it is part of the body.
HEAD = re.compile(r"^(classifier|cls|head|lm_head|qa_outputs|score)(\.|$)")
OPTIONAL = re.compile(r"(^|\.)pooler\.|^decoder\.(weight|bias)$")
TIED, TABLE = "lm_head.weight", "model.embed_tokens.weight"  # one parameter, if config.json ties them
UNUSED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # stored by old Llamas, read by no model
TIED_BY_DEFAULT = ("gemma3_text",)  # families whose config.json need not say so
DECODER_LAYER = re.compile(r"(^|\.)(mlp|self_attn)\.")
NUMBER = re.compile(r"(?:(?<=[._])|^)\d+(?=\.)")  # of a block or an expert, in a parameter's name
EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared)\.")

Scope = Callable[[str], bool]

LONGEST_PATTERN = 10_000  # characters


def compile_pattern(pattern: str) -> Any:
    """Compiles a user's regular expression; the result has `search`, `match` and `fullmatch` like `re`'s.

    RE2 matches in linear time, where Python's engine may take exponential time; its syntax is Perl's without
    look-around and back-references (github.com/google/re2/wiki/Syntax). A match has no groups.

    Raises: ValueError, in one line, for a pattern that RE2 does not support.
    """
    import re2  # imported here: only user patterns need it

    options = re2.Options()
    options.log_errors, options.never_capture = False, True
    try:
        if len(pattern) > LONGEST_PATTERN:
            raise re2.error(f"it has {len(pattern):,} characters, at most {LONGEST_PATTERN:,} are accepted")
        if count := re.search(r"\{\d*,?\d{9,}", pattern):  # which RE2 would read as plain text
            raise re2.error(f"invalid repetition size: {count.group():.20}...")
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        why = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        raise DarexError(
            f"the pattern {pattern!r:.80} is not supported by RE2: {why:.80}. It is a regular expression "
            "without look-ahead, look-behind and back-references; counts {n} go up to 1000."
        ) from error


def family_scope(model_type: str | None, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Scope:
    """The default scope of a model (spec, section 4): True for the parameters that are pruned.

    Encoders: everything but the task head. Decoders: `mlp` and `self_attn`. Other families:
    `repeated_matrices`.

    Args: shapes: of the model's floating parameters by name.
    Raises: ValueError for another family without shapes.
    """
    if model_type in ENCODERS:
        return lambda name: not HEAD.search(name)
    if model_type in DECODERS:
        return lambda name: bool(DECODER_LAYER.search(name))
    if shapes is not None:
        return repeated_matrices(shapes).__contains__
    known = ", ".join((*ENCODERS, *DECODERS))
    raise DarexError(
        f"no default scope for model_type {model_type!r} (known: {known}); "
        "choose the parameters to prune with --include REGEX."
    )


def repeated_matrices(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """The matrices of a model's repeated blocks, whatever the model: linear layers, experts, convolutions.

    They have two axes or more, a block number in their name, and a counterpart in another block. If no block
    is repeated: all with a number, or else all matrices. Embeddings and the head are excluded.
    """
    found = [
        name
        for name, shape in shapes.items()
        if len(shape) > 1 and not (EMBEDDING.search(name) or HEAD.search(name))
    ]
    numbered = [name for name in found if NUMBER.search(name)]
    twins = Counter(map(starred, numbered))
    repeated = [name for name in numbered if twins[starred(name)] > 1]
    return frozenset(repeated or numbered or found)


def starred(name: str) -> str:
    """A parameter's name with `*` for the numbers of blocks and experts."""
    return NUMBER.sub("*", name)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config.json ties the head to the embeddings."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") in TIED_BY_DEFAULT))


def known_family(model_type: str | None) -> bool:
    """Whether the family has its own default scope."""
    return model_type in ENCODERS + DECODERS


def choose_scope(
    model_type: str | None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Scope:
    """The model's scope (`family_scope`), overridden by patterns searched in the parameter's name.

    `exclude` takes precedence over `include`; with `include`, only the parameters it matches are pruned.
    What no model reads (`UNUSED`) never is.
    Raises: ValueError for a pattern that `compile_pattern` refuses.
    """
    included = [compile_pattern(pattern) for pattern in include]
    excluded = [compile_pattern(pattern) for pattern in exclude]
    default = (lambda name: True) if included else family_scope(model_type, shapes)

    def scope(name: str) -> bool:
        if UNUSED.search(name) or any(pattern.search(name) for pattern in excluded):
            return False
        return any(p.search(name) for p in included) if included else default(name)

    return scope

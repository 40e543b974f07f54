"""Exports a delta for other tools: as a PEFT adapter, or as replacement values at flat indices."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from darex_jax.core.errors import DarexError, FileError
from darex_jax.core.lora import LoraConfig
from darex_jax.core.scope import HEAD, is_tied
from darex_jax.core.tree import unflatten_names
from darex_jax.files.adapter import save_adapter
from darex_jax.files.artifact import MOST_VERIFIED_ENTRIES, DeltaFile
from darex_jax.files.card import hub_name, model_card
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.contents import contents
from darex_jax.files.restore import check_base_tensors, restored_params, restored_tensor
from darex_jax.files.safetensors import DTYPES, as_bytes, write_tensors
from darex_jax.files.stream import keep_inputs
from darex_jax.methods.svd import decompose
from darex_jax.parts.columns import Columns
from darex_jax.parts.low_rank import LowRank
from darex_jax.parts.total import Parts
from darex_jax.parts.values import reciprocal

TRIED = (8, 32, 128)  # ranks whose loss an error reports
SAMPLED = 8  # matrices used for that estimate
TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM"}
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # families with Conv1D layers
WHOLE, INDICES, VALUES = "tensors/", "indices/", "values/"  # name prefixes in a patch


class Exported(NamedTuple):
    """Summary of an exported adapter.

    Attributes:
      ranks: by parameter; exact if no rank was given.
      whole: parameters stored whole: norms, biases, heads.
      lost: the share of the delta's squared norm lost by reducing the rank.
    """

    ranks: dict[str, int]
    whole: list[str]
    lost: float


def export_adapter(
    delta: DeltaFile,
    out: str | os.PathLike[str],
    *,
    base: Checkpoint | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes the delta as an adapter directory that `peft.PeftModel.from_pretrained` loads.

    Low-rank parts and columns become factors, with one rank per matrix; pruned norms and biases, and
    parameters that the artifact keeps whole, are saved with their fine-tuned values.

    Args:
      base: the delta's base; needed for norms and biases, for which PEFT stores base plus delta.
      rank: reduce every matrix to at most this rank by SVD, whatever its parts.
    Raises: DarexError for parts that are not low-rank if no rank is given (with the loss at some ranks); for
      norms or biases without a base, or of a family with transposed layers; FileError for a damaged file or
      another base.
    """
    keep_inputs(out, delta, *([] if base is None else [base]))
    if rows := delta.names("rows"):
        raise FileError(f"{delta.path}: has extra rows for {rows[0]}, which an adapter cannot store.")
    if rank is not None and rank < 1:
        raise DarexError(f"rank must be at least 1, got {rank}.")
    shapes = {name: entry["shape"] for name, entry in delta.recipe.parameters.items()}
    config = delta.config() or (base.config if base is not None else {})
    if config.get("model_type") in TRANSPOSED:
        raise DarexError(
            f"{delta.path}: is of a {config['model_type']}, whose linear layers are stored [in, out], unlike "
            "those that an adapter is exported for: darex export --to patch."
        )
    stated = config.get("architectures")
    architecture = stated[0] if isinstance(stated, list) and stated and isinstance(stated[0], str) else ""
    matrices = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not HEAD.search(name)
    ]
    vectors = sorted(shapes.keys() - set(matrices))
    tied = [
        name
        for name in (*matrices, *delta.names("dense"))
        if is_tied(config) and name.endswith("embed_tokens.weight")
    ]
    if tied and "ForCausalLM" in architecture and base is None and tied[0] in matrices:
        raise DarexError(f"{delta.path}: its head is tied to its embedding: pass the base (--base BASE).")
    if vectors and base is None:
        raise DarexError(
            f"{delta.path}: has {vectors[0]} and {len(vectors) - 1} more norms and biases, for which an "
            "adapter stores base plus delta: pass the base (--base BASE)."
        )
    if base is None:
        delta.check_entries(None, MOST_VERIFIED_ENTRIES, "pass the base (--base BASE)")
    else:
        check_base_tensors(base, delta)
    other = [name for name in matrices if not _is_thin(delta.parts(name))]
    if other and rank is None:
        raise DarexError(_not_low_rank(delta, other, matrices))
    factors, squares, lost = {}, 0.0, 0.0
    for name in matrices:
        factors[name], own, left_out = _factors(delta, name, rank)
        squares, lost = squares + own, lost + left_out
    factors = {name: pair for name, pair in factors.items() if pair[0].shape[1]}
    if not factors:
        raise DarexError(f"{delta.path}: it changes no matrix, so the adapter would be empty.")
    whole = {name: delta.read(f"dense/{name}") for name in delta.names("dense")}

    def restored(name: str) -> np.ndarray:
        assert base is not None
        stated = delta.recipe.parameters[name].get("dtype")
        dtype = DTYPES[stated] if stated else base.tensors[delta.base_name(name)].info.dtype
        return restored_tensor(name, base, delta, dtype).reshape(shapes[name])

    if base is not None:
        whole |= {name: restored(name) for name in vectors}
    if tied and "ForCausalLM" in architecture:  # PEFT unties adapted embeddings: the head is stored as well
        whole["lm_head.weight"] = whole[tied[0]] if tied[0] in whole else restored(tied[0])
    delta.check_data()
    layers = {name.removesuffix(".weight"): pair for name, pair in factors.items()}
    ranks = {layer: a.shape[1] for layer, (a, _) in layers.items()}
    lora = LoraConfig(1, 1.0, tuple(sorted(layers)), rank_pattern=ranks, alpha_pattern=ranks)
    named: dict[str, np.ndarray] = {}
    embeddings = {}
    for layer, (a, b) in layers.items():
        if "embed" in layer:
            embeddings[layer] = (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))
        else:
            named |= {f"{layer}.lora_A.weight": b, f"{layer}.lora_B.weight": a}
    task_type = next((t for ending, t in TASK_TYPES.items() if architecture.endswith(ending)), None)
    called = None if base is None else hub_name(base.path)
    save_adapter(
        out,
        lora,
        unflatten_names(named),
        unflatten_names(whole),
        embeddings=embeddings,
        task_type=task_type,
        base=called if base is None or "/" in (called or "") else str(base.path),
        card=model_card(contents(delta), "peft", base_model=called),
        overwrite=overwrite,
    )
    return Exported(dict(sorted(ranks.items())), sorted(whole), lost / squares if squares else 0.0)


def _is_thin(parts: Parts) -> bool:
    return all(isinstance(part, LowRank | Columns) for part in parts.parts)


def _factors(
    delta: DeltaFile, name: str, rank: int | None
) -> tuple[tuple[np.ndarray, np.ndarray], float, float]:
    """A [out, r] and B [r, in] of a parameter; its squared norm, and the part of it that they lose."""
    parts = delta.parts(name)
    out, width = parts.shape
    if _is_thin(parts):
        lefts, rights = [np.zeros((out, 0), np.float32)], [np.zeros((0, width), np.float32)]
        for part in parts.parts:
            if isinstance(part, LowRank):
                a, b = part.factors()
                lefts.append(np.asarray(a) * reciprocal(part.q))
                rights.append(np.asarray(b))
            elif isinstance(part, Columns):
                lefts.append(np.asarray(part.numbers()))
                rights.append((np.asarray(part.columns)[:, None] == np.arange(width)).astype(np.float32))
        a, b = np.concatenate(lefts, axis=1), np.concatenate(rights)
        if rank is None or a.shape[1] <= rank:
            return (a, b), float(np.sum((a.T @ a) * (b @ b.T), dtype=np.float64)), 0.0
    found = decompose(delta.dense(name))
    squares = np.square(found.values.astype(np.float64))
    kept = min(rank or 0, int(np.count_nonzero(found.values)))
    root = np.sqrt(found.values[:kept])
    thin = (found.left[:, :kept] * root, found.right[:kept] * root[:, None])
    return thin, float(squares.sum()), float(squares[kept:].sum())


def _not_low_rank(delta: DeltaFile, other: list[str], matrices: list[str]) -> str:
    squares, left_out = 0.0, np.zeros(len(TRIED))
    some = matrices[:: -(-len(matrices) // SAMPLED)]
    for name in some:
        own = np.square(decompose(delta.dense(name)).values.astype(np.float64))
        squares += own.sum()
        left_out += [own[rank:].sum() for rank in TRIED]
    losses = ", ".join(f"{share:.0%}" for share in left_out / max(squares, 1e-300))
    kinds = sorted(
        {part.kind for name in other for part in delta.parts(name).parts} - {"low_rank", "columns"}
    )
    return (
        f"{delta.path}: {len(other)} of its {len(matrices)} matrices are not low-rank "
        f"({', '.join(kinds)}). "
        f"At rank {', '.join(map(str, TRIED))} they would lose about {losses} of the delta's "
        "squared norm: pass --rank to accept that, or prune with --method svd or --method distilled."
    )


def export_patch(
    base: Checkpoint, delta: DeltaFile, out: str | os.PathLike[str]
) -> Mapping[str, Mapping[str, int]]:
    """Writes the values of the fine-tuned model that differ from the base's, as one safetensors file.

    For each changed parameter, under its base name: `indices/NAME`, increasing flat indices (uint32, uint64
    from 2**32 entries on), and `values/NAME`, the fine-tuned values there, in their dtype. Parameters that
    the base lacks in this shape and dtype, or that are smaller that way, are stored whole: `tensors/NAME`.
    Applying it needs no arithmetic and gives the bits of `darex apply`.

    Returns: {"entries", "changed"} by name.
    Raises: FileError for a damaged file or another base.
    """
    keep_inputs(out, base, delta)
    tensors: dict[str, np.ndarray] = {}
    report = {}
    for name, array in restored_params(base, delta):
        stored = base.tensors.get(delta.base_name(name))
        flat = array.reshape(-1)
        if stored is None or stored.info.shape != array.shape or stored.info.dtype != array.dtype:
            tensors[WHOLE + (name if stored is None else stored.stored_name)], changed = array, flat.size
        else:
            places = np.flatnonzero((_bytes(flat) != _bytes(stored.read())).any(axis=1))
            changed = places.size
            base_name, wide = stored.stored_name, np.dtype(np.uint32 if flat.size < 2**32 else np.uint64)
            if changed * (wide.itemsize + flat.itemsize) >= flat.nbytes > 0:
                tensors[WHOLE + base_name] = array
            elif changed:
                tensors[INDICES + base_name] = places.astype(wide)
                tensors[VALUES + base_name] = flat[places]
        if changed:
            report[name] = {"entries": int(flat.size), "changed": int(changed)}
    write_tensors(out, tensors, {"format": "pt", "delta": delta.recipe.digest()})
    return report


def _bytes(array: np.ndarray) -> np.ndarray:
    """An array's bytes, [entries, bytes per entry]."""
    return np.frombuffer(as_bytes(np.ascontiguousarray(array)), np.uint8).reshape(-1, array.itemsize)

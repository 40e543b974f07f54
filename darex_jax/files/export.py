"""A delta in the forms that other tools read: a PEFT adapter, or replacement values at flat indices."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from darex_jax.core.errors import DarexError, FileError
from darex_jax.core.lora import LoraConfig
from darex_jax.core.scope import HEAD
from darex_jax.core.tree import unflatten_names
from darex_jax.files.adapter import save_adapter
from darex_jax.files.artifact import DeltaFile
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

TRIED = (8, 32, 128)  # ranks that a refusal says the loss of
SAMPLED = 8  # matrices that it looks at
TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM"}
WHOLE, INDICES, VALUES = "tensors/", "indices/", "values/"  # of a patch, before the parameter's name


class Exported(NamedTuple):
    """What an adapter got.

    Attributes:
      ranks: by parameter; exact where no rank was asked for.
      whole: parameters that are stored as they are: norms, biases, heads.
      lost: the share of the delta's squares that a smaller rank leaves out.
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

    Low ranks and columns become factors, each matrix of its own rank; pruned norms and biases, and what the
    artifact keeps whole, are saved as they are in the fine-tuned model.

    Args:
      base: where the delta came from; needed for norms and biases, of which PEFT wants the sum.
      rank: brings every matrix to at most this rank by its singular value decomposition, whatever its parts.
    Raises: DarexError for parts that are not of low rank, with the loss at some ranks, if no rank is given;
      for norms or biases without a base; FileError for a damaged file or another base.
    """
    keep_inputs(out, delta, *([] if base is None else [base]))
    if rows := delta.names("rows"):
        raise FileError(f"{delta.path}: has extra rows for {rows[0]}, which an adapter does not hold.")
    if rank is not None and rank < 1:
        raise DarexError(f"a rank is 1 or more, got {rank}.")
    shapes = {name: entry["shape"] for name, entry in delta.recipe.parameters.items()}
    config = delta.config() or (base.config if base is not None else {})
    architecture = next(iter(config.get("architectures") or [""]))
    matrices = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not HEAD.search(name)
    ]
    vectors = sorted(shapes.keys() - set(matrices))
    tied = [
        name
        for name in (*matrices, *delta.names("dense"))
        if config.get("tie_word_embeddings") and name.endswith("embed_tokens.weight")
    ]
    if tied and "ForCausalLM" in architecture and base is None and tied[0] in matrices:
        raise DarexError(f"{delta.path}: its head is tied to its embedding: name the base (--base BASE).")
    if vectors and base is None:
        raise DarexError(
            f"{delta.path}: has {vectors[0]} and {len(vectors) - 1} more norms and biases, of which an "
            "adapter holds base plus delta: name the base (--base BASE)."
        )
    other = [name for name in matrices if not _is_thin(delta.parts(name))]
    if other and rank is None:
        raise DarexError(_not_low_rank(delta, other, matrices))
    factors, squares, lost = {}, 0.0, 0.0
    for name in matrices:
        factors[name], own, left_out = _factors(delta, name, rank)
        squares, lost = squares + own, lost + left_out
    factors = {name: pair for name, pair in factors.items() if pair[0].shape[1]}
    if not factors:
        raise DarexError(f"{delta.path}: no matrix of it is changed, there is nothing for an adapter.")
    whole = {name: delta.read(f"dense/{name}") for name in delta.names("dense")}

    def restored(name: str) -> np.ndarray:
        assert base is not None
        stated = delta.recipe.parameters[name].get("dtype")
        dtype = DTYPES[stated] if stated else base.tensors[delta.base_name(name)].info.dtype
        return restored_tensor(name, base, delta, dtype).reshape(shapes[name])

    if base is not None:
        check_base_tensors(base, delta)
        whole |= {name: restored(name) for name in vectors}
    if tied and "ForCausalLM" in architecture:  # PEFT ties nothing that it adapts: the head is stored, too
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
    """A [out, r] and B [r, in] of a parameter; the sum of its squares, and of those that they leave out."""
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
                rights.append(np.eye(width, dtype=np.float32)[np.asarray(part.columns)])
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
        f"{delta.path}: {len(other)} of its {len(matrices)} matrices are not of low rank "
        f"({', '.join(kinds)}). "
        f"Brought to rank {', '.join(map(str, TRIED))} they would lose about {losses} of the delta's "
        "squares: --rank does that; or prune with --method svd or --method distilled."
    )


def export_patch(
    base: Checkpoint, delta: DeltaFile, out: str | os.PathLike[str]
) -> Mapping[str, Mapping[str, int]]:
    """Writes what the fine-tuned model has in the place of the base's numbers, as one safetensors file.

    Of each parameter that changes, under the name that it has in the base: `indices/NAME`, rising flat
    indices (uint32, uint64 from 2**32 entries on), and `values/NAME`, the numbers that stand there in the
    fine-tuned model, in its dtype. What the base does not have in this shape and dtype, or what is smaller
    that way, is there whole: `tensors/NAME`. Applying it takes no arithmetic: the bits are `darex apply`'s.

    Returns: by name {"entries", "changed"}.
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
    """[entries, bytes of one]."""
    return np.frombuffer(as_bytes(np.ascontiguousarray(array)), np.uint8).reshape(-1, array.itemsize)

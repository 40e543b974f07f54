"""What a delta holds of each parameter, measured in one pass over it, its base and the fine-tuned model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import blake3
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.scope import NUMBER, starred
from darex_jax.core.spectrum import spectral_norm
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.restore import check_digest
from darex_jax.files.safetensors import CHUNK, DTYPES, as_bytes, element_count
from darex_jax.files.stream import Progress
from darex_jax.parts.low_rank import LowRank
from darex_jax.parts.values import reciprocal

LARGEST = 1 << 28  # entries of a matrix that is made whole for its largest singular value
THIN = 0.1  # of a matrix stored: below it a product goes over its entries


@dataclass(frozen=True)
class Leaf:
    """What a delta holds of one parameter, or of several together.

    Attributes:
      name: with `*` for numbers, of several; layer: the number in it; matrix: whether it has two axes.
      count: of parameters; entries: of them; numbers: stored for them; nonzero: of the restored delta.
      form: kinds of parts, with their bits; q: what their values are divided by.
      size: bytes, what they share with others included by the share of the numbers.
      base, delta, true, lost: sums of squares: of the base's entries, of the restored delta's, of the
        fine-tuned model's delta and of what is between these two; the last two None without that model.
      ranks: stable ranks |D|_F^2 / |D|_2^2 of the restored delta's matrices.
    """

    name: str
    layer: int | None
    matrix: bool
    entries: int
    numbers: int
    nonzero: int
    form: tuple[str, ...]
    q: tuple[float, ...]
    size: float
    base: float
    delta: float
    true: float | None = None
    lost: float | None = None
    ranks: tuple[float, ...] = ()
    count: int = 1

    @property
    def relative(self) -> float:
        """The root mean square of the restored delta in terms of the base's."""
        return math.sqrt(self.delta / self.base) if self.base else math.nan

    @property
    def error(self) -> float:
        """|delta - what is restored|^2 / |delta|^2."""
        if self.true is None or self.lost is None:
            return math.nan
        return self.lost / self.true if self.true else (0.0 if not self.lost else math.inf)

    @property
    def rank(self) -> float:
        return float(np.median(self.ranks)) if self.ranks else math.nan


def page_bytes(base: Checkpoint, delta: DeltaFile, fine: Checkpoint | None) -> int:
    """So many bytes are read for a page."""
    names = delta.recipe.parameters
    read = [base.tensors.get(delta.base_name(name)) for name in names]
    read += [fine.tensors.get(name) for name in names] if fine is not None else []
    return sum(tensor.info.nbytes for tensor in read if tensor is not None)


class _Stored(NamedTuple):
    """How a file holds a parameter: see `Leaf`."""

    form: tuple[str, ...]
    numbers: int
    q: tuple[float, ...]
    size: float


def _stored(file: DeltaFile) -> dict[str, _Stored]:
    """By the parameter's name; of a stream that several share each has the share of its numbers."""
    recipe = file.recipe
    if recipe.format == 1:
        found = {}
        for name, entry in recipe.parameters.items():
            info = file.tensors[f"values/{name}"]
            form = (f"random, {info.dtype.name}",)
            found[name] = _Stored(form, info.size, (entry["q"],), float(info.nbytes))
        return found
    found = {}
    for block in recipe.blocks or ():
        streams = {group: (count, length) for group, _, _, count, length in block["streams"]}
        for name, parts in block["parameters"].items():
            numbers, size = 0, 0.0
            for part in parts:
                for array, (dtype, count) in part["counts"].items():
                    all_of_it, length = streams[f"{part['kind']} {array} {dtype}"]
                    size += length * count / max(1, all_of_it)
                    if array == "signs":  # eight a byte
                        numbers += element_count(tuple(recipe.parameters[name]["shape"]))
                    elif array.rpartition(".")[2] not in ("scales", "positions", "columns"):
                        numbers += count
            q = tuple(float(part["q"]) for part in parts)
            found[name] = _Stored(tuple(map(_form, parts)), numbers, q, size)
    return found


def _form(part: Mapping[str, Any]) -> str:
    """A part in words: its kind, its bits."""
    kind = str(part["kind"]).replace("_", " ")
    if "rank" in part:
        kind += f" {part['rank']}"
    if part["kind"] == "sign":
        return f"{kind}, 1 bit"
    bits = {(part.get(f) or {}).get("bits") for f in ("values", "a", "b") if f in part}
    floats = {dtype for array, (dtype, _) in part["counts"].items() if array.rpartition(".")[2] == "values"}
    names = [f"{b} bit{'s' * (b != 1)}" for b in sorted(b for b in bits if b)]
    names += sorted(DTYPES[dtype].name for dtype in floats)
    return ", ".join([kind, *names])


def leaves_of(
    base: Checkpoint, delta: DeltaFile, fine: Checkpoint | None, progress: Progress
) -> Iterator[Leaf]:
    """Every pruned parameter; besides what a file holds of one, a stretch of its entries is in memory, and of
    a matrix its delta: thin where it is."""
    stored = _stored(delta)
    for name, entry in delta.recipe.parameters.items():
        own, shape = base.tensors[delta.base_name(name)], tuple(entry["shape"])
        other = _fine_chunks(fine, name, shape)
        digest, start, nonzero = blake3.blake3(), 0, 0
        squares: dict[str, Any] = dict.fromkeys(("base", "delta", "true", "lost"), 0.0)
        collect = _Matrix(delta, name, shape, stored[name]) if len(shape) == 2 and min(shape) > 1 else None
        for chunk, (kept, values) in zip(own.chunks(), delta.chunks_of(name), strict=True):
            digest.update(as_bytes(chunk))
            progress(chunk.nbytes)
            with np.errstate(invalid="ignore", over="ignore"):
                numbers, moved = chunk.astype(np.float32), values.astype(np.float32, copy=False)
                squares["base"] += _square(numbers)
                squares["delta"] += _square(moved)
                if other is not None:
                    tuned = next(other)[: chunk.size]
                    progress(tuned.nbytes)
                    true = tuned.astype(np.float32) - numbers
                    squares["true"] += _square(true)
                    true[kept] -= moved
                    squares["lost"] += _square(true)
            nonzero += int(np.count_nonzero(moved))
            if collect is not None:
                collect.take(start, kept, moved)
            start += chunk.size
        check_digest(delta, delta.base_name(name), digest.hexdigest())
        if fine is None:
            del squares["true"], squares["lost"]
        norm = collect.norm() if collect is not None and squares["delta"] > 0 else math.nan
        number = NUMBER.search(name)
        has_rank = math.isfinite(norm) and norm > 0
        yield Leaf(
            name=name, layer=int(number.group()) if number else None, matrix=len(shape) > 1,
            entries=start, nonzero=nonzero, **stored[name]._asdict(), **squares,
            ranks=(squares["delta"] / norm**2,) if has_rank else (),
        )  # fmt: skip


def _fine_chunks(fine: Checkpoint | None, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray] | None:
    """The fine-tuned model's entries; those of rows that the base does not have come last and stay unread."""
    if fine is None:
        return None
    tensor = fine.tensors.get(name)
    if tensor is None or not tensor.floating:
        raise DarexError(
            f"{fine.source} is not what this delta was made from: it has no '{name}' to subtract."
        )
    found = tensor.info.shape
    if found[1:] != shape[1:] or found[:1] < shape[:1]:
        raise DarexError(
            f"{fine.source} is not what this delta was made from: '{name}' has shape {list(found)} there, "
            f"{list(shape)} in the delta."
        )
    return tensor.chunks()


def _square(x: np.ndarray) -> float:
    return float(np.dot(x.reshape(-1), x.reshape(-1)))


class _Matrix:
    """The restored delta of a matrix, as far as its largest singular value needs it."""

    def __init__(self, delta: DeltaFile, name: str, shape: tuple[int, ...], stored: _Stored) -> None:
        self.shape, size = shape, element_count(shape)
        self.parts = delta.parts(name) if all(form.startswith("low rank") for form in stored.form) else None
        scattered = all(form.startswith(("random", "sparse")) for form in stored.form)
        self.thin = scattered and stored.numbers < THIN * size and len(stored.form) == 1
        self.pieces: list[tuple[np.ndarray, np.ndarray]] = []
        whole = self.parts is None and not self.thin and size <= LARGEST
        self.flat = np.zeros(size, np.float32) if whole else None

    def take(self, start: int, kept: np.ndarray | slice, values: np.ndarray) -> None:
        if self.parts is not None:
            return
        if self.thin and isinstance(kept, np.ndarray):
            self.pieces.append((kept.astype(np.int64) + start, values))
        elif self.flat is not None:
            self.flat[start : start + CHUNK][kept] = values

    def norm(self) -> float:
        """Of factors by two QR decompositions, else `spectral_norm`; NaN where that is too much."""
        if self.parts is not None:
            factors = []
            for part in self.parts.parts:
                assert isinstance(part, LowRank)
                a, b = part.factors()
                factors.append((np.asarray(a) * reciprocal(np.asarray(part.q)), np.asarray(b)))
            left = np.linalg.qr(np.concatenate([a for a, _ in factors], 1), mode="r")
            right = np.linalg.qr(np.concatenate([b for _, b in factors], 0).T, mode="r")
            return float(np.linalg.norm(np.asarray(left) @ np.asarray(right).T, 2))
        if self.flat is not None:
            return spectral_norm(self.flat.reshape(self.shape))
        if not self.thin:
            return math.nan
        from scipy.sparse import csr_matrix

        places = np.concatenate([place for place, _ in self.pieces])
        values = np.concatenate([value for _, value in self.pieces])
        return spectral_norm(csr_matrix((values, np.divmod(places, self.shape[1])), self.shape))


def together(leaves: Sequence[Leaf], name: str) -> Leaf:
    """Several as one."""
    forms = tuple(dict.fromkeys(form for leaf in leaves for form in leaf.form))
    sums = {
        k: sum(getattr(leaf, k) for leaf in leaves)
        for k in ("entries", "numbers", "nonzero", "size", "base", "delta", "count")
    }
    known = all(leaf.true is not None for leaf in leaves)
    more = {k: sum(getattr(leaf, k) for leaf in leaves) for k in ("true", "lost")} if known else {}
    return Leaf(
        name=name, layer=leaves[0].layer, matrix=leaves[0].matrix, form=forms,
        q=tuple(sorted({q for leaf in leaves for q in leaf.q})),
        ranks=tuple(r for leaf in leaves for r in leaf.ranks), **sums, **more,
    )  # fmt: skip


def grouped(leaves: Iterable[Leaf], key: Callable[[Leaf], Any]) -> dict[Any, list[Leaf]]:
    found: dict[Any, list[Leaf]] = defaultdict(list)
    for leaf in leaves:
        found[key(leaf)].append(leaf)
    return found


def kind_of(name: str) -> str:
    """Which parameter of its layer: what stands behind the layer's number."""
    return starred(name).split("*.", 1)[-1].removesuffix(".weight")

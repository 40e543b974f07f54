"""A page on one delta: what is in it, layer by layer, where its bytes are, and how what it restores does."""

from __future__ import annotations

import math
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.scope import NUMBER, starred
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.contents import contents
from darex_jax.files.recipe import versions
from darex_jax.files.restore import check_base_tensors, check_digest, layout_bytes, restored_layout
from darex_jax.files.safetensors import CHUNK, DTYPES, as_bytes, element_count
from darex_jax.files.stream import Progress
from darex_jax.parts.low_rank import LowRank
from darex_jax.parts.values import reciprocal
from darex_jax.study.draw import COLOURS, number_text
from darex_jax.study.shown import Figure, Page, Section, Series, Table
from darex_jax.tasks.source import Source

LARGEST = 1 << 28  # entries of a matrix that is made whole for its largest singular value
THIN = 0.1  # of a matrix stored: below it a product goes over its entries
SHOWN = 10  # bars of kinds of parameters
WIDE_RANGE = 30.0  # from which on an axis is logarithmic
BYTES_OF = {
    "values": "values",
    "dense": "parameters stored whole",
    "rows": "rows of a larger vocabulary",
    "file": "configuration and tokenizer",
    "recipe": "recipe: how it was made",
    "header": "header",
}


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


class Scores(NamedTuple):
    """How models do on the same examples.

    Attributes:
      metric, agreement: what the numbers are, "" for none; examples: so many, of `source`.
      of: by the model: its metric and its agreement with the fine-tuned model, NaN where there is none.
    """

    metric: str
    agreement: str
    examples: int
    source: str
    of: dict[str, tuple[float, float]]


def delta_page(
    delta: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    fine: str | os.PathLike[str] | None = None,
    source: Source | None = None,
    allow_changed_files: bool = False,
    ignore_config_fields: Collection[str] = (),
    command: str = "",
    progress: Progress = lambda _: None,
    on_model: Callable[[str], None] = lambda name: None,
) -> Page:
    """Reads a delta, its base and, where it is given, the fine-tuned model, one parameter at a time.

    Args:
      delta: an artifact; base: the directory that it was made from.
      fine: the fine-tuned model; None leaves out how near the delta is to the real one.
      source: of examples, held out or of the test split; None evaluates nothing, so that no model is loaded.
      allow_changed_files, ignore_config_fields: as in `open_model`, for the evaluation.
      command: what makes the page again.
      progress: called with bytes that are read, of `page_bytes`.
      on_model: called with the name of the model that is evaluated next.
    Raises: DarexError for a damaged delta, another base, a fine-tuned model with other parameters, or
      examples that the model cannot be evaluated on.
    """
    with Checkpoint(base) as b, DeltaFile(delta) as d:
        check_base_tensors(b, d)
        scores = None
        if source is not None:
            scores = _evaluate(
                delta, base, fine, source, on_model,
                allow_changed_files=allow_changed_files, ignore_config_fields=ignore_config_fields,
            )  # fmt: skip
        facts, restored = contents(d), layout_bytes(restored_layout(b, d))
        if fine is None:
            leaves = list(_leaves(b, d, None, progress))
        else:
            with Checkpoint(fine) as f:
                leaves = list(_leaves(b, d, f, progress))
        whole = {n: d.tensors[f"{kind}/{n}"].nbytes for kind in ("dense", "rows") for n in d.names(kind)}
        d.check_data()
    if not leaves:
        raise DarexError(f"{delta}: prunes no parameter, so there is nothing to show.")
    total = _together(leaves, "all parameters")
    sections = [
        *([_score_section(scores)] if scores is not None else []),
        _bytes_section(facts, leaves),
        _layers_section(leaves, fine is not None),
        _parameters_section(leaves, whole, fine is not None),
    ]
    sections[-1] = Section(**vars(sections[-1]) | {"command": command})
    return Page(
        f"{Path(delta).name}: what is in this delta",
        _summary(facts, restored, total, scores),
        sections,
        _page_facts(facts, base, fine),
    )


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
                    if array == "packed":
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


def _leaves(
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
        """Of factors by two QR decompositions, else by Lanczos's method; NaN where that is too much."""
        if self.parts is not None:
            factors = []
            for part in self.parts.parts:
                assert isinstance(part, LowRank)
                a, b = part.factors()
                factors.append((np.asarray(a) * reciprocal(np.asarray(part.q)), np.asarray(b)))
            left = np.linalg.qr(np.concatenate([a for a, _ in factors], 1), mode="r")
            right = np.linalg.qr(np.concatenate([b for _, b in factors], 0).T, mode="r")
            return float(np.linalg.norm(np.asarray(left) @ np.asarray(right).T, 2))
        from scipy.sparse import csr_matrix
        from scipy.sparse.linalg import ArpackError, svds

        if self.flat is not None:
            matrix: Any = self.flat.reshape(self.shape)
        elif self.thin:
            places = np.concatenate([place for place, _ in self.pieces])
            values = np.concatenate([value for _, value in self.pieces])
            matrix = csr_matrix((values, np.divmod(places, self.shape[1])), self.shape)
        else:
            return math.nan
        if not np.isfinite(matrix.data if self.thin else matrix).all():
            return math.nan
        if min(self.shape) < 32:
            return float(np.linalg.norm(matrix.toarray() if self.thin else matrix, 2))
        start = np.random.default_rng(0).normal(size=min(self.shape)).astype(np.float32)
        try:
            return float(svds(matrix, k=1, tol=0.05, v0=start, return_singular_vectors=False)[0])
        except ArpackError:
            return math.nan


def _together(leaves: Sequence[Leaf], name: str) -> Leaf:
    """Several as one."""
    forms = tuple(dict.fromkeys(", ".join(form.split(", ")) for leaf in leaves for form in leaf.form))
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


def _grouped(leaves: Iterable[Leaf], key: Callable[[Leaf], Any]) -> dict[Any, list[Leaf]]:
    found: dict[Any, list[Leaf]] = defaultdict(list)
    for leaf in leaves:
        found[key(leaf)].append(leaf)
    return found


def _kind(name: str) -> str:
    """Which parameter of its layer: what stands behind the layer's number."""
    return starred(name).split("*.", 1)[-1].removesuffix(".weight")


def _bytes_section(facts: Mapping[str, Any], leaves: Sequence[Leaf]) -> Section:
    size = facts["bytes"]
    named = {
        BYTES_OF.get(k, k.replace("_", " ").replace(".", ": ")): v for k, v in facts["bytes_by_kind"].items()
    }
    named = dict(sorted(named.items(), key=lambda item: -item[1]))
    kinds = {
        name: _together(group, name) for name, group in _grouped(leaves, lambda x: _kind(x.name)).items()
    }
    largest = sorted(kinds.values(), key=lambda leaf: -leaf.size)
    rest = largest[SHOWN - 1 :] if len(largest) > SHOWN else []
    largest = largest[: len(largest) - len(rest)]
    groups = {leaf.name: leaf.size for leaf in largest}
    if rest:
        groups[f"{len(rest)} other kinds"] = sum(leaf.size for leaf in rest)
    unit, scale = _unit(size)
    return Section(
        "Where the bytes are",
        text=(
            f"The file has {size:,} bytes, {facts['bytes_per_parameter']:.4g} for each of the "
            f"{facts['entries']:,} entries that are pruned. Numbers of one kind share a compressed stream; "
            "a parameter's bytes are its share of them, by how many numbers are its own.",
        ),
        figures=(
            _bars("Bytes by what they are", "what", f"size, {unit}", _divided(named, scale)),
            _bars("Bytes by parameter", "parameter", f"size, {unit}", _divided(groups, scale),
                  note="Of all layers together."),
        ),
    )  # fmt: skip


def _divided(values: Mapping[str, float], by: float) -> dict[str, float]:
    return {name: value / by for name, value in values.items()}


def _bars(title: str, what: str, measure: str, values: Mapping[str, float], note: str = "") -> Figure:
    places = tuple(map(float, range(len(values))))
    series = (Series("", places, tuple(values.values())),)
    return Figure(title, what, measure, series, labels=tuple(values), note=note)


def _layers_section(leaves: Sequence[Leaf], has_fine: bool) -> Section:
    """Lines along the layers, one for each kind of matrix; bars where there are no layers."""
    matrices = [leaf for leaf in leaves if leaf.matrix and leaf.layer is not None]
    if len({leaf.layer for leaf in matrices}) < 2:
        matrices = [leaf for leaf in leaves if leaf.matrix] or list(leaves)
        matrices = sorted(matrices, key=lambda leaf: -leaf.size)[: 2 * SHOWN]
        groups = {leaf.name: {0: leaf} for leaf in matrices}
        layered = False
    else:
        by_kind = _grouped(matrices, lambda leaf: _kind(leaf.name))
        largest = sorted(by_kind, key=lambda kind: -sum(leaf.entries for leaf in by_kind[kind]))[:COLOURS]
        groups = {
            kind: {k: _together(v, kind) for k, v in _grouped(by_kind[kind], lambda leaf: leaf.layer).items()}
            for kind in by_kind
            if kind in largest
        }
        layered = True
    unit, scale = _unit(max(leaf.size for group in groups.values() for leaf in group.values()))

    def figure(title: str, measure: str, of: Callable[[Leaf], float], note: str = "") -> Figure | None:
        values = {kind: {k: of(leaf) for k, leaf in sorted(group.items())} for kind, group in groups.items()}
        flat = [v for group in values.values() for v in group.values() if math.isfinite(v)]
        if not flat:
            return None
        positive = [v for v in flat if v > 0]
        log = len(positive) == len(flat) and max(flat) > WIDE_RANGE * min(flat)
        if not layered:
            found = _bars(
                title, "parameter", measure, {kind: group[0] for kind, group in values.items()}, note
            )
            return Figure(**vars(found) | {"log_y": log})
        series = tuple(Series(k, tuple(map(float, v)), tuple(v.values())) for k, v in values.items())
        return Figure(title, "layer", measure, series, log_y=log, note=note)

    figures = [
        figure("Size of the delta", "restored delta / base, %", lambda leaf: 100 * leaf.relative,
               "Root mean square of the restored delta's entries against the base's."),
        figure("Error of the delta", "error", lambda leaf: leaf.error,
               "|delta - restored delta|² / |delta|²: nothing is lost at 0; 1 is as far off as no delta."),
        figure("Numbers stored", "numbers for 100 entries",
               lambda leaf: 100 * leaf.numbers / max(1, leaf.entries)),
        figure("Stable rank", "|D|² / largest singular value²", lambda leaf: leaf.rank,
               "Of the restored delta D: about how many directions it moves the weights in."),
        figure("Bytes", f"size, {unit}", lambda leaf: leaf.size / scale),
    ]  # fmt: skip
    text = (
        "Each line is one matrix of a layer, from the first layer to the last."
        if layered
        else "The largest parameters; this model has no numbered layers."
    )
    how = (
        "Largest singular values are exact for low-rank factors, by two QR decompositions; of all others "
        "Lanczos's method gives them to about a thousandth."
    )
    return Section("Layer by layer", text=(text, how), figures=tuple(f for f in figures if f is not None))


def _parameters_section(leaves: Sequence[Leaf], whole: Mapping[str, int], has_fine: bool) -> Section:
    kinds = [_together(group, name) for name, group in _grouped(leaves, lambda x: _kind(x.name)).items()]
    heads = [
        "parameter",
        "entries",
        "stored as",
        "numbers per 100",
        "entries changed",
        "bytes",
        "delta / base",
    ]
    heads += ["error", "stable rank"] if has_fine else ["stable rank"]
    several = len(kinds) < len(leaves)
    tables = []
    if several:
        kinds.sort(key=lambda leaf: -leaf.size)
        rows = [[leaf.name + f" ({leaf.count})" * (leaf.count > 1), *_row(leaf, has_fine)] for leaf in kinds]
        tables.append(
            Table(
                "Parameters of all layers together", heads, rows,
                note="In parentheses how many there are. Stable ranks are medians.",
            )
        )  # fmt: skip
    every = [[leaf.name, *_row(leaf, has_fine), _q_text(leaf.q)] for leaf in leaves]
    tables.append(Table("Every parameter", [*heads, "q"], every))
    if whole:
        rows = [[name, f"{size:,}"] for name, size in sorted(whole.items(), key=lambda item: -item[1])]
        tables.append(Table("Stored whole, as fine-tuned", ["parameter", "bytes"], rows))
    return Section("Parameters", tables=tuple(tables))


def _row(leaf: Leaf, has_fine: bool) -> list[str]:
    return [
        f"{leaf.entries:,}",
        _forms(leaf.form),
        f"{100 * leaf.numbers / max(1, leaf.entries):.4g}",
        _percent(leaf.nonzero / max(1, leaf.entries)),
        f"{leaf.size:,.0f}",
        _percent(leaf.relative) if math.isfinite(leaf.relative) else "-",
        *([number_text(leaf.error)] if has_fine else []),
        number_text(leaf.rank) if leaf.ranks else "-",
    ]


def _forms(forms: Sequence[str]) -> str:
    """Forms that differ in their rank only are one."""
    ranks: dict[str, list[int]] = {}
    for form in forms:
        kind, mark, rest = form.partition(", ")
        word, _, rank = kind.rpartition(" ")
        if rank.isdigit():
            ranks.setdefault(f"{word} {{}}{mark}{rest}", []).append(int(rank))
        else:
            ranks.setdefault(form.replace("{", "{{").replace("}", "}}"), [])
    spans = {k: f"{min(v)}" if len(set(v)) == 1 else f"{min(v)} to {max(v)}" for k, v in ranks.items() if v}
    return " + ".join(k.format(spans.get(k, "")) for k in ranks) or "nothing"


def _q_text(q: Sequence[float]) -> str:
    values = sorted(set(q))
    if not values:
        return "-"
    return (
        number_text(values[0])
        if len(values) == 1
        else f"{number_text(values[0])} to {number_text(values[-1])}"
    )


def _score_section(scores: Scores) -> Section:
    heads = ["model"] + [scores.metric] * bool(scores.metric) + [scores.agreement] * bool(scores.agreement)
    rows = [
        [name, *([_score_text(m)] if scores.metric else []), *([_score_text(a)] if scores.agreement else [])]
        for name, (m, a) in scores.of.items()
    ]
    index = 0 if scores.metric else 1
    values = {name: numbers[index] for name, numbers in scores.of.items() if math.isfinite(numbers[index])}
    measure = scores.metric or scores.agreement
    return Section(
        "How the restored model does",
        text=(
            f"{scores.examples:,} examples of {scores.source}. The base alone is the base with what the "
            "delta stores whole, such as a task's head, and nothing else.",
        ),
        figures=(_bars(f"{measure[:1].upper()}{measure[1:]}", "model", measure, values),),
        tables=(Table("Scores", heads, rows),),
    )


def _score_text(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _evaluate(
    delta: str | os.PathLike[str],
    base: str | os.PathLike[str],
    fine: str | os.PathLike[str] | None,
    source: Source,
    on_model: Callable[[str], None],
    **opening: Any,
) -> Scores:
    """One model after the other; beside it at most a parameter of another is held."""
    from darex_jax.core.tree import flatten_names, unflatten_names
    from darex_jax.evaluation.classification import predict
    from darex_jax.evaluation.objectives import prediction_objective
    from darex_jax.files.model import companions
    from darex_jax.models import DecoderConfig
    from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
    from darex_jax.tasks.opening import open_model
    from darex_jax.tasks.source import read_material
    from darex_jax.training.causal_lm import answer_scores

    changed = opening["allow_changed_files"]
    with companions(base, delta, allow_changed_files=changed) as folder:
        try:
            material = read_material(folder, source, held_out=True)
        except DarexError as error:  # which names the folder that stands for the restored model
            raise DarexError(str(error).replace(str(folder), f"the model of {delta}")) from error
        task, batches = material.task, material.batches()
        count, labels, where = len(material.encoded), None, f"{material.source}, held out"
        if task is not None:
            test = task.test.select(slice(source.limit))
            batches = evaluation_batches(encode(load_tokenizer(folder), test), 16)
            count, labels, where = len(test), test.labels, f"{task.name}, test split"
    if source.text is not None:
        where = str(source.text)
    if task is None and fine is None and not source.labelled:
        raise DarexError(
            "texts without labels are compared with the fine-tuned model's answers: give --fine."
        )
    found: dict[str, tuple[float, float]] = {}
    names = {"metric": "", "agreement": ""}
    compare: Callable[[Any, Any], float] | None = None

    def measure(name: str, model: Any, params: Any) -> None:
        nonlocal compare
        if isinstance(model.config, DecoderConfig):
            metric = answer_scores(model, params, batches).tokens
            names["metric"] = "share of right tokens"
            if name == "fine-tuned":
                agreement = prediction_objective(model, params, batches)
                names["agreement"], compare = "agreement of next tokens", lambda _, p: agreement.measure(p)
            found[name] = metric, math.nan if compare is None else compare(model, params)
            return
        logits = predict(model, params, batches)
        metric = math.nan
        if task is not None and labels is not None:
            metric, names["metric"] = task.metric(logits, labels), task.metric_name.replace("_", " ")
        if name == "fine-tuned":
            reference, one = logits, logits.shape[-1] == 1
            names["agreement"] = "correlation of scores" if one else "agreement of predictions"
            compare = lambda own, _: _agreement(own, reference)  # noqa: E731
        found[name] = metric, math.nan if compare is None else compare(logits, params)

    if fine is not None:
        on_model("fine-tuned")
        opened = open_model(fine, ignore_config_fields=opening["ignore_config_fields"])
        measure("fine-tuned", opened.model, opened.params)
        del opened
    on_model("restored")
    opened = open_model(base, delta=delta, **opening)
    measure("restored", opened.model, opened.params)
    on_model("base alone")
    own = flatten_names(opened.params)
    model = opened.model
    del opened
    with Checkpoint(base) as b, DeltaFile(delta) as d:
        for name in d.recipe.parameters:
            if name in own:
                numbers = b.tensors[d.base_name(name)].read().astype(own[name].dtype)
                own[name] = (
                    np.concatenate([numbers, np.asarray(own[name])[len(numbers) :]])
                    if numbers.ndim
                    else numbers
                )
    measure("base alone", model, unflatten_names(own))
    order = ("base alone", "restored", "fine-tuned")
    return Scores(
        names["metric"], names["agreement"], count, where, {n: found[n] for n in order if n in found}
    )


def _agreement(own: np.ndarray, reference: np.ndarray) -> float:
    """See `agreement`. Raises: DarexError for another number of outputs."""
    from darex_jax.evaluation.classification import agreement

    if own.shape != reference.shape:
        raise DarexError(
            f"the fine-tuned model has {reference.shape[-1]} outputs, the restored one {own.shape[-1]}."
        )
    return agreement(own, reference)


def _summary(facts: Mapping[str, Any], restored: int, total: Leaf, scores: Scores | None) -> list[str]:
    size = facts["bytes"]
    said = [
        f"{_bytes_text(size)} restore a model of {_bytes_text(restored)}: the file is "
        f"{restored / size:,.0f} times smaller."
        if restored > 1.5 * size
        else f"{_bytes_text(size)} restore a model of {_bytes_text(restored)}."
    ]
    if scores is not None:
        said.append(_score_sentence(scores))
    said.append(
        f"{facts['method']} stores {total.numbers:,} numbers for {total.entries:,} entries in "
        f"{total.count:,} parameters, {100 * total.numbers / max(1, total.entries):.3g} for a hundred; "
        f"{_percent(total.nonzero / max(1, total.entries))} of the entries change."
    )
    if math.isfinite(total.error):
        error = _percent(total.error) + " of" if total.error < 2 else f"{total.error:,.3g} times"
        said.append(f"The square of its distance from the real delta is {error} that delta's own.")
    if math.isfinite(total.relative):
        rank = f"; its matrices have a stable rank of {total.rank:.3g} (median)" if total.ranks else ""
        said.append(f"The restored delta has {_percent(total.relative)} of the base's norm{rank}.")
    return said


def _score_sentence(scores: Scores) -> str:
    index, name = (0, scores.metric) if scores.metric else (1, scores.agreement)
    numbers = {k: v[index] for k, v in scores.of.items()}
    order = ("restored", "fine-tuned", "base alone")
    told = [f"{numbers[k]:.3f} {k}" for k in order if math.isfinite(numbers.get(k, math.nan))]
    words = f"{name[:1].upper()}{name[1:]} on {scores.source}: {', '.join(told)}"
    agrees = scores.of["restored"][1]
    if index == 0 and math.isfinite(agrees):
        words += f"; {scores.agreement} with the fine-tuned model {agrees:.3f}"
    return words + "."


def _page_facts(
    facts: Mapping[str, Any], base: str | os.PathLike[str], fine: str | os.PathLike[str] | None
) -> list[tuple[str, str]]:
    told = [
        f"{name.replace('_', ' ')} {f'{value:.6g}' if isinstance(value, float) else value}"
        for name, value in facts["made_with"].items()
    ]
    rows = [
        ("method", ", ".join([facts["method"], *told])),
        ("base", os.fspath(base)),
        *([("fine-tuned model", os.fspath(fine))] if fine is not None else []),
        ("format", str(facts["format"])),
        ("key", f"{facts['key'][0]}, {facts['key'][1]} (Threefry)"),
        ("q", _q_text(facts["q"])),
        ("scope", facts["scope"]),
        ("digest", facts["digest"][:32]),
    ]
    rows += [(f"made with {name}", value) for name, value in facts["versions"].items()]
    rows += [(f"read with {name}", value) for name, value in versions().items()]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return [*rows, ("read on", machine)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _unit(size: float) -> tuple[str, float]:
    """A unit for sizes up to this one, and its bytes."""
    return next(
        (unit, scale)
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
        if size >= scale or scale == 1.0
    )


def _bytes_text(size: float) -> str:
    unit, scale = _unit(size)
    return f"{size / scale:,.3g} {unit}"

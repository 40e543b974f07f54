"""A page on one delta: what is in it, layer by layer, where its bytes are, and how what it restores does."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from darex_jax.core.errors import DarexError
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.contents import contents
from darex_jax.files.recipe import versions
from darex_jax.files.restore import check_base_tensors, layout_bytes, restored_layout
from darex_jax.files.stream import Progress
from darex_jax.study.draw import COLOURS, number_text
from darex_jax.study.leaves import Leaf, grouped, kind_of, leaves_of, together
from darex_jax.study.scores import Scores, score_models
from darex_jax.study.shown import Figure, Page, Section, Series, Table
from darex_jax.tasks.source import Source

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
      source: of examples, from its test split; None evaluates nothing, so that no model is loaded.
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
            scores = score_models(
                delta, base, fine, source, on_model,
                allow_changed_files=allow_changed_files, ignore_config_fields=ignore_config_fields,
            )  # fmt: skip
        facts, restored = contents(d), layout_bytes(restored_layout(b, d))
        if fine is None:
            leaves = list(leaves_of(b, d, None, progress))
        else:
            with Checkpoint(fine) as f:
                leaves = list(leaves_of(b, d, f, progress))
        whole = {n: d.tensors[f"{kind}/{n}"].nbytes for kind in ("dense", "rows") for n in d.names(kind)}
        d.check_data()
    if not leaves:
        raise DarexError(f"{delta}: prunes no parameter, so there is nothing to show.")
    total = together(leaves, "all parameters")
    sections = [
        *([_score_section(scores)] if scores is not None else []),
        _bytes_section(facts, leaves),
        _layers_section(leaves),
        _parameters_section(leaves, whole, fine is not None),
    ]
    sections[-1] = Section(**vars(sections[-1]) | {"command": command})
    return Page(
        f"{Path(delta).name}: what is in this delta",
        _summary(facts, restored, total, scores),
        sections,
        _page_facts(facts, base, fine),
    )


def _bytes_section(facts: Mapping[str, Any], leaves: Sequence[Leaf]) -> Section:
    size = facts["bytes"]
    named = {
        BYTES_OF.get(k, k.replace("_", " ").replace(".", ": ")): v for k, v in facts["bytes_by_kind"].items()
    }
    named = dict(sorted(named.items(), key=lambda item: -item[1]))
    kinds = {
        name: together(group, name) for name, group in grouped(leaves, lambda x: kind_of(x.name)).items()
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


def _layers_section(leaves: Sequence[Leaf]) -> Section:
    """Lines along the layers, one for each kind of matrix; bars where there are no layers."""
    matrices = [leaf for leaf in leaves if leaf.matrix and leaf.layer is not None]
    if len({leaf.layer for leaf in matrices}) < 2:
        matrices = [leaf for leaf in leaves if leaf.matrix] or list(leaves)
        matrices = sorted(matrices, key=lambda leaf: -leaf.size)[: 2 * SHOWN]
        groups = {leaf.name: {0: leaf} for leaf in matrices}
        layered = False
    else:
        by_kind = grouped(matrices, lambda leaf: kind_of(leaf.name))
        largest = sorted(by_kind, key=lambda kind: -sum(leaf.entries for leaf in by_kind[kind]))[:COLOURS]
        groups = {
            kind: {k: together(v, kind) for k, v in grouped(by_kind[kind], lambda leaf: leaf.layer).items()}
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
    kinds = [together(group, name) for name, group in grouped(leaves, lambda x: kind_of(x.name)).items()]
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

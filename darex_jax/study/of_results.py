"""The page of a whole study: every study of a folder that has rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.study.plan import SCALES, NoScale, Plan, find_studies, read_plan
from darex_jax.study.rows import Row, floor_of, read_rows, split_name
from darex_jax.study.run import FINE_TUNED, current_rows, missing_cells
from darex_jax.study.shown import Finding, Page, Section
from darex_jax.study.tables import OURS, section, shares

FIRST = ("frontier", "methods")  # of a page; the others follow by name


def results_page(results: Path) -> Page:
    """The page of `results`, the folder that `darex experiment` writes beside its studies.

    Args: results: FOLDER/results or FOLDER/results/SCALE, the small scale where none is named.
    Raises: DarexError if no study there has rows.
    """
    scale = results.name if results.name in SCALES else SCALES[0]
    folder = results.parent.parent if results.name in SCALES else results.parent
    found: list[tuple[Plan, list[Row]]] = []
    for name in sorted(find_studies(folder), key=lambda name: (name not in FIRST, name)):
        try:
            plan = read_plan(folder, name, scale)
        except NoScale:
            continue
        if rows := read_rows(plan.file):
            found.append((plan, rows))
    if not found:
        raise DarexError(f"{results}: has no rows of a study; run darex experiment first.")
    sections = [section(plan, rows, f"darex experiment {plan.name} --scale {scale}") for plan, rows in found]
    every = [finding for each in sections for finding in each.findings if finding.source != OURS]
    claims = Section(
        "The paper's claims, one by one",
        ["Of \"DARE the Extreme\" (arXiv:2410.09344), on the models of this scale. The verdict is computed "
         "from the rows on this page: held in every comparison, in half of them or more (held partly), in "
         "fewer (not seen)."],
        findings=every,
    )  # fmt: skip
    first = sum(plan.name in FIRST for plan, _ in found)
    shown = [_without_claims_of_the_paper(each) for each in sections]
    parts = [*shown[:first], *([claims] if every else []), *shown[first:]]
    return Page("darex_jax: the study", summary(found, every), parts, facts(found))


def summary(found: Sequence[tuple[Plan, Sequence[Row]]], findings: Sequence[Finding]) -> list[str]:
    """At most five sentences, every figure from the rows."""
    current = [(plan, current_rows(plan, rows)) for plan, rows in found]
    told = []
    for plan, rows in current:
        if plan.name == "frontier":
            told += _trained(plan, rows)
        if plan.name == "methods":
            told += _random(rows)
    if findings:
        counts = Counter(finding.verdict for finding in findings).most_common()
        parts = ", ".join(f"{count} {verdict}" for verdict, count in counts)
        told.append(f"Of {len(findings)} claims of the paper: {parts}.")
        if unseen := [finding.claim for finding in findings if finding.verdict == "not seen"]:
            told.append(f"Not seen: {'; '.join(unseen)}.")
    measured = sum(len(rows) for _, rows in current)
    lacks = sum(len(cells) for plan, rows in current for _, cells in missing_cells(plan, rows))
    models = {(row["fine_tune"], row["weights"]) for _, rows in current for row in rows}
    told.append(
        f"{measured:,} rows of {len(current)} studies on {len(models)} fine-tuned models or sets of them"
        + (f"; {lacks:,} declared rows are not measured yet." if lacks else ".")
    )
    return told[:5]


def _trained(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """What trained parts keep at each size."""
    known, heads = shares(rows), {row["fine_tune"]: row for row in rows if row["way"] == FINE_TUNED}
    told = []
    for at in plan.at:
        own = known.get(("distilled", at), {})
        if len(own) < 2:
            continue
        sizes = [r["file_bytes"] for r in rows if (r["way"], r["at"]) == ("distilled", at) and "mean" in r]
        told.append(f"{np.mean(sizes) / 1000:,.0f} kB keep {_mean(own)} ({len(own)} fine-tunes)")
    if not told:
        return []
    floor = _mean({name: floor_of(head) / head["mean"] for name, head in heads.items()})
    return [
        f"Of the fine-tuned metric, of which a model that learnt nothing has {floor}, 4-bit factors trained "
        f"without labels keep: {', '.join(told)}."
    ]


def _random(rows: Sequence[Row]) -> list[str]:
    """What DARE and DAREx-q keep of each optimizer's deltas at 0.01 bytes per parameter."""
    at, parts = 0.01, []
    for optimizer in dict.fromkeys(split_name(row["fine_tune"])[1] for row in rows):
        known = shares([row for row in rows if split_name(row["fine_tune"])[1] == optimizer])
        dare, with_q = known.get(("DARE", at)), known.get(("DAREx-q", at))
        if dare and with_q and dare.keys() == with_q.keys():
            parts.append(f"{optimizer} {_mean(dare)} and {_mean(with_q)}")
    if not parts:
        return []
    return [f"At {at:g} bytes per parameter DARE and DAREx-q keep, by optimizer: {', '.join(parts)}."]


def _mean(values: Mapping[str, float]) -> str:
    return f"{np.mean(list(values.values())):.1%}"


def facts(found: Sequence[tuple[Plan, Sequence[Row]]]) -> list[tuple[str, str]]:
    """Machine and versions, of all rows that state them."""
    seen: dict[str, set[str]] = {}
    for _, rows in found:
        for row in rows:
            manifest: Any = row.get("manifest") or {} if row["way"] == FINE_TUNED else {}
            for name, value in manifest.get("versions", {}).items():
                seen.setdefault(name, set()).add(str(value))
            for name, value in manifest.get("platform", {}).items():
                seen.setdefault(name, set()).add(str(value))
    return [(name, ", ".join(sorted(values))) for name, values in seen.items()]


def _without_claims_of_the_paper(section: Section) -> Section:
    return replace(section, findings=[each for each in section.findings if each.source == OURS])

"""The page of a whole study: every study of a folder that has rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.study.plan import SCALES, Plan, find_studies, read_plan
from darex_jax.study.rows import Row, read_rows
from darex_jax.study.run import FINE_TUNED
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
        except DarexError:  # a study without this scale
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
    told = []
    for plan, rows in found:
        if plan.name == "frontier":
            told += _trained(plan, rows)
        if plan.name == "methods":
            told += _untrained(plan, rows)
    counts = Counter(finding.verdict for finding in findings)
    if findings:
        parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        told.append(f"Of {len(findings)} claims of the paper: {parts}.")
    return told[:5]


def _trained(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """What trained parts keep in the largest and the smallest file that more than one fine-tune has."""
    own = {at: values for (way, at), values in shares(rows).items() if way == "distilled" and len(values) > 1}
    sizes = {
        at: float(np.mean([r["file_bytes"] for r in rows if (r["way"], r["at"]) == ("distilled", at)]))
        for at in own
    }
    told = [
        f"{sizes[at] / 1000:,.0f} kB keep {np.mean(own[at]):.1%} ± {np.std(own[at], ddof=1):.1%} "
        f"({len(own[at])} fine-tunes)"
        for at in plan.at
        if at in own
    ]
    if not told:
        return []
    return [f"Of the fine-tuned metric, 4-bit factors trained without labels in {', '.join(told)}."]


def _untrained(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """Which way without training keeps most at 0.01 bytes per parameter, and what DARE and DAREx-q keep."""
    told = []
    for optimizer in dict.fromkeys(row["fine_tune"].split("/")[1] for row in rows):
        own = shares([row for row in rows if row["fine_tune"].split("/")[1] == optimizer])
        at = 0.01
        means = {way: float(np.mean(values)) for (way, x), values in own.items() if x == at}
        if {"DARE", "DAREx-q"} <= means.keys():
            top = max(means, key=means.__getitem__)
            told.append(
                f"Of deltas trained with {optimizer}, at {at:g} bytes per parameter, DARE keeps "
                f"{means['DARE']:.1%} of the metric, DAREx-q {means['DAREx-q']:.1%}, and {top}, the best "
                f"without training, {means[top]:.1%}."
            )
    return told


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

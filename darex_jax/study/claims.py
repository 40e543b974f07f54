"""Claims of a paper against the rows of a study: the verdict is computed, never written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from darex_jax.study.plan import Plan
from darex_jax.study.rows import Row, floor_of, split_name
from darex_jax.study.run import FINE_TUNED
from darex_jax.study.shown import Finding, Verdict

LOW = " (not above nothing learnt)"
SHOWN = 4  # comparisons of a claim that are written out


def findings(plan: Plan, rows: Sequence[Row]) -> list[Finding]:
    """What became of each claim.

    A claim has one of three forms, each for every fine-tune and every column of `at`:
      better, than: two ways, or with `way` two optimizers: the first has the larger mean (or `value`).
      keeps, way: the way keeps this share of the fine-tuned metric; keeps_gain: of the gain over the base or
        the best constant answer.
      least, value, way: a value of the way is at least this.
    A metric that is not above that of nothing learnt (`floor_of`) counts neither as better nor as kept. The
    claim held if it does everywhere, held partly if in half of all cases or more.
    """
    return [_finding(plan, claim, rows) for claim in plan.claims]


def _finding(plan: Plan, claim: Mapping[str, Any], rows: Sequence[Row]) -> Finding:
    source = claim.get("source", plan.source)
    if why := claim.get("untestable"):
        return Finding(claim["claim"], "not testable here", why, source)
    among = claim.get("optimizers")
    rows = [row for row in rows if among is None or split_name(row["fine_tune"])[1] in among]
    if "keeps" in claim or "keeps_gain" in claim:
        compared = _kept(claim, rows)
    else:
        compared = _at_least(claim, rows) if "least" in claim else _compared(claim, rows)
    if not compared:
        return Finding(claim["claim"], "not testable here", "not measured yet.", source)
    good = sum(holds for holds, _ in compared)
    verdict: Verdict = "held" if good == len(compared) else "not seen"
    if len(compared) > good >= len(compared) / 2:
        verdict = "held partly"
    told = [text for _, text in sorted(compared, key=lambda each: each[0])][:SHOWN]  # the exceptions first
    more = f"; and {len(compared) - len(told)} more" if len(compared) > len(told) else ""
    return Finding(claim["claim"], verdict, f"{good} of {len(compared)}: {'; '.join(told)}{more}.", source)


def _compared(claim: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[bool, str]]:
    better, than, way = claim["better"], claim["than"], claim.get("way")
    value, columns = claim.get("value", "mean"), claim.get("at", [None])
    known = {
        (*split_name(row["fine_tune"]), row["way"], row["at"]): row[value] for row in rows if value in row
    }
    heads = {row["fine_tune"]: row for row in rows if row["way"] == FINE_TUNED}
    found = []
    for (training, optimizer, seed, own, at), number in known.items():
        if at not in columns:
            continue
        if way is None:  # two ways on one fine-tune
            other = known.get((training, optimizer, seed, than, at)) if own == better else None
            name = f"{training}, {optimizer}"
        else:  # one way on the fine-tunes of two optimizers
            other = known.get((training, than, seed, own, at)) if (own, optimizer) == (way, better) else None
            name = training
        if other is not None:
            head = heads.get("/".join((training, optimizer, seed)))
            low = value == "mean" and head is not None and number <= floor_of(head)
            told = f"{_case(name, seed, at)}: {number:.3g} against {other:.3g}" + (LOW if low else "")
            found.append((number > other and not low, told))
    return found


def _kept(claim: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[bool, str]]:
    whole = {row["fine_tune"]: row for row in rows if row["way"] == FINE_TUNED and "mean" in row}
    gain = "keeps_gain" in claim
    found = []
    for row in rows:
        if row["way"] == claim["way"] and row["at"] in claim["at"] and "mean" in row:
            head, floor = whole[row["fine_tune"]], floor_of(whole[row["fine_tune"]])
            training, optimizer, seed = split_name(row["fine_tune"])
            case = _case(f"{training}, {optimizer}", seed, row["at"])
            if head["mean"] <= floor:
                found.append((False, f"{case}: the fine-tuned model is no better than nothing learnt"))
                continue
            share = (row["mean"] - floor * gain) / (head["mean"] - floor * gain)
            low = row["mean"] <= floor
            holds = share >= claim["keeps_gain" if gain else "keeps"] and not low
            found.append((holds, f"{case}: {share:.1%}" + (LOW if low else "")))
    return found


def _at_least(claim: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[bool, str]]:
    found = []
    for row in rows:
        if row["way"] == claim["way"] and row["at"] in claim["at"] and claim["value"] in row:
            training, optimizer, seed = split_name(row["fine_tune"])
            number = row[claim["value"]]
            told = f"{_case(f'{training}, {optimizer}', seed, row['at'])}: {number:.4f}"
            found.append((number >= claim["least"], told))
    return found


def _case(name: str, seed: str, at: float | None) -> str:
    """What a comparison is of: the seed is named where it is not 0."""
    return name + ("" if seed == "0" else f", seed {seed}") + ("" if at is None else f" at {at:g}")

"""What a study or a delta shows, as plain data: a terminal, a Markdown file and an HTML page each draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["held", "held partly", "not seen", "not testable here"]


@dataclass(frozen=True)
class Table:
    """Attributes: title; columns: their heads, the first that of the rows' names; rows: texts, one a column;
    note: one or two sentences on how to read it; best: (row, column) of the cells to point out.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Series:
    """One line of a figure: its name, points, and one standard deviation of each y, or none."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None


@dataclass(frozen=True)
class Figure:
    """Lines, or bars where every x is a name.

    Attributes:
      labels: names of the x positions 0, 1, ... of bars; empty for lines.
      levels: horizontal lines, by what they are: the fine-tuned model, say.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    labels: Sequence[str] = ()
    levels: Sequence[tuple[str, float]] = ()
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """A claim, what became of it here, and the figures that say so."""

    claim: str
    verdict: Verdict
    figures: str
    source: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page. Attributes: text: paragraphs; command: what makes it again, as typed."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    findings: Sequence[Finding] = ()
    command: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
      summary: what it says, in at most five sentences, shown first.
      facts: versions, machine and the like, by name.
    """

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)

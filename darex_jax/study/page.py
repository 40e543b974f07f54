"""A page as one HTML file that loads nothing: style, script and figures are in it."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from importlib.resources import files
from typing import Any

from darex_jax.files.atomic import write_whole
from darex_jax.study.draw import NARROW, WIDE, figure_rows, svg_of, swatch
from darex_jax.study.shown import Figure, Finding, Page, Section, Table

MARKS = {"held": "✓", "held partly": "◐", "not seen": "✕", "not testable here": "○"}
LONG = 24  # rows from which on a table is folded
NUMBER = re.compile(
    r"[-+]?(?:1/)?\d[\d.,]*(?:\D10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+|e[-+]?\d+)?\s?(?:[%x]|[kMG]?B|m?s)?(?: \([\d.]+\))?"
)
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"https://[^\s<>\"']+")


def write_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Writes a page as one HTML file, whole or not at all.

    Raises: FileError if `path` is a directory, a device or a pipe.
    """
    write_whole(path, html_of(page))


def html_of(page: Page) -> str:
    """A page as HTML. Its texts may be anybody's: all are escaped, none can bring in markup or a script."""
    from jinja2 import Environment
    from markupsafe import Markup, escape

    def shown(value: Any) -> Any:
        return _printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    here = files(__package__)
    template, style, script = (
        here.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, finalize=shown)
    environment.filters["prose"] = lambda text: Markup(
        CODE.sub(r"<code>\1</code>", str(escape(_printable(text))))
    )
    return environment.from_string(template).render(
        page=page,
        sections=[_section(section, Markup) for section in page.sections],
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _printable(text: str) -> str:
    """Without what would turn the direction of writing or is no character; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _section(section: Section, markup: Any) -> dict[str, Any]:
    """What the template reads of a section. Args: markup: marks text as HTML."""
    return {
        "title": section.title,
        "text": section.text,
        "command": section.command,
        "findings": [_finding(finding) for finding in section.findings],
        "figures": [_figure(figure, markup) for figure in section.figures],
        "tables": [_table(table) for table in section.tables],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    paper, link = ARXIV.search(finding.source), LINK.search(finding.source)
    address = f"https://arxiv.org/abs/{paper.group(1)}" if paper else link.group() if link else ""
    return vars(finding) | {
        "class": finding.verdict.replace(" ", "-"),
        "mark": MARKS[finding.verdict],
        "link": address,
    }


def _figure(figure: Figure, markup: Any) -> dict[str, Any]:
    heads, rows = figure_rows(figure)
    names = [series.name for series in figure.series]
    return {
        "title": figure.title,
        "note": figure.note,
        "wide": markup(_printable(svg_of(figure, WIDE))),
        "narrow": markup(_printable(svg_of(figure, NARROW))),
        "legend": [{"name": n, "swatch": markup(swatch(i))} for i, n in enumerate(names)]
        if len(names) > 1
        else [],
        "table": _table(Table(figure.title, heads, rows)) | {"shown_title": False},
    }


def _table(table: Table) -> dict[str, Any]:
    """Cells with their deviations apart, and which columns are of numbers: those stand right."""
    width = range(1, len(table.columns))
    numeric = {
        i
        for i in width
        if all(_is_number(row[i]) for row in table.rows) and any(row[i] for row in table.rows)
    }

    def cell(row: int, column: int, text: str) -> dict[str, Any]:
        value, _, error = text.partition(" ± ")
        best = (row, column) in table.best
        classes = " ".join(["n"] * (column in numeric) + ["best"] * best)
        return {"text": value, "error": error, "best": best, "classes": classes}

    return {
        "title": table.title,
        "columns": table.columns,
        "rows": [[cell(r, c, text) for c, text in enumerate(row)] for r, row in enumerate(table.rows)],
        "numeric": numeric,
        "note": table.note,
        "best": table.best,
        "folded": len(table.rows) > LONG,
        "shown_title": len(table.rows) <= LONG,
    }


def _is_number(text: str) -> bool:
    value = re.split(r" ± | \[| \(", text)[0].strip()  # "0.874 (0.970) [1]", "98.1% ± 0.4% [4]"
    return value in ("", "-", "all", "none") or NUMBER.fullmatch(value) is not None

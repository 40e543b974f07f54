"""A study written out: Markdown beside its rows, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darex_jax.files.atomic import write_whole
from darex_jax.study.shown import Figure, Section, Table
from darex_jax.training.record import save_figure

PANELS = 3  # a row of a picture


def write_section(section: Section, stem: Path) -> list[Path]:
    """Writes STEM.md and, where there are figures, STEM.png and STEM.svg; returns what it wrote."""
    written = [stem.with_suffix(".md")]
    pictures = [stem.with_suffix(ending) for ending in (".png", ".svg")] if section.figures else []
    write_whole(written[0], markdown(section, pictures[0].name if pictures else None))
    if pictures:
        draw(section.figures, pictures)
    return written + pictures


def markdown(section: Section, picture: str | None = None) -> str:
    """A section as Markdown; the best cells are bold."""
    lines = [f"# {section.title}", ""]
    for paragraph in section.text:
        lines += [paragraph, ""]
    if section.command:
        lines += [f"Made by `{section.command}`.", ""]
    if section.findings:
        lines += ["| claim | verdict | figures |", "| --- | --- | --- |"]
        lines += [f"| {f.claim} ({f.source}) | **{f.verdict}** | {f.figures} |" for f in section.findings]
        lines.append("")
    if picture:
        lines += [f"![{section.title}]({picture})", ""]
    for table in section.tables:
        lines += _table(table)
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    lines = [f"## {table.title}", ""]
    if table.note:
        lines += [table.note, ""]
    lines += [f"| {' | '.join(table.columns)} |", "|" + " --- |" * len(table.columns)]
    for i, row in enumerate(table.rows):
        cells = [f"**{text}**" if (i, j) in table.best else text for j, text in enumerate(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def print_section(section: Section) -> None:
    """A section in a terminal: its findings and tables."""
    from rich.console import Console
    from rich.table import Table as Shown
    from rich.text import Text

    console = Console()
    for finding in section.findings:
        console.print(Text(f"{finding.verdict}: {finding.claim} ({finding.source}): {finding.figures}"))
    for table in section.tables:
        shown = Shown(title=table.title, caption=table.note or None)
        for j, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if j else "left", overflow="fold")
        for i, row in enumerate(table.rows):
            cells = [
                Text(cell, style="bold green" if (i, j) in table.best else "") for j, cell in enumerate(row)
            ]
            shown.add_row(*cells)
        console.print(shown)


def draw(figures: Sequence[Figure], paths: Sequence[Path]) -> None:
    """All figures as the panels of one picture, in every one of the formats."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    across = min(PANELS, len(figures))
    down = -(-len(figures) // across)
    picture = Picture(figsize=(4.6 * across, 3.6 * down), layout="constrained")
    FigureCanvasAgg(picture)
    names = list(dict.fromkeys(series.name for figure in figures for series in figure.series))
    lines: dict[str, Any] = {}
    grid = list(picture.subplots(down, across, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, figure in zip(grid, figures, strict=False):
        axes.set_axis_on()
        for series in figure.series:
            color = f"C{names.index(series.name) % 10}"
            style = "--" if names.index(series.name) >= 10 else "-"
            lines[series.name] = axes.errorbar(
                series.x, series.y, series.error, marker="o", markersize=3, capsize=2, color=color,
                linestyle=style, label=series.name,
            )  # fmt: skip
        for name, level in figure.levels:
            axes.axhline(level, color="black", linestyle=":", linewidth=1)
            axes.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
        axes.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
        if figure.log_x:
            columns = sorted({x for series in figure.series for x in series.x})
            axes.set_xscale("log")
            axes.set_xticks(columns, [f"{x:g}" for x in columns])
            axes.minorticks_off()
        axes.grid(alpha=0.3)
    picture.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=5, frameon=False)
    for path in paths:
        save_figure(picture, path)

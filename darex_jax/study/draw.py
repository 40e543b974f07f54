"""Figures as SVG, in two widths: colours are classes, so that a page's style decides them, on paper too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

from darex_jax.study.shown import Figure, Series

WIDE, NARROW = 540, 330  # user units; a page shows the second where there is no room for the first
COLOURS = 8  # classes s0, s1, ... of series
MARKS = (  # one fewer than colours: 56 series have a pair of their own
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-5L4.6,3.4H-4.6z",
    "M0,-5.2L5.2,0L0,5.2L-5.2,0z",
    "M0,5L4.6,-3.4H-4.6z",
    "M-1.4,-4.6h2.8v3.2h3.2v2.8h-3.2v3.2h-2.8v-3.2h-3.2v-2.8h3.2z",
    "M-5,-2h10v4h-10z",
)
LETTER = 6.9  # about the width of one, at 12.5 units
FEW = 8  # x values that are all named on the axis


def number_text(value: float) -> str:
    """A number for a person: four digits, and powers of ten where there would be many zeros."""
    if not math.isfinite(value):
        return "none" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        digits, _, power = f"{value:.3g}".partition("e")
        if power:
            raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
            return f"10{raised}" if digits == "1" else f"{digits}\N{MULTIPLICATION SIGN}10{raised}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def figure_rows(figure: Figure) -> tuple[list[str], list[list[str]]]:
    """The numbers of a figure as a table: heads and rows, levels last."""
    places = sorted({x for series in figure.series for x in series.x})
    rows = []
    for x in places:
        name = figure.labels[int(x)] if figure.labels else number_text(x)
        rows.append([name, *(_cell(series, x) for series in figure.series)])
    for name, value in figure.levels:
        rows.append([name, number_text(value), *[""] * (len(figure.series) - 1)])
    return [figure.x_label, *(series.name or figure.y_label for series in figure.series)], rows


def _cell(series: Series, x: float) -> str:
    found = [_value_text(series, i) for i, own in enumerate(series.x) if own == x]
    return ", ".join(found)


def _value_text(series: Series, i: int) -> str:
    error = series.error[i] if series.error is not None else math.nan
    return number_text(series.y[i]) + (f" ± {number_text(error)}" if math.isfinite(error) else "")


def svg_of(figure: Figure, width: int) -> str:
    """A figure as an SVG element of this width, its title being its text for who does not see it."""
    kind = "Bars" if figure.labels else "Lines"
    names = ", ".join(series.name for series in figure.series if series.name)
    says = f"{figure.title}. {kind} of {figure.y_label} by {figure.x_label}{f': {names}' if names else ''}."
    svg = Element("svg", {"role": "img", "aria-label": f"{says} The numbers are in the table below."})
    height = _draw_bars(svg, figure, width) if figure.labels else _draw_lines(svg, figure, width)
    svg.set("viewBox", f"0 0 {width} {height:.0f}")
    svg.set("class", "wide" if width == WIDE else "narrow")
    return tostring(svg, encoding="unicode")


def swatch(number: int) -> str:
    """The mark of a series, for a legend."""
    svg = Element("svg", {"viewBox": "-7 -7 14 14", "aria-hidden": "true", "class": "swatch"})
    _add(svg, "path", d=MARKS[number % len(MARKS)], class_=f"mark {_colour(number)}")
    return tostring(svg, encoding="unicode")


class _Axis(NamedTuple):
    """Where values lie: `at` gives the place of one; ticks: those to write."""

    at: Callable[[float], float]
    ticks: list[float]


def _axis(values: Sequence[float], log: bool, start: float, stop: float, ticks: int, pad: float) -> _Axis:
    """An axis that holds the values, from place `start` to place `stop`.

    Args: ticks: about how many; pad: room at the ends, a share of the whole.
    """
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    low, high = min(finite), max(finite)
    if log:
        a, b = math.log10(low), math.log10(high)
        if b - a < 0.3:
            a, b = a - 0.3, b + 0.3
        a, b = a - pad * (b - a), b + pad * (b - a)
        decades = range(math.floor(a), math.ceil(b) + 1)
        digits = (1, 2, 5) if b - a < 2 else (1,)
        every = max(1, math.ceil((b - a) / ticks))
        marks = [d * 10.0**k for k in decades for d in digits if k % every == 0]
        where = [v for v in marks if a <= math.log10(v) <= b]
        return _Axis(lambda v: start + (math.log10(v) - a) / (b - a) * (stop - start), where)
    if pad and 0 <= low <= 0.25 * high:
        low = 0.0
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-30):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    room = pad * (high - low)
    low, high = (low if low == 0 else low - room), (high if high == 0 else high + room)
    raw = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    where = [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]
    return _Axis(lambda v: start + (v - low) / (high - low) * (stop - start), where)


def _draw_lines(svg: Element, figure: Figure, width: int) -> float:
    wide = width == WIDE
    height, right, top, bottom = (320.0, 18.0, 36.0, 46.0) if wide else (270.0, 12.0, 34.0, 44.0)
    everything = [v for s in figure.series for i, y in enumerate(s.y) for v in _reach(s, i, y)]
    everything += [value for _, value in figure.levels]
    y = _axis(everything, figure.log_y, height - bottom, top, 5 if wide else 4, 0.06)
    left = 10 + LETTER * max((len(number_text(tick)) for tick in y.ticks), default=1)
    x_values = sorted({v for s in figure.series for v in s.x if _drawable(v, figure.log_x)})
    x = _axis(x_values, figure.log_x, left + 10, width - right - 10, 7 if wide else 4, 0.0)
    if len(x_values) <= FEW and _far_enough([x.at(v) for v in x_values]):
        x = x._replace(ticks=x_values)
    elif all(float(v).is_integer() for v in x_values):
        x = x._replace(ticks=[tick for tick in x.ticks if float(tick).is_integer()])
    _add(svg, "text", figure.y_label, x=0, y=14, class_="axis")
    for tick in y.ticks:
        _add(svg, "line", x1=left, x2=width - right, y1=y.at(tick), y2=y.at(tick), class_="grid")
        _add(svg, "text", number_text(tick), x=left - 6, y=y.at(tick) + 4, class_="tick end")
    for tick in x.ticks:
        _add(
            svg,
            "line",
            x1=x.at(tick),
            x2=x.at(tick),
            y1=height - bottom,
            y2=height - bottom + 5,
            class_="base",
        )
        _add(svg, "text", number_text(tick), x=x.at(tick), y=height - bottom + 19, class_="tick middle")
    _add(svg, "line", x1=left, x2=width - right, y1=height - bottom, y2=height - bottom, class_="base")
    _add(svg, "text", figure.x_label, x=(left + width - right) / 2, y=height - 6, class_="axis middle")
    for _, value in figure.levels:
        if _drawable(value, figure.log_y):
            _add(svg, "line", x1=left, x2=width - right, y1=y.at(value), y2=y.at(value), class_="level")
    for number, series in enumerate(figure.series):
        group = _add(svg, "g", class_=f"series {_colour(number)}", data_series=number)
        points = [
            (i, x.at(a), y.at(b))
            for i, (a, b) in enumerate(zip(series.x, series.y, strict=True))
            if _drawable(a, figure.log_x) and _drawable(b, figure.log_y)
        ]
        points.sort(key=lambda point: point[1])
        line = " ".join(f"{'L' if n else 'M'}{px:.1f},{py:.1f}" for n, (_, px, py) in enumerate(points))
        if line:
            _add(group, "path", d=line, class_=f"line d{number % COLOURS}")
        for i, px, py in points:
            low, high = (
                v if _drawable(v, figure.log_y) else series.y[i] for v in _reach(series, i, series.y[i])
            )
            if high > low:
                _add(group, "line", x1=px, x2=px, y1=y.at(low), y2=y.at(high), class_="error")
            _add(group, "path", d=MARKS[number % len(MARKS)], transform=f"translate({px:.1f},{py:.1f})",
                 class_="mark")  # fmt: skip
            hit = _add(group, "circle", cx=px, cy=py, r=9, class_="hit")
            name = f"{series.name}: " if series.name else ""
            where = f"{figure.x_label} {number_text(series.x[i])}"
            _add(hit, "title", f"{name}{_value_text(series, i)} ({where})")
    _name_levels(svg, figure, y, width - right)
    return height


def _name_levels(svg: Element, figure: Figure, y: _Axis, right: float) -> None:
    """The name of each line across over its end, higher where another name is in the way."""
    before = math.inf
    for name, value in sorted(figure.levels, key=lambda level: level[1]):
        if not _drawable(value, figure.log_y):
            continue
        place = y.at(value)
        text = place - 5 if before - (place - 5) >= 13 else before - 13
        _add(svg, "text", f"{name} {number_text(value)}", x=right, y=text, class_="note end")
        before = text


def _draw_bars(svg: Element, figure: Figure, width: int) -> float:
    """Bars that lie, so that names of any length have room: beside them, or above where it is narrow."""
    wide, many = width == WIDE, len(figure.series) > 1
    thick, gap = (13.0, 9.0) if not many else (11.0, 12.0)
    longest = max(map(len, figure.labels))
    most = int(0.4 * width / LETTER) if wide else int(width / LETTER)
    left = min(longest, most) * LETTER + 12 if wide else 0.0
    head = 0.0 if wide else 17.0
    cells = {(n, int(x)): i for n, s in enumerate(figure.series) for i, x in enumerate(s.x)}
    texts = [_value_text(s, i) for s in figure.series for i in range(len(s.y))]
    right = width - 10 - LETTER * max(map(len, texts), default=0)
    values = [v for s in figure.series for i, own in enumerate(s.y) for v in _reach(s, i, own)]
    values += [value for _, value in figure.levels] + ([] if figure.log_y else [0.0])
    axis = _axis(values, figure.log_y, left, right, 5 if wide else 3, 0.0)
    zero = left if figure.log_y else axis.at(0.0)
    top = 22.0 + 16 * len(figure.levels)
    rows = len(figure.labels)
    each = head + thick * len(figure.series) + gap
    bottom = top + rows * each
    _add(svg, "text", figure.y_label, x=left, y=14, class_="axis")
    for tick in axis.ticks:
        _add(svg, "line", x1=axis.at(tick), x2=axis.at(tick), y1=top, y2=bottom, class_="grid")
        side = "tick" if axis.at(tick) < 12 else "tick middle"
        _add(svg, "text", number_text(tick), x=axis.at(tick), y=bottom + 16, class_=side)
    for n, (name, value) in enumerate(figure.levels):
        if _drawable(value, figure.log_y):
            place = axis.at(value)
            _add(svg, "line", x1=place, x2=place, y1=24 + 16 * n, y2=bottom, class_="level")
            side, by = ("note end", -5) if place > width / 2 else ("note", 5)
            _add(svg, "text", f"{name} {number_text(value)}", x=place + by, y=32 + 16 * n, class_=side)
    for row, label in enumerate(figure.labels):
        place = top + row * each + gap / 2
        middle = place + (11 if not wide else thick * len(figure.series) / 2 + 4.5)
        shown = label if len(label) <= most else f"{label[: most - 1]}…"
        _add(svg, "text", shown, x=left - 8 if wide else 4, y=middle, class_=f"name{' end' if wide else ''}")
        for number, series in enumerate(figure.series):
            i = cells.get((number, row))
            if i is None or not _drawable(series.y[i], figure.log_y):
                continue
            y, end = place + head + number * thick, axis.at(series.y[i])
            group = _add(svg, "g", class_=f"series {_colour(number)}", data_series=number)
            start, length = min(zero, end), max(abs(end - zero), 1.0)
            _add(group, "rect", x=start, y=y, width=length, height=thick - 2, rx=2, class_="bar")
            low, high = (
                v if _drawable(v, figure.log_y) else series.y[i] for v in _reach(series, i, series.y[i])
            )
            centre = y + (thick - 2) / 2
            if high > low:
                _add(
                    group,
                    "line",
                    x1=axis.at(low),
                    x2=axis.at(high),
                    y1=centre,
                    y2=centre,
                    class_="error bars",
                )
            beside = max(end, axis.at(high), zero) + 5
            _add(group, "text", _value_text(series, i), x=beside, y=centre + 4, class_="value")
            hit = _add(group, "rect", x=start, y=y - 1, width=max(length, 12), height=thick, class_="hit")
            name = f"{label}, {series.name}" if series.name else label
            _add(hit, "title", f"{name}: {_value_text(series, i)}")
    _add(svg, "line", x1=zero, x2=zero, y1=top, y2=bottom, class_="base")
    if figure.x_label and wide:
        _add(svg, "text", figure.x_label, x=left - 8, y=14, class_="axis end")
    return bottom + 24


def _reach(series: Series, i: int, y: float) -> tuple[float, float]:
    """From where to where the error of a point goes."""
    error = series.error[i] if series.error is not None else 0.0
    error = error if math.isfinite(error) else 0.0
    return y - error, y + error


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _far_enough(places: Sequence[float]) -> bool:
    return all(b - a >= 40 for a, b in pairwise(places))


def _colour(number: int) -> str:
    return f"s{number % COLOURS}"


def _add(parent: Element, tag: str, text: str | None = None, **attributes: Any) -> Element:
    """A child; `class_` is class, `data_x` is data-x, numbers are rounded."""
    named = {
        name.rstrip("_").replace("_", "-"): f"{round(value, 1):g}" if isinstance(value, float) else str(value)
        for name, value in attributes.items()
    }
    child = SubElement(parent, tag, named)
    child.text = text
    return child

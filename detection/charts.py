"""Charts as inline SVG for a page: no library, sharp at any size, in the page's colours."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from detection.pages import Html, element, escape, join

_COLOURS = (
    "#2f6fde",
    "#d9480f",
    "#2b8a3e",
    "#862e9c",
    "#c2255c",
    "#0b7285",
    "#e67700",
    "#5c4033",
    "#495057",
    "#74b816",
)


def column_chart(title: str, labels: Sequence[str], values: Sequence[float], note: object = "", unit: str = "") -> Html:
    """Columns over labels, each with its value above it.

    Args:
        title: of the chart.
        labels, values: as many of each; values are not negative.
        note: below the chart.
        unit: behind each value, for example "%".
    """
    width, height, bottom, top = 440, 220, 34, 30
    most = max([*values, 0]) or 1
    step = width / max(len(values), 1)
    parts = [_svg_text(0, 14, title, anchor="start", weight="600")]
    every = math.ceil(len(labels) * max([len(label) for label in labels] or [1]) * 7.5 / width) or 1
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        x, tall = number * step, (height - bottom - top - 16) * value / most
        y = height - bottom - tall
        said = _said(value, unit)
        parts.append(
            f'<rect x="{x + step * 0.1:.1f}" y="{y:.1f}" width="{step * 0.8:.1f}" height="{max(tall, 0.5):.1f}" '
            f'fill="var(--accent)"><title>{html.escape(label)}: {said}</title></rect>'
        )
        if step > 26:
            parts.append(_svg_text(x + step / 2, y - 4, said))
        if number % every == 0:
            parts.append(_svg_text(x + step / 2, height - bottom + 16, label))
    parts.append(f'<line x1="0" x2="{width}" y1="{height - bottom}" y2="{height - bottom}" stroke="var(--line)"/>')
    return _svg_figure(width, height - 10, parts, title, note)


def bar_chart(title: str, labels: Sequence[str], values: Sequence[float], note: object = "", unit: str = "") -> Html:
    """Bars beside their labels, one below the other: for names rather than steps. Arguments as for ``column_chart``."""
    width, row, left = 440, 22, 150
    most = max([*values, 0]) or 1
    parts = [_svg_text(0, 14, title, anchor="start", weight="600")]
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        y, wide = 26 + number * row, (width - left - 60) * value / most
        said = _said(value, unit)
        short = label if len(label) <= 20 else label[:19] + "…"
        parts.append(_svg_text(left - 8, y + 14, short, anchor="end"))
        parts.append(
            f'<rect x="{left}" y="{y + 3}" width="{max(wide, 0.5):.1f}" height="{row - 6}" fill="var(--accent)">'
            f"<title>{html.escape(label)}: {said}</title></rect>"
        )
        parts.append(_svg_text(left + wide + 6, y + 14, said, anchor="start"))
    return _svg_figure(width, 30 + row * len(values), parts, title, note)


def heat_map(title: str, counts: NDArray[np.floating] | NDArray[np.integer], note: object = "") -> Html:
    """A table of numbers [rows, columns] as a map from pale (0) to strong (the most), twice as wide as high."""
    rows, columns = counts.shape
    width, height, top = 440, 220, 24
    across, down = width / columns, height / rows
    most = float(counts.max(initial=0)) or 1.0
    parts = [_svg_text(0, 14, title, anchor="start", weight="600")]
    parts += [
        f'<rect x="{x * across:.2f}" y="{top + y * down:.2f}" width="{across + 0.2:.2f}" height="{down + 0.2:.2f}" '
        f'fill="var(--accent)" fill-opacity="{counts[y, x] / most:.3f}"/>'
        for y in range(rows)
        for x in range(columns)
    ]
    parts.append(f'<rect x="0" y="{top}" width="{width}" height="{height}" fill="none" stroke="var(--line)"/>')
    return _svg_figure(width, top + height + 6, parts, title, note)


def line_chart(
    series: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]],
    x_name: str,
    y_name: str,
    *,
    diagonal: bool = False,
    marks: Sequence[tuple[float, float]] = (),
) -> Html:
    """Lines over 0..1 by 0..1, with a legend.

    Args:
        series: (name, x [P], y [P]); points that are not finite are left out.
        x_name, y_name: of the axes.
        diagonal: draw where x equals y.
        marks: (x, y) of a dot in each line's colour, in the order of the series; a NaN x draws none.
    """
    left, top, width, height = 44, 10, 360, 240

    def at(x: float, y: float) -> tuple[float, float]:
        return round(left + width * x, 1), round(top + height * (1 - y), 1)

    def line(start: tuple[float, float], end: tuple[float, float], style: str) -> str:
        return f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" {style}/>'

    parts = []
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(line(at(tick, 0), at(tick, 1), 'stroke="var(--line)"'))
        parts.append(line(at(0, tick), at(1, tick), 'stroke="var(--line)"'))
        parts.append(_svg_text(at(tick, 0)[0], top + height + 16, f"{tick:g}"))
        parts.append(_svg_text(left - 6, at(0, tick)[1] + 4, f"{tick:g}", anchor="end"))
    parts.append(_svg_text(left + width / 2, top + height + 34, x_name))
    turned = f'transform="translate(12 {top + height / 2:.1f}) rotate(-90)"'
    parts.append(f"<g {turned}>{_svg_text(0, 0, y_name)}</g>")
    if diagonal:
        parts.append(line(at(0, 0), at(1, 1), 'stroke="var(--dim)" stroke-dasharray="5 4"'))
    legend = []
    for number, (name, xs, ys) in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        finite = [at(x, y) for x, y in zip(xs, ys, strict=True) if np.isfinite(x) and np.isfinite(y)]
        points = " ".join(f"{x},{y}" for x, y in finite)
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"><title>{html.escape(name)}</title>'
            "</polyline>"
        )
        if number < len(marks) and np.isfinite(marks[number][0]):
            x, y = at(*marks[number])
            said = f"{html.escape(name)} {marks[number][0]:.2f}"
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"><title>{said}</title></circle>')
        legend.append(element("span", Html(f'<i style="background:{colour}"></i>'), name))
    chart = _svg_figure(left + width + 12, top + height + 40, parts, f"{y_name} over {x_name}", "")
    return element("div", chart, element("div", *legend, class_="legend"))


def matrix_table(matrix: NDArray[np.int64], rows: Sequence[str], columns: Sequence[str]) -> Html:
    """Numbers [R, C] in cells under turned names, darker where they are a larger share of their row; 0 is left empty."""
    head = element("tr", element("th"), *(element("th", element("span", name)) for name in columns))
    lines = []
    for name, values in zip(rows, matrix.tolist(), strict=True):
        total = max(sum(values), 1)
        cells = (
            Html(f'<td style="background:rgba(47,111,222,{0.75 * value / total:.2f})">{escape(value or "")}</td>')
            for value in values
        )
        lines.append(element("tr", element("th", name), *cells))
    table = element("table", element("thead", head), element("tbody", join(lines)))
    return element("div", table, class_="matrix")


def _said(value: float, unit: str) -> str:
    """A count, a share in per cent or a figure such as AP, for people."""
    if value >= 10 or value == int(value):
        return f"{value:,.0f}{unit}"
    return f"{value:.1f}{unit}" if unit else f"{value:.3f}"


def _svg_text(x: float, y: float, text: str, anchor: str = "middle", weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" font-size="12" '
        f'fill="currentColor">{html.escape(text)}</text>'
    )


def _svg_figure(width: float, height: float, parts: Sequence[str], title: str, note: object) -> Html:
    svg = Html(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(title)}" '
        f'font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )
    return element("figure", svg, *([element("figcaption", note)] if note else []))

"""Charts as inline SVG, which needs no library, stays sharp and takes the page's colours. Made by hand: lines, bars, a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

COLOURS = ("#2f6fde", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#0b7285", "#e67700", "#5c4033", "#495057", "#74b816")
_LEFT, _TOP, _WIDTH, _HEIGHT = 44, 10, 360, 240


def line_chart(
    series: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]],
    x_name: str,
    y_name: str,
    *,
    diagonal: bool = False,
    marks: Sequence[tuple[float, float]] = (),
) -> str:
    """Lines over 0..1 by 0..1.

    Args:
        series: (name, x [P], y [P]); points that are not finite are left out.
        x_name, y_name: of the axes.
        diagonal: draw where x equals y.
        marks: (x, y) of a dot in each line's colour, in the order of the series; a NaN x draws none.
    """
    parts = [_frame(x_name, y_name)]
    if diagonal:
        parts.append(f'<line class="ideal" x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}"/>')
    for number, (name, xs, ys) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{_x(x)},{_y(y)}" for x, y in zip(xs, ys, strict=True) if np.isfinite(x) and np.isfinite(y))
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"><title>{escape(name)}</title></polyline>'
        )
        if number < len(marks) and np.isfinite(marks[number][0]):
            x, y = marks[number]
            parts.append(
                f'<circle cx="{_x(x)}" cy="{_y(y)}" r="4" fill="{colour}"><title>{escape(name)} {x:.2f}</title></circle>'
            )
    return _svg(parts, _LEFT + _WIDTH + 12, _TOP + _HEIGHT + 40) + _legend([name for name, _, _ in series])


def bar_chart(values: Sequence[tuple[str, float, str]], largest: float | None = None) -> str:
    """A horizontal bar for each (name, value, text behind it); values of 0 or more."""
    largest = largest or max((value for _, value, _ in values), default=0) or 1
    left, width, height = 110, 210, 26
    parts = []
    for number, (name, value, text) in enumerate(values):
        top = number * height
        length = max(0.0, width * value / largest)
        parts.append(f'<text x="{left - 8}" y="{top + 17}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{top + 4}" width="{length:.1f}" height="18" fill="{COLOURS[0]}"/>')
        parts.append(f'<text x="{left + length + 6:.1f}" y="{top + 17}">{escape(text)}</text>')
    return _svg(parts, left + width + 110, max(1, len(values)) * height + 4)


def matrix_table(matrix: NDArray[np.int64], rows: Sequence[str], columns: Sequence[str]) -> str:
    """Numbers in cells, darker where they are a larger share of their row."""
    head = "".join(f'<th class="turned"><span>{escape(name)}</span></th>' for name in columns)
    lines = [f"<tr><th></th>{head}</tr>"]
    for name, values in zip(rows, matrix.tolist(), strict=True):
        total = max(sum(values), 1)
        cells = "".join(
            f'<td style="background:rgba(47,111,222,{0.75 * value / total:.2f})">{value or ""}</td>' for value in values
        )
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="matrix">{"".join(lines)}</table></div>'


def _x(value: float) -> str:
    return f"{_LEFT + _WIDTH * value:.1f}"


def _y(value: float) -> str:
    return f"{_TOP + _HEIGHT * (1 - value):.1f}"


def _frame(x_name: str, y_name: str) -> str:
    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        parts.append(f'<line class="grid" x1="{_x(tick)}" y1="{_y(0)}" x2="{_x(tick)}" y2="{_y(1)}"/>')
        parts.append(f'<line class="grid" x1="{_x(0)}" y1="{_y(tick)}" x2="{_x(1)}" y2="{_y(tick)}"/>')
        parts.append(f'<text x="{_x(tick)}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{_LEFT - 6}" y="{float(_y(tick)) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{_x(0.5)}" y="{_TOP + _HEIGHT + 34}" text-anchor="middle">{escape(x_name)}</text>')
    middle = float(_y(0.5))
    parts.append(
        f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>'
    )
    return "".join(parts)


def _svg(parts: Sequence[str], width: float, height: float) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{"".join(parts)}</svg>'


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<div class="legend">{items}</div>'

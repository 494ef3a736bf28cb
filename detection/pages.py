"""Self-contained HTML pages: text, tables, images and charts in one file that opens from disk, without server or script.

Every function gives ``Html``. What is passed to it as a plain ``str`` is text and is escaped; what is ``Html`` already is taken
as it is. Colours follow the reader's light or dark setting, and a page fits a telephone as well as a desk.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5c6670; --ground: #ffffff; --card: #f4f6f8; --line: #d7dde3;
  --accent: #0b6bcb; --error: #c0262d; --warning: #9a5b00; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --dim: #9aa5b1; --ground: #14181c; --card: #1e242a;
  --line: #343c45; --accent: #6cb3ff; --error: #ff7b72; --warning: #e3a73b; --good: #56d364; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 90rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0; max-width: 75ch; }
a { color: var(--accent); }
code { font: .92em/1.4 ui-monospace, monospace; background: var(--card); padding: .1em .3em; border-radius: 4px; }
pre { background: var(--card); padding: .8rem; border-radius: 8px; overflow-x: auto; }
pre code { padding: 0; }
.dim { color: var(--dim); }
.error { color: var(--error); } .warning { color: var(--warning); } .good { color: var(--good); }
.tag { display: inline-block; padding: 0 .5em; border: 1px solid currentColor; border-radius: 1em; font-size: .8rem;
  font-weight: 600; vertical-align: middle; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9rem), 1fr)); gap: .8rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.2; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; margin: .8rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; min-width: 0; }
figure img { display: block; max-width: 100%; max-height: 26rem; height: auto; border-radius: 6px; background: var(--card); }
figure svg { display: block; width: 100%; height: auto; }
figcaption { overflow-wrap: anywhere; font-size: .86rem; color: var(--dim); margin-top: .3rem; }
summary { cursor: pointer; color: var(--accent); }
""".strip()


class Html(str):
    """A piece of HTML; everything else is text that has to be escaped."""

    __slots__ = ()


def escape(content: object) -> Html:
    """Text as HTML; ``Html`` stays as it is."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def join(parts: Iterable[object], between: str = "\n") -> Html:
    """Several pieces as one; text among them is escaped."""
    return Html(escape(between).join(escape(part) for part in parts))


def element(name: str, *parts: object, **attributes: str) -> Html:
    """``<name attributes>parts</name>``; an attribute ``class_`` is written as ``class``."""
    written = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{join(parts, '')}</{name}>")


def page(title: str, *parts: object, subtitle: object = "") -> Html:
    """A whole document.

    Args:
        title: of the page and of its first heading.
        parts: what stands below, from the functions of this file.
        subtitle: a line under the heading.
    """
    head = join(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            element("title", title),
            Html(f"<style>\n{_CSS}\n</style>"),
        ]
    )
    body = [element("h1", title)]
    if subtitle:
        body.append(element("p", subtitle, class_="dim"))
    return Html(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{join([*body, *parts])}\n</body>\n</html>\n'
    )


def section(title: object, *parts: object, level: int = 2, anchor: str = "") -> Html:
    """A heading and what belongs to it; ``anchor`` is a name that links can lead to (``#anchor``)."""
    heading = element(f"h{level}", title, **({"id": anchor} if anchor else {}))
    return join([heading, *parts])


def paragraph(*parts: object, class_: str = "") -> Html:
    return element("p", *parts, **({"class_": class_} if class_ else {}))


def code(text: str, block: bool = False) -> Html:
    """Something to be typed: within a line, or as a block of its own."""
    inner = element("code", text)
    return element("pre", inner) if block else inner


def tag(text: str, class_: str) -> Html:
    """A word in a frame; ``class_`` is its colour: error, warning, good or dim."""
    return element("span", text, class_=f"tag {class_}")


def tiles(figures: Iterable[tuple[object, object]]) -> Html:
    """The few figures that matter, large: pairs of (number, what it counts)."""
    return element(
        "div", *(element("div", element("b", number), what, class_="tile") for number, what in figures), class_="tiles"
    )


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """Rows under a header. A column whose cells are all numbers is set flush right; a wide table scrolls in itself."""
    rows = [list(row) for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[column], int | float) for row in rows) for column in range(len(header))
    ]

    def line(name: str, cells: Sequence[object]) -> Html:
        return element(
            "tr",
            *(
                element(name, _number(cell), **({"class_": "number"} if is_number else {}))
                for cell, is_number in zip(cells, numeric, strict=True)
            ),
        )

    head = element("thead", line("th", header))
    body = element("tbody", *(line("td", row) for row in rows))
    return element("div", element("table", head, body), class_="scroll")


def _number(cell: object) -> object:
    if isinstance(cell, float):
        return f"{cell:,.3f}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else cell


def fold(summary: object, *parts: object, is_open: bool = False) -> Html:
    """Parts that are shown when their summary is clicked on."""
    inner = join([element("summary", summary), *parts])
    return Html(f"<details{' open' if is_open else ''}>{inner}</details>")


def figure(image: NDArray[np.uint8], caption: object = "", alt: str = "", side: int = 480, quality: int = 80) -> Html:
    """An image inside the page, as a JPEG.

    Args:
        image: uint8 [H, W, 3], RGB.
        caption: below it.
        alt: what it shows, for who cannot see it; by default the caption, if that is plain text.
        side: the longer side above which it is made smaller, in pixels.
        quality: of the JPEG, 1 to 100.
    """
    text = alt or ("" if isinstance(caption, Html) else str(caption))
    shown = Html(f'<img src="{data_uri(image, side, quality)}" alt="{html.escape(text)}" loading="lazy">')
    return element("figure", shown, *([element("figcaption", caption)] if caption else []))


def gallery(figures: Iterable[Html]) -> Html:
    """Figures side by side, as many in a row as fit."""
    return element("div", *figures, class_="gallery")


def charts(figures: Iterable[Html]) -> Html:
    """As ``gallery``, with wider cells."""
    return element("div", *figures, class_="charts")


def data_uri(image: NDArray[np.uint8], side: int = 480, quality: int = 80) -> str:
    """An image, uint8 [H, W, 3] RGB, as a ``data:`` address of a JPEG, made smaller where its longer side is above ``side``.

    Raises:
        UserError: it has no pixels, or cannot be encoded.
    """
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"an image is uint8 [H, W, 3] with at least one pixel; got shape {image.shape}")
    factor = side / max(image.shape[:2])
    if factor < 1:
        size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise UserError(f"an image of shape {image.shape} cannot be encoded as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


def column_chart(title: str, labels: Sequence[str], values: Sequence[float], note: object = "", unit: str = "") -> Html:
    """Columns over labels, each with its value above it.

    Args:
        title: of the chart.
        labels, values: as many of each; values are not negative.
        note: below the chart.
        unit: behind each value, for example "%".
    """
    width, height, bottom, top = 520, 220, 34, 30
    most = max([*values, 0]) or 1
    step = width / max(len(values), 1)
    parts = [_svg_text(0, 14, title, anchor="start", weight="600")]
    every = math.ceil(len(labels) * max([len(label) for label in labels] or [1]) * 7.5 / width) or 1
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        x, tall = number * step, (height - bottom - top - 16) * value / most
        y = height - bottom - tall
        said = f"{value:,.0f}{unit}" if value >= 10 or value == int(value) else f"{value:.2g}{unit}"
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
    width, row, left = 520, 22, 170
    most = max([*values, 0]) or 1
    parts = [_svg_text(0, 14, title, anchor="start", weight="600")]
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        y, wide = 26 + number * row, (width - left - 70) * value / most
        said = f"{value:,.0f}{unit}" if value >= 10 or value == int(value) else f"{value:.2g}{unit}"
        short = label if len(label) <= 24 else label[:23] + "…"
        parts.append(_svg_text(left - 8, y + 14, short, anchor="end"))
        parts.append(
            f'<rect x="{left}" y="{y + 3}" width="{max(wide, 0.5):.1f}" height="{row - 6}" fill="var(--accent)">'
            f"<title>{html.escape(label)}: {said}</title></rect>"
        )
        parts.append(_svg_text(left + wide + 6, y + 14, said, anchor="start"))
    return _svg_figure(width, 30 + row * len(values), parts, title, note)


def heat_map(title: str, counts: NDArray[np.floating] | NDArray[np.integer], note: object = "") -> Html:
    """A table of numbers [rows, columns] as a map from pale (0) to strong (the most)."""
    rows, columns = counts.shape
    width, top = 260, 24
    cell = width / columns
    most = float(counts.max(initial=0)) or 1.0
    parts = [_svg_text(0, 14, title, anchor="start", weight="600")]
    parts += [
        f'<rect x="{x * cell:.2f}" y="{top + y * cell:.2f}" width="{cell + 0.2:.2f}" height="{cell + 0.2:.2f}" '
        f'fill="var(--accent)" fill-opacity="{counts[y, x] / most:.3f}"/>'
        for y in range(rows)
        for x in range(columns)
    ]
    parts.append(f'<rect x="0" y="{top}" width="{width}" height="{rows * cell:.1f}" fill="none" stroke="var(--line)"/>')
    return _svg_figure(width * 2, top + rows * cell + 6, parts, title, note)


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

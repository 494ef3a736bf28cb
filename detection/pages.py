"""Self-contained HTML pages: text, tables and images in one file that opens from disk, without server or script.

Every function gives ``Html``. What is passed to it as a plain ``str`` is text and is escaped; what is ``Html`` already is taken
as it is. Colours follow the reader's light or dark setting, and a page fits a telephone as well as a desk.
"""

from __future__ import annotations

import base64
import html
import math
import re
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
.scroll.long { overflow: auto; max-height: 48rem; }
ul { columns: 22rem; column-gap: 2.4rem; }
table { border-collapse: collapse; margin: .6rem 0; width: 100%; max-width: 80rem; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
.beside { display: flex; flex-wrap: wrap; gap: 0 2.4rem; align-items: flex-start; }
.beside > * { flex: 1 1 auto; min-width: min(100%, 18rem); max-width: 100%; }
.matrix { overflow-x: auto; }
.matrix td { text-align: center; min-width: 2.2rem; padding: .2rem .3rem; }
.matrix thead th { vertical-align: bottom; padding: .3rem .1rem; }
.matrix thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(9rem, 14%), 1fr)); gap: .8rem;
  margin: 1rem 0; }
.tile { background: var(--card); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.2; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; margin: .8rem 0; }
.wide { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem 2.4rem; }
.mixed { columns: 26rem; column-gap: 2.4rem; }
.mixed > * { break-inside: avoid; margin: 0 0 1.2rem; }
.few { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 36rem), 1fr)); gap: 1rem 2.4rem; margin: .8rem 0; }
.few figure { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.few figcaption { flex: 1 1 14rem; font-size: .95rem; }
.wide.large { grid-template-columns: repeat(auto-fit, minmax(min(100%, 36rem), 1fr)); }
.wide > * { min-width: 0; }
figure { margin: 0; min-width: 0; }
figure img { display: block; max-width: 100%; max-height: 26rem; height: auto; border-radius: 6px; background: var(--card); }
figure img.whole { width: 100%; max-height: none; background: #fff; }
figure svg { display: block; width: 100%; max-width: 40rem; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .86rem; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; }
figcaption { overflow-wrap: anywhere; font-size: .86rem; color: var(--dim); margin-top: .3rem; }
summary { cursor: pointer; color: var(--accent); }
""".strip()


_LONG = 25  # rows from which on a table scrolls in itself
_NUMBER = re.compile(r"[-+]?[\d.,]+( ?[%x])?|-")


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
    """Rows under a header. A column of numbers is set flush right; a wide or long table scrolls in itself.

    A float is written with three digits; None, and a float that is not finite, as a dash.
    """
    written = [[_written(cell) for cell in row] for row in rows]
    numeric = [
        bool(written) and all(_NUMBER.fullmatch(str(row[column])) for row in written) for column in range(len(header))
    ]

    def line(name: str, cells: Sequence[object]) -> Html:
        return element(
            "tr",
            *(
                element(name, cell, **({"class_": "number"} if is_number else {}))
                for cell, is_number in zip(cells, numeric, strict=True)
            ),
        )

    head = element("thead", line("th", header))
    body = element("tbody", *(line("td", row) for row in written))
    return element("div", element("table", head, body), class_="scroll long" if len(written) > _LONG else "scroll")


def _written(cell: object) -> object:
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "-"
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
    shown = Html(f'<img src="{data_uri(image, side, quality)}" alt="{html.escape(text)}">')
    return element("figure", shown, *([element("figcaption", caption)] if caption else []))


def gallery(figures: Iterable[Html]) -> Html:
    """Figures side by side, as many in a row as fit; one or two with their captions beside them."""
    figures = list(figures)
    return element("div", *figures, class_="few" if len(figures) <= 2 else "gallery")


def wide(parts: Iterable[Html], large: bool = False) -> Html:
    """Charts, tables or figures side by side where there is room, in wider cells than those of ``gallery``.

    Args:
        parts: as many in a row as fit, of one width.
        large: at most two in a row.
    """
    return element("div", *parts, class_="wide large" if large else "wide")


def mixed(parts: Iterable[Html]) -> Html:
    """Charts and tables of different height, in columns as high as each other where there is room."""
    return element("div", *parts, class_="mixed")


def beside(parts: Iterable[Html]) -> Html:
    """Parts in a row, each as wide as it needs to be and growing into what is left; below each other where there is no room."""
    return element("div", *parts, class_="beside")


def png_figure(png: bytes, alt: str) -> Html:
    """A PNG file inside the page, as wide as its cell."""
    address = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return element("figure", Html(f'<img class="whole" src="{address}" alt="{html.escape(alt)}">'))


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

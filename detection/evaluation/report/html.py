"""A page that opens from disk: one file, no script, no outside address; light and dark, narrow and wide."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#667;--paper:#fff;--card:#f5f6f8;--line:#d8dbe0}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#9aa;--paper:#16181b;--card:#202327;--line:#3a3e44}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:16px;font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
h1{font-size:24px;margin:8px 0}h2{font-size:19px;margin:32px 0 6px}h3{font-size:15px;margin:6px 0}
p{margin:6px 0;max-width:80ch}.soft{color:var(--soft)}
code{overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(96px,1fr));gap:8px}
.card{background:var(--card);border-radius:8px;padding:8px 10px}.card b{display:block;font-size:20px}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:16px}
.row>div{min-width:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:3px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
td:last-child{white-space:normal;min-width:7em}.matrix td:last-child{min-width:36px}
td:first-child,th:first-child{text-align:left}
.wide{overflow-x:auto}.tall{max-height:520px;overflow:auto}
.matrix td{text-align:center;min-width:36px;padding:3px 5px}
.matrix .turned{vertical-align:bottom;padding:4px 2px}.turned span{writing-mode:vertical-rl;transform:rotate(180deg)}
svg{width:100%;max-width:560px;height:auto;display:block}svg text{fill:var(--ink);font-size:12px}.grid{stroke:var(--line)}
.ideal{stroke:var(--soft);stroke-dasharray:5 4}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:13px}.legend i{display:inline-block;width:12px;height:12px;
margin-right:5px;border-radius:2px}
.shots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:14px;align-items:start}
img.whole{width:100%;background:#fff;border-radius:8px}pre{font-size:12px;background:var(--card);padding:10px;border-radius:8px}
figure{margin:0;background:var(--card);border-radius:8px;overflow:hidden}figure img{width:100%;display:block}
figcaption{padding:6px 10px;font-size:13px;overflow-wrap:anywhere}
"""


def page(title: str, sections: Sequence[str]) -> bytes:
    """The whole file, UTF-8."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    ).encode()


def section(title: str, text: str, *parts: str) -> str:
    """A heading, a line that says what to see, and what there is to see. ``text`` is plain, ``parts`` are HTML."""
    return f'<section><h2>{escape(title)}</h2><p class="soft">{escape(text)}</p>{"".join(parts)}</section>'


def cards(values: Sequence[tuple[str, str]]) -> str:
    """Large numbers with their names."""
    return (
        '<div class="cards">'
        + "".join(f'<div class="card">{escape(name)}<b>{escape(value)}</b></div>' for name, value in values)
        + "</div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Texts in rows; a long table scrolls in its own box."""
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="wide tall"><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'


def side_by_side(*parts: str) -> str:
    """Beside each other where there is room, else below."""
    return '<div class="row">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def code(text: str) -> str:
    """Text as it is, closed until it is clicked."""
    return f'<details><summary>show</summary><pre class="wide">{escape(text)}</pre></details>'


def figure(image: NDArray[np.uint8], caption: str) -> str:
    """An RGB uint8 image [H, W, 3] as JPEG with a line below."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    data = base64.b64encode(encoded.tobytes()).decode()
    return (
        f'<figure><img loading="lazy" alt="{escape(caption)}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )

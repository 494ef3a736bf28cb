"""The fit of a detector as text and as sections of the page."""

from __future__ import annotations

import numpy as np

from detection import charts, pages
from detection.checks.check import Checked
from detection.checks.fit import SMALL, Fit, Suggestion, share, sides_of
from detection.checks.report import draw_boxes, read_shown
from detection.checks.split import Split

_SHOWN = 12


def fit_text(fit: Fit, suggestion: Suggestion | None, command: str) -> str:
    """A few lines for the terminal.

    Args:
        fit: what was found.
        suggestion: where it was asked for.
        command: what the overrides are appended to.
    """
    height, width = fit.input_size
    small = share(sides_of(fit.objects.boxes) < SMALL)
    lines = [
        f"fit of {fit.kind} at {width} x {height}: {fit.recall:.1%} of {len(fit.quality)} objects are reached "
        f"({_meaning(fit)}); {small:.1%} are below {SMALL:.0f} pixels",
        "  by size: "
        + ", ".join(f"{name} px {recall:.0%} of {count}" for name, count, recall in fit.by_size() if count),
    ]
    lines += [
        f"  {choice.what}: {choice.recall:.1%} reached, {choice.small:.1%} below {SMALL:.0f} pixels, {choice.cost:.1f} x the time"
        for choice in fit.choices[1:]
    ]
    if suggestion is not None and suggestion.overrides:
        lines.append(f"suggested: {suggestion.before:.1%} -> {suggestion.after:.1%} reached ({suggestion.remark}):")
        lines.append(f"  {command} {' '.join(suggestion.overrides)}")
    elif suggestion is not None:
        lines.append(f"suggested: nothing; {suggestion.remark}")
    return "\n".join(lines)


def _meaning(fit: Fit) -> str:
    if fit.kind == "ssdlite":
        return f"an anchor overlaps them with IoU {fit.threshold:g} or more; others are matched by force"
    return f"a point lies inside and describes them with IoU {fit.threshold:g} or more"


def fit_section(checked: Checked, split: Split, fit: Fit, suggestion: Suggestion | None, command: str) -> pages.Html:
    """The section of the page; the objects that nothing reaches are drawn, the worst first."""
    height, width = fit.input_size
    by_size = [row for row in fit.by_size() if row[1]]
    parts: list[object] = [
        pages.paragraph(
            f"{fit.recall:.1%} of {len(fit.quality):,} objects of {split.name} are reached: {_meaning(fit)}."
        ),
        pages.wide(
            [
                charts.column_chart(
                    "Reached, by size at the input", [name for name, *_ in by_size],
                    [100 * recall for *_, recall in by_size],
                    "square root of the area in pixels", "%",
                ),
                charts.column_chart(
                    "Objects, by size at the input", [name for name, *_ in by_size], [count for _, count, _ in by_size],
                    "square root of the area in pixels",
                ),
            ]
        ),
    ]  # fmt: skip
    if suggestion is not None and suggestion.overrides:
        parts.append(
            pages.paragraph(
                f"Suggested: {suggestion.before:.1%} become {suggestion.after:.1%} ({suggestion.remark}).",
                class_="good",
            )
        )
        parts.append(pages.code(f"{command} {' '.join(suggestion.overrides)}", block=True))
    elif suggestion is not None:
        parts.append(pages.paragraph(f"Nothing is suggested: {suggestion.remark}."))
    rows = [
        (choice.what, f"{choice.recall:.1%}", f"{choice.small:.1%}", f"{choice.cost:.1f} x") for choice in fit.choices
    ]
    parts.append(pages.section("Other input sizes", level=3))
    parts.append(pages.table(["input", "reached", f"below {SMALL:.0f} pixels", "time"], rows))
    shown_rows = [
        tuple(f"{cell:.1%}" if isinstance(cell, float) and cell <= 1 else cell for cell in row) for row in fit.rows
    ]
    name = "Anchors" if fit.kind == "ssdlite" else "Strides"
    parts.append(pages.fold(f"{name}, one by one", pages.table(fit.header, shown_rows)))
    figures: list[pages.Html] = []
    for place in np.argsort(fit.quality, kind="stable").tolist():
        if fit.quality[place] >= fit.threshold or len(figures) == _SHOWN:
            break
        record = int(fit.objects.records[place])
        image = read_shown(checked, split.number, int(split.images[record]))
        if image is None:
            continue
        left, top, wide, tall = split.xywh[record].tolist()
        box = np.array([[left, top, left + wide, top + tall]])
        x1, y1, x2, y2 = fit.objects.boxes[place].tolist()
        caption = (
            f"{split.file_names[int(split.images[record])]}: {x2 - x1:.0f} x {y2 - y1:.0f} pixels at the input, "
            f"best IoU {int(100 * fit.quality[place]) / 100:.2f}"  # cut off: one of 0.499 does not reach 0.5
        )
        figures.append(pages.figure(draw_boxes(image, box, [split.class_name(record)]), caption))
    if figures:
        parts += [pages.section("Objects that nothing reaches", level=3), pages.gallery(figures)]
    return pages.section(f"Fit of {fit.kind} at {width} x {height}", *parts, anchor="fit")

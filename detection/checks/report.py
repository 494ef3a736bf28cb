"""The check as one HTML page: every kind of finding with images of it, and what the dataset holds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError
from detection import charts, pages
from detection.checks.check import Checked
from detection.checks.findings import KINDS, Finding
from detection.checks.records import class_counts, leads_outside
from detection.checks.split import Split
from detection.data.dataset import is_turned
from detection.images.decode import EncodedImage
from detection.images.draw import draw_target, image_grid

_SHOWN = 12  # images of a kind of finding
_LISTED = 100  # further findings of a kind, as text
_SIDE = 420  # longer side of an image in the page, in pixels
_CLOSE = 0.08  # share of the image below which a box is shown from near
_MOST_CLASSES = 40


def report_page(checked: Checked, further: list[pages.Html] | None = None) -> pages.Html:
    """The page.

    Args:
        checked: what was found.
        further: sections behind the findings, for example on the fit of a detector.
    """
    names = ", ".join(split.name for split in checked.splits)
    return pages.page(
        f"Dataset check: {names}",
        pages.tiles(_tiles(checked)),
        _overview(checked),
        *(_kind(checked, kind) for kind in checked.counts()),
        *(further or []),
        *(_contents(checked, split) for split in checked.splits),
        subtitle="Errors are what training or evaluation refuses, loses or gets wrong; warnings are worth a look.",
    )


def _tiles(checked: Checked) -> list[tuple[object, object]]:
    return [
        (pages.element("span", f"{checked.num_errors:,}", class_="error" if checked.num_errors else "good"), "errors"),
        (pages.element("span", f"{checked.num_warnings:,}", class_="warning" if checked.num_warnings else "good"), "warnings"),
        (f"{sum(map(len, checked.splits)):,}", "images"),
        (f"{sum(len(split.images) for split in checked.splits):,}", "boxes"),
        (f"{len(checked.splits[0].class_names):,}", "classes"),
    ]  # fmt: skip


def _overview(checked: Checked) -> pages.Html:
    rows = []
    for kind, count in checked.counts().items():
        link = pages.element("a", KINDS[kind].title, href=f"#{kind}")
        severity = KINDS[kind].severity
        rows.append((pages.tag(severity, severity), link, count, KINDS[kind].mend))
    rows.sort(key=lambda row: "warning" in row[0])
    if not rows:
        return pages.section("Findings", pages.paragraph("Nothing was found.", class_="good"))
    return pages.section("Findings", pages.table(["", "what", "count", "what to do"], rows))


def _kind(checked: Checked, kind: str) -> pages.Html:
    found, about = checked.of_kind(kind), KINDS[kind]
    title = pages.join([about.title, " ", pages.tag(f"{len(found):,}", about.severity)], "")
    fix = f" --fix: {about.fix}." if about.fix else ""
    parts: list[object] = [pages.paragraph(about.mend + fix, class_="dim")]
    figures: list[pages.Html] = []
    rest: list[Finding] = []
    for finding in found:
        drawn = draw_finding(checked, finding) if len(figures) < _SHOWN else None
        if drawn is None:
            rest.append(finding)
        else:
            caption = f"{checked.place(finding)}{finding.message}"
            figures.append(pages.figure(drawn, caption, alt=caption, side=_SIDE))
    if figures:
        parts.append(pages.gallery(figures))
    if rest:
        lines = [pages.element("li", f"{checked.place(finding)}{finding.message}") for finding in rest[:_LISTED]]
        if len(rest) > _LISTED:
            lines.append(pages.element("li", f"and {len(rest) - _LISTED:,} more; --json lists all"))
        shown = pages.element("ul", *lines)
        parts.append(pages.fold(f"{len(rest):,} more", shown) if figures else shown)
    return pages.section(title, *parts, anchor=kind)


def read_shown(checked: Checked, number: int, position: int) -> NDArray[np.uint8] | None:
    """An image of a split in the pixels that its boxes count, uint8 RGB [H, W, 3]; None where it cannot be read."""
    split = checked.splits[number]
    if split.image_dir is None or leads_outside(split.file_names[position]):
        return None
    try:
        image = EncodedImage(split.image_path(position))
        height, width = split.sizes[position].tolist()
        return image.decode(turn=is_turned(image.header, (height, width), int(split.exif[position])))
    except UserError:
        return None


def draw_finding(checked: Checked, finding: Finding) -> NDArray[np.uint8] | None:
    """An image of a fault: the box that is meant, a suspect beside its label, two duplicates side by side; None without any.

    Returns:
        uint8 RGB.
    """
    if finding.image is None:
        return None
    image = read_shown(checked, finding.split, finding.image)
    if image is None:
        return None
    if finding.other is not None:
        other = read_shown(checked, *finding.other)
        return None if other is None else image_grid([other, image], columns=2, cell=_SIDE // 2)
    split = checked.splits[finding.split]
    boxes, names = [], []
    if finding.record is not None:
        left, top, width, height = split.xywh[finding.record].tolist()
        boxes.append((*sorted((left, left + width)), *sorted((top, top + height))))
        names.append(split.class_name(finding.record))
    if finding.found is not None:
        x1, y1, x2, y2 = finding.found[0]
        boxes.append((x1, x2, y1, y2))
        names.append(f"found: {finding.found[1]}")
    if not boxes:
        own = np.flatnonzero((split.images == finding.image) & split.usable())[:50]
        for left, top, width, height in split.xywh[own].tolist():
            boxes.append((left, left + width, top, top + height))
        names = [split.class_name(int(record)) for record in own]
    xyxy = np.array([(x1, y1, x2, y2) for x1, x2, y1, y2 in boxes], np.float64).reshape(-1, 4)
    return draw_boxes(image, xyxy, names)


def draw_boxes(image: NDArray[np.uint8], boxes: NDArray[np.float64], names: list[str]) -> NDArray[np.uint8]:
    """Boxes on an image, or on the part around them where they are small; a box that sticks out gets a border to be seen on.

    Args:
        image: uint8 RGB [H, W, 3].
        boxes: [N, 4], xyxy in pixels of it; those with a number that is not finite are not drawn.
        names: N texts.
    """
    finite = np.isfinite(boxes).all(axis=1)
    boxes, names = boxes[finite], [names[place] for place in np.flatnonzero(finite)]
    height, width = image.shape[:2]
    if not len(boxes):
        return image
    # At most one more image on each side: a box a thousand images away tells as much by its numbers.
    low = np.floor(np.clip(boxes[:, :2].min(axis=0), (-width, -height), 0)).astype(int)
    high = np.ceil(np.clip(boxes[:, 2:].max(axis=0), (width, height), (2 * width, 2 * height))).astype(int)
    around = [(-low[1], high[1] - height), (-low[0], high[0] - width), (0, 0)]
    if any(sum(pair) for pair in around):
        image = np.pad(image, around, constant_values=200)
        boxes = boxes - np.tile(low, 2)
    extent = boxes[:, 2:].max(axis=0) - boxes[:, :2].min(axis=0)
    centre = (boxes[:, 2:].max(axis=0) + boxes[:, :2].min(axis=0)) / 2
    if extent.max() < _CLOSE * max(image.shape[:2]) and (centre < image.shape[1::-1]).all() and (centre >= 0).all():
        reach = max(3 * extent.max(), 16.0)
        x1, y1 = np.clip(centre - reach, 0, None).astype(int).tolist()
        x2, y2 = np.ceil(centre + reach).astype(int).tolist()
        image = np.ascontiguousarray(image[y1:y2, x1:x2])
        boxes = boxes - (x1, y1, x1, y1)
    scale = _SIDE / max(image.shape[:2])
    if scale < 1:  # drawn at the size at which it is looked at, so that lines and letters stay legible
        image, boxes = image_grid([image], cell=_SIDE), boxes * scale
    return draw_target(image, boxes.astype(np.float32), np.arange(len(names)), names, min_side=_SIDE)


def _contents(checked: Checked, split: Split) -> pages.Html:
    """What a split holds, in charts."""
    usable = split.usable()
    counts = class_counts(split)
    order = np.argsort(-counts, kind="stable")[:_MOST_CLASSES]
    note = f"the {_MOST_CLASSES} largest of {len(counts)}" if len(counts) > _MOST_CLASSES else ""
    figures = [
        charts.bar_chart(
            "Objects by class",
            [split.class_names[label] for label in order],
            [int(counts[label]) for label in order],
            note,
        )
    ]
    boxes, sizes = split.xywh[usable], split.box_sizes()[usable]
    sides = np.sqrt((boxes[:, 2] * boxes[:, 3]) / (sizes[:, 0] * sizes[:, 1])) if len(boxes) else np.zeros(0)
    edges = [0, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0001]
    figures.append(
        _histogram(
            "Size of objects", sides, edges, [f"{100 * low:.0f}–{100 * high:.0f}" for low, high in pairwise(edges)],
            "square root of the box's area, in per cent of the image's",
        )
    )  # fmt: skip
    ratios = boxes[:, 2] / boxes[:, 3]
    bounds = [0, 1 / 4, 1 / 2.5, 1 / 1.5, 1.5, 2.5, 4, np.inf]
    labels = ["< 1:4", "1:3", "1:2", "square", "2:1", "3:1", "> 4:1"]
    note = "divided at 1:4, 1:2.5, 1:1.5 and the same the other way round"
    figures.append(_histogram("Width to height of objects", ratios, bounds, labels, note))
    per_image = np.bincount(split.images[usable], minlength=len(split))
    steps = [0, 1, 2, 3, 5, 9, 17, 33, np.inf]
    labels = ["0", "1", "2", "3–4", "5–8", "9–16", "17–32", "33+"]
    figures.append(_histogram("Objects in an image", per_image, steps, labels, f"at most {per_image.max(initial=0)}"))
    if len(boxes):
        centres = (boxes[:, :2] + boxes[:, 2:] / 2) / sizes[:, ::-1]
        grid, _, _ = np.histogram2d(centres[:, 1], centres[:, 0], bins=16, range=[[0, 1], [0, 1]])
        figures.append(charts.heat_map("Centres of objects in the image", grid, "darker: more objects"))
    left_out = checked.left_out(split)
    left_out_table = pages.paragraph("Training leaves nothing out.")
    if left_out:
        left_out_table = pages.table(["training leaves out", "count"], list(left_out.items()))
    return pages.section(
        f"What {split.name} holds",
        pages.paragraph(f"{len(split):,} images, {len(split.images):,} boxes, {int(usable.sum()):,} to learn from: {split.path}"),
        pages.mixed([*figures, left_out_table]),
    )  # fmt: skip


def _histogram(
    title: str, values: NDArray[np.floating] | NDArray[np.integer], edges: list[float], labels: list[str], note: str
) -> pages.Html:
    counts, _ = np.histogram(values, edges)
    return charts.column_chart(title, labels, counts.tolist(), note)

"""Faults of annotation records: what can be told without opening an image.

Everything is computed on whole arrays; a Python loop runs over what was found alone.

Letters in shapes: I images, N boxes (annotation records).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from detection.checks.findings import Finding
from detection.checks.split import Split

RARE = 10  # objects below which a class is called rare
_COVERS = 0.99  # share of the image from which on a box covers all of it
_STICKS_OUT = 1.0  # pixels that a box may stick out unremarked: tools round


def check_boxes(split: Split) -> list[Finding]:
    """The boxes of a split, each with its worst fault; crowds are looked at too, but for what they cover."""
    left, top, width, height = split.xywh.T
    rows, columns = split.box_sizes().T
    known = rows > 0
    with np.errstate(invalid="ignore", over="ignore"):
        broken = np.asarray(~np.isfinite(split.xywh).all(axis=1))
        inverted = (width < 0) | (height < 0)
        flat = (width == 0) | (height == 0)
        outside = known & ((left + width <= 0) | (top + height <= 0) | (left >= columns) | (top >= rows))
        tiny = (width < 1) | (height < 1)
        excess = np.max([-left, -top, left + width - columns, top + height - rows], axis=0, initial=-np.inf)
        sticks_out = known & (excess > _STICKS_OUT)
        inner_width = np.minimum(left + width, columns) - np.maximum(left, 0)
        inner_height = np.minimum(top + height, rows) - np.maximum(top, 0)
        covers = known & (inner_width * inner_height >= _COVERS * columns * rows) & ~split.crowd

    def of_image(record: int) -> str:
        return f"; the image is {columns[record]} x {rows[record]}"

    rules: tuple[tuple[str, NDArray[np.bool_], Callable[[int], str]], ...] = (
        ("box-not-finite", broken, lambda n: ""),
        ("box-inverted", inverted, lambda n: ""),
        ("box-without-area", flat, lambda n: ""),
        ("box-outside", outside, of_image),
        ("box-below-pixel", tiny, lambda n: ""),
        ("box-sticks-out", sticks_out, lambda n: f", sticks out by {as_read(excess[n])} pixels{of_image(n)}"),
        ("box-covers-image", covers, lambda n: f", covers all of {columns[n]} x {rows[n]}"),
    )  # fmt: skip
    findings: list[Finding] = []
    unjudged = np.ones(len(left), np.bool_)
    for kind, mask, more in rules:
        records = np.flatnonzero(mask & unjudged).tolist()
        findings += [_of_record(split, kind, n, f"{_box(split, n)}{more(n)}") for n in records]
        unjudged &= ~mask
    return findings


def check_repeats(split: Split) -> list[Finding]:
    """Boxes that stand there twice, with the same class or with another one."""
    good = split.usable()
    of_images = [split.images.astype(np.int64), *split.xywh.T.view(np.int64)]
    same_class = _first_equal([*of_images, split.labels], good)
    same_box = _first_equal(of_images, good)
    findings = []
    for record in np.flatnonzero(same_class >= 0).tolist():
        other = split.annotation_ids[same_class[record]]
        text = f"{_box(split, record)}, is that of annotation {other} of the same class"
        findings.append(_of_record(split, "box-twice", record, text))
    for record in np.flatnonzero((same_box >= 0) & (same_class < 0)).tolist():
        first = int(same_box[record])
        text = (
            f"{_box(split, record)}, is {split.class_name(record)} here and {split.class_name(first)} in annotation "
            f"{split.annotation_ids[first]}"
        )
        findings.append(_of_record(split, "box-two-classes", record, text))
    return findings


def _first_equal(columns: Sequence[NDArray[np.int64]], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """int64 [N]: the first record that equals this one in all columns [N], or -1 for the first itself and those not ``among``.

    Sorting a mixture of the columns is twenty times faster than sorting by each; equal mixtures are compared in full.
    """
    first = np.full(len(among), -1)
    mixed = np.zeros(len(among), np.uint64)
    for column in columns:
        mixed = (mixed ^ column.view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    rows = np.flatnonzero(among)
    order = rows[np.argsort(mixed[rows], kind="stable")]
    repeats = np.flatnonzero(mixed[order[1:]] == mixed[order[:-1]])
    for place in repeats.tolist():
        before, record = order[place], order[place + 1]
        if all(column[before] == column[record] for column in columns):
            first[record] = before if first[before] < 0 else first[before]
    return first


def check_images(split: Split) -> list[Finding]:
    """Image records: their sizes, names and objects."""
    findings = []
    number = split.number
    if split.form == "coco":
        for position in np.flatnonzero(split.sizes[:, 0] == 0).tolist():
            text = f"{split.file_names[position]}: no width and height, both above 0"
            findings.append(Finding(kind="no-size", split=number, image=position, message=text))
    first: dict[str, int] = {}
    for position, name in enumerate(split.file_names):
        before = first.setdefault(name, position)
        if before != position:
            text = f"{name} is listed as image {split.image_ids[before]} and as image {split.image_ids[position]}"
            findings.append(
                Finding(kind="image-listed-twice", split=number, image=position, other=(number, before), message=text)
            )
        if leads_outside(name):
            findings.append(Finding(kind="name-outside", split=number, image=position, message=repr(name)))
    counts = np.bincount(split.images[split.images >= 0], minlength=len(split))
    for position in np.flatnonzero(counts == 0).tolist():
        text = f"{split.file_names[position]} has no annotation"
        findings.append(Finding(kind="no-objects", split=number, image=position, message=text))
    return findings


def leads_outside(name: str) -> bool:
    """Whether a file name leads out of the folder that it is relative to; the datasets refuse these."""
    return os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or "\0" in name


def check_classes(splits: Sequence[Split]) -> list[Finding]:
    """Classes without objects or with few, and those of a later split that the first one cannot teach."""
    findings = []
    for split in splits:
        counts = class_counts(split)
        for label, name in enumerate(split.class_names):
            count = int(counts[label])
            if count == 0:
                text = f"{name!r} (category {split.category_ids[label]}) has no object"
                findings.append(Finding(kind="class-unused", split=split.number, message=text))
            elif count < RARE:
                text = f"{name!r} has {count} object{'s' if count > 1 else ''}"
                findings.append(Finding(kind="class-rare", split=split.number, message=text))
            if split is not splits[0] and count and name not in splits[0].class_names:
                text = f"{name!r} has {count} object{'s' if count > 1 else ''} here and is no class of {splits[0].name}"
                findings.append(Finding(kind="class-not-learnt", split=split.number, message=text))
    return findings


def class_counts(split: Split) -> NDArray[np.int64]:
    """int64 [K], the objects of each class that can be learnt from."""
    return np.bincount(split.labels[split.usable()], minlength=len(split.class_names))


def _of_record(split: Split, kind: str, record: int, message: str) -> Finding:
    image = int(split.images[record])
    return Finding(kind=kind, split=split.number, image=image if image >= 0 else None, record=record, message=message)


def _box(split: Split, record: int) -> str:
    left, top, width, height = map(as_read, split.xywh[record].tolist())
    return f"{split.class_name(record)}, {width} x {height} pixels at left {left}, top {top}"


def as_read(pixels: float) -> str:
    """A length for people: whole pixels, below ten with one digit behind the point, below one with two that count."""
    if not math.isfinite(pixels) or abs(pixels) >= 1e6:
        return f"{pixels:.3g}"
    if abs(pixels) < 1:
        return f"{pixels:.2g}"
    return f"{pixels:.0f}" if abs(pixels) >= 10 else f"{pixels:.1f}".removesuffix(".0")

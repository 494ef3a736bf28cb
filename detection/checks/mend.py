"""A clean copy of a split: what can be mended without asking anybody, and a word on each change.

What is ambiguous stays as it is: an image of another size than recorded, a box below one pixel, near duplicates.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from backbones.state import write_whole
from detection.checks.check import Checked
from detection.checks.coco import load_json
from detection.checks.findings import KINDS
from detection.checks.split import Split
from detection.data.formats.writer import plain

_WITH_IMAGE = (
    "name-outside", "missing-image", "not-an-image", "truncated-image", "too-large", "duplicate-image", "duplicate-image-id",
)  # fmt: skip
_BOX_GOES = ("box-not-finite", "box-without-area", "box-outside", "box-twice", "unknown-image", "unknown-category")


def write_mended(checked: Checked, split: Split, out: Path) -> list[str]:
    """Writes a COCO json without the faults that can be mended; everything else of the file stays as it is.

    Args:
        checked: what the check found in all splits.
        split: one of them.
        out: the json to write, whole or not at all.

    Returns:
        A line for each kind of change, with how often it was made.

    Raises:
        OSError: it cannot be written.
    """
    content = load_json(split.path) if split.form == "coco" else _content(split)
    mended, changes = _mend(checked, split, content)
    write_whole(out, msgspec.json.encode(mended))
    lines = [f"{count} x {what}" for what, count in changes.items()]
    left = Counter(
        finding.kind for finding in checked.findings if finding.split == split.number and not KINDS[finding.kind].fix
    )
    lines += [f"{left[kind]} x {KINDS[kind].title}: left as it is" for kind in KINDS if left[kind]]
    return lines


def _mend(checked: Checked, split: Split, content: dict[str, Any]) -> tuple[dict[str, Any], Counter[str]]:
    changes: Counter[str] = Counter()
    gone_images: dict[int, str] = {}
    gone_records: dict[int, str] = {}
    joined: dict[int, int] = {}
    new_ids: set[int] = set()
    clipped: set[int] = set()
    swapped: set[int] = set()
    for finding in checked.findings:
        if finding.kind == "leak" and finding.other is not None and finding.other[0] == split.number:
            gone_images.setdefault(finding.other[1], "leak")
        if finding.split != split.number:
            continue
        if finding.kind in _WITH_IMAGE and finding.image is not None:
            gone_images.setdefault(finding.image, finding.kind)
        elif finding.kind == "image-listed-twice" and finding.image is not None and finding.other is not None:
            joined[finding.image] = finding.other[1]
        elif finding.record is not None:
            if finding.kind in _BOX_GOES:
                gone_records.setdefault(finding.record, finding.kind)
            elif finding.kind == "duplicate-annotation-id":
                new_ids.add(finding.record)
            elif finding.kind == "box-sticks-out":
                clipped.add(finding.record)
            elif finding.kind == "box-inverted":
                swapped.add(finding.record)
    # One file under two records is equal to itself: its objects are joined, not lost.
    for position in joined:
        gone_images.pop(position, None)

    def note(kind: str, what: str = "") -> None:
        changes[f"{KINDS[kind].title}: {what or KINDS[kind].fix}"] += 1

    images = []
    for position, place in enumerate(split.image_places.tolist()):
        record = content["images"][place]
        if position in gone_images or position in joined:
            note(gone_images.get(position, "image-listed-twice"))
            continue
        if split.form != "coco" or not split.sizes[position, 0]:
            record = _sized(checked, split, position, record, note)
        images.append(record)

    label_ids = split.category_ids.tolist()
    annotations = []
    next_id = int(split.annotation_ids.max(initial=0)) + 1
    for row, place in enumerate(split.places.tolist()):
        record, position = content["annotations"][place], int(split.images[row])
        if row in gone_records:
            note(gone_records[row])
            continue
        if position < 0 or position in gone_images:
            changes["Annotation of an image that is left out: left out too"] += 1
            continue
        record = dict(record)
        if position in joined:
            record["image_id"] = int(split.image_ids[joined[position]])
        if row in new_ids:
            record["id"], next_id = next_id, next_id + 1
            note("duplicate-annotation-id")
        if record["category_id"] != label_ids[split.labels[row]]:
            record["category_id"] = label_ids[split.labels[row]]
        if row in swapped or row in clipped:
            box = _mended_box(split, row)
            kind = "box-inverted" if row in swapped else "box-sticks-out"
            if box is None:
                note(kind, "nothing of it is inside, left out")
                continue
            note(kind)
            if "area" in record and not record.get("segmentation"):  # of a mask, the area stays that of the mask
                record["area"] = plain([box[2] * box[3]])[0]
            record["bbox"] = plain(box)
        annotations.append(record)

    names = dict(zip(label_ids, split.class_names, strict=True))
    categories, seen = [], set()
    for category in content["categories"]:
        id_ = _id(category)
        if id_ in names and id_ not in seen:
            seen.add(id_)
            categories.append(category)
    for finding in checked.findings:
        if finding.split != split.number:
            continue
        sized = finding.kind == "no-size-voc" and finding.image not in gone_images
        if sized or finding.kind in ("duplicate-category", "broken-record"):
            note(finding.kind)
    return content | {"images": images, "annotations": annotations, "categories": categories}, changes


def _sized(checked: Checked, split: Split, position: int, record: dict[str, Any], note: Any) -> dict[str, Any]:
    """An image's record with the size of its file, as it is shown, where it had none."""
    table = checked.tables[split.number]
    height, width = split.sizes[position].tolist()
    if not height:
        height, width = table.header(position).shown_size
        if not height:
            note("no-size", "the file was not read, left as it is")
            return record
        note("no-size")
    turned = {"exif_orientation": "applied"} if split.form == "yolo" and table.orientations[position] != 1 else {}
    return {**record, "width": int(width), "height": int(height)} | turned  # YOLO's own tools turn images


def _mended_box(split: Split, row: int) -> list[float] | None:
    """The box with its corners in order, cut off at the edge of its image; None if nothing is left."""
    left, top, width, height = split.xywh[row].tolist()
    rows, columns = split.box_sizes()[row].tolist()
    x1, x2 = sorted((left, left + width))
    y1, y2 = sorted((top, top + height))
    if rows:
        x1, x2, y1, y2 = max(x1, 0.0), min(x2, columns), max(y1, 0.0), min(y2, rows)
    return [x1, y1, x2 - x1, y2 - y1] if x2 > x1 and y2 > y1 else None


def _id(category: Any) -> int | None:
    try:
        return int(category["id"])
    except (KeyError, TypeError, ValueError):
        return None


def _content(split: Split) -> dict[str, Any]:
    """The records of a folder of VOC or YOLO as COCO's."""
    images = [
        {"id": int(split.image_ids[position]), "file_name": name} for position, name in enumerate(split.file_names)
    ]
    annotations = []
    for row in range(len(split.images)):
        position, label = int(split.images[row]), int(split.labels[row])
        box = split.xywh[row].tolist()
        annotations.append(
            {
                "id": int(split.annotation_ids[row]),
                "image_id": int(split.image_ids[position]) if position >= 0 else -1,
                "category_id": int(split.category_ids[label]) if label >= 0 else -1,
                "bbox": plain(box) if all(side == side for side in box) else None,
                "area": plain([box[2] * box[3]])[0] if all(side == side for side in box) else None,
                "iscrowd": 0,
            }
        )
    categories = [
        {"id": id_, "name": name} for id_, name in zip(split.category_ids.tolist(), split.class_names, strict=True)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}

"""COCO json files as they are, faults and all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError
from detection.checks.findings import Finding
from detection.checks.split import Split
from detection.data.coco import decode_coco, exif_of, no_garbage_collection, positions_of

_WHOLE = 2**53  # whole numbers up to here are exact as floats


class _Image(NamedTuple):
    id: int
    file_name: str
    width: int | None
    height: int | None
    exif_orientation: Any


class _Category(NamedTuple):
    id: int
    name: str


class _Content(NamedTuple):
    """The records that can be read, and where they stood in the file."""

    images: list[Any]
    image_places: NDArray[np.int64]
    categories: list[Any]
    ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    xywh: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    places: NDArray[np.int64]
    info: Any


def read_coco(path: Path, image_dir: Path | None, number: int, name: str) -> Split:
    """The split of a COCO json file.

    A file whose fields all have the right types takes the way of ``CocoIndex``; any other is read record by record.

    Args:
        path: the file.
        image_dir: file names start here; None where images are not looked at.
        number, name: of the split.

    Raises:
        FileNotFoundError: no such file.
        UserError: it is no json, or has no lists of images, annotations and categories.
    """
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist or is not a file")
    findings: list[Finding] = []
    with no_garbage_collection():
        try:
            content = _strict(path)
        except UserError as error:
            content = _loose(path, error, number, findings)

    image_ids = np.array([image.id for image in content.images], np.int64)
    for place in _repeats(image_ids):
        text = f"image id {image_ids[place]} stands there more than once; here for {content.images[place].file_name}"
        findings.append(Finding(kind="duplicate-image-id", split=number, image=place, message=text))
    for place in _repeats(content.ids):
        text = f"annotation id {content.ids[place]} stands there more than once"
        findings.append(Finding(kind="duplicate-annotation-id", split=number, record=place, message=text))
    categories = sorted(content.categories, key=lambda category: category.id)
    by_name: dict[str, int] = {}
    kept: list[Any] = []
    for category in categories:
        if kept and kept[-1].id == category.id:
            text = f"category id {category.id} stands for {kept[-1].name!r} and for {category.name!r}"
            findings.append(Finding(kind="duplicate-category", split=number, message=text))
        elif category.name in by_name:
            text = f"category {category.name!r} has the ids {by_name[category.name]} and {category.id}"
            findings.append(Finding(kind="duplicate-category", split=number, message=text))
            kept.append(category)
        else:
            by_name[category.name] = category.id
            kept.append(category)

    # A name that stands there twice is one class: all its ids lead to the first label.
    own_ids = np.array([category.id for category in kept], np.int64)
    first = {id_: label for label, id_ in enumerate(dict.fromkeys(by_name.values()))}
    label_of = np.array([first[by_name[category.name]] for category in kept], np.int64)
    labels = positions_of(content.category_ids, own_ids)
    if len(kept):
        labels = np.where(labels >= 0, label_of[labels], -1)
    unique_ids, first_of = np.unique(image_ids, return_index=True)
    images = positions_of(content.image_ids, unique_ids)
    if len(image_ids):
        images = np.where(images >= 0, first_of[images], -1)
    for record in np.flatnonzero(images < 0).tolist():
        text = f"annotation {content.ids[record]} names image_id {content.image_ids[record]}, which `images` has not"
        findings.append(Finding(kind="unknown-image", split=number, record=record, message=text))
    for record in np.flatnonzero(labels < 0).tolist():
        text = f"annotation {content.ids[record]} has category_id {content.category_ids[record]}, which `categories` has not"
        image = int(images[record]) if images[record] >= 0 else None
        findings.append(Finding(kind="unknown-category", split=number, record=record, image=image, message=text))
    sizes = np.array([[_side(image.height), _side(image.width)] for image in content.images], np.int64).reshape(-1, 2)
    sizes[(sizes <= 0).any(axis=1)] = 0
    return Split(
        number=number,
        name=name,
        path=path,
        image_dir=image_dir,
        form="coco",
        image_ids=image_ids,
        file_names=[image.file_name for image in content.images],
        sizes=sizes,
        exif=exif_of(content.images, content.info),
        annotation_ids=content.ids,
        images=images,
        labels=labels,
        xywh=content.xywh,
        crowd=content.crowd,
        places=content.places,
        image_places=content.image_places,
        category_ids=np.array(list(first), np.int64),
        class_names=tuple(by_name),
        findings=findings,
    )


def _side(value: object) -> int:
    return int(value) if isinstance(value, int | float) and 0 < value < 1 << 31 else 0


def _repeats(ids: NDArray[np.int64]) -> list[int]:
    """The places of ids that stood there before."""
    again = np.ones(len(ids), np.bool_)
    again[np.unique(ids, return_index=True)[1]] = False
    return np.flatnonzero(again).tolist()


def _strict(path: Path) -> _Content:
    images, categories, records, info = decode_coco(path)
    return _Content(
        images=images,
        image_places=np.arange(len(images)),
        categories=categories,
        ids=records.ids,
        image_ids=records.image_ids,
        category_ids=records.category_ids,
        xywh=records.xywh,
        crowd=records.crowd,
        places=np.arange(len(records.ids)),
        info=info,
    )


def load_json(path: Path) -> Any:
    """What is in a json file; NaN and Infinity, which are no json but what Python writes, are read too.

    Raises:
        UserError: it is no json.
    """
    data = path.read_bytes()
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            return json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a json file: {error}") from None


def _loose(path: Path, reason: UserError, number: int, findings: list[Finding]) -> _Content:
    """The records that can be read; a finding for each that cannot.

    Raises:
        UserError: the file as a whole cannot be read; ``reason`` of the strict reader says it best.
    """
    try:
        file = load_json(path)
    except UserError:
        raise reason from None
    lists = ("images", "annotations", "categories")
    if not isinstance(file, dict) or not all(isinstance(file.get(name), list) for name in lists):
        raise reason from None

    def broken(what: str, place: int, record: object, why: str) -> None:
        if isinstance(record, dict):
            record = {key: value for key, value in record.items() if key != "segmentation"}
        text = f"{what} {place} of the list: {why}: {str(record)[:200]}"
        findings.append(Finding(kind="broken-record", split=number, message=text))

    images, image_places = [], []
    for place, record in enumerate(file["images"]):
        values = record if isinstance(record, dict) else {}
        id_, file_name = _whole(values.get("id")), values.get("file_name")
        if id_ is None or not isinstance(file_name, str):
            broken("image", place, record, "no whole number as `id`" if id_ is None else "no text as `file_name`")
            continue
        width, height = (_whole(values.get(side)) for side in ("width", "height"))
        images.append(_Image(id_, file_name, width, height, values.get("exif_orientation")))
        image_places.append(place)
    categories = []
    for place, record in enumerate(file["categories"]):
        values = record if isinstance(record, dict) else {}
        id_, name = _whole(values.get("id")), values.get("name")
        if id_ is None or not isinstance(name, str):
            broken("category", place, record, "a whole number as `id` and a text as `name` are needed")
            continue
        categories.append(_Category(id_, name))
    numbers, boxes, crowd, places = [], [], [], []
    for place, record in enumerate(file["annotations"]):
        values = record if isinstance(record, dict) else {}
        ids = [_whole(values.get(name)) for name in ("id", "image_id", "category_id")]
        box = values.get("bbox")
        if None in ids:
            broken("annotation", place, record, "`id`, `image_id` and `category_id` are whole numbers")
        elif not isinstance(box, list) or len(box) != 4:
            broken("annotation", place, record, "`bbox` is a list of four numbers")
        else:
            numbers.append(ids)
            boxes.append([_number(value) for value in box])  # nan where it is none: found with the boxes
            crowd.append(bool(values.get("iscrowd")))
            places.append(place)
    ids_of = np.array(numbers, np.int64).reshape(-1, 3)
    return _Content(
        images=images,
        image_places=np.array(image_places, np.int64),
        categories=categories,
        ids=ids_of[:, 0].copy(),
        image_ids=ids_of[:, 1].copy(),
        category_ids=ids_of[:, 2].copy(),
        xywh=np.array(boxes, np.float64).reshape(-1, 4),
        crowd=np.array(crowd, np.bool_),
        places=np.array(places, np.int64),
        info=file.get("info"),
    )


def _whole(value: object) -> int | None:
    """A whole number, also one that was written as a text or with a point; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) < 1 << 63 else None
    number = _number(value)
    return int(number) if abs(number) < _WHOLE and number == int(number) else None


def _number(value: object) -> float:
    """A number, also one that was written as a text; nan for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return float("nan")
    try:
        return float(value)
    except (ValueError, OverflowError):
        return float("nan")

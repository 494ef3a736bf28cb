"""COCO json files as flat arrays.

A file of COCO's size holds almost a million records. As Python objects they are slow to make, large, and copied page
by page into every worker process that looks at them (looking changes their reference counts). Here they are a dozen
numpy arrays, and the arrays of a large file are kept in the user's cache folder, so that the second opening takes a
fraction of a second.

Letters in shapes: I images, N boxes (annotation records), K classes.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import mmap
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from backbones.errors import UserError

_log = logging.getLogger(__name__)

CACHE_VERSION = 2
CACHE_FROM_BYTES = 8 << 20  # a smaller file is read in less time than its cache is worth
_PIECE = 1 << 20  # bytes of json whose records stay in the processor's cache while their fields are taken
_NUM_NAMED = 10  # records that a warning names before it only counts


_Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]  # the arrays hold no larger ones
_Int32 = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 31) - 1)]


class _Image(msgspec.Struct, gc=False):
    id: _Int64
    file_name: str
    width: _Int32 | None = None
    height: _Int32 | None = None
    exif_orientation: Any = None  # ours; what another tool may keep under this name is passed over


class _Annotation(msgspec.Struct, gc=False):
    # Fields that are not listed (segmentation above all, nine tenths of the file) are skipped without being decoded.
    id: _Int64
    image_id: _Int64
    category_id: _Int64
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool | None = 0


class _Category(msgspec.Struct, gc=False):
    id: _Int64
    name: str


class _File(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]
    info: Any = None


Exif = Literal["applied", "ignored"]
EXIF: tuple[Exif | None, ...] = (None, "applied", "ignored")
"""What the numbers in ``CocoIndex.exif`` stand for."""

_BOM = b"\xef\xbb\xbf"
_LIST_OF_RECORDS = re.compile(rb'"annotations"\s*:\s*\[')
_BETWEEN_RECORDS = re.compile(rb"\}\s*,\s*(?=\{)")
_MARKER = _Annotation(id=-(1 << 62), image_id=0, category_id=0, bbox=(0.0, 0.0, 0.0, 0.0))


class Objects(NamedTuple):
    """The objects of one image.

    Attributes:
        boxes: float32 [N, 4], xyxy in pixels of the image, as the file has them (they may stick out of it). Which way up
            the image is then, ``CocoIndex.exif`` says.
        labels: int64 [N], 0 .. K-1.
        crowd: bool [N], true where the box stands for a group that nobody counted.
        areas: float64 [N], square pixels; COCO's is the area of the mask, not of the box.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CocoIndex:
    """All that training and evaluation need to know of a COCO json file, in flat arrays.

    Images keep the order of the file; an image's *position* is its place in that order. The records of the image
    at position p are ``offsets[p]:offsets[p + 1]`` of the arrays over N, in the order of the file. All records are
    here, exactly as written, because evaluation counts them as COCO does; ``usable`` marks those to learn from.

    Attributes:
        path: the json file.
        image_ids: int64 [I].
        name_bytes, name_offsets: the file names as one UTF-8 buffer (uint8) and int64 [I + 1] into it. See
            ``file_name``.
        sizes: int32 [I, 2], (height, width) of each image as the file says.
        exif: int8 [I], whether the boxes count pixels of the image turned as its EXIF tag says (1, "applied") or as stored
            (2, "ignored"), or the file says nothing (0): indices into ``EXIF``. It stands in an image's record, or once in
            ``info``, as ``"exif_orientation": "applied"``; our converters write it. See ``detection.data.dataset``.
        offsets: int64 [I + 1].
        xywh: float64 [N, 4], COCO's ``bbox``: left, top, width, height in pixels.
        labels: int64 [N], 0 .. K-1: the classes in ascending order of their category id.
        areas: float64 [N], COCO's ``area``, width times height where the file has none.
        crowd: bool [N], COCO's ``iscrowd``.
        usable: bool [N]: no crowd, and some of the box lies inside its image.
        annotation_ids: int64 [N].
        category_ids: int64 [K], ascending: the id that label k has in the file.
        class_names: the name of each label.
        problems: one line for each kind of record that cannot be learnt from, naming the first of them.
    """

    path: Path
    image_ids: NDArray[np.int64]
    name_bytes: NDArray[np.uint8]
    name_offsets: NDArray[np.int64]
    sizes: NDArray[np.int32]
    exif: NDArray[np.int8]
    offsets: NDArray[np.int64]
    xywh: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    usable: NDArray[np.bool_]
    annotation_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    class_names: tuple[str, ...]
    problems: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | Path, *, cache: bool = True, strict: bool = False) -> CocoIndex:
        """Read a COCO json file.

        A record that cannot be learnt from (a box without area, or wholly outside its image) is kept for
        evaluation, left out of ``usable``, and named in a warning: such records are common, and COCO's own files have
        them.

        Args:
            path: the json file.
            cache: keep the arrays of a file above 8 MB in ``$XDG_CACHE_HOME/litedet`` (``~/.cache/litedet``), and use
                what is there if path, size and time of change of the json still agree.
            strict: refuse a file with such records.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: not json, not a COCO json, or a record that contradicts another. The message names file and
                record.
        """
        path = Path(path)
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"annotation file {path} {what}; a COCO json file is expected")
        cached = _cache_path(path) if cache and path.stat().st_size >= CACHE_FROM_BYTES else None
        index = _read_cache(cached, path) if cached else None
        if index is None:
            with no_garbage_collection():
                index = _build(path)
            if cached:
                _write_cache(cached, index)
        if index.problems and strict:
            raise UserError(f"{path}: " + "; ".join(index.problems))
        for problem in index.problems:
            _log.warning("%s: %s (not used in training)", path, problem)
        return index

    def __len__(self) -> int:
        """The number of images, those without objects included."""
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def boxes(self) -> NDArray[np.float32]:
        """float32 [N, 4]: every box as xyxy in pixels of its image on disk."""
        return _xywh_to_xyxy(self.xywh)

    def file_name(self, position: int) -> str:
        """The name of the image at this position, relative to the image folder."""
        return bytes(self.name_bytes[self.name_offsets[position] : self.name_offsets[position + 1]]).decode()

    def size(self, position: int) -> tuple[int, int]:
        """(height, width) of the image at this position."""
        height, width = self.sizes[position].tolist()
        return height, width

    def objects(self, position: int, *, usable_only: bool = False) -> Objects:
        """The objects of the image at this position: every record, or those alone that training uses."""
        records: Any = slice(self.offsets[position], self.offsets[position + 1])
        if usable_only:
            records = np.arange(records.start, records.stop)[self.usable[records]]
        return Objects(
            _xywh_to_xyxy(self.xywh[records]), self.labels[records], self.crowd[records], self.areas[records]
        )

    def select(
        self,
        positions: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> CocoIndex:
        """Part of the file, as a file of its own.

        Args:
            positions: of the images to keep, in the order wanted, none of them twice; None keeps all.
            class_names: keep the records of these classes alone; images, labels and categories stay. None keeps all.

        Raises:
            UserError: the file has no class of one of these names.
            IndexError: it has no image at one of these positions.
        """
        records = np.ones(len(self.labels), np.bool_)
        if class_names is not None:
            if unknown := [name for name in class_names if name not in self.class_names]:
                raise UserError(
                    f"{self.path} has no class {', '.join(map(repr, unknown))}; "
                    f"it has {', '.join(map(repr, self.class_names))}"
                )
            records = np.isin(self.labels, [self.class_names.index(name) for name in class_names])
        kept = np.flatnonzero(records)
        if positions is None and len(kept) == len(records):
            return self
        offsets = np.concatenate([[0], np.cumsum(records)])[self.offsets]
        of_images: dict[str, Any] = {}
        if positions is not None:
            chosen = np.asarray(positions, np.int64).reshape(-1)
            counts = np.diff(offsets)[chosen]
            ends = counts.cumsum()
            # Record r of the result is the (r - its image's first)th record of the image in this file.
            kept = kept[np.repeat(offsets[chosen] - (ends - counts), counts) + np.arange(counts.sum())]
            offsets = np.concatenate([[0], ends])
            names = [self.file_name(position).encode() for position in chosen.tolist()]
            of_images = {name: getattr(self, name)[chosen] for name in ("image_ids", "sizes", "exif")}
            of_images["name_bytes"] = np.frombuffer(b"".join(names), np.uint8)
            of_images["name_offsets"] = np.cumsum([0, *map(len, names)], dtype=np.int64)
        of_records = {name: getattr(self, name)[kept] for name in _OF_RECORDS}
        return replace(self, offsets=offsets, **of_images, **of_records)

    def require_objects(self) -> CocoIndex:
        """This index, if there is anything to learn from it.

        Raises:
            UserError: the file has no image, or not one usable box.
        """
        if not len(self):
            raise UserError(f"{self.path}: `images` is empty: no image to train on")
        if not self.usable.any():
            raise UserError(
                f"{self.path}: nothing to learn: {len(self)} images, {len(self.labels)} annotations, and none of them is a box "
                "that training can use (crowds and boxes without area are not used)"
            )
        return self

    def with_categories(self, category_ids: NDArray[np.int64], class_names: tuple[str, ...]) -> CocoIndex:
        """The same file with the labels of another one, for example of the file that a detector was trained on.

        Classes are the same if their names are. ``category_ids`` of the result are this file's own, so that results
        written with them fit this file; a class that this file does not have keeps the other file's id, or a new one
        where that is taken.

        Args:
            category_ids: int64 [K], the other file's id of each label.
            class_names: the other file's K names.

        Raises:
            UserError: this file has objects of a class that is not among ``class_names``.
        """
        label_of = {name: label for label, name in enumerate(class_names)}
        new_labels = np.array([label_of.get(name, -1) for name in self.class_names], np.int64)
        counts = np.bincount(self.labels, minlength=self.num_classes)
        unknown = [
            f"{name!r} (id {self.category_ids[label]}, {counts[label]} boxes)"
            for label, name in enumerate(self.class_names)
            if new_labels[label] < 0 and counts[label]
        ]
        if unknown:
            raise UserError(
                f"{self.path}: unknown category {', '.join(unknown[:_NUM_NAMED])}; "
                f"the classes are {', '.join(map(repr, class_names[:100]))}"
            )
        own_id = dict(zip(self.class_names, self.category_ids.tolist(), strict=True))
        taken = {own_id[name] for name in class_names if name in own_id}
        ids = []
        for name, other_id in zip(class_names, np.asarray(category_ids).tolist(), strict=True):
            if name not in own_id:
                own_id[name] = other_id if other_id not in taken else max(taken) + 1
                taken.add(own_id[name])
            ids.append(own_id[name])
        labels = new_labels[self.labels] if len(self.labels) else self.labels
        return replace(self, labels=labels, category_ids=np.array(ids, np.int64), class_names=tuple(class_names))


def _xywh_to_xyxy(xywh: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)


# ----------------------------------------------------------------------------------------------------- json -> arrays


def _build(path: Path) -> CocoIndex:
    images, categories, records, exif = decode_coco(path)
    categories.sort(key=lambda category: category.id)
    if not categories:
        raise UserError(f"{path}: `categories` is empty: there is no class to find")

    image_ids = _array(images, "id", np.int64)
    category_ids = _array(categories, "id", np.int64)
    annotation_ids, images_named, categories_named, xywh, areas, crowd = records
    num = len(annotation_ids)

    _refuse_duplicates(path, "image id", image_ids)
    _refuse_duplicates(path, "annotation id", annotation_ids)
    _refuse_duplicates(path, "category id", category_ids)
    _refuse_duplicates(path, "category name", np.array([category.name for category in categories], object))

    names = [image.file_name.encode() for image in images]
    sizes = np.nan_to_num(np.stack([_floats(images, "height"), _floats(images, "width")], axis=1)).astype(np.int32)
    for position in np.flatnonzero((sizes <= 0).any(axis=1))[:1]:
        image = images[position]
        raise UserError(
            f"{path}: image {image.id} ({image.file_name}) has width {image.width} and height {image.height}; "
            "both are needed, in pixels of the image on disk"
        )

    position = positions_of(images_named, image_ids)
    for record in np.flatnonzero(position < 0)[:1]:
        raise UserError(
            f"{path}: annotation {annotation_ids[record]} names image_id {images_named[record]}, which `images` has not"
        )
    labels = positions_of(categories_named, category_ids)
    for record in np.flatnonzero(labels < 0)[:1]:
        raise UserError(
            f"{path}: annotation {annotation_ids[record]} has the unknown category {categories_named[record]}; "
            f"`categories` has {', '.join(map(str, category_ids[:100].tolist()))}"
        )
    unknown = np.isnan(areas)
    areas[unknown] = xywh[unknown, 2] * xywh[unknown, 3]

    # By image, and in an image as in the file. Sorting (image, record) pairs is five times faster than a stable
    # argsort. Here and below as much as possible happens in place: the first touch of fresh memory takes longer than the
    # arithmetic.
    pairs = position * num
    pairs += np.arange(num)
    pairs.sort()
    position, order = np.divmod(pairs, max(num, 1))
    for values in (*xywh.T, labels, areas, annotation_ids, crowd):
        values[:] = values.take(order)
    usable, problems = _judge(xywh, sizes[position], annotation_ids)
    return CocoIndex(
        path=path,
        image_ids=image_ids,
        name_bytes=np.frombuffer(b"".join(names), np.uint8),
        name_offsets=np.cumsum([0, *map(len, names)], dtype=np.int64),
        sizes=sizes,
        exif=exif_of(images, exif),
        offsets=np.concatenate([[0], np.bincount(position, minlength=len(images)).cumsum()]),
        xywh=xywh,
        labels=labels,
        areas=areas,
        crowd=crowd,
        usable=usable & ~crowd,
        annotation_ids=annotation_ids,
        category_ids=category_ids,
        class_names=tuple(category.name for category in categories),
        problems=problems,
    )


class _Records(NamedTuple):
    """The annotation records in the order of the file, int64 [N] where no other is named."""

    ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    xywh: NDArray[np.float64]  # [N, 4]
    areas: NDArray[np.float64]  # [N], nan where the file has none
    crowd: NDArray[np.bool_]  # [N]


def _records(annotations: list[_Annotation]) -> _Records:
    corners = np.fromiter(chain.from_iterable(map(attrgetter("bbox"), annotations)), np.float64, 4 * len(annotations))
    return _Records(
        ids=_array(annotations, "id", np.int64),
        image_ids=_array(annotations, "image_id", np.int64),
        category_ids=_array(annotations, "category_id", np.int64),
        xywh=corners.reshape(-1, 4),
        areas=_floats(annotations, "area"),
        crowd=_array(annotations, "iscrowd", np.bool_),
    )


def decode_coco(path: Path) -> tuple[list[_Image], list[_Category], _Records, Any]:
    """The records of a file whose fields have the right types: images, categories, annotations, what ``info`` says.

    Whether they contradict each other (an id twice, an image that is not listed) is left to the caller.

    Raises:
        UserError: not json, or a field is missing or of another type.
    """
    if not path.stat().st_size:
        raise UserError(f"{path} is not a json file: it is empty")
    # Mapped, not read: a file of COCO's size has hundreds of megabytes, and they need no copy. Nobody closes the map: it goes
    # with the last view of it, and an error's traceback may hold one.
    with path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    view = memoryview(data)[len(_BOM) if data[: len(_BOM)] == _BOM else 0 :]  # Windows tools mark UTF-8 so
    try:
        if (decoded := _decode_in_pieces(view)) is not None:
            return decoded
        file = _decode_whole(view)
        return file.images, file.categories, _records(file.annotations), file.info
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is not a COCO json file: {_explain(str(error), bytes(view))}") from None
    except RecursionError:
        raise UserError(f"{path} is not a COCO json file: lists or objects are nested too deep in it") from None
    except UnicodeDecodeError as error:
        place_of_it = bytes(error.object[max(error.start - 60, 0) : error.end])
        raise UserError(f"{path} is not a json file: it is not UTF-8 text, see {place_of_it!r}") from None
    except msgspec.DecodeError as error:
        near = ""
        if place := re.search(r"byte (\d+)", str(error)):
            start = max(int(place[1]) - 60, 0)
            near = f", after {bytes(view[start : int(place[1])]).decode(errors='replace')!r}"
        raise UserError(f"{path} is not a json file: {error}{near}") from None


def _decode_whole(data: memoryview) -> _File:
    try:
        return msgspec.json.decode(data, type=_File)
    except msgspec.ValidationError:
        # Some exporters write numbers as texts, ids above all. Reading these too costs others nothing, if it comes second.
        return msgspec.json.decode(data, type=_File, strict=False)


def _decode_in_pieces(data: memoryview) -> tuple[list[_Image], list[_Category], _Records, Any] | None:
    """A large file without the objects of all its records at once; None if it has to be decoded as a whole.

    ``annotations`` is cut between two records about every megabyte. The objects of a piece stay in the processor's cache,
    and the next piece uses their memory again: train2017's size opens in a sixth less time and a quarter less memory. What
    remains when the pieces are taken out is again a file, with a short list.

    Nothing has to be known of a cut but that it lies between braces: inside of a record or of a string it leaves brackets
    or quotes open, and the piece is not json. The rest begins its list with a marker, which is missing from the decoded
    rest if the list that was cut is not the one that counts (another thing in the file may have the name).
    """
    found = _LIST_OF_RECORDS.search(data)
    if found is None:
        return None
    decode = msgspec.json.Decoder(list[_Annotation]).decode
    parts = []
    place = found.end()
    while cut := _BETWEEN_RECORDS.search(data, place + _PIECE):
        try:
            annotations = decode(b"".join([b"[", data[place : cut.start() + 1], b"]"]))
        except (msgspec.DecodeError, RecursionError):
            break  # the list ended before the cut, or a record is broken
        parts.append(_records(annotations))
        place = cut.end()
    if not parts:
        return None
    rest = b"".join([data[: found.end()], msgspec.json.encode(_MARKER), b",", data[place:]])
    try:
        file = msgspec.json.decode(rest, type=_File)
    except (msgspec.DecodeError, RecursionError):
        return None  # the whole file gives the message with the right place
    if file.annotations[:1] != [_MARKER]:
        return None
    parts.append(_records(file.annotations[1:]))
    records = _Records(*map(np.concatenate, zip(*parts, strict=True)))
    return file.images, file.categories, records, file.info


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For a million new objects, none of them garbage: the collector would walk over them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _explain(error: str, data: bytes) -> str:
    """The decoder's message with the record it speaks of, without its mask."""
    place = re.search(r" - at `\$\.(\w+)\[(\d+)\]", error)
    if not place:
        return error.replace(" - at `$.", " - at `")
    try:
        record = json.loads(data)[place[1]][int(place[2])]
    except (RecursionError, ValueError):  # json's own decoder gives up earlier than msgspec's
        return error
    if isinstance(record, dict):
        record.pop("segmentation", None)
    return f"{error.replace('`$.', '`')}: {str(record)[:300]}"


def exif_of(images: list[_Image], info: object) -> NDArray[np.int8]:
    """int8 [I], see ``CocoIndex.exif``: what an image's record says, or ``info`` for all."""
    numbers: dict[Any, int] = {"applied": 1, "ignored": 2}
    stated = info.get("exif_orientation") if isinstance(info, dict) else None
    default = numbers.get(stated, 0) if isinstance(stated, str) else 0
    own = list(map(attrgetter("exif_orientation"), images))
    if own.count(None) == len(own):
        return np.full(len(own), default, np.int8)
    return np.array([numbers.get(one, default) if isinstance(one, str) else default for one in own], np.int8)


def _array(records: list[Any], name: str, dtype: type) -> NDArray[Any]:
    return np.fromiter(map(attrgetter(name), records), dtype, len(records))


def _floats(records: list[Any], name: str) -> NDArray[np.float64]:
    """A field of N records, float64 [N]; nan where a record has none."""
    try:
        return _array(records, name, np.float64)
    except TypeError:  # there is a None: twice as slow
        return np.array(list(map(attrgetter(name), records)), np.float64)


def positions_of(named: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place in ``ids`` of each number [N], -1 where it is not there."""
    if not len(ids):
        return np.full(len(named), -1, np.int64)
    low, high = int(ids.min()), int(ids.max())
    if high - low < 10 * (
        len(ids) + len(named)
    ):  # a table is sixty times faster than a search, where it is not too large
        table = np.full(high - low + 1, -1, np.int64)
        table[ids - low] = np.arange(len(ids))
        places = table.take(named - low, mode="clip")
        places[(named < low) | (named > high)] = -1
        return places
    order = np.argsort(ids)
    places = order[np.searchsorted(ids[order], named).clip(max=len(ids) - 1)]
    return np.where(ids[places] == named, places, -1)


def _refuse_duplicates(path: Path, what: str, values: NDArray[Any]) -> None:
    ordered = np.sort(values)
    repeats = ordered[1:] == ordered[:-1]
    if repeats.any():
        twice = np.unique(ordered[1:][repeats])
        raise UserError(
            f"{path}: {what} {', '.join(map(str, twice[:_NUM_NAMED].tolist()))} stands there more than once"
        )


def _judge(
    xywh: NDArray[np.float64], sizes: NDArray[np.int32], annotation_ids: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Which boxes can be learnt from, and a line for each reason why others cannot."""
    # Column by column: numpy reduces along a side of two ten times slower.
    (left, top, width, height), (rows, columns) = xywh.T, sizes.T
    flat = ~((width > 0) & (height > 0))
    outside = ~flat & ((left + width <= 0) | (top + height <= 0) | (left >= columns) | (top >= rows))
    problems = []
    for reason, bad in (("without area", flat), ("wholly outside the image", outside)):
        if bad.any():
            named = ", ".join(map(str, annotation_ids[bad][:_NUM_NAMED].tolist()))
            more = ", …" if bad.sum() > _NUM_NAMED else ""
            problems.append(f"{bad.sum()} of {len(bad)} boxes {reason}: annotation {named}{more}")
    return ~(flat | outside), tuple(problems)


# ----------------------------------------------------------------------------------------------------- arrays <-> cache

_OF_RECORDS = ("xywh", "labels", "areas", "crowd", "usable", "annotation_ids")
_ARRAYS = (
    "image_ids", "name_bytes", "name_offsets", "sizes", "exif", "offsets", "xywh", "labels", "areas", "crowd", "usable",
    "annotation_ids", "category_ids",
)  # fmt: skip


def _cache_path(path: Path) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litedet"
    return folder / f"{path.stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.safetensors"


def _fingerprint(path: Path) -> dict[str, str]:
    stat = path.stat()
    return {"version": str(CACHE_VERSION), "json": str(path.resolve()), "stat": f"{stat.st_size} {stat.st_mtime_ns}"}


def _read_cache(cached: Path, path: Path) -> CocoIndex | None:
    """What was kept of this file, or nothing if there is no cache, it is broken, or the file has changed."""
    if not cached.is_file():
        return None
    try:
        with safetensors.safe_open(cached, framework="numpy") as file:
            metadata = file.metadata() or {}
            if any(metadata.get(key) != value for key, value in _fingerprint(path).items()):
                return None
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in _ARRAYS}
            class_names, problems = json.loads(metadata["class_names"]), json.loads(metadata["problems"])
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        _log.info("annotation cache %s cannot be read (%s); it is made again", cached, error)
        return None
    return CocoIndex(path=path, class_names=tuple(class_names), problems=tuple(problems), **arrays)


def _write_cache(cached: Path, index: CocoIndex) -> None:
    """Keep the arrays; a cache folder that cannot be written costs time and nothing else."""
    metadata = _fingerprint(index.path)
    metadata["class_names"], metadata["problems"] = json.dumps(index.class_names), json.dumps(index.problems)
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in _ARRAYS}
    temporary = None
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, prefix=cached.stem, delete=False) as file:
            temporary = file.name
        safetensors.numpy.save_file(arrays, temporary, metadata=metadata)
        os.replace(temporary, cached)  # whole or not at all, also where two processes write at once
    except OSError as error:
        _log.info("annotation cache %s cannot be written (%s)", cached, error)
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

"""The shards of ``detection.inference.folder`` in the formats that other tools and our own training read.

All of them are made from the shards, which stay the one record of what was done: a format may be asked for later, and a kill at
any moment leaves nothing that the next start does not complete. A file is written whole or not at all, and not again.

* ``coco``: ``detections.json``, COCO's result format; ``instances.json``, an annotation file with the detections as objects,
  each with its ``score``.
* ``yolo``: ``labels/NAME.txt`` with the inner folders of the images, and ``data.yaml`` with the class names.
* ``voc``: ``annotations/NAME.xml``, and ``classes.txt``.

An image that cannot be read has no text or XML file, because an empty one would say that it shows nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from xml.etree import ElementTree

import msgspec
import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError
from backbones.state import write_whole, writing_whole
from detection.data.formats.writer import plain
from detection.evaluation.table import DetectionTable, coco_results
from detection.inference.folder import Shards, legible

Format = Literal["parquet", "coco", "yolo", "voc"]
FORMATS: tuple[Format, ...] = get_args(Format)

_NARROWEST = 1.0001  # pixels: VOC includes the last pixel, and its readers refuse a box whose corners coincide


@dataclass(slots=True, eq=False, kw_only=True)
class Formats:
    """What is made of shards beside them.

    Attributes:
        wanted: some of ``FORMATS``.
        shards: what they are made from; files go into the folder of these.
        root: folder that the names of images are relative to.
        class_names: of the labels 0 .. K-1.
        category_ids: int64 [K], COCO's id of each label.
        image_ids: int64 [I], COCO's id of each image of ``shards.paths``.
        with_scores: a score as the sixth value of YOLO's rows, and as ``score`` in VOC's objects.

    Raises:
        UserError: two images would share a text or XML file, or an image does not lie in ``root``.
    """

    wanted: tuple[Format, ...]
    shards: Shards
    root: Path
    class_names: tuple[str, ...]
    category_ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    with_scores: bool = False
    _before: str = field(init=False)

    def __post_init__(self) -> None:
        self._before = os.path.join(os.path.abspath(self.root), "")
        if "yolo" in self.wanted:
            self._refuse_shared(lambda path: os.path.splitext(self._name(path))[0], "labels", ".txt")
        if "voc" in self.wanted:  # its files lie in one folder
            self._refuse_shared(lambda path: os.path.splitext(os.path.basename(path))[0], "annotations", ".xml")

    def write(self) -> list[Path]:
        """Writes what is missing of all shards that are there; files about the whole once all of them are.

        Returns:
            The files about the whole that are there: of COCO both, of YOLO and VOC the list of classes.
        """
        out = self.shards.out
        complete = not self.shards.missing()
        made: list[Path] = []
        labels, classes = out / "data.yaml", out / "classes.txt"
        todo = {"yolo": labels, "voc": classes}
        per_image = [name for name, last in todo.items() if name in self.wanted and not last.exists()]
        if per_image:
            for positions, rows in self._shards():
                for position, row in zip(positions, rows, strict=True):
                    if row["error"] is None:
                        self._write_image(per_image, self.shards.paths[position], row)
        if complete and "coco" in self.wanted:
            made += [self._write_results(out / "detections.json"), self._write_instances(out / "instances.json")]
        if complete and "yolo" in self.wanted:
            content = {"path": legible(str(self.root.resolve())), "names": dict(enumerate(self.class_names))}
            made.append(_once(labels, msgspec.yaml.encode(content)))
        if complete and "voc" in self.wanted:
            made.append(_once(classes, "".join(f"{name}\n" for name in self.class_names).encode()))
        return made

    def _shards(self) -> Iterator[tuple[range, list[dict[str, Any]]]]:
        missing = set(self.shards.missing())
        for shard in range(len(self.shards)):
            if shard not in missing:
                yield self.shards.positions(shard), self.shards.rows(shard)

    def _name(self, path: str) -> str:
        absolute = os.path.abspath(path)
        if not absolute.startswith(self._before):
            raise UserError(f"{path} does not lie in {self.root}, which the names of images are relative to")
        return absolute[len(self._before) :].replace(os.sep, "/")

    def _refuse_shared(self, stem_of: Callable[[str], str], folder: str, suffix: str) -> None:
        first: dict[str, str] = {}
        for path in self.shards.paths:
            other = first.setdefault(stem_of(path), path)
            if other is not path:
                raise UserError(
                    f"{other} and {path} would share the file {folder}/{stem_of(path)}{suffix}; rename one, or take a format "
                    "that names the image (parquet, coco)"
                )

    def _write_image(self, formats: Sequence[str], path: str, row: dict[str, Any]) -> None:
        name = self._name(path)
        stem = os.path.splitext(name)[0]
        if "yolo" in formats and not (labels := self.shards.out / "labels" / f"{stem}.txt").exists():
            write_whole(labels, yolo_rows(row, self.with_scores).encode())
        if "voc" in formats:
            file = self.shards.out / "annotations" / f"{os.path.basename(stem)}.xml"
            if not file.exists():
                write_whole(file, voc_xml(os.path.basename(name), row, self.with_scores))

    def _write_results(self, file: Path) -> Path:
        """COCO's result format, streamed: the file may be larger than memory."""
        if file.exists():
            return file
        encoder = msgspec.json.Encoder()
        with writing_whole(file) as stream:
            separator = b"[\n"
            for positions, rows in self._shards():
                for record in coco_results(self.category_ids, self._table(positions, rows)):
                    stream.write(separator + encoder.encode(record))
                    separator = b",\n"
            stream.write(b"[]\n" if separator == b"[\n" else b"\n]\n")
        return file

    def _table(self, positions: range, rows: list[dict[str, Any]]) -> DetectionTable:
        found = [row["boxes"] or [] for row in rows]
        counts = [len(boxes) for boxes in found]
        return DetectionTable(
            image_ids=np.repeat(self.image_ids[positions.start : positions.stop], counts),
            boxes=np.array([box for boxes in found for box in boxes], np.float32).reshape(-1, 4),
            scores=np.array([score for row in rows for score in row["scores"] or []], np.float32),
            labels=np.array([label for row in rows for label in row["labels"] or []], np.int64),
        )

    def _write_instances(self, file: Path) -> Path:
        """An annotation file, streamed; images that cannot be read are not in it."""
        if file.exists():
            return file
        encoder = msgspec.json.Encoder()
        with writing_whole(file) as stream:
            stream.write(b'{"images": [')
            separator = b"\n"
            for positions, rows in self._shards():
                for position, row in zip(positions, rows, strict=True):
                    if row["error"] is None:
                        image = {
                            "id": int(self.image_ids[position]),
                            "file_name": legible(self._name(self.shards.paths[position])),
                            "width": row["width"],
                            "height": row["height"],
                        }
                        stream.write(separator + encoder.encode(image))
                        separator = b",\n"
            stream.write(b'\n], "annotations": [')
            separator, number = b"\n", 0
            for positions, rows in self._shards():
                for record in coco_results(self.category_ids, self._table(positions, rows)):
                    number += 1
                    box = plain(record.bbox)
                    annotation = {
                        "id": number,
                        "image_id": record.image_id,
                        "category_id": record.category_id,
                        "bbox": box,
                        "area": plain((box[2] * box[3],))[0],
                        "iscrowd": 0,
                        "score": record.score,
                    }
                    stream.write(separator + encoder.encode(annotation))
                    separator = b",\n"
            categories = [
                {"id": int(number), "name": name}
                for number, name in zip(self.category_ids, self.class_names, strict=True)
            ]
            stream.write(b'\n], "categories": ' + encoder.encode(categories) + b"}\n")
        return file


def _once(file: Path, content: bytes) -> Path:
    if not file.exists():
        write_whole(file, content)
    return file


def yolo_rows(row: dict[str, Any], with_scores: bool) -> str:
    """YOLO's text for a row of a shard: ``class x y width height`` as shares of the image, and the score where asked for."""
    width, height = row["width"], row["height"]
    lines = []
    for (x1, y1, x2, y2), label, score in zip(row["boxes"], row["labels"], row["scores"], strict=True):
        shares = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        numbers = [f"{share:.8f}" for share in shares] + ([f"{score:.6f}"] if with_scores else [])
        lines.append(f"{label} {' '.join(numbers)}\n")
    return "".join(lines)


def voc_xml(name: str, row: dict[str, Any], with_scores: bool) -> bytes:
    """Pascal VOC's XML for a row of a shard.

    VOC counts pixels from 1 and includes the last: x1, y1, x2, y2 become x1 + 1, y1 + 1, x2, y2. A box narrower than a pixel,
    which VOC cannot say, becomes a pixel wide.
    """
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = legible(name)
    size = ElementTree.SubElement(root, "size")
    for side, pixels in (("width", row["width"]), ("height", row["height"]), ("depth", 3)):
        ElementTree.SubElement(size, side).text = str(pixels)
    for box, class_name, score in zip(row["boxes"], row["names"], row["scores"], strict=True):
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = class_name
        ElementTree.SubElement(item, "difficult").text = "0"
        if with_scores:
            ElementTree.SubElement(item, "score").text = f"{score:.6f}"
        x1, y1, x2, y2 = box
        corners = (min(x1, x2 - _NARROWEST) + 1, min(y1, y2 - _NARROWEST) + 1, x2, y2)
        corner_names = ("xmin", "ymin", "xmax", "ymax")
        place = ElementTree.SubElement(item, "bndbox")
        for corner, number in zip(corner_names, plain(corners), strict=True):
            ElementTree.SubElement(place, corner).text = str(number)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"

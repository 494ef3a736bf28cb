"""Pascal VOC and YOLO folders to COCO json.

Both formats count differently from COCO: VOC numbers pixels from 1 and includes the last one, YOLO gives the centre
and the size as shares of the image. All of that ends here. Whatever cannot be converted is left out, counted and
named.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import cv2
import msgspec
import numpy as np
from PIL import Image
from tqdm import tqdm

from backbones.errors import UserError

_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_NUM_NAMED = 5  # examples that the report names for each reason
_EXIF_ORIENTATION = 0x0112


@dataclass(kw_only=True, slots=True)
class ConversionReport:
    """What a conversion wrote, and what it left out.

    Attributes:
        out: the file that was written.
        num_images, num_boxes: how many records it has.
        num_empty: images without any box, kept as such.
        class_names: in the order of their category ids.
        dropped: the records that were left out, by reason; each as "file: what".
        notes: records that were written, but not as they stood there, by reason.
    """

    out: Path
    num_images: int = 0
    num_boxes: int = 0
    num_empty: int = 0
    class_names: tuple[str, ...] = ()
    dropped: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, record: str) -> None:
        self.dropped.setdefault(reason, []).append(record)

    def note(self, reason: str, record: str) -> None:
        self.notes.setdefault(reason, []).append(record)

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {self.num_images} images ({self.num_empty} without objects), {self.num_boxes} boxes, "
            f"{len(self.class_names)} classes: {', '.join(self.class_names)}"
        ]
        for title, reasons in (("dropped", self.dropped), ("changed", self.notes)):
            for reason, records in reasons.items():
                lines.append(f"{title}: {len(records)} x {reason}")
                lines += [f"    {record}" for record in records[:_NUM_NAMED]]
                if len(records) > _NUM_NAMED:
                    lines.append(f"    and {len(records) - _NUM_NAMED} more")
        if not self.dropped:
            lines.append("dropped: nothing")
        return "\n".join(lines)


def convert_voc(
    annotations: Path,
    images: Path,
    out: Path,
    *,
    list_file: Path | None = None,
    names: Path | None = None,
    difficult: Literal["keep", "drop"] = "keep",
) -> ConversionReport:
    """Pascal VOC's XML files -> one COCO json.

    The corners (x1, y1, x2, y2), counted from 1 with the last pixel included, become x1 - 1, y1 - 1, x2, y2, cut off
    at the image's edge. Classes are all that occur in *any* file of the folder, sorted by name, with ids from 1:
    the two halves of one data set get the same ids even if a rare class is missing from one half's list.

    Args:
        annotations: folder of XML files, one an image.
        images: folder of images, or of folders of them; an image belongs to the XML file of the same stem.
        out: the json to write.
        list_file: text file with the stems to take, one a line (VOC's ImageSets/Main); without it all XML files are
            taken.
        names: file with the class names in the order wanted, see ``read_class_names``; other classes are dropped.
        difficult: VOC's own evaluation leaves "difficult" objects out, COCO's knows no such thing. "keep" writes them
            as ordinary objects with ``"difficult": 1``, "drop" leaves them out.

    Raises:
        FileNotFoundError: a folder or file is not there.
        UserError: there is nothing to convert.
    """
    _require_folder("annotations", annotations)
    _require_folder("images", images)
    xml_files = sorted(annotations.glob("*.xml"))
    if not xml_files:
        raise UserError(f"folder of annotations {annotations} has no .xml file")
    report = ConversionReport(out=out)
    roots: dict[str, ElementTree.Element] = {}
    for path in tqdm(xml_files, desc="annotations", unit="file", leave=False):
        try:
            roots[path.stem] = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, OSError, ValueError) as error:
            report.drop("annotation file that cannot be read", f"{path}: {error}")

    stems = list(roots)
    if list_file is not None:
        _require_file("list", list_file)
        # VOC's lists for one class have a second column; the stem is always the first word.
        wanted = list(dict.fromkeys(line.split()[0] for line in list_file.read_text().splitlines() if line.strip()))
        existing = {path.stem for path in xml_files}
        for stem in wanted:
            if stem not in existing:
                report.drop("image of the list without an annotation file", f"{list_file}: {stem}")
        stems = [stem for stem in wanted if stem in roots]
        if not stems:
            raise UserError(f"{list_file}: none of its {len(wanted)} names is an annotation file in {annotations}")
    if names is None:
        class_names = sorted(
            {name for root in roots.values() for item in root.findall("object") if (name := _name(item))}
        )
    else:
        class_names = read_class_names(names)
    category_id = {name: number for number, name in enumerate(class_names, 1)}
    image_of = {path.stem: path for path in reversed(_find_images(images))}

    writer = _Writer(report, images, category_id)
    for stem in tqdm(stems, desc="images", unit="image", leave=False):
        root, xml_path = roots[stem], annotations / f"{stem}.xml"
        image = image_of.get(stem)
        if image is None:
            report.drop("annotation without an image", f"{xml_path}: no image {stem} in {images}")
            continue
        raw_size, turned_size = _image_sizes(image, report)
        if raw_size is None:
            continue
        stated = tuple(_number(root.findtext(f"size/{side}")) or 0 for side in ("width", "height"))
        size = stated if stated in (raw_size, turned_size) else raw_size
        if size != stated and all(stated):
            report.note(
                "image size taken from the image",
                f"{xml_path}: states {_plain(stated)}, the image has {_plain(size)}",
            )
        image_id = writer.add_image(image, size)
        for number, item in enumerate(root.findall("object"), 1):
            where = f"{xml_path}: object {number}"
            name = _name(item)
            corners = [_number(item.findtext(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax")]
            x1, y1, x2, y2 = (np.nan if corner is None else corner for corner in corners)
            is_difficult = (item.findtext("difficult") or "0").strip() == "1"
            if name not in category_id:
                report.drop("class that is not among the names", f"{where}: {name!r}")
            elif np.isnan([x1, y1, x2, y2]).any():
                report.drop("box without four numbers", f"{where}: {corners}")
            elif not (x2 > x1 and y2 > y1):
                # One pixel by the letter of the format, in truth a slip of the annotator's mouse.
                report.drop("box without area", f"{where}: {corners}")
            elif is_difficult and difficult == "drop":
                report.drop("difficult object", where)
            else:
                extra = {"difficult": 1} if is_difficult else {}
                writer.add_box(image_id, category_id[name], (x1 - 1, y1 - 1, x2, y2), size, where, extra)
    writer.write()
    return report


def convert_yolo(images: Path, labels: Path, names: Path, out: Path) -> ConversionReport:
    """YOLO's text files -> one COCO json.

    A row is ``class x y width height``, centre and size as shares of the image, or ``class x1 y1 x2 y2 x3 y3 …``,
    the corners of a polygon, of which the bounding box is taken. Class i gets category id i + 1. An image without a
    text file, or with an empty one, has no objects: that is how YOLO marks background.

    Args:
        images: folder of images, or of folders of them.
        labels: folder of text files with the same inner folders and stems.
        names: file with the class names, see ``read_class_names``.
        out: the json to write.

    Raises:
        FileNotFoundError: a folder or file is not there.
        UserError: there is nothing to convert.
    """
    _require_folder("images", images)
    _require_folder("labels", labels)
    class_names = read_class_names(names)
    files = _find_images(images)
    if not files:
        raise UserError(f"folder of images {images} has no image ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    report = ConversionReport(out=out)
    label_files = {path.relative_to(labels).with_suffix("") for path in labels.rglob("*.txt")}
    stems = {path.relative_to(images).with_suffix("") for path in files}
    if not label_files & stems:
        raise UserError(f"no text file in {labels} has the name of an image in {images} (a.jpg belongs to a.txt)")
    for stem in sorted(label_files - stems):
        report.drop("annotation without an image", f"{labels / stem}.txt")

    writer = _Writer(report, images, {name: number for number, name in enumerate(class_names, 1)})
    for image in tqdm(files, desc="images", unit="image", leave=False):
        _, size = _image_sizes(image, report)  # YOLO's own tools turn an image as its EXIF tag says
        if size is None:
            continue
        image_id = writer.add_image(image, size)
        path = (labels / image.relative_to(images)).with_suffix(".txt")
        rows = path.read_text().splitlines() if path.is_file() else []
        for line, row in enumerate(rows, 1):
            if not row.strip():
                continue
            where = f"{path}:{line}"
            shares = _yolo_corners(row)
            if shares is None:
                report.drop("row that is neither a box nor a polygon", f"{where}: {row[:60]!r}")
                continue
            label, corners = shares
            if not 0 <= label < len(class_names):
                report.drop("class that is not among the names", f"{where}: {label}")
                continue
            width, height = size
            box = (corners[0] * width, corners[1] * height, corners[2] * width, corners[3] * height)
            writer.add_box(image_id, label + 1, box, size, where, {})
    writer.write()
    return report


def read_class_names(path: Path) -> list[str]:
    """Class names from a text file with one a line, or from the ``names`` of an ultralytics data.yaml (a list, or a
    dict by number).

    Raises:
        FileNotFoundError: no such file.
        UserError: no names in it, a name twice, or numbers that are not 0 .. K-1.
    """
    _require_file("names", path)
    if path.suffix.lower() in (".yaml", ".yml"):
        try:
            names = msgspec.convert(msgspec.yaml.decode(path.read_bytes()), _Names).names
        except msgspec.MsgspecError as error:
            raise UserError(
                f"{path}: `names` (a list of class names, or a dict of them by number) is expected: {error}"
            ) from None
        if isinstance(names, dict):
            if sorted(names) != list(range(len(names))):
                raise UserError(
                    f"{path}: the numbers of `names` are {sorted(names)}; 0 .. {len(names) - 1} is expected"
                )
            names = [names[number] for number in range(len(names))]
        class_names = [str(name) for name in names]
    else:
        class_names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not class_names:
        raise UserError(f"{path}: no class name in it; one a line is expected")
    if twice := sorted({name for name in class_names if class_names.count(name) > 1}):
        raise UserError(f"{path}: class name {', '.join(twice)} stands there more than once")
    return class_names


class _Names(msgspec.Struct):
    names: list[str | int] | dict[int, str | int]


class _Writer:
    """Collects the records and writes the file."""

    def __init__(self, report: ConversionReport, image_dir: Path, category_id: dict[str, int]) -> None:
        self.report = report
        self.image_dir = image_dir
        self.category_id = category_id
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_image(self, path: Path, size: tuple[float, ...]) -> int:
        width, height = (int(side) for side in size)
        name = path.relative_to(self.image_dir).as_posix()
        self.images.append({"id": len(self.images) + 1, "file_name": name, "width": width, "height": height})
        return len(self.images)

    def add_box(
        self,
        image_id: int,
        category_id: int,
        box: tuple[float, float, float, float],
        size: tuple[float, ...],
        where: str,
        extra: dict[str, int],
    ) -> None:
        """Write xyxy corners in pixels, cut off at the image's edge."""
        x1, x2 = (min(max(x, 0.0), size[0]) for x in box[::2])
        y1, y2 = (min(max(y, 0.0), size[1]) for y in box[1::2])
        if not (x2 > x1 and y2 > y1):
            outside = box[2] > box[0] and box[3] > box[1]
            self.report.drop("box outside its image" if outside else "box without area", f"{where}: {_plain(box)}")
            return
        if max(x1 - box[0], y1 - box[1], box[2] - x2, box[3] - y2) > 1:
            self.report.note("box cut off at the edge of its image by more than a pixel", f"{where}: {_plain(box)}")
        width, height = x2 - x1, y2 - y1
        record = {
            "id": len(self.annotations) + 1,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": _plain((x1, y1, width, height)),
            "area": _plain((width * height,))[0],
            "iscrowd": 0,
        }
        self.annotations.append(record | extra)

    def write(self) -> None:
        """Write the json: whole or not at all."""
        report = self.report
        if not self.images:
            reasons = "; ".join(
                f"{len(records)} x {reason}, first {records[0]}" for reason, records in report.dropped.items()
            )
            raise UserError(f"{report.out} is not written: not one image is left to convert ({reasons})")
        report.num_images, report.num_boxes = len(self.images), len(self.annotations)
        report.num_empty = len(self.images) - len({record["image_id"] for record in self.annotations})
        report.class_names = tuple(self.category_id)
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": number, "name": name} for name, number in self.category_id.items()],
        }
        report.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=report.out.parent, suffix=".json", delete=False) as file:
            json.dump(content, file)
        os.chmod(file.name, 0o644)  # a temporary file can be read by its owner alone
        os.replace(file.name, report.out)


def _plain(numbers: Iterable[float]) -> list[float]:
    """Four decimals are a ten-thousandth of a pixel; whole numbers stay whole."""
    return [int(number) if number == int(number) else round(float(number), 4) for number in numbers]


def _name(item: ElementTree.Element) -> str:
    return (item.findtext("name") or "").strip()


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _yolo_corners(row: str) -> tuple[int, tuple[float, float, float, float]] | None:
    """The class and x1, y1, x2, y2 of a row, as shares of the image; nothing if it is no such row."""
    numbers = [_number(word) for word in row.split()]
    values = [number for number in numbers if number is not None]
    if len(values) < len(numbers) or len(values) < 5 or values[0] != int(values[0]):
        return None
    label, coordinates = int(values[0]), values[1:]
    if len(coordinates) == 4:
        x, y, width, height = coordinates
        return label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(coordinates) % 2 or len(coordinates) < 6:
        return None
    xs, ys = coordinates[::2], coordinates[1::2]
    return label, (min(xs), min(ys), max(xs), max(ys))


def _find_images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file())


def _image_sizes(path: Path, report: ConversionReport) -> tuple[tuple[int, int], tuple[int, int]] | tuple[None, None]:
    """(width, height) as the image lies in the file, and turned as its EXIF tag says; None if it does not decode."""
    try:
        with Image.open(path) as image:
            size, orientation = image.size, image.getexif().get(_EXIF_ORIENTATION, 1)
        # The header alone does not tell a whole image from a broken one. An eighth of it is decoded fast.
        decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, cv2.error) as error:
        report.drop("image that does not decode", f"{path}: {error}")
        return None, None
    if decoded is None:
        report.drop("image that does not decode", str(path))
        return None, None
    return size, size[::-1] if orientation >= 5 else size


def _require_folder(what: str, path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"folder of {what} {path} does not exist or is not a folder")


def _require_file(what: str, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"file of {what} {path} does not exist or is not a file")

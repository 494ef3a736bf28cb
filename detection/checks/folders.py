"""Folders of Pascal VOC and YOLO as they are, faults and all. What a row or an XML file means, the converters' functions say."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np

from backbones.errors import UserError
from detection.checks.findings import Finding
from detection.checks.split import Split
from detection.data.formats.voc import image_of, listed, object_name, stated_size
from detection.data.formats.writer import (
    ConversionReport,
    find_images,
    read_class_names,
    read_text,
    require_folder,
    to_number,
)
from detection.data.formats.yolo import corners_of_row, key_values


def read_voc(
    annotations: Path,
    images: Path,
    number: int,
    name: str,
    *,
    list_file: Path | None = None,
    names: Path | None = None,
) -> Split:
    """The split of a folder of Pascal VOC XML files; ids count from 1 in the order of the files.

    Args:
        annotations: folder of XML files.
        images: folder of images.
        number, name: of the split.
        list_file, names: as for ``convert_voc``.

    Raises:
        FileNotFoundError: a folder or file is not there.
        UserError: there is nothing to check.
    """
    require_folder("annotations", annotations)
    require_folder("images", images)
    xml_files = sorted(annotations.glob("*.xml"))
    if not xml_files:
        raise UserError(f"folder of annotations {annotations} has no .xml file")
    out = _Builder(number)
    roots: dict[str, ElementTree.Element] = {}
    for path in xml_files:
        try:
            roots[path.stem] = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            out.find("broken-record", f"{path}: {error}")
    report = ConversionReport(out=annotations)
    stems = list(roots) if list_file is None else listed(list_file, annotations, xml_files, roots, report)
    for records in report.dropped.values():
        for record in records:
            out.find("annotation-without-image", f"{record}: listed, without an annotation file")
    if names is None:
        items = (item for root in roots.values() for item in root.findall("object"))
        out.class_names = sorted(set(map(object_name, items)) - {""})
    else:
        out.class_names = read_class_names(names)
    with_stem: dict[str, list[Path]] = defaultdict(list)
    for path in find_images(images):
        with_stem[path.stem].append(path)
    for stem in stems:
        xml_path, root = annotations / f"{stem}.xml", roots[stem]
        image = image_of(root, xml_path, with_stem[stem], images, ConversionReport(out=annotations))
        if image is None:
            out.find("annotation-without-image", f"{xml_path}: no image {stem} in {images}")
            continue
        size = stated_size(root)
        position = out.add_image(image.relative_to(images).as_posix(), size)
        if size == (0, 0):
            stated = [root.findtext(f"size/{side}") for side in ("width", "height")]
            out.find("no-size-voc", f"{xml_path}: states width {stated[0]} and height {stated[1]}", position)
        for place, item in enumerate(root.findall("object"), 1):
            where = f"{xml_path}: object {place}"
            corners = [to_number(item.findtext(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax")]
            x1, y1, x2, y2 = (np.nan if corner is None else corner for corner in corners)
            # The last pixel belongs to the box; with x2 = x1 the converter takes it for a slip of the mouse all the same.
            xywh = (x1 - 1, y1 - 1, *(high - low + (1 if high > low else 0) for low, high in ((x1, x2), (y1, y2))))
            out.add_box(position, object_name(item), xywh, where)
    return out.split("voc", annotations, images, name)


def read_yolo(labels: Path, images: Path, names: Path, number: int, name: str) -> Split:
    """The split of a folder of YOLO text files; boxes are shares of their image until its size is known.

    Args:
        labels: folder of text files.
        images: folder of images.
        names: file with the class names.
        number, name: of the split.

    Raises:
        FileNotFoundError: a folder or file is not there.
        UserError: there is nothing to check.
    """
    require_folder("labels", labels)
    require_folder("images", images)
    out = _Builder(number)
    out.class_names = read_class_names(names)
    num_key_values = key_values(names)
    files = find_images(images)
    if not files:
        raise UserError(f"folder of images {images} has no image")
    stems = {path.relative_to(images).with_suffix("") for path in files}
    for path in sorted(labels.rglob("*.txt")):
        if path.relative_to(labels).with_suffix("") not in stems:
            out.find("annotation-without-image", f"{path}: no image of this name in {images}")
    for image in files:
        position = out.add_image(image.relative_to(images).as_posix(), (0, 0))
        path = (labels / image.relative_to(images)).with_suffix(".txt")
        try:
            rows = read_text("labels", path).splitlines() if path.is_file() else []
        except UserError as error:
            out.find("broken-record", str(error), position)
            continue
        for line, row in enumerate(rows, 1):
            if not row.strip():
                continue
            where = f"{path}:{line}"
            found = corners_of_row(row, num_key_values)
            if found is None:
                out.find("broken-record", f"{where}: {row[:60]!r} is neither a box nor a polygon", position)
                continue
            label, (x1, y1, x2, y2), _ = found
            class_name = out.class_names[label] if 0 <= label < len(out.class_names) else f"class {label}"
            out.add_box(position, class_name, (x1, y1, x2 - x1, y2 - y1), where)
    split = out.split("yolo", labels, images, name)
    split.shares = True
    return split


class _Builder:
    """Collects what a split is made of."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.class_names: list[str] = []
        self.file_names: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.images: list[int] = []
        self.labels: list[int] = []
        self.xywh: list[tuple[float, ...]] = []
        self.findings: list[Finding] = []

    def find(self, kind: str, message: str, image: int | None = None, record: int | None = None) -> None:
        self.findings.append(Finding(kind=kind, split=self.number, message=message, image=image, record=record))

    def add_image(self, file_name: str, size: tuple[int, int]) -> int:
        self.file_names.append(file_name)
        self.sizes.append(size)
        return len(self.file_names) - 1

    def add_box(self, image: int, class_name: str, xywh: tuple[float, ...], where: str) -> None:
        label = self.class_names.index(class_name) if class_name in self.class_names else -1
        if label < 0:
            self.find("unknown-category", f"{where}: {class_name!r} is not among the names", image, len(self.images))
        self.images.append(image)
        self.labels.append(label)
        self.xywh.append(xywh)

    def split(self, form: Literal["voc", "yolo"], path: Path, image_dir: Path, name: str) -> Split:
        num_images, num_boxes = len(self.file_names), len(self.images)
        return Split(
            number=self.number,
            name=name,
            path=path,
            image_dir=image_dir,
            form=form,
            image_ids=np.arange(1, num_images + 1),
            file_names=self.file_names,
            sizes=np.array(self.sizes, np.int64).reshape(-1, 2),
            exif=np.zeros(num_images, np.int8),
            annotation_ids=np.arange(1, num_boxes + 1),
            images=np.array(self.images, np.int64),
            labels=np.array(self.labels, np.int64),
            xywh=np.array(self.xywh, np.float64).reshape(-1, 4),
            crowd=np.zeros(num_boxes, np.bool_),
            places=np.arange(num_boxes),
            image_places=np.arange(num_images),
            category_ids=np.arange(1, len(self.class_names) + 1),
            class_names=tuple(self.class_names),
            findings=self.findings,
        )

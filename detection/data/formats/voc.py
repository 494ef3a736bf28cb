"""Pascal VOC's XML files to COCO json.

VOC numbers pixels from 1 and includes the last one; that ends here. What cannot be converted is left out, counted and named.
"""

from collections import defaultdict
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np

from backbones.errors import UserError
from detection.data.coco import Exif
from detection.data.formats.writer import (
    CocoWriter,
    ConversionReport,
    also,
    find_images,
    look_at,
    read_class_names,
    read_text,
    require_folder,
    to_number,
)
from detection.engine.progress import progress_bar
from detection.images.decode import Header


def convert_voc(
    annotations: Path,
    images: Path,
    out: Path,
    *,
    list_file: Path | None = None,
    names: Path | None = None,
    difficult: Literal["keep", "drop"] = "keep",
    exif: Literal["auto", "applied", "ignored"] = "auto",
) -> ConversionReport:
    """Pascal VOC's XML files -> one COCO json.

    The corners (x1, y1, x2, y2), counted from 1 with the last pixel included, become x1 - 1, y1 - 1, x2, y2, cut off
    at the image's edge. Classes are all that occur in *any* file of the folder, sorted by name, with ids from 1:
    the two halves of one dataset get the same ids even if a rare class is missing from one half's list.

    Args:
        annotations: folder of XML files, one an image.
        images: folder of images, or of folders of them; an image belongs to the XML file of the same stem. Of several, the
            one that the XML file's ``filename`` names is taken.
        out: the json to write.
        list_file: text file with the stems to take, one a line (VOC's ImageSets/Main); without it all XML files are
            taken.
        names: file with the class names in the order wanted, see ``read_class_names``; other classes are dropped.
        difficult: VOC's own evaluation leaves "difficult" objects out, COCO's knows no such thing. "keep" writes them
            as ordinary objects with ``"difficult": 1``, "drop" leaves them out.
        exif: where an image's EXIF tag turns it without changing its size, whether the boxes were drawn on the turned
            image ("applied") or on the stored pixels ("ignored"). "auto" takes what the sizes of the other images tell, if
            they agree, and else "applied", with a note. Where turning changes the size, the XML file's size tells.

    Raises:
        FileNotFoundError: a folder or file is not there.
        UserError: there is nothing to convert, or nothing of it is left.
    """
    require_folder("annotations", annotations)
    require_folder("images", images)
    xml_files = sorted(annotations.glob("*.xml"))
    if not xml_files:
        raise UserError(f"folder of annotations {annotations} has no .xml file")
    image_files = find_images(images)
    report = ConversionReport(out=out)
    roots: dict[str, ElementTree.Element] = {}
    for path in progress_bar(xml_files, desc="annotations", unit="file", leave=False):
        try:
            roots[path.stem] = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            report.drop("annotation file that cannot be read", f"{path}: {error}")

    stems = list(roots) if list_file is None else listed(list_file, annotations, xml_files, roots, report)
    if names is None:
        class_names = sorted(
            {name for root in roots.values() for item in root.findall("object") if (name := object_name(item))}
        )
    else:
        class_names = read_class_names(names)
    category_id = {name: number for number, name in enumerate(class_names, 1)}

    with_stem: dict[str, list[Path]] = defaultdict(list)
    for path in image_files:
        with_stem[path.stem].append(path)
    found: list[tuple[str, Path, Header]] = []
    for stem in progress_bar(stems, desc="images", unit="image", leave=False):
        image = image_of(roots[stem], annotations / f"{stem}.xml", with_stem[stem], images, report)
        if image is not None and (header := look_at(image, report)) is not None:
            found.append((stem, image, header))

    told = {_told_by_size(header, stated_size(roots[stem])) for stem, _, header in found} - {None}
    open_rule: Exif = exif if exif != "auto" else "ignored" if told == {"ignored"} else "applied"
    writer = CocoWriter(report, images, category_id)
    for stem, image, header in found:
        root, xml_path, stated = roots[stem], annotations / f"{stem}.xml", stated_size(roots[stem])
        rule: Exif | None = None
        if header.orientation != 1:
            rule = _told_by_size(header, stated) or open_rule
            if exif == "auto" and len(told) != 1 and header.size == header.shown_size:
                report.note("EXIF tag of which the size does not tell whether boxes heed it, taken as if", str(image))
        size = header.size if rule == "ignored" else header.shown_size
        if stated not in (size, (0, 0)):
            report.note(
                "image size taken from the image",
                f"{xml_path}: states {list(stated[::-1])}, the image has {list(size[::-1])}",
            )
        image_id = writer.add_image(image, size, rule)
        for number, item in enumerate(root.findall("object"), 1):
            where = f"{xml_path}: object {number}"
            name = object_name(item)
            corners = [to_number(item.findtext(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax")]
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
                writer.add_box(image_id, category_id[name], (x1 - 1, y1 - 1, x2, y2), where, extra)
    writer.write()
    return report


def listed(
    list_file: Path,
    annotations: Path,
    xml_files: list[Path],
    roots: dict[str, ElementTree.Element],
    report: ConversionReport,
) -> list[str]:
    """The stems of a list that have an annotation file."""
    # VOC's lists for one class have a second column; the stem is always the first word.
    lines = read_text("list", list_file).splitlines()
    wanted = list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
    existing = {path.stem for path in xml_files}
    for stem in wanted:
        if stem not in existing:
            report.drop("image of the list without an annotation file", f"{list_file}: {stem}")
    stems = [stem for stem in wanted if stem in roots]
    if not stems:
        raise UserError(f"{list_file}: none of its {len(wanted)} names is an annotation file in {annotations}")
    return stems


def image_of(
    root: ElementTree.Element, xml_path: Path, candidates: list[Path], folder: Path, report: ConversionReport
) -> Path | None:
    """The image that an annotation file speaks of."""
    if not candidates:
        report.drop("annotation without an image", f"{xml_path}: no image {xml_path.stem} in {folder}")
        return None
    named = [path for path in candidates if path.name == (root.findtext("filename") or "").strip()]
    if len(named) == 1:
        return named[0]
    chosen = (named or candidates)[0]
    if len(candidates) > 1:
        others = [path for path in candidates if path != chosen]
        report.note("one of several images of the same name taken", f"{xml_path}: {chosen}, not {also(others)}")
    return chosen


def stated_size(root: ElementTree.Element) -> tuple[int, int]:
    """(height, width) as the file says; zeros where it does not."""
    height, width = (int(to_number(root.findtext(f"size/{side}")) or 0) for side in ("height", "width"))
    return (height, width) if height and width else (0, 0)


def _told_by_size(header: Header, stated: tuple[int, int]) -> Exif | None:
    """Whether boxes heed the EXIF tag, where turning changes the image's size and the stated size is one of the two."""
    if header.size == header.shown_size:
        return None
    return "applied" if stated == header.shown_size else "ignored" if stated == header.size else None


def object_name(item: ElementTree.Element) -> str:
    return (item.findtext("name") or "").strip()

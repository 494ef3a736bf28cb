"""YOLO's text files to COCO json.

YOLO gives the centre and the size of a box as shares of the image; that ends here. What cannot be converted is left out,
counted and named.
"""

from collections import defaultdict
from pathlib import Path

import msgspec

from backbones.errors import UserError
from detection.data.formats.writer import (
    CocoWriter,
    ConversionReport,
    also,
    find_images,
    is_yaml,
    look_at,
    read_class_names,
    read_text,
    require_folder,
    to_number,
)
from detection.engine.progress import progress_bar
from detection.images.decode import IMAGE_SUFFIXES


def convert_yolo(images: Path, labels: Path, names: Path, out: Path) -> ConversionReport:
    """YOLO's text files -> one COCO json.

    A row is one of

    * ``class x y width height``, centre and size as shares of the image;
    * the same with a score behind it, as detectors write it: the box is taken;
    * the same with key points behind it, where ``names`` is a data.yaml that has a ``kpt_shape``: the box is taken;
    * ``class x1 y1 x2 y2 x3 y3 …``, the corners of a polygon, of which the bounding box is taken. Without a ``kpt_shape``
      every longer row of an odd number of values is read so, and the report says how many. Rows of an even number that fit
      key points of three values are no polygons: their box is taken.

    Class i gets category id i + 1. An image without a text file, or with an empty one, has no objects: that is how YOLO
    marks background. YOLO's own tools turn an image as its EXIF tag says, so the boxes count pixels of the turned image.

    Args:
        images: folder of images, or of folders of them.
        labels: folder of text files with the same inner folders and stems.
        names: file with the class names, see ``read_class_names``.
        out: the json to write.

    Raises:
        FileNotFoundError: a folder or file is not there.
        UserError: there is nothing to convert, or nothing of it is left.
    """
    require_folder("images", images)
    require_folder("labels", labels)
    class_names = read_class_names(names)
    num_key_values = key_values(names)
    files = find_images(images)
    if not files:
        raise UserError(f"folder of images {images} has no image ({', '.join(IMAGE_SUFFIXES)})")
    label_paths = sorted(labels.rglob("*.txt"))
    report = ConversionReport(out=out)
    by_stem: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        by_stem[path.relative_to(images).with_suffix("")].append(path)
    label_files = {path.relative_to(labels).with_suffix("") for path in label_paths}
    if not label_files & by_stem.keys():
        raise UserError(f"no text file in {labels} has the name of an image in {images} (a.jpg belongs to a.txt)")
    for stem in sorted(label_files - by_stem.keys()):
        report.drop("annotation without an image", f"{labels / stem}.txt")
    for stem in sorted(label_files & by_stem.keys()):
        if len(by_stem[stem]) > 1:
            report.note(
                "text file that several images share, taken for each", f"{labels / stem}.txt: {also(by_stem[stem])}"
            )

    writer = CocoWriter(report, images, {name: number for number, name in enumerate(class_names, 1)})
    for image in progress_bar(files, desc="images", unit="image", leave=False):
        header = look_at(image, report)
        if header is None:
            continue
        path = (labels / image.relative_to(images)).with_suffix(".txt")
        try:
            rows = read_text("labels", path).splitlines() if path.is_file() else []
        except UserError as error:
            report.drop("image whose text file is not UTF-8", str(error))
            continue
        height, width = header.shown_size
        image_id = writer.add_image(image, (height, width), None if header.orientation == 1 else "applied")
        for line, row in enumerate(rows, 1):
            if not row.strip():
                continue
            where = f"{path}:{line}"
            shares = corners_of_row(row, num_key_values)
            if shares is None:
                report.drop("row that is neither a box nor a polygon", f"{where}: {row[:60]!r}")
                continue
            label, (x1, y1, x2, y2), guess = shares
            if not 0 <= label < len(class_names):
                report.drop("class that is not among the names", f"{where}: {label}")
                continue
            if guess:
                report.note(guess, where)
            writer.add_box(image_id, label + 1, (x1 * width, y1 * height, x2 * width, y2 * height), where)
    writer.write()
    return report


def key_values(names: Path) -> int | None:
    """How many values of key points a row has behind its box, where a data.yaml tells (``kpt_shape``: points, values)."""
    if not is_yaml(names):
        return None
    shape = msgspec.yaml.decode(read_text("names", names)).get("kpt_shape")
    if shape is None:
        return None
    try:
        points, values = msgspec.convert(shape, tuple[int, int])
    except msgspec.ValidationError:
        points, values = 0, 0
    if points < 1 or values not in (2, 3):
        raise UserError(
            f"{names}: `kpt_shape` is {shape}; the number of key points, then 2 or 3 values each, is expected"
        )
    return points * values


def corners_of_row(row: str, num_key_values: int | None) -> tuple[int, tuple[float, float, float, float], str] | None:
    """The class and x1, y1, x2, y2 of a row, as shares of the image, and what was guessed; nothing if it is no such row.

    Args:
        row: the line.
        num_key_values: values of key points behind a box; None where nobody has told.
    """
    numbers = [to_number(word) for word in row.split()]
    values = [number for number in numbers if number is not None]
    if len(values) < len(numbers) or len(values) < 5 or values[0] != int(values[0]):
        return None
    label, coordinates = int(values[0]), values[1:]
    further, guess = len(coordinates) - 4, ""
    if num_key_values is None and further == 1:
        guess = "row read as a box with a score behind it"
    elif num_key_values is None and further and len(coordinates) % 2 and further % 3 == 0:
        guess = "row read as a box with key points, by its length"
    if not further or further == num_key_values or guess:
        x, y, width, height = coordinates[:4]
        return label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), guess
    if num_key_values is not None or len(coordinates) % 2:
        return None
    xs, ys = coordinates[::2], coordinates[1::2]
    guess = "row of more than five values read as a polygon (key points need kpt_shape in the data.yaml)"
    return label, (min(xs), min(ys), max(xs), max(ys)), guess

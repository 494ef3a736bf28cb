"""What the converters share: looking at images, writing the COCO json, the report of what became of every record."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from backbones.errors import UserError
from backbones.state import write_whole
from detection.data.coco import Exif
from detection.images.decode import IMAGE_SUFFIXES, EncodedImage, Header, UnreadableImageError

_NUM_NAMED = 5  # examples that the report names for each reason


@dataclass(kw_only=True, slots=True)
class ConversionReport:
    """What a conversion wrote, and what it left out.

    Attributes:
        out: the file that was written.
        num_images, num_boxes: how many records it has.
        num_empty: images without any box, kept as such.
        class_names: in the order of their category ids.
        dropped: the records that were left out, by reason; each as "file: what".
        notes: records that were written, but not as they stood there or not without a guess, by reason.
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


class CocoWriter:
    """Collects the records and writes the file.

    Args:
        report: what becomes of the records is counted here.
        image_dir: file names are written relative to it.
        category_id: id of each class name.
    """

    def __init__(self, report: ConversionReport, image_dir: Path, category_id: dict[str, int]) -> None:
        self.report = report
        self.image_dir = image_dir
        self.category_id = category_id
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_image(self, path: Path, size: tuple[int, int], exif: Exif | None = None) -> int:
        """Write an image of (height, width), as its boxes count it; the id that it got.

        Args:
            path: the file, below the image folder.
            size: (height, width).
            exif: whether the boxes count pixels of the image turned as its EXIF tag says; None where it has no such tag.
        """
        height, width = size
        name = path.relative_to(self.image_dir).as_posix()
        record: dict[str, Any] = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
        if exif is not None:
            record["exif_orientation"] = exif
        self.images.append(record)
        return len(self.images)

    def add_box(
        self,
        image_id: int,
        category_id: int,
        box: tuple[float, float, float, float],
        where: str,
        extra: dict[str, int] | None = None,
    ) -> None:
        """Write xyxy corners in pixels, cut off at the image's edge; without any area left they are dropped."""
        image = self.images[image_id - 1]
        x1, x2 = (min(max(x, 0.0), image["width"]) for x in box[::2])
        y1, y2 = (min(max(y, 0.0), image["height"]) for y in box[1::2])
        if not (x2 > x1 and y2 > y1):
            outside = box[2] > box[0] and box[3] > box[1]
            self.report.drop("box outside its image" if outside else "box without area", f"{where}: {plain(box)}")
            return
        if max(x1 - box[0], y1 - box[1], box[2] - x2, box[3] - y2) > 1:
            self.report.note("box cut off at the edge of its image by more than a pixel", f"{where}: {plain(box)}")
        width, height = x2 - x1, y2 - y1
        record = {
            "id": len(self.annotations) + 1,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": plain((x1, y1, width, height)),
            "area": plain((width * height,))[0],
            "iscrowd": 0,
        }
        self.annotations.append(record | (extra or {}))

    def write(self) -> None:
        """Write the json: whole or not at all.

        Raises:
            UserError: there is nothing that a detector could learn from: no image, or not one box.
            OSError: it cannot be written.
        """
        report = self.report
        for what, records in (("image", self.images), ("box", self.annotations)):
            if not records:
                reasons = "; ".join(
                    f"{len(dropped)} x {reason}, first {dropped[0]}" for reason, dropped in report.dropped.items()
                )
                raise UserError(
                    f"{report.out} is not written: not one {what} is left to convert ({reasons or 'there was none'})"
                )
        report.num_images, report.num_boxes = len(self.images), len(self.annotations)
        report.num_empty = len(self.images) - len({record["image_id"] for record in self.annotations})
        report.class_names = tuple(self.category_id)
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": number, "name": name} for name, number in self.category_id.items()],
        }
        write_whole(report.out, msgspec.json.encode(content))


def find_images(folder: Path) -> list[Path]:
    """The files below a folder that have an image's suffix, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def look_at(path: Path, report: ConversionReport) -> Header | None:
    """Size and orientation of an image that decodes; one that does not is dropped."""
    try:
        image = EncodedImage(path)
        image.decode(8)  # the header does not tell a whole image from a broken one
    except UnreadableImageError as error:
        report.drop("image that does not decode", str(error))
        return None
    return image.header


def read_text(what: str, path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: no such file.
        UserError: it is not UTF-8.
    """
    require_file(what, path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from None


def read_class_names(path: Path) -> list[str]:
    """Class names from a text file with one a line, or from the ``names`` of an ultralytics data.yaml (a list, or a
    dict by number).

    Raises:
        FileNotFoundError: no such file.
        UserError: no names in it, a name twice, or numbers that are not 0 .. K-1.
    """
    text = read_text("names", path)
    if is_yaml(path):
        try:
            names = msgspec.convert(msgspec.yaml.decode(text), _Names).names
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
        class_names = [line.strip() for line in text.splitlines() if line.strip()]
    if not class_names:
        raise UserError(f"{path}: no class name in it; one a line is expected")
    if twice := sorted({name for name in class_names if class_names.count(name) > 1}):
        raise UserError(f"{path}: class name {', '.join(twice)} stands there more than once")
    return class_names


class _Names(msgspec.Struct):
    names: list[str | int] | dict[int, str | int]


def is_yaml(path: Path) -> bool:
    return path.suffix.lower() in (".yaml", ".yml")


def plain(numbers: Iterable[float]) -> list[float]:
    """Four decimals are a ten-thousandth of a pixel; whole numbers stay whole."""
    return [int(number) if number == int(number) else round(float(number), 4) for number in numbers]


def to_number(text: str | None) -> float | None:
    """A finite number, or nothing."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def also(paths: Sequence[Path]) -> str:
    """Paths for a note, not too many."""
    return ", ".join(map(str, paths[:_NUM_NAMED])) + (", …" if len(paths) > _NUM_NAMED else "")


def require_folder(what: str, path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"folder of {what} {path} does not exist or is not a folder")


def require_file(what: str, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"file of {what} {path} does not exist or is not a file")

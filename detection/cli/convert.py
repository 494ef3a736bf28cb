"""Convert a dataset to COCO json.

$ litedet convert voc  --annotations DIR --images DIR [--list FILE] --out FILE.json
$ litedet convert yolo --images DIR --labels DIR --names FILE --out FILE.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from detection.cli.outputs import refuse_overwrites
from detection.engine.errors import main_errors

if TYPE_CHECKING:
    from detection.data.formats.writer import ConversionReport


@dataclass(kw_only=True, slots=True)
class Voc:
    """A folder of Pascal VOC XML files."""

    annotations: Path
    """Folder of XML files, one an image."""
    images: Path
    """Folder of the images; file names in the json are relative to it."""
    out: Path
    """The COCO json to write."""
    list: Path | None = None
    """Text file with the names of the images to take, without suffix, one a line (VOC's ImageSets/Main/*.txt)."""
    names: Path | None = None
    """File that fixes the classes and their order: one a line, or a data.yaml. Without it: every class that any XML
    file of the folder has, sorted by name."""
    difficult: Literal["keep", "drop"] = "keep"
    """What becomes of objects marked as difficult."""
    exif: Literal["auto", "applied", "ignored"] = "auto"
    """Whether boxes were drawn on images turned as their EXIF tag says (applied) or on the stored pixels (ignored), where
    the size does not tell. auto: as the sizes of the other images tell, if they agree; else applied, with a note."""


@dataclass(kw_only=True, slots=True)
class Yolo:
    """A folder of YOLO text files."""

    images: Path
    """Folder of the images; file names in the json are relative to it."""
    labels: Path
    """Folder of text files: images/a/b.jpg belongs to labels/a/b.txt."""
    names: Path
    """The class names in order: a text file with one a line, or a data.yaml. Its kpt_shape, if it has one, says how many
    values of key points each row has behind its box."""
    out: Path
    """The COCO json to write."""


Command = (
    Annotated[Voc, tyro.conf.subcommand("voc", prefix_name=False)]
    | Annotated[Yolo, tyro.conf.subcommand("yolo", prefix_name=False)]
)


@main_errors
def main(argv: Sequence[str] | None = None) -> ConversionReport:
    command: Voc | Yolo = tyro.cli(Command, args=argv, description=__doc__)
    read = {f"--{name}": getattr(command, name, None) for name in ("annotations", "images", "labels", "list", "names")}
    refuse_overwrites(read, {"--out": command.out})

    from detection.data.formats.voc import convert_voc  # here, because they load torch
    from detection.data.formats.yolo import convert_yolo

    if isinstance(command, Voc):
        report = convert_voc(
            command.annotations,
            command.images,
            command.out,
            list_file=command.list,
            names=command.names,
            difficult=command.difficult,
            exif=command.exif,
        )
    else:
        report = convert_yolo(command.images, command.labels, command.names, command.out)
    print(report)
    return report


if __name__ == "__main__":
    main()

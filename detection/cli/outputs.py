"""One check for all commands: what they write is nothing that they read."""

import os
from collections.abc import Mapping
from pathlib import Path

from backbones.errors import UserError
from detection.images.decode import IMAGE_SUFFIXES

# What lies in the folders that commands read: images, and the annotation files of VOC and YOLO.
_CONTENTS = (*IMAGE_SUFFIXES, ".txt", ".xml")


def refuse_overwrites(inputs: Mapping[str, str | Path | None], outputs: Mapping[str, Path | None]) -> None:
    """Refuse outputs that are an input or each other, under whatever name: symbolic and hard links, ``..``, ``./``.

    Call it before anything is written.

    Args:
        inputs: what the command reads, by the name of its argument (``--annotations``): files, folders, whose images, XML and
            text files are then inputs, or names that are neither (a camera, a published name). None is passed over.
        outputs: the files that it writes, in the same way.

    Raises:
        UserError: names both arguments and the file.
    """
    written = {argument: path for argument, path in outputs.items() if path is not None}
    for argument, path in written.items():
        if path.is_dir():
            raise UserError(f"{argument} {path} is a folder; give the name of a file")
        for source, read in inputs.items():
            if read is None:
                continue
            if _is_same(path, Path(read)):
                raise UserError(f"{argument} {path} is the file of {source}; it would be overwritten")
            if Path(read).is_dir() and (inside := _find_inside(path, Path(read))):
                raise UserError(f"{argument} {path} is the file {inside} of {source}; it would be overwritten")
    arguments = list(written)
    for number, first in enumerate(arguments):
        for second in arguments[number + 1 :]:
            if _is_same(written[first], written[second]):
                raise UserError(f"{first} and {second} are the same file, {written[second]}; give each its own")


def _is_same(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except (OSError, ValueError):  # not there (yet), or no file name at all
        return os.path.realpath(first) == os.path.realpath(second)


def _find_inside(path: Path, folder: Path) -> Path | None:
    """The image or annotation file of a folder that a path is, if it is one."""
    if not path.is_file():
        return None
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.suffix.lower() in _CONTENTS and root in real.parents:
        return real
    wanted = real.stat()
    if wanted.st_nlink == 1:
        return None
    for candidate in folder.rglob("*"):  # another name of the same file; seldom, so looked for only where there is one
        if candidate.suffix.lower() in _CONTENTS and candidate.is_file():
            found = candidate.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return candidate
    return None

"""What a user gives as datasets: which of the three forms each is, and what belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backbones.errors import UserError
from detection.checks.coco import read_coco
from detection.checks.folders import read_voc, read_yolo
from detection.checks.split import Split


def read_splits(
    paths: Sequence[Path],
    image_dirs: Sequence[Path] = (),
    *,
    names: Path | None = None,
    lists: Sequence[Path] = (),
) -> list[Split]:
    """The splits of a dataset.

    Args:
        paths: the training split first: each a COCO json, a folder of VOC's XML files, or a folder of YOLO's text files.
        image_dirs: a folder of images for each, or one for all; none where only the records of COCO files are looked at.
        names: class names of YOLO (a must) and VOC.
        lists: of VOC, a file with the stems to take for each path; with one path and several lists, a split for each list.

    Raises:
        FileNotFoundError: a file or folder is not there.
        UserError: what was given does not go together, or cannot be read at all.
    """
    paths = list(paths)
    if len(paths) == 1 and len(lists) > 1:
        paths = paths * len(lists)
    if lists and len(lists) != len(paths):
        raise UserError(f"--list has {len(lists)} files for {len(paths)} datasets; give one for each")
    if len(image_dirs) not in (0, 1, len(paths)):
        raise UserError(
            f"--images has {len(image_dirs)} folders for {len(paths)} datasets; give one for each, or one for all"
        )
    folders: list[Path | None] = [*image_dirs] or [None]
    folders = folders * (len(paths) // len(folders))
    for folder in folders:
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"image folder {folder} does not exist or is not a folder")
    split_names = _names([*lists] if lists else paths)
    splits = []
    for number, (path, folder, name) in enumerate(zip(paths, folders, split_names, strict=True)):
        if not path.is_dir():
            if lists:
                raise UserError(f"--list belongs to folders of Pascal VOC; {path} is none")
            splits.append(read_coco(path, folder, number, name))
            continue
        if folder is None:
            raise UserError(f"--images is missing: the folder of the images of {path}")
        if any(path.glob("*.xml")):
            list_file = lists[number] if lists else None
            splits.append(read_voc(path, folder, number, name, list_file=list_file, names=names))
        elif any(path.rglob("*.txt")):
            if names is None:
                raise UserError(
                    f"--names is missing: the class names of the YOLO files in {path} (a text file or data.yaml)"
                )
            splits.append(read_yolo(path, folder, names, number, name))
        else:
            raise UserError(f"{path} has neither XML files (Pascal VOC) nor text files (YOLO); or give a COCO json")
    return splits


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each split, as short as tells them apart: its stem, else with the folder, else with a number."""
    for names in ([path.stem for path in paths], [f"{path.absolute().parent.name}/{path.stem}" for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [f"{path.stem} {number}" for number, path in enumerate(paths, 1)]

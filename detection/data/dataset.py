"""The images and objects of a COCO file, one sample at a time.

Which pixels the boxes count
    A camera stores an image as its sensor lay, and notes in EXIF how to turn it; the boxes may have been drawn before or
    after. One rule, for training and evaluation alike: where turning changes the size, the size in the annotation file
    tells. Where it does not (mirrored, upside down, square images), the setting ``exif`` tells if it is not "auto", then
    the file's own word (``CocoIndex.exif``; our converters write it), and else the boxes count pixels of the image as it is
    shown: labelling tools draw on that, and so do people. A warning then says how many images were decided so. A
    ``Predictor`` has no annotations: it always takes the image as shown.

Which files are opened
    Names in an annotation file are relative to the image folder and stay below it: ".." and absolute names that lead
    elsewhere are refused, because the file may come from anywhere. Links in the folder are followed; who put them there
    wanted that.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from backbones.errors import UserError
from detection.data.augment import EvalTransform, TrainTransform
from detection.data.coco import EXIF, CocoIndex
from detection.images.decode import MAX_PIXELS, EncodedImage, Header, UnreadableImageError, read_header
from detection.structures import Sample

ExifRule = Literal["auto", "applied", "ignored"]
"""Where neither an image's size nor its file tells: "applied" and "auto" take the boxes as drawn on the image turned as its
EXIF tag says, "ignored" on the pixels as stored. "applied" and "ignored" also overrule what the file tells."""

_log = logging.getLogger(__name__)

_NUM_SUBSTITUTES = 20  # unreadable images in a row before a training sample gives up
_NUM_PROBES = 20  # files looked for before anything else is done
_NUM_HEADERS = 1000  # headers read to count the images whose EXIF tag nobody explains; 30 ms from the page cache
_HEADER_BYTES = 1 << 18  # two EXIF segments of the largest size, and more
_LIST_FROM = 16  # files of a folder from which on listing it beats asking for each


class SkippedSample(NamedTuple):
    """What stands in the place of an evaluation sample whose image cannot be read."""

    reason: str
    input_size: tuple[int, int]


class DetectionDataset(Dataset[Sample | SkippedSample]):
    """The images of an index, each through a transform.

    Its keys are (epoch, position): a worker process that lives through the whole training learns the epoch from the
    key.

    Args:
        index: what the annotation file says.
        image_dir: the folder that the file names of the index are relative to.
        transform: a ``TrainTransform`` draws samples with the objects that can be learnt from; an image that cannot
            be read is replaced by another one. An ``EvalTransform`` gives each image as it is, and a
            ``SkippedSample`` for an unreadable one.
        exif: which pixels the boxes count where the files leave it open.
        max_pixels: width times height above which an image counts as unreadable.

    Raises:
        FileNotFoundError: the folder is not there, or holds none of the first images that were looked for.
        UserError: there is nothing to train on, or a file name leads out of the folder.
    """

    def __init__(
        self,
        index: CocoIndex,
        image_dir: str | Path,
        transform: TrainTransform | EvalTransform,
        *,
        exif: ExifRule = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.index = index
        self.image_dir = Path(image_dir)
        self.transform = transform
        self.training = isinstance(transform, TrainTransform)
        self.max_pixels = max_pixels
        self._exif = index.exif if exif == "auto" else np.full(len(index), EXIF.index(exif), np.int8)
        if self.training:
            index.require_objects()
        _refuse_names_outside(index, self.image_dir)
        _require_images(index, self.image_dir)
        _warn_of_open_exif(index, self.image_dir, self._exif)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample | SkippedSample:
        """The sample of (epoch, position)."""
        epoch, position = key
        try:
            return self._sample(epoch, position, ())
        except UnreadableImageError as error:
            skipped = [str(error)]
        if not self.training:
            return SkippedSample(skipped[0], self.transform.input_size)
        substitutes = np.random.default_rng((epoch, position, len(self))).integers(len(self), size=_NUM_SUBSTITUTES)
        for substitute in substitutes.tolist():
            try:
                return self._sample(epoch, substitute, tuple(dict.fromkeys(skipped)))
            except UnreadableImageError as error:
                skipped.append(str(error))
        raise UnreadableImageError(f"{len(skipped)} images in a row cannot be read; the first: {skipped[0]}")

    def image(self, position: int) -> NDArray[np.uint8]:
        """The image at this position in the pixels that its boxes count: RGB uint8 [H, W, 3].

        Raises:
            UnreadableImageError: it cannot be read, or has not the size that the annotation file says.
        """
        image, turn = self._open(position)
        return image.decode(turn=turn)

    def _open(self, position: int) -> tuple[EncodedImage, bool]:
        """An image, and whether its boxes count pixels of it as shown."""
        image = EncodedImage(self.image_dir / self.index.file_name(position), self.max_pixels, watch=True)
        size, header = self.index.size(position), image.header
        turn = is_turned(header, size, int(self._exif[position]))
        (height, width) = actual = header.shown_size if turn else header.size
        if size != actual:
            raise UnreadableImageError(
                f"{image.path}: the image is {width}x{height} pixels, its annotation says {size[1]}x{size[0]}"
            )
        return image, turn

    def _sample(self, epoch: int, position: int, skipped: tuple[str, ...]) -> Sample:
        index = self.index
        size = index.size(position)
        image, turn = self._open(position)
        objects = index.objects(position, usable_only=True)
        boxes = objects.boxes.clip(0, np.array([size[1], size[0], size[1], size[0]], np.float32))
        placed = self.transform(partial(image.decode, turn=turn), size, boxes, objects.labels, epoch, position)
        return Sample(
            image=placed.image,
            boxes=placed.boxes,
            labels=placed.labels,
            image_id=int(index.image_ids[position]),
            original_size=size,
            placement=placed.placement,
            skipped=skipped,
            damaged=f"{image.path}: {image.damage}" if image.damage else "",
        )


def is_turned(header: Header, size: tuple[int, int], exif: int) -> bool:
    """Whether boxes that come with this (height, width) count pixels of the image as shown; ``exif`` as in ``CocoIndex``."""
    if header.size != header.shown_size and size in (header.size, header.shown_size):
        return size == header.shown_size
    return EXIF[exif] != "ignored"


def check_images(index: CocoIndex, image_dir: str | Path) -> list[str]:
    """The file names of an index that are no files in the folder, in the order of the index.

    Folders are listed rather than asked for each file: that takes a tenth of the time, and on a network drive less. Nothing
    is opened.

    Raises:
        FileNotFoundError: the image folder is not there.
        UserError: a file name leads out of the folder.
    """
    image_dir = Path(image_dir)
    _require_folder(image_dir)
    _refuse_names_outside(index, image_dir)
    return missing_files([index.file_name(position) for position in range(len(index))], image_dir)


def missing_files(names: Sequence[str], image_dir: str | Path) -> list[str]:
    """The names, relative to a folder, that are no files there, in their order. See ``check_images``."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_folder[os.path.dirname(name)].append(name)
    missing: set[str] = set()
    for folder, wanted in by_folder.items():
        path = os.path.join(image_dir, folder)
        if len(wanted) < _LIST_FROM:
            missing.update(name for name in wanted if not _is_file(os.path.join(image_dir, name)))
            continue
        try:
            with os.scandir(path) as entries:
                there = {entry.name for entry in entries if entry.is_file()}
        except OSError:
            there = set()
        # A file system that ignores case finds what its listing spells otherwise: who is not listed is asked for.
        unlisted = (name for name in wanted if os.path.basename(name) not in there)
        missing.update(name for name in unlisted if not (there and _is_file(os.path.join(image_dir, name))))
    return [name for name in names if name in missing] if missing else []


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a zero byte in the name
        return False


def _require_folder(image_dir: Path) -> None:
    if not image_dir.is_dir():
        raise FileNotFoundError(f"image folder {image_dir} does not exist or is not a folder")


def _require_images(index: CocoIndex, image_dir: Path) -> None:
    _require_folder(image_dir)
    probes = _spread(len(index), _NUM_PROBES)
    paths = [os.path.join(image_dir, index.file_name(position)) for position in probes]
    if paths and not any(map(_is_file, paths)):
        raise FileNotFoundError(
            f"image folder {image_dir} has none of {len(paths)} images of {index.path}; the first that was looked for is "
            f"{paths[0]}"
        )


def _refuse_names_outside(index: CocoIndex, image_dir: Path) -> None:
    joined = index.name_bytes.tobytes()
    first_bytes = index.name_bytes.take(index.name_offsets[:-1], mode="clip") if joined else index.name_bytes
    if os.name == "posix" and b".." not in joined and not (first_bytes == ord("/")).any():
        return  # the usual case, without a look at each name
    root = os.path.join(os.path.abspath(image_dir), "")
    outside = []
    for position in range(len(index)):
        name = index.file_name(position)
        path = os.path.join(root, name)
        if ".." in name.replace("\\", "/").split("/") or not os.path.abspath(path).startswith(root):
            outside.append(name)
    if outside:
        raise UserError(
            f"{index.path}: {len(outside)} file names lead out of the image folder {image_dir}, the first is "
            f"{outside[0]!r}; names are relative to the folder, without '..'"
        )


def _warn_of_open_exif(index: CocoIndex, image_dir: Path, exif: NDArray[np.int8]) -> None:
    """Say once how many images have an EXIF tag of which neither size nor file tells whether the boxes heed it."""
    has_boxes = np.diff(index.offsets) > 0
    asked = np.flatnonzero(has_boxes & (exif == 0))
    asked = asked[_spread(len(asked), _NUM_HEADERS)]
    num_open, first = 0, ""
    for position in asked.tolist():
        path = os.path.join(image_dir, index.file_name(position))
        try:
            with open(path, "rb", opener=_without_waiting) as file:
                header = read_header(file.read(_HEADER_BYTES), whole=False)
        except Exception:  # whoever decodes it will say what is wrong
            continue
        if header.orientation != 1 and header.size == header.shown_size:
            num_open += 1
            first = first or path
    if num_open:
        of = f"{len(asked)} images" + ("" if len(asked) == has_boxes.sum() else f" looked at (there are {len(index)})")
        _log.warning(
            "%s: %d of %s have an EXIF tag that turns them without changing their size, and the file does not say whether the "
            'boxes were drawn on the turned image, which is assumed; `exif` set to "ignored" takes the stored pixels. The '
            "first: %s",
            index.path,
            num_open,
            of,
            first,
        )


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer would wait


def _spread(num: int, most: int) -> list[int]:
    """Up to ``most`` of the numbers below ``num``, evenly spread."""
    return np.unique(np.linspace(0, num - 1, min(most, num)).astype(int)).tolist() if num else []

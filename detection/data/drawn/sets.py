"""Drawn images as datasets on the disk."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError
from backbones.state import write_whole
from detection.data.drawn.forms import CLASS_NAMES
from detection.data.drawn.images import SMALLEST_SIDE, draw_crop, draw_image

_Result = TypeVar("_Result")

_TRAIN, _VAL = range(2)  # streams of random numbers that never meet; the video's is in images.py


class DetectionSet(NamedTuple):
    """Where a drawn detection set lies: COCO json files and the folders of their images."""

    train_annotations: Path
    train_images: Path
    val_annotations: Path
    val_images: Path


def write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise OSError(f"{path}: the image could not be written (is the disk full, the folder read-only?)")


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < 2 * SMALLEST_SIDE + 8:
        raise UserError(
            f"size {size}: images need at least {2 * SMALLEST_SIDE + 8} pixels a side for objects of {SMALLEST_SIDE}"
        )


def _in_threads(work: Callable[[int], _Result], count: int) -> list[_Result]:
    # OpenCV and numpy let go of the interpreter lock while they draw.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(work, range(count)))


def _draw_split(
    annotations: Path, images: Path, num_images: int, size: tuple[int, int], stream: tuple[int, int]
) -> None:
    images.mkdir(parents=True, exist_ok=True)

    def draw(number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        image = draw_image(np.random.default_rng((*stream, number)), size)
        write_jpeg(images / f"{number:06d}.jpg", image.image)
        return image.boxes, image.labels

    records: list[dict[str, object]] = []
    for number, (boxes, labels) in enumerate(_in_threads(draw, num_images)):
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            width, height = x2 - x1, y2 - y1
            records.append(
                {
                    "id": len(records) + 1,
                    "image_id": number + 1,
                    "category_id": label + 1,
                    "bbox": [x1, y1, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    image_records = [
        {"id": number + 1, "file_name": f"{number:06d}.jpg", "height": size[0], "width": size[1]}
        for number in range(num_images)
    ]
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)]
    content = {"images": image_records, "annotations": records, "categories": categories}
    write_whole(annotations, msgspec.json.encode(content))


def draw_detection_set(
    out_dir: Path, num_train: int, num_val: int, size: tuple[int, int] = (320, 320), seed: int = 0
) -> DetectionSet:
    """Draws ``out_dir``/train.json, train/*.jpg, val.json and val/*.jpg.

    Args:
        out_dir: made if it is not there; files of the same names are replaced.
        num_train: number of images to train on.
        num_val: number of images to evaluate on; none of them is in the first part.
        size: (height, width) of every image.
        seed: the same seed gives the same files, byte for byte, with the same OpenCV and numpy.

    Raises:
        UserError: the size leaves no room for the smallest object.
        OSError: a file could not be written.
    """
    _check_size(size)
    found = DetectionSet(out_dir / "train.json", out_dir / "train", out_dir / "val.json", out_dir / "val")
    _draw_split(found.train_annotations, found.train_images, num_train, size, (seed, _TRAIN))
    _draw_split(found.val_annotations, found.val_images, num_val, size, (seed, _VAL))
    return found


def draw_classification_set(
    out_dir: Path, num_train: int, num_val: int, size: tuple[int, int] = (96, 96), seed: int = 0
) -> tuple[Path, Path]:
    """Draws ``out_dir``/train/CLASS/*.jpg and ``out_dir``/val/CLASS/*.jpg, torchvision's ImageFolder layout.

    Args:
        out_dir: made if it is not there; files of the same names are replaced.
        num_train: number of images of each class to train on.
        num_val: number of images of each class to evaluate on.
        size: (height, width) of every image.
        seed: the same seed gives the same files.

    Returns:
        The two folders.

    Raises:
        UserError: the size leaves no room for an object.
        OSError: a file could not be written.
    """
    _check_size(size)
    folders = out_dir / "train", out_dir / "val"
    for folder, num_images, stream in zip(folders, (num_train, num_val), (_TRAIN, _VAL), strict=True):
        for label, name in enumerate(CLASS_NAMES):
            class_dir = folder / name
            class_dir.mkdir(parents=True, exist_ok=True)

            def draw(number: int, label: int = label, class_dir: Path = class_dir, stream: int = stream) -> None:
                rng = np.random.default_rng((seed, stream, label, number))
                write_jpeg(class_dir / f"{number:06d}.jpg", draw_crop(rng, label, size))

            _in_threads(draw, num_images)
    return folders

"""Images that an export looks at: to calibrate eight-bit numbers, and to verify what it wrote."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError
from detection.images.decode import IMAGE_SUFFIXES, UnreadableImageError, read_image
from detection.images.place import place
from detection.models.detector import DetectorConfig


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder and the folders in it, by name.

    Raises:
        UserError: there are none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no images ({' '.join(IMAGE_SUFFIXES)})")
    return files


def spread(files: list[Path], count: int) -> list[Path]:
    """``count`` files at even distances; all of them where there are fewer."""
    places = np.unique(np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int))
    return [files[place] for place in places]


def network_inputs(files: list[Path], config: DetectorConfig) -> NDArray[np.uint8]:
    """Images as the network sees them: uint8 [B, 3, H, W]. Those that cannot be read are left out.

    Raises:
        UserError: none can be read.
    """
    placed = []
    for path in files:
        try:
            placed.append(place(read_image(path), config.input_size, config.resize, config.fill)[0])
        except UnreadableImageError:
            continue
    if not placed:
        raise UserError(f"none of {len(files)} images can be read; the first is {files[0]}")
    return np.ascontiguousarray(np.stack(placed).transpose(0, 3, 1, 2))

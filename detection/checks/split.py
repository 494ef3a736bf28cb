"""What an annotation file says, however faulty it is: the arrays that all checks look at.

``CocoIndex`` refuses a file that contradicts itself. Here everything is kept that can be read at all, and what cannot be is a
finding, so that a user sees every fault at once.

Letters in shapes: I images, N boxes (annotation records), K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detection.checks.findings import Finding


@dataclass(slots=True, kw_only=True, eq=False)
class Split:
    """One annotation file (or folder of them), as it is.

    Attributes:
        number: of the split among those that are checked; findings name it.
        name: for people.
        path: the annotation file or folder.
        image_dir: file names start here; None where no folder was given.
        form: how it was written.
        image_ids: int64 [I], as in the file; ids may occur twice.
        file_names: I names, relative to ``image_dir``.
        sizes: int64 [I, 2], (height, width) as recorded; 0 where that is missing or senseless.
        exif: int8 [I], as in ``CocoIndex``.
        annotation_ids: int64 [N].
        images: int64 [N], position of each record's image; -1 where the file lists no such image.
        labels: int64 [N], 0 .. K-1; -1 where the file has no such category.
        xywh: float64 [N, 4], left, top, width, height in pixels, as recorded; nan where a number is missing.
        crowd: bool [N].
        places: int64 [N], the place of each record in the list of the file (COCO), for whoever writes it again.
        image_places: int64 [I], the same of the images.
        category_ids: int64 [K], ascending.
        class_names: K names.
        findings: what was found while reading.
        shares: whether ``xywh`` are still shares of the image, as YOLO has them; ``take_sizes`` ends that.
    """

    number: int
    name: str
    path: Path
    image_dir: Path | None
    form: Literal["coco", "voc", "yolo"]
    image_ids: NDArray[np.int64]
    file_names: list[str]
    sizes: NDArray[np.int64]
    exif: NDArray[np.int8]
    annotation_ids: NDArray[np.int64]
    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    xywh: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    places: NDArray[np.int64]
    image_places: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    class_names: tuple[str, ...]
    findings: list[Finding] = field(default_factory=list)
    shares: bool = False

    def __len__(self) -> int:
        """The number of images."""
        return len(self.file_names)

    def image_path(self, position: int) -> Path:
        """The file of the image at this position; without an image folder, its name alone."""
        name = self.file_names[position]
        return Path(name) if self.image_dir is None else self.image_dir / name

    def take_sizes(self, sizes: NDArray[np.integer[Any]]) -> None:
        """Fills in sizes that were not recorded, and makes pixels of YOLO's shares.

        Args:
            sizes: [I, 2], (height, width) of the images as they are shown; 0 where unknown. Boxes that are shares of an image
                of unknown size are left out.
        """
        open_ = self.sizes[:, 0] == 0
        self.sizes[open_] = sizes[open_]
        if self.shares:
            self._keep(self.box_sizes()[:, 0] > 0)
            self.xywh = self.xywh * self.box_sizes()[:, [1, 0, 1, 0]]
            self.shares = False

    def _keep(self, records: NDArray[np.bool_]) -> None:
        for name in ("annotation_ids", "images", "labels", "xywh", "crowd", "places"):
            setattr(self, name, getattr(self, name)[records])
        new_row = np.cumsum(records) - 1
        self.findings = [
            one if one.record is None else replace(one, record=int(new_row[one.record]))
            for one in self.findings
            if one.record is None or records[one.record]
        ]

    def class_name(self, record: int) -> str:
        label = int(self.labels[record])
        return self.class_names[label] if label >= 0 else "?"

    def box_sizes(self) -> NDArray[np.int64]:
        """int64 [N, 2], (height, width) of each record's image; 0 where unknown."""
        if not len(self):
            return np.zeros((len(self.images), 2), np.int64)
        sizes = self.sizes[self.images]
        sizes[self.images < 0] = 0
        return sizes

    def usable(self) -> NDArray[np.bool_]:
        """bool [N], the records that training learns from: as ``CocoIndex.usable``, and with image and category."""
        (left, top, width, height), (rows, columns) = self.xywh.T, self.box_sizes().T
        with np.errstate(invalid="ignore"):
            inside = (left + width > 0) & (top + height > 0) & (left < columns) & (top < rows)
            good = (width > 0) & (height > 0) & inside & np.isfinite(self.xywh).all(axis=1)
        return good & ~self.crowd & (self.images >= 0) & (self.labels >= 0)

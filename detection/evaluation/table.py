"""All detections of a set of images as one table, and COCO's result files.

AP is computed from such a table, whoever made it: a detector just run, or a file that any tool wrote.

Letters in shapes: N detections.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from backbones.errors import UserError
from backbones.state import write_whole
from detection.data.coco import CocoIndex
from detection.structures import Detections

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DetectionTable:
    """Detections of many images, a row each, in any order.

    Attributes:
        image_ids: int64 [N], ids of the annotation file.
        boxes: float32 [N, 4], xyxy in pixels of the image on disk; float64 where a file was read, which keeps its digits.
        scores: float32 [N] in 0..1, or float64 as ``boxes``.
        labels: int64 [N], 0 .. K-1 as in the ``CocoIndex`` that the table goes with.
    """

    image_ids: NDArray[np.int64]
    boxes: NDArray[np.floating[Any]]
    scores: NDArray[np.floating[Any]]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        lengths = {len(self.image_ids), len(self.boxes), len(self.scores), len(self.labels)}
        if len(lengths) != 1 or self.boxes.shape[1:] != (4,):
            raise ValueError(
                f"a table has as many ids, boxes [N, 4], scores and labels; got {self.image_ids.shape}, "
                f"{self.boxes.shape}, {self.scores.shape} and {self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> DetectionTable:
        return cls(
            image_ids=np.empty(0, np.int64),
            boxes=np.empty((0, 4), np.float32),
            scores=np.empty(0, np.float32),
            labels=np.empty(0, np.int64),
        )

    @classmethod
    def of(cls, image_ids: Sequence[int], detections: Sequence[Detections]) -> DetectionTable:
        """What was found in each of B images, boxes in pixels of the image on disk."""
        if not detections:
            return cls.empty()
        found = [one.cpu() for one in detections]
        return cls(
            image_ids=np.repeat(np.array(image_ids, np.int64), [len(one) for one in found]),
            boxes=torch.cat([one.boxes for one in found]).reshape(-1, 4).float().numpy(),
            scores=torch.cat([one.scores for one in found]).float().numpy(),
            labels=torch.cat([one.labels for one in found]).long().numpy(),
        )

    @classmethod
    def concat(cls, tables: Sequence[DetectionTable]) -> DetectionTable:
        """The rows of all tables, one table after the other."""
        if not tables:
            return cls.empty()
        return cls(
            image_ids=np.concatenate([table.image_ids for table in tables]),
            boxes=np.concatenate([table.boxes for table in tables]),
            scores=np.concatenate([table.scores for table in tables]),
            labels=np.concatenate([table.labels for table in tables]),
        )

    def select(self, rows: NDArray[np.bool_] | NDArray[np.int64] | slice) -> DetectionTable:
        """Some rows: a mask [N], their numbers in the order wanted, or a slice."""
        return DetectionTable(
            image_ids=self.image_ids[rows], boxes=self.boxes[rows], scores=self.scores[rows], labels=self.labels[rows]
        )

    def sorted(self) -> DetectionTable:
        """Images in ascending order of their ids, the best detection of each first; equal scores keep their order."""
        return self.select(np.lexsort((-self.scores, self.image_ids)))

    def of_image(self, image_id: int, class_names: tuple[str, ...] = ()) -> Detections:
        """What was found in one image, best first."""
        found = self.select(np.flatnonzero(self.image_ids == image_id)).sorted()
        return Detections(
            boxes=torch.from_numpy(found.boxes.astype(np.float32)),
            scores=torch.from_numpy(found.scores.astype(np.float32)),
            labels=torch.from_numpy(found.labels.astype(np.int64)),
            class_names=class_names,
        )


_Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class CocoResult(msgspec.Struct, gc=False):
    """A record of a COCO result file; other fields (a segmentation, the names of tools) are skipped.

    ``bbox`` is left, top, width, height in pixels.
    """

    image_id: _Int64
    category_id: _Int64
    bbox: tuple[float, float, float, float]
    score: float


def write_coco_results(path: str | Path, index: CocoIndex, table: DetectionTable) -> int:
    """Write a table in COCO's result format, images in ascending order; returns the number of detections.

    A list of ``{"image_id", "category_id", "bbox": [left, top, width, height], "score"}`` with the category ids of
    ``index``. ``read_coco_results`` gives the same table again.

    Raises:
        OSError: the file cannot be written; what was there before stays.
    """
    table = table.select(np.argsort(table.image_ids, kind="stable"))
    write_json(path, coco_results(index.category_ids, table))
    return len(table)


def coco_results(category_ids: NDArray[np.int64], table: DetectionTable) -> list[CocoResult]:
    """The records of a table, in its order; ``category_ids`` int64 [K] is the id of each label."""
    rows = zip(
        table.image_ids.tolist(),
        category_ids[table.labels].tolist(),
        map(tuple, xyxy_to_xywh(table.boxes).tolist()),
        table.scores.tolist(),
        strict=True,
    )
    return [CocoResult(*row) for row in rows]


def read_coco_results(path: str | Path, index: CocoIndex) -> DetectionTable:
    """Read a COCO result file, as any tool writes it, in the order of the file.

    Args:
        path: a json list of ``{"image_id", "category_id", "bbox": [left, top, width, height], "score"}``; other fields are
            skipped.
        index: the annotation file that the ids are of. Detections of a category that it does not have cannot be right or
            wrong: they are left out with a warning, as pycocotools leaves them out.

    Raises:
        FileNotFoundError: no such file.
        UserError: not such a list, a number that is not finite, or an image id that the annotation file does not have.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"result file {path} {what}; a COCO result json is expected")
    try:
        results = msgspec.json.decode(path.read_bytes(), type=list[CocoResult])
    except msgspec.ValidationError as error:
        record = re.search(r" - at `\$\[(\d+)\]", str(error))
        where = f"record {record[1]}" if record else "the file"
        raise UserError(f"{path} is not a COCO result file, a list of detections: {where}: {error}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a json file: {error}") from None
    xywh = np.array([result.bbox for result in results], np.float64).reshape(-1, 4)
    table = DetectionTable(
        image_ids=np.array([result.image_id for result in results], np.int64),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        scores=np.array([result.score for result in results], np.float64),
        labels=_labels(np.array([result.category_id for result in results], np.int64), index),
    )
    for row in np.flatnonzero(~np.isfinite(xywh).all(1) | ~np.isfinite(table.scores))[:1]:
        raise UserError(f"{path}: record {row} has a number that is not finite")
    for row in np.flatnonzero(~np.isin(table.image_ids, index.image_ids))[:1]:
        raise UserError(
            f"{path}: record {row} names image_id {table.image_ids[row]}, which {index.path} does not have; are these the "
            "detections in other images?"
        )
    known = table.labels >= 0
    if not known.all():
        first = results[int(np.flatnonzero(~known)[0])].category_id
        _log.warning(
            "%s: %d of %d detections are of categories that %s does not have (the first: %d) and are left out",
            path,
            (~known).sum(),
            len(known),
            index.path,
            first,
        )
        table = table.select(known)
    return table


def _labels(category_ids: NDArray[np.int64], index: CocoIndex) -> NDArray[np.int64]:
    """The label of each category id [N], -1 where the index does not have it."""
    order = np.argsort(index.category_ids)
    places = order[np.searchsorted(index.category_ids, category_ids, sorter=order).clip(max=len(order) - 1)]
    return np.where(index.category_ids[places] == category_ids, places, -1)


def xyxy_to_xywh(boxes: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """xyxy [N, 4] -> COCO's left, top, width, height [N, 4]."""
    xyxy = boxes.astype(np.float64)
    return np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)


def write_json(path: str | Path, content: object) -> None:
    """Write json, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    write_whole(path, msgspec.json.encode(content))

"""COCO average precision of a table of detections.

The matching and counting is done by ``faster_coco_eval`` (C++) or by ``pycocotools``, the reference, which takes 12 times
as long. Both give the same figures; tests/test_evaluation.py holds them together.

Letters in shapes: I images, N boxes (ground truth or detections), K classes, T IoU thresholds, R recall levels,
S area ranges (all, small, medium, large), D limits on the number of detections (1, 10, 100).
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from backbones.errors import UserError
from detection.data.coco import CocoIndex
from detection.evaluation.table import DetectionTable, write_coco_results, xyxy_to_xywh
from detection.structures import Detections

Backend = Literal["faster", "pycocotools"]
IOU_THRESHOLDS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)

# How each figure is cut out of the arrays of precision or recall: (array, IoU threshold or all, area range, limit).
_FIGURES: dict[str, tuple[Literal["precision", "recall"], float | None, int, int]] = {
    "AP": ("precision", None, 0, 2),
    "AP50": ("precision", 0.50, 0, 2),
    "AP75": ("precision", 0.75, 0, 2),
    "AP_small": ("precision", None, 1, 2),
    "AP_medium": ("precision", None, 2, 2),
    "AP_large": ("precision", None, 3, 2),
    "AR1": ("recall", None, 0, 0),
    "AR10": ("recall", None, 0, 1),
    "AR100": ("recall", None, 0, 2),
    "AR_small": ("recall", None, 1, 2),
    "AR_medium": ("recall", None, 2, 2),
    "AR_large": ("recall", None, 3, 2),
}
FIGURES = tuple(_FIGURES)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        figures: the twelve COCO figures by the names in ``FIGURES``, each in 0..1; -1 where the ground truth has nothing that
            the figure could be taken of (``AP_small`` without a small object), as COCO has it.
        class_ap: AP of each evaluated class, None for a class without ground truth.
        class_counts: objects of each evaluated class in the ground truth, crowds not counted.
        num_images: images of the annotation file; all of them count.
        num_detections: detections that took part.
        unreadable: "path: reason" of every image that could not be read. Such an image counts as one in which nothing
            was found.
        precision: float64 [T, R, K, S], interpolated precision of each evaluated class at the 101 recall levels, at most 100
            detections; -1 for a class without ground truth of that size. COCO's ``eval["precision"][..., 2]``.
    """

    figures: dict[str, float]
    class_ap: dict[str, float | None]
    class_counts: dict[str, int]
    num_images: int
    num_detections: int
    unreadable: tuple[str, ...] = ()
    precision: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0, 0, 0)), compare=False, repr=False)

    def class_ap_of_size(self, area: int) -> dict[str, float | None]:
        """AP of each evaluated class over all (0), small (1), medium (2) or large (3) objects, None without such objects."""
        return {name: _mean(self.precision[:, :, k, area]) for k, name in enumerate(self.class_ap)}


class _Boxes(NamedTuple):
    """Ground truth or detections as both backends take them, grouped by image.

    Attributes:
        image_ids: int64 [N], ascending.
        xywh: float64 [N, 4].
        labels: int64 [N].
        areas: float64 [N].
        last: float64 [N]: ``iscrowd`` of ground truth, the score of a detection.
    """

    image_ids: NDArray[np.int64]
    xywh: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    last: NDArray[np.float64]

    @classmethod
    def of_index(cls, index: CocoIndex) -> _Boxes:
        """Every record of a file, in the order of the index."""
        image_ids = np.repeat(index.image_ids, np.diff(index.offsets))
        return cls(image_ids, index.xywh, index.labels, index.areas, index.crowd.astype(np.float64))

    @classmethod
    def of_table(cls, table: DetectionTable) -> _Boxes:
        """Every detection, in the order of the table."""
        xywh = xyxy_to_xywh(table.boxes)
        return cls(table.image_ids, xywh, table.labels, xywh[:, 2] * xywh[:, 3], table.scores.astype(np.float64))

    def rows(self, rows: NDArray[np.int64]) -> _Boxes:
        return _Boxes(self.image_ids[rows], self.xywh[rows], self.labels[rows], self.areas[rows], self.last[rows])

    def of_class(self, label: int) -> _Boxes:
        return self.rows(np.flatnonzero(self.labels == label))


def coco_ap(
    index: CocoIndex, table: DetectionTable, *, backend: Backend = "faster", classes: Sequence[str] | None = None
) -> EvaluationResult:
    """The COCO figures of a table over every image of an annotation file; one without detections counts as just that.

    Args:
        index: the ground truth. Its labels are those of the table; see ``CocoIndex.with_categories`` for a detector that
            learnt from another file. Crowds and areas count as COCO counts them.
        table: what was found, in any order.
        backend: who computes the figures; both give the same.
        classes: names of the classes to evaluate; None takes all. Others are left out of ground truth and detections.

    Raises:
        UserError: the file has no box that could be found, or a name in ``classes`` is unknown.
    """
    chosen = _choose(index, classes)
    truth, found = _ground_truth(index), _found(table, chosen.labels)
    precision, recall = [], []
    with _without_garbage_collection():
        # One class after the other gives the same arrays as all at once, and at any time only the records of one class exist
        # as the dicts that both libraries ask for.
        for label in chosen.labels.tolist():
            class_precision, class_recall = _count(backend, truth, found, label)
            precision.append(class_precision)
            recall.append(class_recall)
    return EvaluationResult(
        figures=_figures(np.stack(precision, 2), np.stack(recall, 1)),
        class_ap={name: _mean(p[..., 0, 2]) for name, p in zip(chosen.counts, precision, strict=True)},
        class_counts=chosen.counts,
        num_images=len(index),
        num_detections=len(found.labels),
        precision=np.stack(precision, 2)[..., 2],
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Matches:
    """Which detection COCO took for which annotation, at each IoU threshold.

    An annotation's *record* is its row in the arrays over N of the ``CocoIndex``, a detection's *row* that in the table.

    Attributes:
        iou_thresholds: float64 [T], 0.50, 0.55 ... 0.95.
        annotations: int64 [T, N], the record that each detection was matched with; -1 where it was matched with none.
        ignored: bool [T, N], true for a detection that counts neither as right nor as wrong: matched with a crowd, of a class
            that was not evaluated, or not among the best 100 of its class in its image. A detection that is not ignored is
            right where it has a record and wrong where it has none.
        detections: int64 [T, M], the row that found each annotation; -1 where none did. Of a crowd, which any number of
            detections may lie on, one of them.
        counted: bool [M], true for the annotations that count as objects to be found: no crowds, and of an evaluated class. A
            counted annotation without a row is missed.
    """

    iou_thresholds: NDArray[np.float64]
    annotations: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    detections: NDArray[np.int64]
    counted: NDArray[np.bool_]


def match_detections(index: CocoIndex, table: DetectionTable, classes: Sequence[str] | None = None) -> Matches:
    """The matches behind the figures of ``coco_ap`` (all areas), found by pycocotools and a dozen times slower.

    Args:
        index, table, classes: as for ``coco_ap``.

    Raises:
        UserError: see ``coco_ap``.
    """
    chosen = _choose(index, classes)
    T, N, M = len(IOU_THRESHOLDS), len(table), len(index.labels)
    annotations = np.full((T, N), -1, np.int64)
    detections = np.full((T, M), -1, np.int64)
    ignored = np.ones((T, N), np.bool_)
    counted = np.isin(index.labels, chosen.labels) & ~index.crowd
    # In the order in which coco_ap counts, so that equal scores are matched in the same order.
    records = np.flatnonzero(np.isin(index.labels, chosen.labels))
    rows = np.flatnonzero(np.isin(table.labels, chosen.labels))
    rows = rows[np.argsort(table.image_ids[rows], kind="stable")]
    truth = _Boxes.of_index(index).rows(records)
    found = _Boxes.of_table(table).rows(rows)
    with contextlib.redirect_stdout(io.StringIO()), _without_garbage_collection():
        evaluation = _evaluation(*_library("pycocotools"), truth, found, chosen.labels.tolist())
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    for image in evaluation.evalImgs:
        if image is None:
            continue
        # Ids in pycocotools are numbers from 1 in truth and found, 0 is no match.
        own_rows = rows[np.array(image["dtIds"], np.int64) - 1]
        own_records = records[np.array(image["gtIds"], np.int64) - 1]
        matched, finder = image["dtMatches"].astype(np.int64), image["gtMatches"].astype(np.int64)
        annotations[:, own_rows] = _pick(records, matched)
        detections[:, own_records] = _pick(rows, finder)
        ignored[:, own_rows] = image["dtIgnore"].astype(np.bool_)
    return Matches(
        iou_thresholds=IOU_THRESHOLDS.copy(),
        annotations=annotations,
        ignored=ignored,
        detections=detections,
        counted=counted,
    )


def _pick(places: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each number from 1 on, -1 for 0."""
    return np.concatenate([[-1], places])[numbers]


class CocoEvaluator:
    """Collects detections batch by batch, from several processes too, and gives the COCO figures at the end.

    Args:
        index, backend, classes: as for ``coco_ap``.

    Raises:
        UserError: the file has no box that could be found, or a name in ``classes`` is unknown.
    """

    def __init__(self, index: CocoIndex, backend: Backend = "faster", classes: Sequence[str] | None = None) -> None:
        self.index = index
        self.backend = backend
        self.class_counts = _choose(index, classes).counts
        self.class_names = tuple(self.class_counts)
        self._known = set(index.image_ids.tolist())
        self.reset()

    def reset(self) -> None:
        """Forget every detection."""
        self._seen: set[int] = set()
        self._unreadable: dict[str, None] = {}
        self._tables: list[DetectionTable] = []

    @property
    def table(self) -> DetectionTable:
        """All detections so far, of all classes, in the order they came."""
        self._tables = [DetectionTable.concat(self._tables)]
        return self._tables[0]

    def update(self, image_ids: Sequence[int] | Tensor, detections: Sequence[Detections]) -> None:
        """Take the detections of some images. An image that was there before keeps its first detections.

        Args:
            image_ids: B ids of the annotation file.
            detections: what was found in each, boxes in pixels of the image on disk.

        Raises:
            UserError: an id that the annotation file does not have, or more ids than detections.
        """
        ids = image_ids.tolist() if isinstance(image_ids, Tensor) else list(image_ids)
        if len(ids) != len(detections):
            raise UserError(f"{len(ids)} image ids came with the detections of {len(detections)} images")
        new = []
        for place, image_id in enumerate(ids):
            if image_id not in self._known:
                raise UserError(f"image id {image_id} is not in {self.index.path}")
            if image_id not in self._seen:
                self._seen.add(image_id)
                new.append(place)
        if new:
            self._tables.append(DetectionTable.of([ids[i] for i in new], [detections[i] for i in new]))

    def note_unreadable(self, reasons: Iterable[str]) -> None:
        """Name images that could not be read; they count as images in which nothing was found."""
        self._unreadable.update(dict.fromkeys(reasons))

    def merge_across_processes(self) -> None:
        """Bring all detections to process 0; every process has to call it. Each image counts once.

        Without a process group nothing happens. Afterwards ``compute`` is for process 0 alone.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        own = (sorted(self._seen), list(self._unreadable), self.table)
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, gathered)
        if gathered is None:
            return
        self.reset()
        for seen, unreadable, table in gathered:
            # A sampler that pads its share gives the same image to two processes: the first one's detections stand.
            new = set(seen) - self._seen
            self._tables.append(table.select(np.isin(table.image_ids, np.fromiter(new, np.int64, len(new)))))
            self._seen |= new
            self.note_unreadable(unreadable)

    def compute(self) -> EvaluationResult:
        """The figures over every image of the annotation file; an image without detections counts as just that."""
        result = coco_ap(self.index, self.table, backend=self.backend, classes=self.class_names)
        return replace(result, unreadable=tuple(self._unreadable))

    def write_coco_results(self, path: str | Path) -> int:
        """Write the detections of the evaluated classes in COCO's result format; returns their number."""
        table = self.table
        labels = [self.index.class_names.index(name) for name in self.class_names]
        return write_coco_results(path, self.index, table.select(np.isin(table.labels, labels)))


class _Chosen(NamedTuple):
    labels: NDArray[np.int64]  # of the classes to evaluate
    counts: dict[str, int]  # objects of each, crowds not counted, by name


def _choose(index: CocoIndex, classes: Sequence[str] | None) -> _Chosen:
    """The classes to evaluate, which must have something to find."""
    names = tuple(index.class_names if classes is None else dict.fromkeys(classes))
    unknown = [name for name in names if name not in index.class_names]
    if unknown or not names:
        raise UserError(
            f"no such class: {', '.join(map(repr, unknown)) or 'none was named'}; "
            f"the classes are {', '.join(map(repr, index.class_names))}"
        )
    labels = np.array([index.class_names.index(name) for name in names], np.int64)
    counts = np.bincount(index.labels[~index.crowd], minlength=index.num_classes)[labels]
    if not counts.any():
        which = f" of {', '.join(map(repr, names))}" if len(names) < index.num_classes else ""
        raise UserError(
            f"{index.path}: no ground truth to evaluate on: {len(index)} images, {len(index.labels)} annotations, and "
            f"not one box{which} that is not a crowd"
        )
    return _Chosen(labels, dict(zip(names, counts.tolist(), strict=True)))


def _ground_truth(index: CocoIndex) -> _Boxes:
    truth = _Boxes.of_index(index)
    return truth.rows(np.argsort(truth.image_ids, kind="stable"))


def _found(table: DetectionTable, labels: NDArray[np.int64]) -> _Boxes:
    rows = np.flatnonzero(np.isin(table.labels, labels))
    # Images come in ascending order however the work was shared: equal scores are counted in that order.
    rows = rows[np.argsort(table.image_ids[rows], kind="stable")]
    return _Boxes.of_table(table.select(rows))


# ------------------------------------------------------------------------------------------------------------- backends


def _library(backend: Backend) -> tuple[Any, Any]:
    """A backend's type of a COCO file, and its evaluation of two of them."""
    if backend == "faster":
        import faster_coco_eval
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster

        return faster_coco_eval.COCO, partial(COCOeval_faster, print_function=lambda *_: None)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _evaluation(coco_type: Any, evaluation_type: Any, truth: _Boxes, found: _Boxes, labels: list[int]) -> Any:
    """A library's evaluation of some classes, not yet run.

    Images with no box of the classes on either side add nothing to any sum and are not mentioned.
    """
    images = [{"id": image_id} for image_id in np.union1d(truth.image_ids, found.image_ids).tolist()]
    categories = [{"id": label + 1} for label in labels]
    sides = []
    for boxes, last in ((truth, "iscrowd"), (found, "score")):
        coco = coco_type()
        coco.dataset = {"images": images, "categories": categories, "annotations": _records(boxes, last)}  # type: ignore[arg-type]
        coco.createIndex()
        sides.append(coco)
    return evaluation_type(*sides, "bbox")


def _records(boxes: _Boxes, last: Literal["iscrowd", "score"]) -> list[dict[str, Any]]:
    """Boxes as the annotations of a COCO file.

    Annotations are numbered from 1 here, whatever their ids in the file: both libraries take a match with annotation 0 for
    no match.
    """
    kind = int if last == "iscrowd" else float
    rows = zip(
        boxes.image_ids.tolist(),
        (boxes.labels + 1).tolist(),
        boxes.xywh.tolist(),
        boxes.areas.tolist(),
        boxes.last.tolist(),
        strict=True,
    )
    return [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            "area": area,
            "iscrowd": 0,
            last: kind(value),
        }
        for number, (image_id, category_id, box, area, value) in enumerate(rows, 1)
    ]


def _count(
    backend: Backend, truth: _Boxes, found: _Boxes, label: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision [T, R, S, D] and recall [T, S, D] of one class, -1 where it has no ground truth."""
    coco_type, evaluation_type = _library(backend)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluation(coco_type, evaluation_type, truth.of_class(label), found.of_class(label), [label])
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def _figures(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> dict[str, float]:
    """Precision [T, R, K, S, D] and recall [T, K, S, D] -> the twelve figures, as COCO averages them."""
    figures = {}
    for name, (kind, threshold, area, limit) in _FIGURES.items():
        values = (precision if kind == "precision" else recall)[..., area, limit]
        mean = _mean(values if threshold is None else values[np.isclose(IOU_THRESHOLDS, threshold)])
        figures[name] = -1.0 if mean is None else mean
    return figures


def _mean(values: NDArray[np.float64]) -> float | None:
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else None


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Hundreds of thousands of small dicts are made and none is garbage before the end; the collector would walk over them again
    and again."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()

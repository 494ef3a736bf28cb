"""COCO average precision, and the loop that brings a detector to it.

The matching and counting is done by ``faster_coco_eval`` (C++) or by ``pycocotools``, the reference, which takes 12 times
as long. Both give the same figures; tests/test_evaluation.py holds them together.

Letters in shapes: I images, N boxes (ground truth or detections), K classes, T IoU thresholds, R recall levels,
S area ranges (all, small, medium, large), D limits on the number of detections (1, 10, 100).
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from backbones.errors import UserError
from detection.data.coco import CocoIndex
from detection.structures import Batch, Detections, RawPredictions

Backend = Literal["faster", "pycocotools"]

_log = logging.getLogger(__name__)

_NUM_NAMED = 10  # unreadable images that a warning names before it only counts

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
    """

    figures: dict[str, float]
    class_ap: dict[str, float | None]
    class_counts: dict[str, int]
    num_images: int
    num_detections: int
    unreadable: tuple[str, ...] = ()


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

    def rows(self, rows: NDArray[np.int64]) -> _Boxes:
        return _Boxes(self.image_ids[rows], self.xywh[rows], self.labels[rows], self.areas[rows], self.last[rows])

    def of_class(self, label: int) -> _Boxes:
        return self.rows(np.flatnonzero(self.labels == label))


class CocoEvaluator:
    """Takes detections batch by batch and gives the COCO figures at the end.

    Detections are kept as flat arrays, 36 bytes each.

    Args:
        index: the ground truth. Its labels are those of the detections; see ``CocoIndex.with_categories`` for a detector
            that learnt from another file. Crowds and areas count as COCO counts them.
        backend: who computes the figures.
        classes: names of the classes to evaluate; None takes all. Others are left out of ground truth and detections.

    Raises:
        UserError: the file has no box that could be found, or a name in ``classes`` is unknown.
    """

    def __init__(self, index: CocoIndex, backend: Backend = "faster", classes: Sequence[str] | None = None) -> None:
        self.index = index
        self.backend = backend
        self.class_names = tuple(index.class_names if classes is None else dict.fromkeys(classes))
        unknown = [name for name in self.class_names if name not in index.class_names]
        if unknown or not self.class_names:
            raise UserError(
                f"no such class: {', '.join(map(repr, unknown)) or 'none was named'}; "
                f"the classes are {', '.join(map(repr, index.class_names))}"
            )
        self._labels = np.array([index.class_names.index(name) for name in self.class_names], np.int64)
        counts = np.bincount(index.labels[~index.crowd], minlength=index.num_classes)[self._labels]
        self.class_counts = dict(zip(self.class_names, counts.tolist(), strict=True))
        if not counts.any():
            which = "" if classes is None else f" of {', '.join(map(repr, self.class_names))}"
            raise UserError(
                f"{index.path}: no ground truth to evaluate on: {len(index)} images, {len(index.labels)} annotations, and "
                f"not one box{which} that is not a crowd"
            )
        self._known = set(index.image_ids.tolist())
        self.reset()

    def reset(self) -> None:
        """Forget every detection."""
        self._seen: set[int] = set()
        self._unreadable: dict[str, None] = {}
        self._image_ids: list[NDArray[np.int64]] = []
        self._boxes: list[NDArray[np.float32]] = []
        self._scores: list[NDArray[np.float32]] = []
        self._label_arrays: list[NDArray[np.int64]] = []

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
        kept = []
        for image_id, found in zip(ids, detections, strict=True):
            if image_id not in self._known:
                raise UserError(f"image id {image_id} is not in {self.index.path}")
            if image_id not in self._seen:
                self._seen.add(image_id)
                kept.append((image_id, found))
        if not kept:
            return
        self._append(
            np.repeat(np.array([i for i, _ in kept], np.int64), [len(found) for _, found in kept]),
            torch.cat([found.boxes for _, found in kept]).reshape(-1, 4).float().cpu().numpy(),
            torch.cat([found.scores for _, found in kept]).float().cpu().numpy(),
            torch.cat([found.labels for _, found in kept]).long().cpu().numpy(),
        )

    def note_unreadable(self, reasons: Iterable[str]) -> None:
        """Name images that could not be read; they count as images in which nothing was found."""
        self._unreadable.update(dict.fromkeys(reasons))

    def merge_across_processes(self) -> None:
        """Bring all detections to process 0; every process has to call it. Each image counts once.

        Without a process group nothing happens. Afterwards ``compute`` is for process 0 alone.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        own = (sorted(self._seen), list(self._unreadable), *self._arrays())
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, gathered)
        if gathered is None:
            return
        self.reset()
        for seen, unreadable, image_ids, boxes, scores, labels in gathered:
            # A sampler that pads its share gives the same image to two processes: the first one's detections stand.
            new = set(seen) - self._seen
            rows = np.isin(image_ids, np.fromiter(new, np.int64, len(new)))
            self._append(image_ids[rows], boxes[rows], scores[rows], labels[rows])
            self._seen |= new
            self.note_unreadable(unreadable)

    def compute(self) -> EvaluationResult:
        """The figures over every image of the annotation file; an image without detections counts as just that."""
        truth, found = self._ground_truth(), self._detections()
        counts = _count_faster if self.backend == "faster" else _count_pycocotools
        precision, recall = [], []
        with _without_garbage_collection():
            # One class after the other gives the same arrays as all at once, and at any time only the records of one class
            # exist as the dicts that both libraries ask for.
            for label in self._labels.tolist():
                class_precision, class_recall = counts(truth.of_class(label), found.of_class(label))
                precision.append(class_precision)
                recall.append(class_recall)
        return EvaluationResult(
            figures=_figures(np.stack(precision, 2), np.stack(recall, 1)),
            class_ap={name: _mean(p[..., 0, 2]) for name, p in zip(self.class_names, precision, strict=True)},
            class_counts=self.class_counts,
            num_images=len(self.index),
            num_detections=len(found.labels),
            unreadable=tuple(self._unreadable),
        )

    def write_coco_results(self, path: str | Path) -> int:
        """Write the detections of the evaluated classes in COCO's result format; returns their number.

        A list of ``{"image_id", "category_id", "bbox": [left, top, width, height], "score"}`` with the category ids of the
        annotation file.
        """
        found = self._detections()
        category_ids = self.index.category_ids[found.labels].tolist()
        rows = zip(found.image_ids.tolist(), category_ids, found.xywh.tolist(), found.last.tolist(), strict=True)
        write_json(path, [_Result(image_id, category, box, score) for image_id, category, box, score in rows])
        return len(category_ids)

    def _append(
        self,
        image_ids: NDArray[np.int64],
        boxes: NDArray[np.float32],
        scores: NDArray[np.float32],
        labels: NDArray[np.int64],
    ) -> None:
        self._image_ids.append(image_ids)
        self._boxes.append(boxes)
        self._scores.append(scores)
        self._label_arrays.append(labels)

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        empty = (np.empty(0, np.int64), np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, np.int64))
        held: list[list[NDArray[Any]]] = [self._image_ids, self._boxes, self._scores, self._label_arrays]
        return tuple(np.concatenate([first, *rest]) for first, rest in zip(empty, held, strict=True))

    def _ground_truth(self) -> _Boxes:
        index = self.index
        image_ids = np.repeat(index.image_ids, np.diff(index.offsets))
        truth = _Boxes(image_ids, index.xywh, index.labels, index.areas, index.crowd.astype(np.float64))
        return truth.rows(np.argsort(image_ids, kind="stable"))

    def _detections(self) -> _Boxes:
        image_ids, boxes, scores, labels = self._arrays()
        rows = np.flatnonzero(np.isin(labels, self._labels))
        # Images come in ascending order however the work was shared: equal scores are counted in that order.
        rows = rows[np.argsort(image_ids[rows], kind="stable")]
        xyxy = boxes[rows].astype(np.float64)
        xywh = np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)
        return _Boxes(image_ids[rows], xywh, labels[rows], xywh[:, 2] * xywh[:, 3], scores[rows].astype(np.float64))


def only_classes(index: CocoIndex, names: Sequence[str]) -> CocoIndex:
    """The same file without the records of all other classes; images, labels and categories stay.

    Raises:
        UserError: the file has no class of one of these names.
    """
    unknown = [name for name in names if name not in index.class_names]
    if unknown:
        raise UserError(
            f"{index.path} has no class {', '.join(map(repr, unknown))}; it has {', '.join(map(repr, index.class_names))}"
        )
    kept = np.isin(index.labels, [index.class_names.index(name) for name in names])
    per_record = {
        name: getattr(index, name)[kept] for name in ("xywh", "labels", "areas", "crowd", "usable", "annotation_ids")
    }
    return replace(index, offsets=np.concatenate([[0], np.cumsum(kept)])[index.offsets], **per_record)


class _Result(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: list[float]
    score: float


def write_json(path: str | Path, content: object) -> None:
    """Write json, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(msgspec.json.encode(content))
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTiming:
    """Where the time of ``evaluate`` went, in milliseconds per image of this process.

    Attributes:
        network: from the batch on the device to raw predictions.
        postprocess: from raw predictions to detections on the host.
        wait: waiting for the loader, the copy to the device included.
    """

    network: float
    postprocess: float
    wait: float


def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    postprocess: Callable[[RawPredictions, Tensor, Tensor], list[Detections]],
    evaluator: CocoEvaluator,
    device: torch.device,
    amp: Literal["off", "bf16", "fp16"] = "off",
) -> EvaluationTiming:
    """Hand everything that a detector finds in the images of a loader to an evaluator.

    The network runs in evaluation mode and is left in the mode it came in. In a run of several processes each goes through
    its own share; ``evaluator.merge_across_processes()`` comes after.

    Args:
        model: images [B, 3, H, W] -> RawPredictions, on ``device``.
        loader: batches with ``placements``, as an ``EvalTransform`` makes them.
        postprocess: see ``detection.postprocess.Postprocess``.
        evaluator: takes the detections, and the names of images that could not be read.
        device: where ``model`` is.
        amp: number format of the network's convolutions; "off" is float32.
    """
    autocast = torch.autocast(
        device.type, dtype=torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off"
    )
    num_images, network, post, wait = 0, 0.0, 0.0, 0.0
    unreadable: list[str] = []
    was_training = model.training
    model.eval()
    bar = tqdm(
        loader, desc="evaluation", unit="batch", leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty()
    )
    try:
        start = time.perf_counter()
        for batch in bar:
            unreadable += batch.skipped
            if not len(batch):
                continue
            batch = batch.to(device, non_blocking=True)
            arrived = _now(device)
            with torch.inference_mode():
                with autocast:
                    raw = model(batch.images)
                predicted = _now(device)
                detections = postprocess(raw, batch.placements, batch.original_sizes)
                evaluator.update(batch.image_ids, detections)
            done = time.perf_counter()
            wait, network, post = wait + arrived - start, network + predicted - arrived, post + done - predicted
            num_images += len(batch)
            start = done
    finally:
        bar.close()
        model.train(was_training)
    for reason in unreadable[:_NUM_NAMED]:
        _log.warning("cannot be read, counts as an image in which nothing was found: %s", reason)
    if len(unreadable) > _NUM_NAMED:
        _log.warning("... and %d more", len(unreadable) - _NUM_NAMED)
    evaluator.note_unreadable(unreadable)
    per_image = 1000 / max(num_images, 1)
    return EvaluationTiming(network=network * per_image, postprocess=post * per_image, wait=wait * per_image)


def _now(device: torch.device) -> float:
    """The time when everything asked of the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ------------------------------------------------------------------------------------------------------------- backends


def _records(boxes: _Boxes, last: Literal["iscrowd", "score"]) -> dict[str, Any]:
    """The boxes of one class as a COCO file's dict.

    Annotations are numbered from 1 here, whatever their ids in the file: both libraries take a match with annotation 0 for
    no match. Images with no box of the class on either side add nothing to any sum and are not mentioned.
    """
    kind = int if last == "iscrowd" else float
    rows = zip(boxes.image_ids.tolist(), boxes.xywh.tolist(), boxes.areas.tolist(), boxes.last.tolist(), strict=True)
    return {
        "categories": [{"id": 1}],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": 1,
                "bbox": box,
                "area": area,
                "iscrowd": 0,
                last: kind(value),
            }
            for number, (image_id, box, area, value) in enumerate(rows, 1)
        ],
    }


def _count_faster(truth: _Boxes, found: _Boxes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision [T, R, S, D] and recall [T, S, D] of one class, -1 where it has no ground truth."""
    from faster_coco_eval import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    return _count(COCO, partial(COCOeval_faster, print_function=lambda *_: None), truth, found)


def _count_pycocotools(truth: _Boxes, found: _Boxes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As ``_count_faster``."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return _count(COCO, COCOeval, truth, found)


def _count(
    coco_type: Any, evaluation_type: Any, truth: _Boxes, found: _Boxes
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    images = [{"id": image_id} for image_id in np.union1d(truth.image_ids, found.image_ids).tolist()]
    sides = []
    with contextlib.redirect_stdout(io.StringIO()):
        for boxes, last in ((truth, "iscrowd"), (found, "score")):
            coco = coco_type()
            coco.dataset = {"images": images, **_records(boxes, last)}  # type: ignore[arg-type]
            coco.createIndex()
            sides.append(coco)
        evaluation = evaluation_type(*sides, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def _figures(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> dict[str, float]:
    """Precision [T, R, K, S, D] and recall [T, K, S, D] -> the twelve figures, as COCO averages them."""
    thresholds = np.linspace(0.5, 0.95, 10)
    figures = {}
    for name, (kind, threshold, area, limit) in _FIGURES.items():
        values = (precision if kind == "precision" else recall)[..., area, limit]
        mean = _mean(values if threshold is None else values[np.isclose(thresholds, threshold)])
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

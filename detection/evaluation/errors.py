"""Which mistakes a detector makes, what each kind costs, and from which score on to believe it.

All of it is read from a ``DetectionTable`` and a ``CocoIndex``, whoever made the detections, with COCO's own matches.

Letters in shapes: N detections, M annotations, K classes, I images, T IoU thresholds, R the 101 recall levels, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detection.data.coco import CocoIndex
from detection.evaluation.coco_ap import IOU_THRESHOLDS, Matches, match_detections
from detection.evaluation.table import DetectionTable

RECALLS: NDArray[np.float64] = np.linspace(0, 1, 101)
FOREGROUND, BACKGROUND = 0.5, 0.1  # TIDE's IoU thresholds
WORTH = 0.1  # F1 below which no threshold of a class is worth having
ErrorKind = Literal["class", "localisation", "both", "duplicate", "background", "missed"]
KINDS: tuple[ErrorKind, ...] = ("class", "localisation", "both", "duplicate", "background", "missed")
_CELLS = 20_000_000  # of the largest array in a bootstrap


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Outcomes:
    """A table of detections beside the truth, in the order in which COCO counts.

    Attributes:
        index: the truth.
        table: the detections, best score first; equal scores by image id, then as they came.
        positions: int64 [N], the place in the index of each detection's image.
        matches: COCO's, for the rows of ``table``.
    """

    index: CocoIndex
    table: DetectionTable
    positions: NDArray[np.int64]
    matches: Matches

    @classmethod
    def of(cls, index: CocoIndex, table: DetectionTable, classes: tuple[str, ...] | None = None) -> Outcomes:
        """Match a table, in any order, with the truth.

        Raises:
            UserError: the file has no box that could be found, or a name in ``classes`` is unknown.
        """
        table = table.select(np.argsort(table.image_ids, kind="stable"))
        table = table.select(np.argsort(-table.scores, kind="stable"))
        order = np.argsort(index.image_ids, kind="stable")
        positions = (
            order[np.searchsorted(index.image_ids, table.image_ids, sorter=order)]
            if len(table)
            else np.empty(0, np.int64)
        )
        return cls(index=index, table=table, positions=positions, matches=match_detections(index, table, classes))

    @property
    def right(self) -> NDArray[np.bool_]:
        """bool [T, N]: found an object that was to be found."""
        return (self.matches.annotations >= 0) & ~self.matches.ignored

    @property
    def num_objects(self) -> NDArray[np.int64]:
        """int64 [K]: objects to be found of each class."""
        return np.bincount(self.index.labels[self.matches.counted], minlength=self.index.num_classes)


def precision_at(right: NDArray[np.bool_], weights: NDArray[Any], num_objects: NDArray[Any]) -> NDArray[np.float64]:
    """COCO's interpolated precision of one class at the 101 levels of recall.

    Args:
        right: bool [N], detections best first, those that are ignored left out.
        weights: [B, N], how often each counts (1 throughout for the plain figure).
        num_objects: [B], objects to be found.

    Returns:
        float64 [B, R]; NaN in rows without an object.
    """
    B, N = weights.shape
    result = np.zeros((B, len(RECALLS)))
    if N:
        hits = np.cumsum(weights * right, axis=1, dtype=np.float64)
        precision = hits / np.maximum(np.cumsum(weights, axis=1, dtype=np.float64), np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = hits / np.maximum(num_objects, 1)[:, None]
        for row in range(B):
            places = np.searchsorted(recall[row], RECALLS, side="left")
            reached = places < N
            result[row, reached] = precision[row, places[reached]]
    result[np.asarray(num_objects) == 0] = np.nan
    return result


def _ap50(right: NDArray[np.bool_], labels: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    """Mean AP over the classes with objects, of detections best first."""
    values = []
    for label in np.flatnonzero(counts > 0).tolist():
        own = right[labels == label]
        values.append(precision_at(own, np.ones((1, len(own))), counts[label : label + 1]).mean())
    return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ErrorSplit:
    """The errors of TIDE (Bolya et al., arXiv 2008.08115) at IoU 0.5.

    Attributes:
        kinds: int64 [N], the place in ``KINDS`` of each detection that is wrong; -1 for one that is right or ignored.
        partners: int64 [N], the annotation that a class, localisation or duplicate error is about; -1 without one.
        missed: bool [M], objects that nothing found, not even an error of class or localisation.
        counts: number of errors of each kind.
        costs: AP50 that would be gained by mending all errors of this kind and no other.
        ap50: AP50 as it is.
    """

    kinds: NDArray[np.int64]
    partners: NDArray[np.int64]
    missed: NDArray[np.bool_]
    counts: dict[ErrorKind, int]
    costs: dict[ErrorKind, float]
    ap50: float


def split_errors(outcomes: Outcomes) -> ErrorSplit:
    """Name each wrong detection and missed object, and what each kind costs.

    A wrong detection is, in this order: *localisation* if it lies at IoU 0.1..0.5 on an object of its class; *class* if at
    0.5 or more on one of another class; *duplicate* if at 0.5 or more on one of its own, which a better one found;
    *background* if below 0.1 on everything; else *both* (class and place). An object is *missed* if it is not found and no
    class or localisation error is about it. Crowds are no objects.

    Mending: the best class or localisation error about an object that is not found becomes right, the others of that kind
    go; duplicate, background and both go; missed objects need not be found, and a
    class of which none is left to find leaves the mean (AP50 is 1 if all do).
    """
    index, table, matches = outcomes.index, outcomes.table, outcomes.matches
    right, ignored = outcomes.right[0], matches.ignored[0]
    kinds, partners = np.full(len(table), -1, np.int64), np.full(len(table), -1, np.int64)
    for rows, records in _by_image(outcomes):
        rows = rows[~right[rows] & ~ignored[rows]]
        records = records[matches.counted[records]]
        if not len(rows):
            continue
        overlaps = iou(table.boxes[rows], _truth_boxes(index, records))
        same = table.labels[rows][:, None] == index.labels[records][None]
        own, own_place = _best(np.where(same, overlaps, 0))
        other, other_place = _best(np.where(same, 0, overlaps))
        choices = [
            (own >= BACKGROUND) & (own < FOREGROUND),
            other >= FOREGROUND,
            own >= FOREGROUND,
            np.maximum(own, other) < BACKGROUND,
        ]
        numbers = [KINDS.index(kind) for kind in ("localisation", "class", "duplicate", "background")]
        kinds[rows] = np.select(choices, numbers, KINDS.index("both"))
        if len(records):
            partners[rows] = np.select(choices[:3], [records[own_place], records[other_place], records[own_place]], -1)
    is_found = matches.detections[0] >= 0
    missed = matches.counted & ~is_found
    nearly = np.isin(kinds, [KINDS.index("class"), KINDS.index("localisation")])
    missed[partners[nearly]] = False

    labels, counts = table.labels, outcomes.num_objects
    counting = ~ignored
    ap50 = _ap50(right[counting], labels[counting], counts)
    costs: dict[ErrorKind, float] = {}
    for number, kind in enumerate(KINDS):
        mended, mended_labels, kept, objects = right.copy(), labels.copy(), counting.copy(), counts
        if kind == "missed":
            objects = counts - np.bincount(index.labels[missed], minlength=len(counts))
        rows = np.flatnonzero(kinds == number)
        kept[rows] = False
        if kind in ("class", "localisation"):
            open_rows = rows[~is_found[partners[rows]]]
            _, first = np.unique(partners[open_rows], return_index=True)  # rows are best first
            saved = open_rows[first]
            kept[saved], mended[saved], mended_labels[saved] = True, True, index.labels[partners[saved]]
        after = _ap50(mended[kept], mended_labels[kept], objects)
        costs[kind] = (after if objects.any() else 1.0) - ap50
    numbers_of = {kind: int((kinds == number).sum()) for number, kind in enumerate(KINDS)} | {
        "missed": int(missed.sum())
    }
    return ErrorSplit(kinds=kinds, partners=partners, missed=missed, counts=numbers_of, costs=costs, ap50=ap50)


def shown_errors(outcomes: Outcomes, split: ErrorSplit, thresholds: NDArray[np.float64]) -> dict[ErrorKind, int]:
    """The errors that a user sees who looks at detections from a score on: those of each kind, as ``split_errors`` has it.

    An object that only weaker detections find is missed then, and a weaker error of class or place is about none.

    Args:
        split: of the same outcomes.
        thresholds: float64 [K], of each class.
    """
    table, matches = outcomes.table, outcomes.matches
    shown = table.scores >= thresholds[table.labels]
    kinds = np.where(shown, split.kinds, -1)
    counts: dict[ErrorKind, int] = {kind: int((kinds == number).sum()) for number, kind in enumerate(KINDS)}
    found = matches.detections[0]
    missed = matches.counted & ~(shown[found] & (found >= 0) if len(table) else False)
    missed[split.partners[np.isin(kinds, [KINDS.index("class"), KINDS.index("localisation")])]] = False
    return counts | {"missed": int(missed.sum())}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ThresholdCurve:
    """Precision, recall and F1 of a class at IoU 0.5 if detections below a score are dropped.

    Attributes:
        thresholds: float64 [101], 0 to 1.
        precision, recall, f1: float64 [101]; precision is 1 where nothing is left.
        best: the score with the highest F1 among the scores that occur; None where F1 stays below 0.1: the highest of such
            F1 is at a score that floods images with false alarms.
        best_f1: F1 there; 0 without one.
    """

    thresholds: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    best: float | None
    best_f1: float


def threshold_curves(outcomes: Outcomes) -> list[ThresholdCurve]:
    """A curve for each of the K classes."""
    result = []
    thresholds = np.linspace(0, 1, 101)
    right, ignored = outcomes.right[0], outcomes.matches.ignored[0]
    for label, num_objects in enumerate(outcomes.num_objects.tolist()):
        own = np.flatnonzero((outcomes.table.labels == label) & ~ignored)
        scores = outcomes.table.scores[own].astype(np.float64)
        hits = np.concatenate([[0], np.cumsum(right[own])])
        f1_all = 2 * hits / np.maximum(np.arange(len(hits)) + num_objects, 1)
        # A threshold cannot part equal scores: only the last of equals is a choice.
        choosable = np.append(scores[1:] != scores[:-1], True) if len(scores) else np.empty(0, np.bool_)
        f1_there = np.where(choosable, f1_all[1:], 0)
        place = int(f1_there.argmax()) if len(scores) else 0
        best = float(scores[place]) if len(scores) and f1_there[place] >= WORTH else None
        kept = np.searchsorted(-scores, -thresholds, side="right")
        result.append(
            ThresholdCurve(
                thresholds=thresholds,
                precision=np.where(kept > 0, hits[kept] / np.maximum(kept, 1), 1.0),
                recall=hits[kept] / max(num_objects, 1),
                f1=f1_all[kept],
                best=best,
                best_f1=float(f1_there[place]) if best is not None else 0.0,
            )
        )
    return result


def confusion(outcomes: Outcomes, thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """What objects are taken for.

    Detections from their class's threshold on take, best first, the object of any class that they overlap most (IoU 0.5 or
    more) and that is not taken yet. Detections on crowds are left out.

    Args:
        thresholds: float64 [K].

    Returns:
        int64 [K + 1, K + 1]: true class by found class; the last row is detections on background, the last column objects
        that nothing found.
    """
    index, table, matches = outcomes.index, outcomes.table, outcomes.matches
    K = index.num_classes
    matrix = np.zeros((K + 1, K + 1), np.int64)
    shown = (table.scores >= thresholds[table.labels]) & ~matches.ignored[0]
    for rows, records in _by_image(outcomes):
        rows, records = rows[shown[rows]], records[matches.counted[records]]
        overlaps = iou(table.boxes[rows], _truth_boxes(index, records))
        free = np.ones(len(records), np.bool_)
        for place, row in enumerate(rows.tolist()):
            candidates = np.where(free, overlaps[place], 0)
            partner = int(candidates.argmax()) if len(records) else -1
            if partner >= 0 and candidates[partner] >= FOREGROUND:
                free[partner] = False
                matrix[index.labels[records[partner]], table.labels[row]] += 1
            else:
                matrix[K, table.labels[row]] += 1
        np.add.at(matrix[:, K], index.labels[records[free]], 1)
    return matrix


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Calibration:
    """Whether of detections with score 0.7 seven in ten are right (at IoU 0.5).

    Attributes:
        edges: float64 [bins + 1].
        counts: int64 [bins].
        scores, right: float64 [bins], mean score and share of right ones; NaN in an empty bin.
        error: expected calibration error (Guo et al., arXiv 1706.04599): mean of |share - score| over detections.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    scores: NDArray[np.float64]
    right: NDArray[np.float64]
    error: float


def calibration(outcomes: Outcomes, from_score: float = 0.05, bins: int = 10) -> Calibration:
    """Of the detections from ``from_score`` on; the flood below is never shown and would hide the rest."""
    chosen = ~outcomes.matches.ignored[0] & (outcomes.table.scores >= from_score)
    scores, right = outcomes.table.scores[chosen].astype(np.float64), outcomes.right[0][chosen]
    edges = np.linspace(0, 1, bins + 1)
    places = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = np.bincount(places, scores, minlength=bins) / counts
        shares = np.bincount(places, right, minlength=bins) / counts
    error = float(np.nansum(counts * np.abs(shares - means)) / max(len(scores), 1))
    return Calibration(edges=edges, counts=counts, scores=means, right=shares, error=error)


def resampled_ap(
    outcomes: Outcomes, weights: NDArray[np.integer[Any]], ious: slice = slice(None)
) -> NDArray[np.float64]:
    """AP of each class if image i counted ``weights[b, i]`` times.

    Matches within an image do not depend on other images, so a resample only weighs the rows of one sorted table: precision
    and recall are weighted cumulative sums, and COCO is evaluated once, not B times.

    Args:
        weights: integers [B, I].
        ious: which of the IoU thresholds to average; all of them by default.

    Returns:
        float64 [B, K]; NaN where a resample has no object of the class.
    """
    matches, index = outcomes.matches, outcomes.index
    of_record = np.repeat(np.arange(len(index)), np.diff(index.offsets))
    result = np.full((len(weights), index.num_classes), np.nan)
    for label in range(index.num_classes):
        objects = of_record[matches.counted & (index.labels == label)]
        if not len(objects):
            continue
        own = np.flatnonzero(outcomes.table.labels == label)
        step = max(1, _CELLS // max(len(own), len(objects)))
        for start in range(0, len(weights), step):
            part = slice(start, start + step)
            counts = weights[part][:, objects].sum(1)
            own_weights = weights[part][:, outcomes.positions[own]]
            total = np.zeros(len(counts))
            chosen = range(len(IOU_THRESHOLDS))[ious]
            for t in chosen:
                counting = ~matches.ignored[t, own]
                hit = outcomes.right[t, own]
                # What comes after the last right one changes nothing.
                last = int(np.flatnonzero(hit)[-1]) + 1 if hit.any() else 0
                counting[last:] = False
                total += precision_at(hit[counting], own_weights[:, counting], counts).mean(1)
            result[part, label] = total / len(chosen)
    return result


def iou(boxes: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """IoU of xyxy boxes [N, 4] and [M, 4] -> float64 [N, M]; 0 for boxes without area."""
    a, b = boxes.astype(np.float64)[:, None], others.astype(np.float64)[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    shared = sides.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0.0)


def _best(overlaps: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if not overlaps.shape[1]:
        return np.zeros(len(overlaps)), np.zeros(len(overlaps), np.int64)
    return overlaps.max(1), overlaps.argmax(1)


def _truth_boxes(index: CocoIndex, records: NDArray[np.int64]) -> NDArray[np.float64]:
    xywh = index.xywh[records]
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)


def _by_image(outcomes: Outcomes) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows (best first) and records of each image."""
    order = np.argsort(outcomes.positions, kind="stable")
    ends = np.cumsum(np.bincount(outcomes.positions, minlength=len(outcomes.index)))
    offsets = outcomes.index.offsets
    return [
        (rows, np.arange(offsets[place], offsets[place + 1])) for place, rows in enumerate(np.split(order, ends[:-1]))
    ]

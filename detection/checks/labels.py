"""Suspected label errors: where a detector, confident, and the labels disagree.

Four kinds, each ranked: a detection without a label, one on a label of another class, one whose label lies elsewhere, and a label
that no detection finds. A detector that was trained on these labels has learnt many of their errors too, so suspects are best
sought in images it was not trained on.

ObjectLab (arXiv 2309.00832, in cleanlab) asks the same of an image's score; here the question is which label to look at, the
matching crosses classes, and crowds are respected. It would bring pandas and scikit-learn, and was AGPL until lately.

Letters in shapes: N labels of an image, D detections.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError
from detection.checks.check import Checked
from detection.checks.findings import Finding
from detection.checks.report import read_shown
from detection.checks.split import Split
from detection.engine.progress import progress_bar
from detection.inference.predictor import Predictor, load_detector
from detection.structures import Detections

CONFIDENT = 0.5
"""Score from which on a detection is believed."""
_FAINT = 0.05  # score below which a detection does not count as having found a label
_SAME = 0.5  # IoU from which on box and label are of one object
_APART = 0.1  # IoU below which they have nothing to do with each other
_BATCH = 16


def find_label_errors(checked: Checked, split: Split, detector: Predictor) -> list[Finding]:
    """Suspected label errors of a split.

    Args:
        checked: gives the images.
        split: whose classes the detector knows by name.
        detector: with a low score threshold, as ``load_for_labels`` gives it.

    Raises:
        UserError: the split has a class with objects that the detector does not know, or no image can be read.
    """
    label_of = {name: label for label, name in enumerate(detector.class_names)}
    counts = np.bincount(split.labels[split.labels >= 0], minlength=len(split.class_names))
    unknown = [name for label, name in enumerate(split.class_names) if counts[label] and name not in label_of]
    if unknown:
        raise UserError(f"{split.path}: the detector does not know the class {', '.join(map(repr, unknown[:10]))}")
    own_labels = np.array([label_of.get(name, -1) for name in split.class_names], np.int64)
    records_of = _by_image(split)
    findings: list[Finding] = []
    num_read = 0
    for position, found in _detect(checked, split, detector):
        num_read += 1
        records = records_of.get(position, np.zeros(0, np.int64))
        findings += compare(split, position, records, own_labels[split.labels[records]], found)
    if not num_read:
        raise UserError(f"{split.path}: no image can be read, so no label can be compared with what a detector finds")
    return findings


def _by_image(split: Split) -> dict[int, NDArray[np.int64]]:
    """The records of each image that are boxes at all, crowds included."""
    good = split.usable() | (
        split.crowd & (split.images >= 0) & (split.labels >= 0) & np.isfinite(split.xywh).all(axis=1)
    )
    records = np.flatnonzero(good)
    records = records[np.argsort(split.images[records], kind="stable")]
    positions, starts = np.unique(split.images[records], return_index=True)
    return dict(zip(positions.tolist(), np.split(records, starts[1:]), strict=True)) if len(records) else {}


def _detect(checked: Checked, split: Split, detector: Predictor) -> Iterable[tuple[int, Detections]]:
    waiting: list[tuple[int, NDArray[np.uint8]]] = []
    bar = progress_bar(range(len(split)), desc=f"detection in {split.name}", unit="image", leave=False)
    for position in bar:
        image = read_shown(checked, split.number, position)
        if image is not None:
            waiting.append((position, image))
        if len(waiting) == _BATCH or (waiting and position == len(split) - 1):
            yield from zip([place for place, _ in waiting], detector([image for _, image in waiting]), strict=True)
            waiting.clear()


def compare(
    split: Split, position: int, records: NDArray[np.int64], labels: NDArray[np.int64], found: Detections
) -> list[Finding]:
    """The suspects of one image.

    Args:
        split, position: the image.
        records: int64 [N], the labels of the image.
        labels: int64 [N], their classes as the detector counts them.
        found: in the image.
    """
    found = found.above(_FAINT).cpu()
    boxes, scores, classes = found.boxes.double().numpy(), found.scores.double().numpy(), found.labels.numpy()
    texts = [f"{name} {score:.2f}" for name, score in zip(found.names(), scores.tolist(), strict=True)]
    truth = split.xywh[records].copy()
    truth[:, 2:] += truth[:, :2]
    crowd = split.crowd[records]
    iou, covered = _overlaps(boxes, truth)  # [D, N]
    same_class = classes[:, None] == labels
    findings = []
    explained = np.zeros(len(records), np.bool_)  # labels that a finding names already
    for row in range(len(scores)):
        if scores[row] < CONFIDENT:
            break  # best first
        if (covered[row, crowd] >= _SAME).any() or (iou[row] * same_class[row] * ~crowd >= _SAME).any():
            continue
        box = tuple(boxes[row].tolist())
        overlap = np.where(crowd | explained, 0.0, iou[row])
        nearest = int(overlap.argmax()) if len(overlap) else -1
        record = int(records[nearest]) if nearest >= 0 else None
        kind, score = "", float(scores[row])
        if nearest < 0 or overlap[nearest] < _APART:
            # In front of a label that another finding names it is that object again, not a new one.
            if not len(records) or iou[row].max() < _APART:
                kind, record, text = "label-missing", None, f"{texts[row]} where there is no label"
        elif overlap[nearest] >= _SAME and not same_class[row, nearest]:
            own = scores[(iou[:, nearest] >= _SAME) & same_class[:, nearest]]
            if score > own.max(initial=0.0):
                kind, text = "label-class", f"labelled {split.class_name(int(records[nearest]))}, found as {texts[row]}"
                score -= float(own.max(initial=0.0))
        elif same_class[row, nearest] and not ((iou[:, nearest] >= _SAME) & same_class[:, nearest]).any():
            kind, text = "label-place", f"found as {texts[row]}, IoU {overlap[nearest]:.2f} with the label"
            score *= 1 - float(overlap[nearest])
        if not kind:
            continue
        if record is not None:
            explained[nearest] = True
        findings.append(
            Finding(
                kind=kind, split=split.number, image=position, record=record, message=text, score=score,
                found=((box[0], box[1], box[2], box[3]), texts[row]),
            )
        )  # fmt: skip
    height, width = split.sizes[position].tolist()
    for place in np.flatnonzero(~crowd & ~explained).tolist():
        best = iou[:, place].max(initial=0.0)
        if best >= _SAME / 2:
            continue
        sides = truth[place, 2:] - truth[place, :2]
        size = float(np.sqrt(sides.prod() / max(height * width, 1)))  # a large object is not overlooked easily
        name = split.class_name(int(records[place]))
        findings.append(
            Finding(
                kind="label-not-found", split=split.number, image=position, record=int(records[place]), score=min(size, 1.0),
                message=f"{name} of {sides[0]:.0f} x {sides[1]:.0f} pixels; the nearest detection has IoU {best:.2f}",
            )
        )  # fmt: skip
    return findings


def _overlaps(
    boxes: NDArray[np.float64], truth: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU [D, N], and the share of each detection that lies in each label [D, N]."""
    sides = np.minimum(boxes[:, None, 2:], truth[None, :, 2:]) - np.maximum(boxes[:, None, :2], truth[None, :, :2])
    overlap = sides.clip(min=0).prod(axis=2)
    own = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None]
    other = (truth[:, 2:] - truth[:, :2]).prod(axis=1)[None]
    return overlap / np.maximum(own + other - overlap, 1e-9), overlap / np.maximum(own, 1e-9)


def load_for_labels(path: str | Path, device: str = "auto") -> Predictor:
    """A detector that tells faint detections too.

    Raises:
        FileNotFoundError, UserError: see ``load_detector``.
    """
    return load_detector(path, device=device, score_threshold=_FAINT)

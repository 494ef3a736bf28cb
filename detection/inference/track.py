"""Ids for what moves through a video, and counts of what crosses a line.

Tracking is ByteTrack (Zhang et al. 2022, arXiv 2110.06864) of the package ``trackers``, counting is supervision's ``LineZone``.
"""

import importlib
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import supervision as sv
import torch

from backbones.errors import UserError
from detection.structures import Detections

WEAKEST = 0.1
"""Score of the weakest detections that a track may be continued with."""
_MOST_TRACKS = 4096  # whose class is remembered; a camera runs for weeks


class Tracked(NamedTuple):
    """What was found in a frame, with ids.

    Attributes:
        detections: N of them, best first.
        ids: N of them; None where a detection has no track (yet): a track begins with its second frame.
    """

    detections: Detections
    ids: list[int | None]


class Tracker:
    """Follows objects from frame to frame, whatever their class.

    Args:
        rate: frames per second of the video; a lost track is kept for a second.
        score: detections from here on begin tracks; weaker ones only continue them, and only as the class that was last sure.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, rate: float, score: float) -> None:
        try:
            trackers: Any = importlib.import_module("trackers")
        except ImportError as error:
            raise UserError(
                "--track needs the package trackers, which is not installed; pip install 'litedet[track]'"
            ) from error
        self._score = score
        self._label_of: dict[int, int] = {}  # of each track, when it was last seen with confidence
        self._tracker = trackers.ByteTrackTracker(
            frame_rate=rate, lost_track_buffer=30, track_activation_threshold=score, high_conf_det_threshold=score
        )

    def __call__(self, detections: Detections) -> Tracked:
        """The same detections with ids, without those below ``score`` that continue no track of their class."""
        boxes = sv.Detections(
            xyxy=detections.boxes.numpy().astype(np.float32).reshape(-1, 4),
            confidence=detections.scores.numpy().astype(np.float32),
            class_id=detections.labels.numpy().astype(np.int64),
            data={"row": np.arange(len(detections))},
        )
        found = self._tracker.update(boxes)
        number_of = dict(zip(found.data.get("row", ()), found.tracker_id, strict=True)) if len(found) else {}
        numbers = [int(number_of.get(row, -1)) for row in range(len(detections))]
        stays = []
        pairs = zip(detections.scores.tolist(), detections.labels.tolist(), strict=True)
        for row, (score, label) in enumerate(pairs):
            if score >= self._score:
                self._label_of.pop(numbers[row], None)  # so that the last seen stand last
                self._label_of[numbers[row]] = label
            if score >= self._score or (numbers[row] >= 0 and self._label_of.get(numbers[row]) == label):
                stays.append(row)
        while len(self._label_of) > _MOST_TRACKS:
            self._label_of.pop(next(iter(self._label_of)))
        rows = torch.tensor(stays, dtype=torch.int64)
        kept = replace(
            detections, boxes=detections.boxes[rows], scores=detections.scores[rows], labels=detections.labels[rows]
        )
        return Tracked(kept, [numbers[row] if numbers[row] >= 0 else None for row in stays])


class LineCounter:
    """Counts tracked objects whose centre crosses a line.

    Args:
        line: x1, y1, x2, y2 in pixels. Seen from (x1, y1) towards (x2, y2), in is from right to left, as supervision has it.

    Attributes:
        counts: class name -> {"in": n, "out": n}, of classes that crossed.
    """

    def __init__(self, line: tuple[float, float, float, float]) -> None:
        x1, y1, x2, y2 = line
        self.line = line
        self.counts: dict[str, dict[str, int]] = {}
        self._zone = sv.LineZone(start=sv.Point(x1, y1), end=sv.Point(x2, y2), triggering_anchors=(sv.Position.CENTER,))

    def __call__(self, tracked: Tracked) -> None:
        """Takes the next frame."""
        rows = [row for row, number in enumerate(tracked.ids) if number is not None]
        detections, names = tracked.detections, tracked.detections.names()
        went_in, went_out = self._zone.trigger(
            sv.Detections(
                xyxy=detections.boxes[rows].numpy().astype(np.float32).reshape(-1, 4),
                class_id=detections.labels[rows].numpy().astype(np.int64),
                tracker_id=np.array([tracked.ids[row] for row in rows], np.int64),
            )
        )
        for way, crossed in (("in", went_in), ("out", went_out)):
            for row in np.flatnonzero(crossed):
                self.counts.setdefault(names[rows[row]], {"in": 0, "out": 0})[way] += 1

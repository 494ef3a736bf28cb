"""Small objects in large images: the image in overlapping slices and whole, through a predictor as one batch, and merged.

Letters in shapes: N boxes. The idea is that of Akyon, Altinuc and Temizel, "Slicing Aided Hyper Inference", 2022 (section 3).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import batched_nms, box_area

from backbones.errors import UserError
from detection.structures import Detections

_EDGE = 2.0  # pixels from the edge of a slice within which a box counts as cut off by it
_COVERED = 0.6  # share of a cut box inside another of its class above which it is a part of that object


BatchPredictor = Callable[[list[Any]], list[Detections]]
"""What a ``Predictor`` is to this file: RGB uint8 [H, W, 3] each -> the detections of each."""


class SlicedPredictor:
    """A predictor that looks at slices of an image too, and finds what is too small in the whole.

    Boxes that the edge of a slice cuts off are parts of objects. They go where the whole image, or another slice, shows the
    object they are of (a box of the class that covers most of them); then non-maximum suppression within each class.

    Args:
        predictor: a list of images -> detections of each.
        side: of a slice, in pixels of the image.
        overlap: share of a slice that the next one repeats; an object smaller than that is whole in one of them.
        nms_threshold: IoU above which the worse of two boxes of a class goes.
        batch: images that the predictor gets at once, at most.

    Raises:
        UserError: a side below 32, or an overlap outside [0, 0.9].
    """

    def __init__(
        self, predictor: BatchPredictor, side: int, overlap: float = 0.2, nms_threshold: float = 0.5, batch: int = 16
    ) -> None:
        if side < 32 or not 0 <= overlap <= 0.9:
            raise UserError(f"slices of {side} pixels that overlap by {overlap}: at least 32, and 0 to 0.9")
        self.predictor = predictor
        self.side = side
        self.overlap = overlap
        self.nms_threshold = nms_threshold
        self.batch = batch

    def __call__(self, image: NDArray[np.uint8]) -> Detections:
        """RGB uint8 [H, W, 3] -> detections, best first, boxes in pixels of the image."""
        height, width = image.shape[:2]
        windows = slice_windows((height, width), self.side, self.overlap)
        parts = [image, *(np.ascontiguousarray(image[y1:y2, x1:x2]) for x1, y1, x2, y2 in windows)]
        found: list[Detections] = []
        for first in range(0, len(parts), self.batch):
            found += self.predictor(parts[first : first + self.batch])
        return merge(found[0], found[1:], windows, (height, width), self.nms_threshold)


def slice_windows(size: tuple[int, int], side: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """Windows xyxy that cover an image of (height, width), evenly spread; none where one would be the whole image."""
    starts = []
    for length in size:
        number = 1 if length <= side else int(np.ceil((length - side) / (side * (1 - overlap)) - 1e-9)) + 1
        starts.append(np.linspace(0, max(length - side, 0), number).round().astype(int).tolist())
    height, width = size
    windows = [(x, y, min(x + side, width), min(y + side, height)) for y in starts[0] for x in starts[1]]
    return [] if windows == [(0, 0, width, height)] else windows


def merge(
    whole: Detections,
    slices: list[Detections],
    windows: list[tuple[int, int, int, int]],
    size: tuple[int, int],
    nms_threshold: float,
) -> Detections:
    """The detections of the whole image and of its slices as one.

    Args:
        whole: in pixels of the image.
        slices: one for each window, in pixels of the slice.
        windows: xyxy of each slice in the image.
        size: (height, width) of the image.
        nms_threshold: see ``SlicedPredictor``.

    Returns:
        Best first, boxes in pixels of the image.
    """
    boxes, cut = [whole.boxes], [torch.zeros(len(whole), dtype=torch.bool)]
    for found, (x1, y1, x2, y2) in zip(slices, windows, strict=True):
        moved = found.boxes + found.boxes.new_tensor([x1, y1, x1, y1])
        boxes.append(moved)
        cut.append(
            ((moved[:, 0] < x1 + _EDGE) & (x1 > 0))
            | ((moved[:, 1] < y1 + _EDGE) & (y1 > 0))
            | ((moved[:, 2] > x2 - _EDGE) & (x2 < size[1]))
            | ((moved[:, 3] > y2 - _EDGE) & (y2 < size[0]))
        )
    everything = replace(
        whole,
        boxes=torch.cat(boxes),
        scores=torch.cat([whole.scores, *(found.scores for found in slices)]),
        labels=torch.cat([whole.labels, *(found.labels for found in slices)]),
    )
    stays = ~_is_part(everything, torch.cat(cut))
    everything = _pick(everything, stays.nonzero().squeeze(1))
    return _pick(everything, batched_nms(everything.boxes, everything.scores, everything.labels, nms_threshold))


def _is_part(found: Detections, cut: Tensor) -> Tensor:
    """bool [N]: a cut box of which a whole one of its class covers the most."""
    a, b = found.boxes[cut], found.boxes[~cut]
    sides = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])).clamp(min=0)
    covers = sides.prod(-1) >= _COVERED * box_area(a)[:, None]
    covers &= found.labels[cut][:, None] == found.labels[~cut][None]
    part = torch.zeros_like(cut)
    part[cut] = covers.any(1)
    return part


def _pick(found: Detections, rows: Tensor) -> Detections:
    return replace(found, boxes=found.boxes[rows], scores=found.scores[rows], labels=found.labels[rows])

"""Small objects in large images: the image in overlapping slices and whole, through a predictor as one batch, and merged.

The idea is that of Akyon, Altinuc and Temizel, "Slicing Aided Hyper Inference", 2022 (section 3). They merge
boxes of which the smaller lies by half in the larger (IoS), as supervision's slicer can too. Two parts of an object that no slice
holds whole share no more than the strip that both slices see, a fifth of a slice, and stay two; and a child before a grown-up
becomes one with it.
Here only boxes that a slice cuts off are joined, and what tells whether they belong together is what both slices see of them.

Letters in shapes: N boxes of the whole image and all slices, P of them parts.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import batched_nms

from backbones.errors import UserError
from detection.structures import Detections

_EDGE = 0.02  # of a slice's side: a box that ends so near to its edge counts as cut off by it
_COVERED = 0.5  # share of a cut box inside a whole one of its class from which on it is a part of that object
_AGREE = 0.5  # IoU of two parts, in what both slices see, from which on they are of one object

BatchPredictor = Callable[[list[Any]], list[Detections]]
"""What a ``Predictor`` is to this file: RGB uint8 [H, W, 3] each -> the detections of each."""


class SlicedPredictor:
    """A predictor that looks at slices of an image too, and finds what is too small in the whole.

    Boxes that the edge of a slice cuts off are parts of objects. They go where the whole image, or another slice, shows the
    object they are of (a box of the class that covers most of them). Parts in neighbouring slices that agree where both look
    become one box. Then non-maximum suppression within each class.

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
    seen = [torch.tensor([0, 0, size[1], size[0]]).expand(len(whole), 4)]
    for found, (x1, y1, x2, y2) in zip(slices, windows, strict=True):
        moved = found.boxes + found.boxes.new_tensor([x1, y1, x1, y1])
        near = _EDGE * max(x2 - x1, y2 - y1)
        boxes.append(moved)
        seen.append(torch.tensor([x1, y1, x2, y2]).expand(len(found), 4))
        cut.append(
            ((moved[:, 0] < x1 + near) & (x1 > 0))
            | ((moved[:, 1] < y1 + near) & (y1 > 0))
            | ((moved[:, 2] > x2 - near) & (x2 < size[1]))
            | ((moved[:, 3] > y2 - near) & (y2 < size[0]))
        )
    everything = replace(
        whole,
        boxes=torch.cat(boxes),
        scores=torch.cat([whole.scores, *(found.scores for found in slices)]),
        labels=torch.cat([whole.labels, *(found.labels for found in slices)]),
    )
    is_cut, window_of = torch.cat(cut), torch.cat(seen).to(everything.boxes)
    unexplained = is_cut & ~_is_part(everything, is_cut)
    parts = _pick(everything, unexplained.nonzero().squeeze(1))
    joined, is_joined = _joined(parts, window_of[unexplained])
    everything = _concatenated(_pick(everything, (~is_cut).nonzero().squeeze(1)), joined)
    # A part that agreed with no other may still lie in what others became.
    alone = torch.cat([torch.zeros(len(everything) - len(joined), dtype=torch.bool), ~is_joined])
    everything = _pick(everything, (~_is_part(everything, alone)).nonzero().squeeze(1))
    return _pick(everything, batched_nms(everything.boxes, everything.scores, everything.labels, nms_threshold))


def _is_part(found: Detections, cut: Tensor) -> Tensor:
    """bool [N]: a cut box (``cut`` is bool [N]) of which one that is not cut, of its class, covers half."""
    a, b = found.boxes[cut], found.boxes[~cut]
    covers = _area(_shared(a[:, None], b[None])) >= _COVERED * _area(a)[:, None]
    covers &= found.labels[cut][:, None] == found.labels[~cut][None]
    part = torch.zeros_like(cut)
    part[cut] = covers.any(1)
    return part


def _joined(parts: Detections, windows: Tensor) -> tuple[Detections, Tensor]:
    """Parts of objects, those of one object as one box with the score of the best; and which of them were several.

    Args:
        parts: P boxes in pixels of the image.
        windows: float32 [P, 4], xyxy of the slice that each is from.

    Returns:
        At most P detections; bool of as many, whether one was joined.
    """
    if not len(parts):
        return parts, torch.zeros(0, dtype=torch.bool)
    both_see = _shared(windows[:, None], windows[None])
    a, b = _shared(parts.boxes[:, None], both_see), _shared(parts.boxes[None], both_see)
    overlap = _area(_shared(a, b))
    union = _area(a) + _area(b) - overlap
    belong = (overlap >= _AGREE * union) & (union > 0) & (parts.labels[:, None] == parts.labels[None])
    belong &= (windows[:, None] != windows[None]).any(-1)  # within a slice the detector has told them apart
    belong.fill_diagonal_(True)
    group = torch.arange(len(parts))
    while True:  # each takes the lowest number among those it belongs to, until none changes
        lowest = torch.where(belong, group[None], len(parts)).amin(1)
        if torch.equal(lowest, group):
            break
        group = lowest
    numbers, group, counts = torch.unique(group, return_inverse=True, return_counts=True)
    inside = group[None] == torch.arange(len(numbers))[:, None]  # [groups, P]
    corners = torch.where(inside[..., None], parts.boxes[None], float("inf"))
    ends = torch.where(inside[..., None], parts.boxes[None], -float("inf"))
    joined = replace(
        parts,
        boxes=torch.cat([corners[..., :2].amin(1), ends[..., 2:].amax(1)], 1),
        scores=torch.where(inside, parts.scores[None], -float("inf")).amax(1),
        labels=parts.labels[numbers],
    )
    return joined, counts > 1


def _shared(a: Tensor, b: Tensor) -> Tensor:
    """What two boxes xyxy [..., 4] share, as boxes; without area where they share nothing."""
    low = torch.maximum(a[..., :2], b[..., :2])
    return torch.cat([low, torch.maximum(torch.minimum(a[..., 2:], b[..., 2:]), low)], -1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def _concatenated(first: Detections, second: Detections) -> Detections:
    return replace(
        first,
        boxes=torch.cat([first.boxes, second.boxes]),
        scores=torch.cat([first.scores, second.scores]),
        labels=torch.cat([first.labels, second.labels]),
    )


def _pick(found: Detections, rows: Tensor) -> Detections:
    return replace(found, boxes=found.boxes[rows], scores=found.scores[rows], labels=found.labels[rows])

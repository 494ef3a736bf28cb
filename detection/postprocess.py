"""From raw predictions to detections, in one pass over all classes.

Letters in shapes: B batch, A anchors, C columns of class logits, N candidates of an image, D numbers of a box code.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from backbones.errors import UserError
from detection.models.box_coders import BoxCoder
from detection.models.detector import DetectorConfig, Score
from detection.structures import Detections, RawPredictions


@dataclass(kw_only=True, slots=True)
class PostprocessConfig:
    score_threshold: float = 0.001
    """Only detections with a higher score (0 to 1) are kept. 0.001 suits COCO evaluation, 0.25 to 0.5 suits viewing."""
    nms_threshold: float = 0.55
    """Non-maximum suppression: of two boxes of one class with a higher IoU than this, the one with the lower score goes. 1: none
    goes, for a detector that finds each object once (a one-to-one head)."""
    candidates: int = 1000
    """How many (anchor, class) pairs of an image, the best by score, enter non-maximum suppression."""
    max_detections: int = 300
    """Maximum number of detections in an image, over all classes."""

    def validate(self) -> None:
        if not 0 <= self.score_threshold < 1:
            raise UserError(f"postprocess.score_threshold must be in [0, 1), got {self.score_threshold}")
        if not 0 < self.nms_threshold <= 1:
            raise UserError(f"postprocess.nms_threshold must be in (0, 1], got {self.nms_threshold}")
        if self.candidates < 1 or self.max_detections < 1:
            raise UserError("postprocess.candidates and postprocess.max_detections must be at least 1")


# Boxes are suppressed as if they ended this many pixels from the input's corner. No real box reaches that far, and a stray
# one, even an infinite one, cannot push the classes so far apart that float64 loses what lies between two boxes.
_REACH = 2.0**20
# On a GPU this many candidates at most are suppressed at once: the work grows with the square.
_AT_ONCE = 2**14


class Postprocess:
    """Scores, one top-k over all (anchor, class) pairs, decoding of those boxes alone, class-aware NMS.

    A loop over classes, as most SSD code has it, costs as much as the network on a CPU. One top-k over all pairs finds the
    same detections as long as ``candidates`` does not cut off what the loop would have kept; at 1,000 it does not.

    Boxes are suppressed in pixels of the network's input, whole: clipping comes last, as in TensorFlow, because two boxes that
    stick out of the image differ more than what is left of them. Scaling the axes does not change an IoU, so the result is
    that of suppression in pixels of the image.

    On a CPU the images are processed one after the other. On a GPU the whole batch is processed at once, and the host waits
    for it twice: NMS returns a number of boxes that only the device knows, and the result is copied (NMS once more for each
    further 16 images with 1,000 candidates).

    Args:
        config: see ``PostprocessConfig``.
        box_coder: the code that the predictions are written in.
        score: how class logits become scores.
        background_column: whether column 0 of the class logits is the background.
        class_names: handed on to the detections.
    """

    def __init__(
        self,
        config: PostprocessConfig,
        box_coder: BoxCoder,
        score: Score,
        background_column: bool,
        class_names: tuple[str, ...] = (),
    ) -> None:
        config.validate()
        self.config = config
        self.box_coder = box_coder
        self.score = score
        self.first_column = int(background_column)
        self.class_names = class_names

    def scores(self, class_logits: Tensor) -> Tensor:
        """Class logits [B, A, C] -> float32 scores [B, A, C] in 0..1; the background's, where it has a column, are 0."""
        logits = class_logits.float()
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        if self.first_column:
            scores[..., 0] = 0  # not cut off: what is left would have to be copied
        return scores

    def __call__(self, raw: RawPredictions, placements: Tensor, original_sizes: Tensor) -> list[Detections]:
        """The detections of each image.

        Args:
            raw: predictions [B, A, ...], on any device.
            placements: float32 [B, 4], where each image lies in the network's input (``Placement``); on the host.
            original_sizes: int64 [B, 2], (height, width) of each image; on the host.

        Returns:
            B detections on the CPU, best first, boxes in pixels of the image and inside it.
        """
        on_host = raw.class_logits.device.type == "cpu"
        found = self._each(raw) if on_host else _unpack(self.batched(raw).cpu())
        placements = placements.to("cpu", torch.float32)
        limits = original_sizes.to("cpu", torch.float32).flip(-1)  # [B, 2]: width, height
        return [self._in_image(*one) for one in zip(found, placements, limits, strict=True)]

    def _each(self, raw: RawPredictions) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each image, best first: boxes [N, 4] in pixels of the input, scores [N], class columns [N]."""
        C = raw.class_logits.shape[-1]
        for class_logits, codes in zip(raw.class_logits, raw.codes, strict=True):
            scores, pairs = self._above_threshold(class_logits)
            scores, order = scores.topk(min(self.config.candidates, len(pairs)))  # [N], best first
            scores = scores[: int((scores > self.config.score_threshold).sum())]
            pairs = pairs[order[: len(scores)]]
            rows, columns = pairs // C, pairs % C
            boxes, best = self._suppress(codes, raw.anchors, rows, scores, columns)
            yield boxes[best], scores[best], columns[best]

    def _above_threshold(self, class_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [A, C] -> the scores above the threshold [N], and the (anchor, class) pairs they are of, as
        anchor * C + column; with sigmoid also a few just below it.

        Few pairs are above it: a top-k over all of them takes twice as long as finding those and sorting them. A sigmoid
        grows with its logit, so that the others need no sigmoid at all.
        """
        threshold = self.config.score_threshold
        if self.score == "softmax":
            scores = self.scores(class_logits).flatten()
            pairs = _positions_above(scores, threshold)
            return scores.index_select(0, pairs), pairs
        flat = class_logits.float().flatten()
        least = (
            math.log(threshold / (1 - threshold)) - 1e-3 if threshold else -math.inf
        )  # a little less: sigmoid rounds
        pairs = _positions_above(flat, least)
        if self.first_column:
            pairs = pairs[pairs % class_logits.shape[-1] != 0]
        return flat.index_select(0, pairs).sigmoid(), pairs

    def _suppress(
        self, codes: Tensor, anchors: Tensor, rows: Tensor, scores: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decoding and suppression of an image's candidates.

        Args:
            codes: [A, D], of all anchors.
            anchors: [A, 4].
            rows, scores, columns: [N] each, of the candidates, best first: anchor, score, class column.

        Returns:
            Boxes of the first candidates, and the positions of those that stay, best first.
        """
        wanted = self.config.max_detections
        # What is kept of the best n is kept of all, and the time goes with n times what is kept: where the best are mostly apart,
        # a part of them suffices.
        count = wanted if self.config.nms_threshold == 1 else wanted + wanted // 2
        while True:
            some = rows[:count]
            boxes = self.box_coder.decode(codes[some].float(), anchors[some])
            if self.config.nms_threshold == 1:
                return boxes, torch.arange(len(some), device=scores.device)
            apart = _apart(boxes, columns[:count])
            best: Tensor = nms(apart, scores[:count].double(), self.config.nms_threshold)[:wanted]
            if len(best) == wanted or count >= len(scores):
                return boxes, best
            count *= 3

    def batched(self, raw: RawPredictions) -> Tensor:
        """The same for all images at once, in tensors of fixed size; the host waits for the device in NMS alone.

        Returns:
            float32 [B, max_detections, 6], on the device of ``raw``, best first: x1, y1, x2, y2 in pixels of the input, score,
            class column. Where an image has fewer detections the rest have score 0.
        """
        B, A, C = raw.class_logits.shape
        scores = self.scores(raw.class_logits).flatten(1)
        scores = torch.where(scores > self.config.score_threshold, scores, 0)
        N = min(self.config.candidates, A * C)
        scores, pairs = scores.topk(N)  # [B, N], best first; those of score 0 take part, but nothing ranks behind them
        rows, columns = pairs // C, pairs % C
        codes = raw.codes.gather(1, rows[..., None].expand(-1, -1, raw.codes.shape[-1]))
        boxes = self.box_coder.decode(codes.float(), raw.anchors[rows])
        groups = columns + C * torch.arange(B, device=columns.device)[:, None]
        kept = torch.full_like(scores, self.config.nms_threshold == 1, dtype=torch.bool)
        at_once = max(_AT_ONCE // N, 1)
        for part in range(0, B, at_once) if self.config.nms_threshold < 1 else ():
            some = slice(part, part + at_once)
            apart = _apart(boxes[some].flatten(0, 1), groups[some].flatten())
            best = nms(apart, scores[some].flatten().double(), self.config.nms_threshold)
            kept[some].view(-1).index_fill_(0, best, True)
        scores, order = torch.where(kept, scores, 0).topk(min(self.config.max_detections, N))
        packed = torch.cat((boxes, columns[..., None].to(boxes)), -1).gather(1, order[..., None].expand(-1, -1, 5))
        return torch.cat((packed[..., :4], scores[..., None], packed[..., 4:]), -1)

    def _in_image(self, found: tuple[Tensor, Tensor, Tensor], placement: Tensor, limit: Tensor) -> Detections:
        boxes, scores, columns = found
        boxes = to_image(boxes, placement).unflatten(-1, (2, 2)).clamp(min=0).minimum(limit).flatten(-2)
        has_sides = boxes[:, 2:] > boxes[:, :2]
        if not has_sides.all():
            visible = has_sides.all(-1)
            boxes, scores, columns = boxes[visible], scores[visible], columns[visible]
        return Detections(boxes=boxes, scores=scores, labels=columns - self.first_column, class_names=self.class_names)


def _positions_above(values: Tensor, least: float) -> Tensor:
    """Values [N] on the host -> int64 [M], where they are above ``least``. NumPy takes a third of the time that torch does."""
    return torch.from_numpy(np.flatnonzero(values.detach().numpy() > least))


def _apart(boxes: Tensor, groups: Tensor) -> Tensor:
    """Boxes [N, 4] -> float64 [N, 4], each group moved to a place of its own, so that boxes of different groups never meet.

    The same as ``torchvision.ops.batched_nms`` does, but its way depends on the number of boxes: above 1,000 on a CPU and
    25,000 on a GPU it loops over the groups and waits for each. Float64 costs no time here and keeps every IoU exact.
    """
    return boxes.double().clamp_(-_REACH, _REACH) + (groups.double() * (2 * _REACH + 1))[:, None]


def _unpack(packed: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What ``Postprocess.batched`` returned, on the host -> boxes, scores, class columns of each image."""
    counts = (packed[..., 4] > 0).sum(1).tolist()
    for rows, count in zip(packed, counts, strict=True):
        yield rows[:count, :4], rows[:count, 4].clone(), rows[:count, 5].long()


def to_image(boxes: Tensor, placement: Tensor) -> Tensor:
    """Boxes in pixels of the network's input -> pixels of the original image, not clipped to it.

    Args:
        boxes: xyxy [N, 4].
        placement: [4] (scale_x, scale_y, offset_x, offset_y).
    """
    scale, offset = placement.split(2)
    return ((boxes.unflatten(-1, (2, 2)) - offset) / scale).flatten(-2)  # corner by corner


def build_postprocess(
    model: DetectorConfig, config: PostprocessConfig, class_names: tuple[str, ...] = ()
) -> Postprocess:
    """The post-processing that fits a detector's output."""
    return Postprocess(config, model.box_coder(), model.score, model.background_column, class_names)

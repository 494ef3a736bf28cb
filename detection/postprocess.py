"""From raw predictions to detections, in one pass over all classes.

Letters in shapes: B batch, A anchors, C columns of class logits, N candidates of an image.
"""

from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import nms

from backbones.errors import UserError
from detection.models.box_coders import BoxCoder
from detection.models.detector import DetectorConfig, Score
from detection.structures import Detections, RawPredictions


@dataclass(kw_only=True, slots=True)
class PostprocessConfig:
    score_threshold: float = 0.001
    """Detections below this score are dropped. 0.001 is COCO evaluation; 0.25 to 0.5 is for people to look at."""
    nms_threshold: float = 0.55
    """Of two boxes of a class that overlap more than this (IoU), the one with the lower score goes."""
    candidates: int = 1000
    """The best (anchor, class) pairs of an image that non-maximum suppression sees."""
    max_detections: int = 300
    """Detections of an image at most."""

    def validate(self) -> None:
        if not 0 <= self.score_threshold < 1:
            raise UserError(f"postprocess.score_threshold must be in [0, 1), got {self.score_threshold}")
        if not 0 < self.nms_threshold <= 1:
            raise UserError(f"postprocess.nms_threshold must be in (0, 1], got {self.nms_threshold}")
        if self.candidates < 1 or self.max_detections < 1:
            raise UserError("postprocess.candidates and postprocess.max_detections must be at least 1")


class Postprocess:
    """Scores, one top-k over all (anchor, class) pairs, decoding of those boxes alone, class-aware NMS.

    A loop over classes, as most SSD code has it, costs as much as the network on a CPU. One top-k over all pairs finds the
    same detections as long as ``candidates`` does not cut off what the loop would have kept; at 1,000 it does not.

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
            raw: predictions [B, A, ...].
            placements: float32 [B, 4], where each image lies in the network's input (``Placement``).
            original_sizes: int64 [B, 2], (height, width) of each image.

        Returns:
            B detections, best first, boxes in pixels of the image and inside it.
        """
        scores = self.scores(raw.class_logits)
        codes = raw.codes.float()
        placements = placements.to(codes)
        limits = original_sizes.to(codes).flip(-1)  # [B, 2]: width, height
        images = zip(scores, codes, placements, limits, strict=True)
        return [self._image(*image, anchors=raw.anchors) for image in images]

    def _image(self, scores: Tensor, codes: Tensor, placement: Tensor, limit: Tensor, anchors: Tensor) -> Detections:
        C = scores.shape[-1]
        scores = scores.flatten()
        # Few pairs are above it, and a top-k over all of them takes twice as long as finding those and sorting them.
        pairs = (scores > self.config.score_threshold).nonzero().squeeze(1)
        scores, order = scores[pairs].topk(min(self.config.candidates, len(pairs)))  # [N], best first
        pairs = pairs[order]
        rows, columns = pairs // C, pairs % C
        boxes = to_image(self.box_coder.decode(codes[rows], anchors[rows]), placement)

        best = self._suppress(boxes, scores, columns)
        # Clipped last, as TensorFlow does: two boxes that stick out of the image differ more than what is left of them.
        boxes = boxes[best].unflatten(-1, (2, 2)).clamp(min=0).minimum(limit).flatten(-2)
        has_sides = boxes[:, 2:] > boxes[:, :2]
        if not has_sides.all():
            visible = has_sides.all(-1)
            boxes, best = boxes[visible], best[visible]
        labels = columns[best] - self.first_column
        return Detections(boxes=boxes, scores=scores[best], labels=labels, class_names=self.class_names)

    def _suppress(self, boxes: Tensor, scores: Tensor, columns: Tensor) -> Tensor:
        """Boxes [N, 4] with scores, best first, and class columns -> the places of those that stay, best first."""
        # Boxes of different classes never meet when each class is moved to a place of its own.
        low, high = boxes.aminmax() if len(boxes) else (0, 0)
        apart = boxes + (columns * (high - low + 1))[:, None]
        wanted = self.config.max_detections
        # What is kept of the best n is kept of all, and the time goes with the square of n: mostly a part of them suffices.
        count = wanted + wanted // 4
        while True:
            best: Tensor = nms(apart[:count], scores[:count], self.config.nms_threshold)[:wanted]
            if len(best) == wanted or count >= len(scores):
                return best
            count *= 2


def to_image(boxes: Tensor, placement: Tensor) -> Tensor:
    """Boxes in pixels of the network's input -> pixels of the image on disk, not clipped to it.

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

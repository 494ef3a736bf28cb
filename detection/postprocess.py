"""From raw predictions to detections, in one pass over all classes.

Letters in shapes: B batch, A anchors, K classes, C columns of class logits, N candidates of a picture.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import nms

from detection.box_coder import BoxCoder
from detection.structures import Detections, RawPredictions


@dataclass(kw_only=True, slots=True)
class PostprocessConfig:
    score_threshold: float = 0.001
    """Detections below this score are dropped. 0.001 is COCO evaluation; 0.25 to 0.5 is for people to look at."""
    nms_threshold: float = 0.55
    """Of two boxes of a class that overlap more than this (IoU), the one with the lower score goes."""
    candidates: int = 1000
    """The best (anchor, class) pairs of a picture that non-maximum suppression sees."""
    max_detections: int = 300
    """Detections of a picture at most."""

    def validate(self) -> None:
        if not 0 <= self.score_threshold < 1:
            raise ValueError(f"postprocess.score_threshold must be in [0, 1), got {self.score_threshold}")
        if not 0 < self.nms_threshold <= 1:
            raise ValueError(f"postprocess.nms_threshold must be in (0, 1], got {self.nms_threshold}")
        if self.candidates < 1 or self.max_detections < 1:
            raise ValueError("postprocess.candidates and postprocess.max_detections must be at least 1")


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
        score: Literal["softmax", "sigmoid"],
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
        """Class logits [B, A, C] -> float32 scores [B, A, K] in 0..1, without the background."""
        logits = class_logits.float()
        if self.score == "softmax":
            return logits.softmax(-1)[..., self.first_column :]
        return logits[..., self.first_column :].sigmoid()

    def __call__(self, raw: RawPredictions, placements: Tensor, original_sizes: Tensor) -> list[Detections]:
        """The detections of each picture.

        Args:
            raw: predictions [B, A, ...].
            placements: float32 [B, 4], where each picture lies in the network's input (``Placement``).
            original_sizes: int64 [B, 2], (height, width) of each picture.

        Returns:
            B detections, best first, boxes in pixels of the picture and inside it.
        """
        scores = self.scores(raw.class_logits)
        K = scores.shape[-1]
        chosen = [self._choose(picture) for picture in scores.flatten(1)]
        scores = pad_sequence([best for best, _ in chosen], batch_first=True)  # [B, N], best first
        pairs = pad_sequence([places for _, places in chosen], batch_first=True)
        anchors = pairs // K
        labels = pairs % K
        encodings = raw.box_encodings.float().gather(1, anchors[..., None].expand(-1, -1, 4))
        boxes = self.box_coder.decode(encodings, raw.anchors[anchors])  # [B, N, 4], pixels of the input
        boxes = to_picture(boxes, placements.to(boxes))
        limits = original_sizes.to(boxes).flip(-1)  # [B, 2]: width, height
        numbers = [len(best) for best, _ in chosen]
        return [self._suppress(*picture) for picture in zip(boxes, scores, labels, numbers, limits, strict=True)]

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [A * K] of a picture -> the best N above the threshold, best first, and their places."""
        # Few pairs are above it, and a top-k over all of them takes twice as long as finding those and sorting them.
        places = (scores > self.config.score_threshold).nonzero().squeeze(1)
        best, order = scores[places].topk(min(self.config.candidates, len(places)))
        return best, places[order]

    def _suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor, number: int, limits: Tensor) -> Detections:
        boxes, scores, labels = boxes[:number], scores[:number], labels[:number]  # without the padding
        # Boxes of different classes never meet when each class is moved to a place of its own.
        span = (boxes.max() - boxes.min() + 1) if len(boxes) else 1
        apart = boxes + (labels * span)[:, None]
        wanted = self.config.max_detections
        # What is kept of the best n is kept of all, and the time goes with the square of n: mostly a part of them suffices.
        for count in (2 * wanted, len(scores)):
            best = nms(apart[:count], scores[:count], self.config.nms_threshold)[:wanted]
            if len(best) == wanted:
                break
        # Clipped last, as TensorFlow does: two boxes that stick out of the picture differ more than what is left of them.
        boxes = boxes[best].unflatten(-1, (2, 2)).clamp(min=0).minimum(limits).flatten(-2)
        visible = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        best = best[visible]
        return Detections(boxes=boxes[visible], scores=scores[best], labels=labels[best], class_names=self.class_names)


def to_picture(boxes: Tensor, placements: Tensor) -> Tensor:
    """Boxes in pixels of the network's input -> pixels of the picture on disk, not clipped to it.

    Args:
        boxes: xyxy [B, N, 4].
        placements: [B, 4] (scale_x, scale_y, offset_x, offset_y).
    """
    scale, offset = placements[:, None, None].split(2, dim=-1)
    return ((boxes.unflatten(-1, (2, 2)) - offset) / scale).flatten(-2)  # corner by corner

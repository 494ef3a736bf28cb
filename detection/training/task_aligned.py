"""Task-aligned assignment: anchors that both classify and locate an object well answer for it.

Letters in shapes: B batch, A anchors, M objects of an image (padded), C columns of class logits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.errors import UserError
from detection.boxes import paired_iou
from detection.models.box_coders import BoxCoder
from detection.structures import RawPredictions, Target
from detection.training.assignment import Assignment

_LEAST_IOU = 1e-3  # below it boxes are told apart by the score and by the distance alone
_TIE = 1e-3  # what the distance to the object's centre counts beside IoU: it decides between equals


@dataclass(kw_only=True, slots=True)
class TaskAlignedConfig:
    anchors_per_object: int = 13
    """The best so many anchors of an object answer for it."""
    score_power: float = 1.0
    """alpha: how much an anchor's score of the object's class counts."""
    iou_power: float = 6.0
    """beta: how much the IoU of its box with the object counts."""
    least_side: float = 2.0
    """A smaller object counts as that wide and high, in anchors of the finest map, when anchors inside it are sought. At 2
    every object has four anchors or so, however small."""
    least_quality: float = 0.05
    """The best anchor of an object learns at least this quality. An object that no box overlaps yet would teach nothing
    otherwise."""

    def validate(self) -> None:
        if self.anchors_per_object < 1:
            raise UserError(f"assigner.anchors_per_object must be at least 1, got {self.anchors_per_object}")
        if self.score_power < 0 or self.iou_power < 0:
            raise UserError(
                f"assigner.score_power and assigner.iou_power must not be negative, got {self.score_power} and "
                f"{self.iou_power}"
            )
        if self.least_side < 0:
            raise UserError(f"assigner.least_side must not be negative, got {self.least_side}")
        if not 0 <= self.least_quality <= 1:
            raise UserError(f"assigner.least_quality must be in [0, 1], got {self.least_quality}")


class TaskAlignedAssigner:
    """The assignment of TOOD (arXiv 2108.07755, section 3.2).

    The alignment of an anchor with an object is t = s^alpha * u^beta: s its score of the object's class, u the IoU of its
    box with the object. Of the anchors whose centre lies inside the object, those with the highest alignment are its
    positives. An anchor that several objects want goes to the one that its box overlaps most. The quality of an object's
    positives is t, scaled so that the highest equals their highest IoU.

    Between equals the anchor nearer to the object's centre wins, and the object nearer to the anchor.

    Args:
        config: see ``TaskAlignedConfig``.
        box_coder: the code that the predictions are written in.
        first_column: of the class logits that label 0 has.
    """

    def __init__(self, config: TaskAlignedConfig, box_coder: BoxCoder, first_column: int = 0) -> None:
        config.validate()
        self.config = config
        self.box_coder = box_coder
        self.first_column = first_column

    @torch.no_grad()
    def __call__(self, raw: RawPredictions, target: Target) -> Assignment:
        """See ``Assigner``. An image without objects has no positive."""
        predicted = self.box_coder.decode(raw.codes.float(), raw.anchors)
        return self.assign(predicted, raw.class_logits.float(), target, raw.anchors)

    def assign(self, predicted: Tensor, class_logits: Tensor, target: Target, anchors: Tensor) -> Assignment:
        """Assign by boxes and logits.

        Args:
            predicted: float32 [B, A, 4], the boxes that the anchors predict, xyxy.
            class_logits: float32 [B, A, C].
            target: the objects [B, M, ...].
            anchors: float32 [A, 4].
        """
        boxes, labels, valid = target
        B, M = valid.shape
        A = len(anchors)
        if M == 0:
            none = predicted.new_zeros((B, A))
            return Assignment(none.bool(), none.long(), none)
        iou = paired_iou(boxes, predicted)  # [B, M, A]
        columns = (labels + self.first_column)[..., None].expand(B, M, A)
        log_scores = F.logsigmoid(class_logits.transpose(1, 2).gather(1, columns))
        # In logarithms: u^6 of a small overlap would vanish in float32.
        alignment = self.config.score_power * log_scores
        alignment = alignment + self.config.iou_power * iou.clamp(min=_LEAST_IOU).log()
        inside, closeness = self._places(boxes, anchors)

        wish = torch.where(inside & valid[..., None], alignment + _TIE * closeness, -torch.inf)
        best, chosen = wish.topk(min(self.config.anchors_per_object, A), dim=2)
        wanted = torch.zeros_like(inside).scatter(2, chosen, best > -torch.inf)  # [B, M, A]
        objects = torch.where(wanted, iou + _TIE * closeness, -1.0).argmax(1)  # [B, A]
        positive = wanted.any(1)

        # Over the anchors that an object got in the end: its highest alignment and its highest IoU.
        own = wanted & (objects[:, None] == torch.arange(M, device=objects.device)[:, None])
        highest = torch.where(own, alignment, -torch.inf).amax(2)  # [B, M]
        best_iou = torch.where(own, iou, 0.0).amax(2).clamp(min=self.config.least_quality)
        share = (alignment.gather(1, objects[:, None])[:, 0] - highest.gather(1, objects)).exp()
        quality = torch.where(positive, share * best_iou.gather(1, objects), 0.0)
        return Assignment(positive, objects, quality)

    def _places(self, boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Where anchors lie in objects: inside or not [B, M, A], and closeness to the centre in 0..1 [B, M, A]."""
        finest = (anchors[:, 2] - anchors[:, 0]).amin()
        points = 0.5 * (anchors[:, :2] + anchors[:, 2:])
        centres = 0.5 * (boxes[..., :2] + boxes[..., 2:])
        half = 0.5 * (boxes[..., 2:] - boxes[..., :2]).clamp(min=self.config.least_side * finest)
        offsets = (points - centres[:, :, None]).abs()  # [B, M, A, 2]
        inside = (offsets < half[:, :, None]).all(-1)
        closeness = 1 / (1 + offsets.amax(-1) / finest)
        return inside, closeness

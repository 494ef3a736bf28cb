"""The loss of LiteDet: quality focal loss on classes, GIoU and distribution focal loss on boxes.

Letters in shapes: B batch, A anchors, M objects of an image (padded).
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.errors import UserError
from detection.boxes import giou
from detection.models.box_coders import DistributionBoxCoder, log_softmax
from detection.models.detector import Detector, DetectorConfig
from detection.structures import RawPredictions, Target
from detection.training.losses import DetectionLoss, LossConfig, normaliser_over_processes
from detection.training.task_aligned import TaskAlignedAssigner, TaskAlignedConfig


@dataclass(kw_only=True, slots=True)
class LiteDetLossConfig(LossConfig):
    kind: Literal["litedet"] = "litedet"
    """Which loss this config describes."""
    assigner: TaskAlignedConfig = field(default_factory=TaskAlignedConfig)
    """Which anchors answer for which object."""
    classification_weight: float = 1.0
    """Weight of the classification loss."""
    box_weight: float = 2.0
    """Weight of the box loss (GIoU)."""
    distribution_weight: float = 0.25
    """Weight of the loss on the distributions of the boxes' sides."""
    one_to_one_weight: float = 1.0
    """Weight of the whole loss of a one-to-one head, where the network has one."""
    focal_gamma: float = 2.0
    """How strongly the classification loss forgets scores that are right already."""

    def validate(self) -> None:
        self.assigner.validate()
        if min(self.classification_weight, self.box_weight, self.distribution_weight, self.one_to_one_weight) < 0:
            raise UserError(
                "loss.classification_weight, box_weight, distribution_weight and one_to_one_weight must not be negative"
            )
        if self.focal_gamma < 1:
            raise UserError(f"loss.focal_gamma must be at least 1, got {self.focal_gamma}")

    def check(self, model: DetectorConfig) -> None:
        if model.score != "sigmoid" or model.background_column or not _distributions(model):
            raise UserError(
                f"loss.kind litedet trains sigmoid scores and distributions, which a model of kind {model.kind} does not "
                "give; take a recipe of kind litedet"
            )

    def fitted(self, model: DetectorConfig) -> tuple["LiteDetLossConfig", str]:
        return self, ""

    def build(self, model: Detector) -> "LiteDetLoss":
        self.check(model.config)
        box_coder = model.config.box_coder()
        assert isinstance(box_coder, DistributionBoxCoder)
        return LiteDetLoss(self, box_coder, getattr(model.config, "one_to_one", False))


def _distributions(model: DetectorConfig) -> bool:
    return isinstance(model.box_coder(), DistributionBoxCoder)


class LiteDetLoss(DetectionLoss):
    """Quality focal loss of every anchor; GIoU and distribution focal loss of the positives, each weighted by its quality.

    All three are summed over the batch and divided by the sum of the qualities in it (TOOD, arXiv 2108.07755, section 3.3;
    GFL, arXiv 2006.04388, section 3.3). Across processes that sum is the mean over all of them, so that an image weighs the
    same however images fall on GPUs.

    Args:
        config: see ``LiteDetLossConfig``.
        box_coder: the code that the predictions are written in.
        one_to_one: whether the second half of the anchors belongs to a one-to-one head: the same loss, with the best anchor of
            each object alone (consistent dual assignment, YOLOv10, arXiv 2405.14458, section 3.1).
    """

    def __init__(self, config: LiteDetLossConfig, box_coder: DistributionBoxCoder, one_to_one: bool = False) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.box_coder = box_coder
        self.assigner = TaskAlignedAssigner(config.assigner, box_coder)
        alone = replace(config.assigner, anchors_per_object=1)
        self.one_to_one = TaskAlignedAssigner(alone, box_coder) if one_to_one else None

    def forward(self, raw: RawPredictions, target: Target) -> dict[str, Tensor]:
        """See ``DetectionLoss``; the parts are ``loss_class``, ``loss_box`` and ``loss_distribution``, and with a one-to-one head
        ``loss_one_to_one``, the weighted sum of its three."""
        if self.one_to_one is None:
            return self._of_head(raw, target, self.assigner)
        first, second = (RawPredictions(*part) for part in zip(*(x.chunk(2, -2) for x in raw), strict=True))
        losses = self._of_head(first, target, self.assigner)
        loss = self.config.one_to_one_weight * self._of_head(second, target, self.one_to_one)["loss"]
        return {**losses, "loss": losses["loss"] + loss, "loss_one_to_one": loss}

    def _of_head(self, raw: RawPredictions, target: Target, assigner: TaskAlignedAssigner) -> dict[str, Tensor]:
        logits, codes, anchors = raw.class_logits.float(), raw.codes.float(), raw.anchors
        B, A = logits.shape[:2]
        predicted = self.box_coder.decode(codes, anchors)
        with torch.no_grad():
            positive, objects, quality = assigner.assign(predicted.detach(), logits.detach(), target, anchors)
            if target.valid.shape[1]:
                labels = torch.gather(target.labels, 1, objects)
                boxes = torch.gather(target.boxes, 1, objects[..., None].expand(B, A, 4))
            else:  # no image of the batch has an object
                labels, boxes = torch.zeros_like(objects), torch.zeros_like(predicted)
            # Anchors without an object get themselves as target: finite numbers that then weigh nothing.
            boxes = torch.where(positive[..., None], boxes, anchors)
            qualities = torch.zeros_like(logits).scatter(2, labels[..., None], quality[..., None])
            bin_weights = self.box_coder.bin_weights(boxes, anchors)
            normaliser = normaliser_over_processes(quality.sum())

        errors = F.binary_cross_entropy_with_logits(logits, qualities, reduction="none")
        loss_class = (errors * (qualities - logits.sigmoid()).abs() ** self.config.focal_gamma).sum() / normaliser
        loss_box = ((1 - giou(predicted, boxes)) * quality).sum() / normaliser
        log_probabilities = log_softmax(codes.unflatten(-1, (4, -1)))
        surprise = -(bin_weights * log_probabilities).sum(-1).mean(-1)  # [B, A]
        loss_distribution = (surprise * quality).sum() / normaliser

        loss = (
            self.config.classification_weight * loss_class
            + self.config.box_weight * loss_box
            + self.config.distribution_weight * loss_distribution
        )
        return {
            "loss": loss,
            "loss_class": loss_class,
            "loss_box": loss_box,
            "loss_distribution": loss_distribution,
            "positives": positive.sum() / B,
        }

"""The loss of SSD: smooth L1 on box codes, cross entropy with hard-negative mining or focal loss on classes.

Letters in shapes: B batch, A anchors, M objects of an image (padded), C columns of class logits.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from backbones.errors import UserError
from detection.models.box_coders import BoxCoder, SSDBoxCoder
from detection.models.detector import Detector, DetectorConfig, Score
from detection.structures import RawPredictions, Target
from detection.training.assignment import MatcherConfig, SSDAssigner
from detection.training.losses import DetectionLoss, LossConfig, normaliser_over_processes


@dataclass(kw_only=True, slots=True)
class SSDLossConfig(LossConfig):
    kind: Literal["ssd"] = "ssd"
    """Which loss this config describes."""
    classification: Literal["cross_entropy", "focal"] = "cross_entropy"
    """cross_entropy: softmax over classes and background with hard-negative mining (SSD). focal: sigmoid focal loss on every
    anchor, without mining (RetinaNet)."""
    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    """How anchors are matched with objects."""
    negatives_per_positive: float = 3.0
    """cross_entropy only: hardest negatives that count in each image, for each of its positives."""
    min_negatives: int = 3
    """cross_entropy only: hardest negatives that count in each image at least, also in one without objects."""
    box_weight: float = 1.0
    """Factor of the box loss in the total loss."""
    classification_weight: float = 1.0
    """Factor of the classification loss in the total loss."""
    smooth_l1_beta: float = 1.0
    """Error at which the box loss turns from quadratic to linear, in units of the box code."""
    label_smoothing: float = 0.0
    """cross_entropy only: fraction of the class target that is spread evenly over all columns, from 0 to below 1."""
    focal_alpha: float = 0.25
    """focal only: weight of a column that should be 1; the others have 1 - focal_alpha."""
    focal_gamma: float = 2.0
    """focal only: exponent that reduces the loss of what is already predicted well. 0: no reduction."""

    def validate(self) -> None:
        self.matcher.validate()
        if self.negatives_per_positive < 0 or self.min_negatives < 0:
            raise UserError("loss.negatives_per_positive and loss.min_negatives must not be negative")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"loss.label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.label_smoothing and self.classification == "focal":
            raise UserError("loss.label_smoothing belongs to cross_entropy; with the focal loss it would do nothing")
        if self.smooth_l1_beta <= 0:
            raise UserError(f"loss.smooth_l1_beta must be positive, got {self.smooth_l1_beta}")

    @property
    def trains(self) -> Score:
        """How the scores that this loss trains are computed from logits."""
        return "softmax" if self.classification == "cross_entropy" else "sigmoid"

    def check(self, model: DetectorConfig) -> None:
        if not isinstance(model.box_coder(), SSDBoxCoder):
            raise UserError(
                f"loss.kind ssd trains SSD's box codes, which a model of kind {model.kind} does not give; take a recipe of "
                "kind ssdlite"
            )
        if model.score != self.trains:
            raise UserError(
                f"loss.classification {self.classification} trains {self.trains} scores, model.score is {model.score}; "
                "change one of them"
            )

    def fitted(self, model: DetectorConfig) -> tuple["SSDLossConfig", str]:
        wanted: Literal["cross_entropy", "focal"] = "cross_entropy" if model.score == "softmax" else "focal"
        if self.classification == wanted:
            return self, ""
        fitted = replace(self, classification=wanted)
        remark = f"loss.classification is {wanted} now, which trains {model.score} scores"
        if wanted == "focal" and self.label_smoothing:
            remark += f"; loss.label_smoothing {self.label_smoothing:g}, which belongs to cross_entropy, is 0"
            fitted.label_smoothing = 0.0
        return fitted, remark

    def build(self, model: Detector) -> "SSDLoss":
        self.check(model.config)
        return SSDLoss(self, model.config.box_coder(), model.config.background_column)


class SSDLoss(DetectionLoss):
    """Smooth L1 on the box code of the positives, and a classification loss on positives and negatives.

    Both are summed over the batch and divided by the number of positives in it (SSD, arXiv 1512.02325, eq. 1). Across
    processes that number is the mean over all of them, so that an image weighs the same however images fall on GPUs.

    Args:
        config: see ``SSDLossConfig``.
        box_coder: the code that the predictions are written in.
        background_column: whether column 0 of the class logits stands for the background; labels start at column 1 then.
    """

    def __init__(self, config: SSDLossConfig, box_coder: BoxCoder, background_column: bool) -> None:
        super().__init__()
        config.validate()
        if config.classification == "cross_entropy" and not background_column:
            raise UserError("cross_entropy needs a background column; set model.score to softmax or use the focal loss")
        self.config = config
        self.box_coder = box_coder
        self.assigner = SSDAssigner(config.matcher)
        self.first_column = int(background_column)

    def forward(self, raw: RawPredictions, target: Target) -> dict[str, Tensor]:
        """See ``DetectionLoss``; the parts are ``loss_box`` and ``loss_class``."""
        logits, codes = raw.class_logits.float(), raw.codes.float()
        B, A, _ = logits.shape
        with torch.no_grad():
            positive, objects, _ = self.assigner(raw, target)
            if target.valid.shape[1]:
                labels = torch.gather(target.labels, 1, objects)
                boxes = torch.gather(target.boxes, 1, objects[..., None].expand(B, A, 4))
            else:  # no image of the batch has an object
                labels, boxes = torch.zeros_like(objects), torch.zeros_like(codes)
            # The target of an anchor without an object is the anchor itself: finite numbers, which are then masked out.
            boxes = torch.where(positive[..., None], boxes, raw.anchors)
            columns = torch.where(positive, labels + self.first_column, 0)
            normaliser = normaliser_over_processes(positive.sum().float())

        box_errors = F.smooth_l1_loss(
            codes,
            self.box_coder.encode(boxes, raw.anchors),
            reduction="none",
            beta=self.config.smooth_l1_beta,
        ).sum(-1)
        loss_box = (box_errors * positive).sum() / normaliser

        if self.config.classification == "focal":
            # Not F.one_hot: its int64 takes twice the memory of the logits. Without a background column a negative is a row of 0.
            hit = torch.ones_like(positive) if self.first_column else positive
            targets = torch.zeros_like(logits).scatter_(2, columns[..., None], hit[..., None].to(logits))
            focal = sigmoid_focal_loss(logits, targets, self.config.focal_alpha, self.config.focal_gamma)
            loss_class = focal.sum() / normaliser
        else:
            errors = F.cross_entropy(
                logits.flatten(0, 1), columns.flatten(), reduction="none", label_smoothing=self.config.label_smoothing
            ).view(B, A)
            counted = positive | self.hard_negatives(logits, positive)
            loss_class = (errors * counted).sum() / normaliser

        loss = self.config.box_weight * loss_box + self.config.classification_weight * loss_class
        positives = positive.sum() / B
        return {"loss": loss, "loss_box": loss_box, "loss_class": loss_class, "positives": positives}

    @torch.no_grad()
    def hard_negatives(self, logits: Tensor, positive: Tensor) -> Tensor:
        """The negatives of each image that look least like background (SSD, section 2.2, "Hard negative mining").

        Args:
            logits: float32 [B, A, C], column 0 the background.
            positive: bool [B, A].

        Returns:
            bool [B, A]: the ``negatives_per_positive`` times as many negatives as the image has positives, and at least
            ``min_negatives``, with the lowest probability of background.
        """
        background = (logits[..., 0] - logits.logsumexp(-1)).masked_fill(positive, float("inf"))
        rank = background.argsort(dim=1, stable=True).argsort(dim=1)  # 0 = the hardest
        wanted = (positive.sum(1, keepdim=True) * self.config.negatives_per_positive).floor()
        wanted = wanted.clamp(min=self.config.min_negatives)
        return (rank < wanted) & ~positive

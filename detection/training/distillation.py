"""Learning from a trained detector beside the labels.

Letters in shapes: B batch, A anchors, C columns of class logits, D numbers of a box code.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.errors import UserError
from detection.models.box_coders import DistributionBoxCoder, log_softmax
from detection.models.build import build_detector
from detection.models.detector import Detector, DetectorConfig
from detection.structures import RawPredictions
from detection.training.losses import normaliser_over_processes
from detection.weights.hub import locate
from detection.weights.native import read_detector

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class DistillationConfig:
    class_weight: float = 1.0
    """Weight of the loss between the scores of the two detectors."""
    box_weight: float = 1.0
    """Weight of the loss between their boxes."""
    temperature: float = 2.0
    """Logits of the boxes' distributions are divided by this before they are compared; higher values show more of what the
    teacher holds possible. LiteDet alone."""

    def validate(self) -> None:
        if self.class_weight < 0 or self.box_weight < 0:
            raise UserError("distillation.class_weight and distillation.box_weight must not be negative")
        if not self.temperature > 0:
            raise UserError(f"distillation.temperature must be above 0, got {self.temperature}")


def read_teacher(source: str | Path, student: DetectorConfig, names: tuple[str, ...]) -> tuple[Detector, Tensor]:
    """A trained detector that a training learns from.

    Args:
        source: a file of ours or another library's, or a published name.
        student: of the network that is trained; teacher and student must have the same anchors and mean the same by a box code.
        names: class names of the training.

    Returns:
        The teacher at the student's input size, in evaluation mode and without gradients; and int64 [C], its column of class
        logits for each column of the student.

    Raises:
        UserError: another kind of detector, other anchors, another box code, other classes.
        FileNotFoundError: there is no such file.
    """
    teacher, info = read_detector(locate(str(source)))
    if info.model.kind != student.kind:
        raise UserError(
            f"the teacher {source} is of kind {info.model.kind}, the student of kind {student.kind}; they must be of one kind, "
            f"because what they say is compared anchor by anchor: train a larger {student.kind} as teacher"
        )
    missing = [name for name in names if name not in info.class_names]
    if missing or len(info.class_names) != len(names):
        raise UserError(
            f"the teacher {source} has the classes {', '.join(info.class_names)}; the training data has {', '.join(names)}. "
            "They must be the same"
        )
    config = info.model.replaced(input_size=student.input_size)
    same_size = build_detector(config, len(names))
    same_size.load_state_dict(teacher.state_dict())
    same_code = (config.box_coder().code_size, config.score, config.background_column) == (
        student.box_coder().code_size, student.score, student.background_column,
    )  # fmt: skip
    anchors = build_detector(student, len(names)).anchors
    if not same_code or not torch.equal(same_size.anchors, anchors) or not _same_bins(config, student):
        raise UserError(
            f"the teacher {source} has other anchors or another box code than the student ({len(same_size.anchors)} anchors with "
            f"{config.box_coder().code_size} numbers, the student {len(anchors)} with {student.box_coder().code_size}); "
            "model.features, model.anchors, model.bins and model.first_bin must be the same"
        )
    if config.resize != student.resize:
        raise UserError(
            f"the teacher {source} takes images by resize {config.resize}, the student by {student.resize}; set "
            f"--model.resize {config.resize}"
        )
    first = int(student.background_column)
    columns = [*range(first), *(info.class_names.index(name) + first for name in names)]
    _log.info(
        "learning from %s too, %.1f million parameters", source, sum(p.numel() for p in teacher.parameters()) / 1e6
    )
    return same_size.eval().requires_grad_(False), torch.tensor(columns)


def _same_bins(teacher: DetectorConfig, student: DetectorConfig) -> bool:
    ours, theirs = teacher.box_coder(), student.box_coder()
    if isinstance(ours, DistributionBoxCoder) and isinstance(theirs, DistributionBoxCoder):
        return ours.first == theirs.first
    return type(ours) is type(theirs)


class Distillation(torch.nn.Module):
    """The teacher, and the difference between what it and the student say of the same images.

    Every anchor weighs as much as the teacher is sure of an object there: its highest score. Sums over the batch are divided by
    the sum of those weights, over all processes.

    * Scores. Sigmoid: cross entropy with the teacher's scores as targets, each times the squared difference of the two scores
      (the quality focal loss, arXiv 2006.04388, eq. 1, with the teacher's score as quality). Softmax: the Kullback-Leibler
      divergence of the columns (arXiv 1503.02531).
    * Boxes. Distributions: the divergence of each side's distribution at a temperature (localisation distillation, arXiv
      2102.12252, section 3.2). Other codes: smooth L1.

    Args:
        config: see ``DistillationConfig``.
        teacher: what ``read_teacher`` returns.
        columns: int64 [C], as well.
    """

    columns: Tensor

    def __init__(self, config: DistillationConfig, teacher: Detector, columns: Tensor) -> None:
        super().__init__()
        config.validate()
        self.config = replace(config)
        self.teacher = teacher
        self.first_column = int(teacher.config.background_column)
        self.softmax = teacher.config.score == "softmax"
        self.distributions = isinstance(teacher.config.box_coder(), DistributionBoxCoder)
        self.register_buffer("columns", columns, persistent=False)

    def train(self, mode: bool = True) -> Distillation:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, raw: RawPredictions) -> dict[str, Tensor]:
        """The two parts of the loss, weighted.

        Args:
            images: uint8 [B, 3, H, W], as the student got them.
            raw: what the student said of them. Of more anchors than the teacher's (a one-to-one head) the first count.

        Returns:
            Scalars ``loss_distilled_class`` and ``loss_distilled_box``.
        """
        with torch.no_grad():
            said = self.teacher(images)
            theirs = said.class_logits.float().index_select(2, self.columns)
            codes = said.codes.float()
            scores = theirs.softmax(-1) if self.softmax else theirs.sigmoid()
            weight = scores[..., self.first_column :].amax(-1)  # [B, A]
            normaliser = normaliser_over_processes(weight.sum())
        A = theirs.shape[1]
        ours, our_codes = raw.class_logits[:, :A].float(), raw.codes[:, :A].float()
        if self.softmax:
            class_errors = F.kl_div(ours.log_softmax(-1), scores, reduction="none").sum(-1) * weight
        else:
            difference = (scores - ours.sigmoid()).abs() ** 2
            class_errors = F.binary_cross_entropy_with_logits(ours, scores, reduction="none") * difference
        if self.distributions:
            T = self.config.temperature
            wanted = log_softmax((codes / T).unflatten(-1, (4, -1)))
            given = log_softmax((our_codes / T).unflatten(-1, (4, -1)))
            box_errors = F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1).mean(-1) * T**2
        else:
            box_errors = F.smooth_l1_loss(our_codes, codes, reduction="none").sum(-1)
        return {
            "loss_distilled_class": self.config.class_weight * class_errors.sum() / normaliser,
            "loss_distilled_box": self.config.box_weight * (box_errors * weight).sum() / normaliser,
        }

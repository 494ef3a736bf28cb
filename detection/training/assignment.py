"""Which anchor is responsible for which object, and how well it fits.

Letters in shapes: B batch, A anchors, M objects of an image (padded).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from backbones.errors import UserError
from detection.boxes import paired_iou
from detection.structures import RawPredictions, Target


@dataclass(kw_only=True, slots=True)
class MatcherConfig:
    iou_threshold: float = 0.5
    """Lowest IoU, above 0 and at most 1, at which an anchor is matched with the object that it overlaps most."""
    forced_rounds: int = 3
    """Rounds in which every object that has claimed no anchor yet claims the free one that it overlaps most, however little. 0:
    no claims, the threshold alone decides."""

    def validate(self) -> None:
        if not 0 < self.iou_threshold <= 1:
            raise UserError(f"matcher.iou_threshold must be in (0, 1], got {self.iou_threshold}")
        if self.forced_rounds < 0:
            raise UserError(f"matcher.forced_rounds must not be negative, got {self.forced_rounds}")


class Assignment(NamedTuple):
    """What the anchors of a batch are to learn.

    Attributes:
        positive: bool [B, A], the anchors that are responsible for an object.
        objects: int64 [B, A], the object of each anchor (its position in 0..M-1); meaningless where not positive.
        quality: float32 [B, A] in 0..1, the score that the anchor should give its object's class; 0 where not positive.
    """

    positive: Tensor
    objects: Tensor
    quality: Tensor


class Matches(NamedTuple):
    """The first two fields of ``Assignment``."""

    positive: Tensor
    objects: Tensor


class Assigner(Protocol):
    """Decides what each anchor learns, for a whole batch, without a round trip to the host."""

    def __call__(self, raw: RawPredictions, target: Target) -> Assignment:
        """Assign objects to anchors.

        Args:
            raw: what the network says now; an assigner may look at it or at its anchors alone.
            target: the objects [B, M, ...].
        """


class SSDAssigner:
    """SSD's matching (arXiv 1512.02325, section 2.2). It looks at the anchors alone; every positive has quality 1.

    An anchor takes the object with the highest IoU, if that is at least the threshold. Before that every object gets the
    anchor that overlaps it most, however little. Where several objects have the same best anchor, the one with the highest
    IoU gets it and the others claim the best anchor that is left in the next round; small objects that stand close
    together would lose their only anchor otherwise.
    """

    def __init__(self, config: MatcherConfig) -> None:
        config.validate()
        self.config = config

    def __call__(self, raw: RawPredictions, target: Target) -> Assignment:
        """See ``Assigner``. An image without objects has no positive."""
        positive, objects = self.match(target.boxes, target.valid, raw.anchors)
        return Assignment(positive, objects, positive.to(raw.anchors.dtype))

    def match(self, boxes: Tensor, valid: Tensor, anchors: Tensor) -> Matches:
        """Match anchors and objects.

        Args:
            boxes: xyxy [B, M, 4] in the anchors' pixels.
            valid: bool [B, M], false on padding.
            anchors: xyxy [A, 4].

        Returns:
            See ``Matches``.
        """
        B, M = valid.shape
        A = len(anchors)
        if M == 0:
            none = anchors.new_zeros((B, A), dtype=torch.bool)
            return Matches(none, none.long())
        iou = torch.where(valid[..., None], paired_iou(boxes, anchors), -1.0)  # [B, M, A]
        best, objects = iou.max(1)  # [B, A]
        positive = best >= self.config.iou_threshold

        claimed = torch.zeros_like(positive)
        unserved = valid
        order = torch.arange(M, device=valid.device).expand(B, M)
        for _ in range(self.config.forced_rounds):
            # Every unserved object bids its IoU for one anchor; there the highest bid wins, on a tie the first object.
            # An object that overlaps no anchor at all does not bid: it has nothing to learn from one.
            bid, anchor = iou.masked_fill(claimed[:, None], -1.0).max(2)  # [B, M]
            bid = torch.where(unserved, bid, -1.0)
            highest = iou.new_zeros((B, A)).scatter_reduce(1, anchor, bid, "amax")
            leads = (bid > 0) & (bid == highest.gather(1, anchor))
            winner = torch.full_like(objects, M).scatter_reduce(1, anchor, torch.where(leads, order, M), "amin")
            won = winner < M  # [B, A]
            objects = torch.where(won, winner, objects)
            claimed = claimed | won
            unserved = unserved & ~(leads & (winner.gather(1, anchor) == order))
        return Matches(positive | claimed, objects)

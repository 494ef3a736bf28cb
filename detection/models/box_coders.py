"""How a box is written relative to an anchor.

Letters in shapes: D numbers of a box code; ``...`` any leading dimensions.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from detection.boxes import xyxy_to_cxcywh


class BoxCoder(Protocol):
    """The meaning of the numbers that a detector gives for a box.

    Attributes:
        code_size: D, how many numbers there are for each anchor.
    """

    code_size: int

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """xyxy boxes [..., 4] and their anchors [..., 4] -> codes [..., D] that ``decode`` turns back into the boxes."""

    def decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        """Codes [..., D] and their anchors [..., 4] -> xyxy boxes [..., 4] in the anchors' pixels, not clipped."""


class SSDBoxCoder:
    """The box code of Faster R-CNN (arXiv 1506.01497, eq. 2) with SSD's weights.

    x, y: shift of the centre in units of the anchor's width and height, times 10; w, h: logarithm of box side over anchor
    side, times 5. The weights bring the four numbers to about unit variance ("variances" 0.1 and 0.2 in Caffe's SSD).
    """

    code_size = 4
    centre_weight = 10.0
    size_weight = 5.0
    # 62.5 times the anchor's side is larger than any image; the cap keeps the sides of an untrained network's boxes finite.
    max_log_ratio = math.log(1000 / 16)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """xyxy boxes [..., 4] and their anchors [..., 4] -> codes [..., 4] (x, y, w, h).

        A side of zero has no logarithm: sides shorter than a thousandth of a pixel count as a thousandth.
        """
        centre, sides = xyxy_to_cxcywh(boxes).split(2, -1)
        anchor_centre, anchor_sides = xyxy_to_cxcywh(anchors).split(2, -1)
        shift = self.centre_weight * (centre - anchor_centre) / anchor_sides
        log_ratio = self.size_weight * torch.log(sides.clamp(min=1e-3) / anchor_sides)
        return torch.cat((shift, log_ratio), -1)

    def decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        """Codes [..., 4] and their anchors [..., 4] -> xyxy boxes [..., 4] in the anchors' pixels, not clipped."""
        shift, log_ratio = codes.split(2, -1)
        top_left, bottom_right = anchors.split(2, -1)
        sides = bottom_right - top_left
        centre = top_left + sides * (shift / self.centre_weight + 0.5)
        half = sides * (log_ratio / self.size_weight).clamp(max=self.max_log_ratio).exp() * 0.5
        return torch.cat((centre - half, centre + half), -1)

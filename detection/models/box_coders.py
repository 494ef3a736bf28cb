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


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension [..., N], for a small N.

    torch's own on a CPU takes seven times as long over a last dimension of 8 as over a first one. A compiler or an exporter
    gets the plain operator.
    """
    if torch.compiler.is_compiling():
        return logits.softmax(-1)
    return logits.movedim(-1, 0).softmax(0).movedim(0, -1)


def log_softmax(logits: Tensor) -> Tensor:
    """The logarithm of ``softmax``, computed without it."""
    if torch.compiler.is_compiling():
        return logits.log_softmax(-1)
    return logits.movedim(-1, 0).log_softmax(0).movedim(0, -1)


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


class DistributionBoxCoder:
    """Each side of a box as a distribution over its distance from the anchor's centre (GFL, arXiv 2006.04388, section 3.2).

    A code is four times ``bins`` logits, for left, top, right, bottom. Softmax makes probabilities of them, and their mean
    over the bins is the distance in units of the anchor's width or height. Bin i stands for a distance of i + ``first``; with
    ``first`` below zero also a point just outside of a box can say where the box is, as it must for a box that lies between
    the points.

    Args:
        bins: number of bins, at least 2.
        first: distance of the first bin, in anchor sides.

    Attributes:
        code_size: D, 4 * bins.
    """

    def __init__(self, bins: int = 8, first: float = 0.0) -> None:
        self.bins = bins
        self.first = first
        self.code_size = 4 * bins

    def bin_weights(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """xyxy boxes [..., 4] and their anchors [..., 4] -> weights of the bins [..., 4, bins] whose mean is the box.

        A distance between two bins shares its weight among them (GFL, eq. 6). One beyond the bins counts as the outermost.
        """
        top_left, bottom_right = anchors.split(2, -1)
        sides, centre = bottom_right - top_left, 0.5 * (top_left + bottom_right)
        distances = torch.cat((centre - boxes[..., :2], boxes[..., 2:] - centre), -1) / torch.cat((sides, sides), -1)
        places = (distances - self.first).clamp(0, self.bins - 1)
        bins = torch.arange(self.bins, device=boxes.device, dtype=places.dtype)
        return (1 - (places[..., None] - bins).abs()).clamp(min=0)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """xyxy boxes [..., 4] and their anchors [..., 4] -> codes [..., 4 * bins] that ``decode`` turns back into the boxes.

        Sides further from the centre than the last bin, or nearer than the first, come back at that bin.
        """
        return self.bin_weights(boxes, anchors).clamp(min=1e-9).log().flatten(-2)

    def decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        """Codes [..., 4 * bins] and their anchors [..., 4] -> xyxy boxes [..., 4] in the anchors' pixels, not clipped."""
        probabilities = softmax(codes.unflatten(-1, (4, self.bins)))
        bins = torch.arange(self.bins, device=codes.device, dtype=probabilities.dtype)
        distances = (probabilities * bins).sum(-1) + self.first  # no matrix product: autocast would round it to half
        top_left, bottom_right = anchors.split(2, -1)
        sides, centre = bottom_right - top_left, 0.5 * (top_left + bottom_right)
        before, after = distances.split(2, -1)
        corner = centre - before * sides
        return torch.cat((corner, torch.maximum(corner, centre + after * sides)), -1)

"""How a box is written relative to an anchor."""

import math

import torch
from torch import Tensor

from detection.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh


class BoxCoder:
    """The box code of Faster R-CNN (arXiv 1506.01497, eq. 2) with SSD's weights.

    x, y: shift of the centre in units of the anchor's width and height, times 10; w, h: logarithm of the ratio of the
    sides, times 5. The weights bring the four numbers to about unit variance ("variances" 0.1 and 0.2 of Caffe's SSD).
    """

    # exp(4.1) * the largest anchor leaves every picture: a cap there keeps an untrained network's boxes finite.
    max_log_ratio = math.log(1000 / 16)

    def __init__(self, weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)) -> None:
        self.weights = weights

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """xyxy boxes [..., 4] and their anchors [..., 4] -> encodings [..., 4] (x, y, w, h).

        A box without area has no logarithm: sides below a thousandth of a pixel count as that.
        """
        cx, cy, w, h = xyxy_to_cxcywh(boxes).unbind(-1)
        ax, ay, aw, ah = xyxy_to_cxcywh(anchors).unbind(-1)
        wx, wy, ww, wh = self.weights
        return torch.stack(
            (
                wx * (cx - ax) / aw,
                wy * (cy - ay) / ah,
                ww * torch.log(w.clamp(min=1e-3) / aw),
                wh * torch.log(h.clamp(min=1e-3) / ah),
            ),
            -1,
        )

    def decode(self, encodings: Tensor, anchors: Tensor) -> Tensor:
        """Encodings [..., 4] and their anchors [..., 4] -> xyxy boxes [..., 4] in the anchors' pixels, not clipped."""
        scaled = encodings / encodings.new_tensor(self.weights)
        shift, log_ratio = scaled[..., :2], scaled[..., 2:].clamp(max=self.max_log_ratio)
        centred = xyxy_to_cxcywh(anchors)
        centre, sides = centred[..., :2], centred[..., 2:]
        return cxcywh_to_xyxy(torch.cat((centre + shift * sides, sides * log_ratio.exp()), -1))

"""What a network that is only to predict computes at once: batch norms in the convolutions before them, outputs together."""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from backbones.layers import ConvNormAct
from detection.models.litedet import LiteDetHead
from detection.models.necks import DepthwiseSeparable

_Module = TypeVar("_Module", bound=nn.Module)


def fold_norms(model: _Module) -> _Module:
    """Fold every batch norm into the convolution before it, in place: the same function with half the layers."""
    for module in model.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()  # type: ignore[assignment]
    return model


def merge_outputs(model: _Module) -> _Module:
    """Merge what can be computed at once in the heads of a detector that is only to predict, in place: the same function.

    Not for a file that is quantised: boxes and classes would share one scale.
    """
    for module in model.modules():
        if isinstance(module, LiteDetHead):
            module.merge_outputs()
    return model


class SubtractedReLU6(nn.Module):
    """ReLU6 as 6 - relu(6 - relu(x)), each difference a depthwise 1x1 convolution. [B, C, H, W] -> the same shape.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.below, self.value = (nn.Conv2d(channels, channels, 1, groups=channels) for _ in range(2))
        for difference in (self.below, self.value):
            nn.init.constant_(difference.weight, -1.0)
            nn.init.constant_(difference.bias, 6.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        below: Tensor = torch.relu(self.below(torch.relu(x)))
        found: Tensor = self.value(below)
        return found


def clip_sums_in_blocks(model: _Module) -> _Module:
    """Clip what LiteDet's blocks add up by ``SubtractedReLU6``, in place: the same function to 1e-6, for ONNX Runtime on x86.

    There maps lie in blocks of channels (NCHWc), and Clip knows no blocks: each sum is brought back to planes, added, clipped
    and cut into blocks again, four operators of one thread. Relu and convolutions know them, and a convolution takes in the sum
    and the Relu after it: LiteDet at 320 px on one thread takes 17.6 in place of 19.3 ms.
    """
    for module in model.modules():
        if isinstance(module, DepthwiseSeparable) and module.act is not None:
            module.act = SubtractedReLU6(module.pointwise.conv.out_channels)  # type: ignore[assignment]
    return model

"""The bricks of the networks: convolution + batch norm + activation, channel rounding, padding modes.

Letters in shapes: B batch, C channels, H W height and width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.errors import UserError

PaddingMode = Literal["symmetric", "tf_same"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """Pixels to what a network was trained on: (pixel / 255 - mean) / std, on the device, where it costs nothing.

    Args:
        mean, std: of the channels R, G, B, in units of pixel / 255.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        # No part of the weights' tensors: they travel with the weights as plain numbers.
        self.register_buffer("mean", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(1, 3, 1, 1), persistent=False)
        self.set(mean, std)

    def set(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take other values, in place."""
        for buffer, values in ((self.mean, mean), (self.std, std)):
            buffer.copy_(torch.tensor(values, dtype=torch.float32).mul(255).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 or float [B, 3, H, W] in 0..255 -> float [B, 3, H, W]."""
        return (images.to(self.mean.dtype) - self.mean) / self.std


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``value``, at least one divisor and never below 90 % of ``value``.

    Halves go up. Channel counts scaled by a width multiplier go through this, so that they fill vector registers. The
    rule is the one of the networks the public weights come from (TensorFlow's slim MobileNetV2), so shapes agree.
    """
    rounded = max(divisor, int(value / divisor + 0.5) * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


def tf_same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one side of ``size`` pixels so that the output has ceil(size / stride) cells.

    TensorFlow's SAME rule: the total depends on the size, and the odd pixel goes to the end. Stride 2 over an even side
    pads the end alone, where a symmetric padding of one pixel looks one pixel further up and left.
    """
    # The textbook form is max((ceil(size / stride) - 1) * stride + kernel_size - size, 0). It depends on size % stride
    # alone, and compared like this a torch.compile with unknown sizes takes the remainder as a constant: one guard in
    # place of a formula in symbols that grows with every layer (seven times the compile time for the whole network).
    remainder = 0
    for remainder in range(stride):
        if size % stride == remainder:
            break
    total = max(kernel_size - (remainder or stride), 0)
    return total // 2, total - total // 2


class _ReLU6InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        F.hardtanh_(x, 0.0, 6.0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        # Where the result is 0 or 6 the input was there or beyond: the result tells as much as the input.
        passed: Tensor = torch.ops.aten.hardtanh_backward(gradient, result, 0.0, 6.0)
        return passed


class ReLU6(nn.ReLU6):
    """min(max(x, 0), 6), written over x.

    torch's own in-place form keeps a copy of x for the backward pass. The result is kept anyway, by the convolution after
    it, and tells as much: no copy, and a third less memory for activations.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a compiler decides itself what it keeps
            return F.relu6(x)
        if not x.requires_grad:  # prediction: no detour through autograd, half a millisecond of a network's 25
            return F.hardtanh_(x, 0.0, 6.0)
        result: Tensor = _ReLU6InPlace.apply(x)
        return result


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, ReLU6.

    The convolution and the norm are plain ``nn.Conv2d`` and ``nn.BatchNorm2d`` under the names ``conv`` and ``norm``.
    To fold them into one for prediction put the result of ``torch.nn.utils.fusion.fuse_conv_bn_eval`` in ``conv`` and
    an ``nn.Identity`` in ``norm``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel, odd.
        stride: step of the kernel.
        groups: ``in_channels`` for a depthwise convolution, 1 for a full one.
        activation: ReLU6 at the end, or nothing (a linear bottleneck).
        padding: "symmetric" pads (kernel_size - 1) / 2 on all sides, "tf_same" as TensorFlow does. With stride 1 both
            are the same. Padding is part of the weights: a network trained with one loses points with the other.
        norm_eps: added to the variance in the batch norm.
        norm_momentum: share of the new batch in the running statistics (torch's meaning: 1 - TensorFlow's decay).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: bool = True,
        padding: PaddingMode = "symmetric",
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise UserError(f"kernel_size is {kernel_size}; an odd number is needed")
        if padding not in ("symmetric", "tf_same"):
            raise UserError(f"padding is {padding!r}; it can be 'symmetric' or 'tf_same'")
        self.kernel_size = kernel_size
        self.stride = stride
        self.pads_itself = padding == "tf_same" and stride > 1
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=0 if self.pads_itself else (kernel_size - 1) // 2,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)
        self.act = ReLU6() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)]."""
        if self.pads_itself:
            top, bottom = tf_same_padding(x.shape[2], self.kernel_size, self.stride)
            left, right = tf_same_padding(x.shape[3], self.kernel_size, self.stride)
            x = F.pad(x, (left, right, top, bottom))
        return self.act(self.norm(self.conv(x)))

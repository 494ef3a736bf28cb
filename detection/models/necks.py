"""Necks: from the backbone's maps to maps that have seen each other.

Letters in shapes: B batch, C channels, H W height and width of a map.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.errors import UserError
from backbones.features import FeatureSpec
from backbones.layers import ConvNormAct, PaddingMode, ReLU6

Layer = Callable[..., ConvNormAct]  # ConvNormAct with the batch norm values of the new layers filled in


class DepthwiseSeparable(nn.Module):
    """A depthwise and a 1x1 convolution, each with batch norm and ReLU6 (MobileNet, arXiv 1704.04861, section 3.1).

    With a shortcut (ResNet, arXiv 1512.03385, section 3.2) a map is added before the last ReLU6. The norm before the sum starts
    at zero, so that an untrained block hands on what it is given: a training of a few thousand steps then begins with what the
    pretrained backbone knows, and not behind a stack of random layers.

    [B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)].

    Args:
        in_channels, out_channels: C_in, C_out.
        kernel_size: of the depthwise convolution.
        layer: makes a convolution with its batch norm.
        stride, padding: of the depthwise convolution.
        shortcut: whether a map is added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        layer: Layer,
        stride: int = 1,
        padding: PaddingMode = "symmetric",
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.depthwise = layer(in_channels, in_channels, kernel_size, stride, groups=in_channels, padding=padding)
        self.pointwise = layer(in_channels, out_channels, 1, activation=not shortcut)
        self.act = ReLU6() if shortcut else None
        if shortcut:
            nn.init.zeros_(self.pointwise.norm.weight)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Maps [B, C_in, H, W] and, where it was asked for, what is added: [B, C_out, H, W]; None: the input itself."""
        found: Tensor = self.pointwise(self.depthwise(x))
        if self.act is None:
            return found
        summed: Tensor = self.act(found.add_(x if shortcut is None else shortcut))
        return summed


class Mix(nn.Module):
    """Two maps [B, C, H, W] each, concatenated and mixed into one that continues the first."""

    def __init__(self, width: int, depth: int, kernel_size: int, layer: Layer) -> None:
        super().__init__()
        self.first = DepthwiseSeparable(2 * width, width, kernel_size, layer, shortcut=True)
        self.more = nn.Sequential(
            *(DepthwiseSeparable(width, width, kernel_size, layer, shortcut=True) for _ in range(depth - 1))
        )

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        mixed: Tensor = self.more(self.first(torch.cat((x, other), 1), x))
        return mixed


class LightPAN(nn.Module):
    """A path aggregation network (arXiv 1803.01534, section 3.1) of depthwise separable convolutions, and one map more.

    Every map is brought to ``width`` channels. Top-down, from the coarsest, a map is concatenated with the one before,
    doubled in size, and the two are mixed; bottom-up the same with the one before at half its size. The additional map, of
    twice the last stride, is the sum of the halved last map before and after all that (as in NanoDet-Plus).

    Args:
        specs: the backbone's maps, from the finest; each stride is twice the one before.
        width: channels of every map that comes out.
        depth: depthwise separable convolutions that mix two maps.
        kernel_size: of the depthwise convolutions.
        padding: of the convolutions of stride 2.
        layer: makes a convolution with its batch norm.

    Attributes:
        feature_specs: what the maps are, from the finest; one more than came in.

    Raises:
        UserError: strides that do not double.
    """

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        width: int,
        depth: int,
        kernel_size: int,
        padding: PaddingMode,
        layer: Layer,
    ) -> None:
        super().__init__()
        strides = [spec.stride for spec in specs]
        if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
            raise UserError(f"the neck needs maps whose strides double, got strides {strides}; set model.features")

        def mix() -> Mix:
            return Mix(width, depth, kernel_size, layer)

        def halve() -> DepthwiseSeparable:
            return DepthwiseSeparable(width, width, kernel_size, layer, 2, padding)

        steps = range(len(specs) - 1)
        self.reduce = nn.ModuleList(layer(spec.channels, width, 1) for spec in specs)
        self.top_down = nn.ModuleList(mix() for _ in steps)
        self.halve = nn.ModuleList(halve() for _ in steps)
        self.bottom_up = nn.ModuleList(mix() for _ in steps)
        self.extra_before = halve()
        self.extra_after = halve()
        self.feature_specs = [FeatureSpec(width, stride) for stride in (*strides, 2 * strides[-1])]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C_k, H_k, W_k], from the finest -> maps [B, width, H_k, W_k] and the additional one."""
        reduced = [reduce(x) for reduce, x in zip(self.reduce, maps, strict=True)]
        last = len(reduced) - 1
        downward = [reduced[last]]  # the coarsest first
        for step, mix in enumerate(self.top_down):
            finer = reduced[last - 1 - step]
            downward.append(mix(finer, _doubled(downward[-1], finer)))
        found = [downward[last]]
        for step, (halve, mix) in enumerate(zip(self.halve, self.bottom_up, strict=True)):
            found.append(mix(downward[last - 1 - step], halve(found[-1])))
        found.append(self.extra_before(reduced[last]) + self.extra_after(found[-1]))
        return found


def _doubled(x: Tensor, like: Tensor) -> Tensor:
    """A map at twice its size, each cell four times; a row or column that the finer map has not is cut off."""
    x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    height, width = like.shape[-2:]
    return x if x.shape[-2:] == like.shape[-2:] else x[..., :height, :width]

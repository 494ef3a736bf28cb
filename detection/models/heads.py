"""SSDLite: the extra feature maps and the two prediction layers of every map.

Letters in shapes: B batch, H W height and width of a map, A anchors of all maps, C columns of class logits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from backbones.features import FeatureSpec
from backbones.layers import ConvNormAct, PaddingMode

Layer = Callable[..., ConvNormAct]  # ConvNormAct with the batch norm values of the new layers filled in


class ExtraBlock(nn.Sequential):
    """A map of half the size: 1x1 to half the channels, 3x3 depthwise of stride 2, 1x1 (MobileNetV2 paper, section 6.2).

    [B, C_in, H, W] -> [B, channels, ceil(H/2), ceil(W/2)].
    """

    def __init__(self, in_channels: int, channels: int, padding: PaddingMode, layer: Layer) -> None:
        middle = channels // 2
        super().__init__(
            layer(in_channels, middle, 1),
            layer(middle, middle, 3, stride=2, groups=middle, padding=padding),
            layer(middle, channels, 1),
        )


class Extras(nn.Module):
    """The feature maps after the backbone's last, each half the size of the one before.

    Args:
        last: the backbone's last map.
        channels: channels of each extra map.
        padding: padding of the convolutions of stride 2.
        layer: makes a convolution with its batch norm and activation.

    Attributes:
        feature_specs: channels and stride of each extra map, from the largest.
    """

    def __init__(self, last: FeatureSpec, channels: Sequence[int], padding: PaddingMode, layer: Layer) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.feature_specs: list[FeatureSpec] = []
        for width in channels:
            self.blocks.append(ExtraBlock(last.channels, width, padding, layer))
            last = FeatureSpec(width, last.stride * 2)
            self.feature_specs.append(last)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The backbone's last map [B, C, H, W] -> the extra maps, from the largest."""
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


class SeparableConv(nn.Sequential):
    """3x3 depthwise, batch norm, ReLU6, then 1x1 with a bias: SSDLite's prediction layer (MobileNetV2 paper, section 6.2)."""

    def __init__(self, in_channels: int, out_channels: int, layer: Layer) -> None:
        super().__init__(
            layer(in_channels, in_channels, 3, groups=in_channels),
            nn.Conv2d(in_channels, out_channels, 1),
        )

    @property
    def output(self) -> nn.Conv2d:
        """The last convolution, which makes the predictions."""
        output = self[-1]
        assert isinstance(output, nn.Conv2d)
        return output


class SSDLiteHead(nn.Module):
    """Box codes and class logits for every anchor of every map.

    Args:
        specs: the feature maps, from the finest.
        num_anchors: anchors per cell, one number per map.
        code_size: D, numbers of a box code.
        num_columns: C, columns of class logits.
        layer: makes a convolution with its batch norm and activation.
    """

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        num_anchors: Sequence[int],
        code_size: int,
        num_columns: int,
        layer: Layer,
    ) -> None:
        super().__init__()
        self.code_size = code_size
        self.num_columns = num_columns
        pairs = list(zip(specs, num_anchors, strict=True))
        self.box = nn.ModuleList(SeparableConv(spec.channels, code_size * n, layer) for spec, n in pairs)
        self.classes = nn.ModuleList(SeparableConv(spec.channels, num_columns * n, layer) for spec, n in pairs)

    def box_outputs(self) -> list[nn.Conv2d]:
        """The convolution of each map that makes the box codes."""
        return [layer.output for layer in self.box if isinstance(layer, SeparableConv)]

    def class_outputs(self) -> list[nn.Conv2d]:
        """The convolution of each map that makes the class logits."""
        return [layer.output for layer in self.classes if isinstance(layer, SeparableConv)]

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps [B, C_k, H_k, W_k] -> box codes [B, A, D], class logits [B, A, C]."""
        boxes = [per_anchor(layer(x), self.code_size) for layer, x in zip(self.box, maps, strict=True)]
        classes = [per_anchor(layer(x), self.num_columns) for layer, x in zip(self.classes, maps, strict=True)]
        return torch.cat(boxes, 1), torch.cat(classes, 1)


def per_anchor(x: Tensor, columns: int) -> Tensor:
    """[B, n * columns, H, W] -> [B, H * W * n, columns]. In channels-last memory this moves nothing."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, columns)


def names_of_parameters(model: nn.Module, layers: Sequence[nn.Module]) -> frozenset[str]:
    """Names in ``model.state_dict()`` of the parameters of some of its layers."""
    wanted = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in wanted)

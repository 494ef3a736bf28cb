"""The contract between a backbone and whatever stands on it.

Letters in shapes: B batch, C channels, H W height and width.
"""

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class FeatureSpec(NamedTuple):
    """What is known of a feature map before any image is seen.

    Attributes:
        channels: number of channels C of the map.
        stride: input pixels per cell, in both directions. Over an input of side n the map has ceil(n / stride) cells.
    """

    channels: int
    stride: int


class Backbone(nn.Module):
    """A network that gives named feature maps.

    Nobody looks inside a backbone: whoever needs a map asks for it by name when the backbone is built, and reads its
    channels and stride from ``feature_specs``.

    Attributes:
        feature_specs: every map this backbone can give, by name, from the finest to the coarsest.
        out_features: the names that ``forward`` returns, in the order of its dict.
    """

    feature_specs: dict[str, FeatureSpec]
    out_features: tuple[str, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Float images [B, 3, H, W], already normalised -> the maps of ``out_features``.

        Each is [B, C, ceil(H / stride), ceil(W / stride)] with the channels and stride of its spec.
        """

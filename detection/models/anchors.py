"""Anchors: the boxes that an SSD head corrects.

Everything but the choices (scales, ratios) is derived from the feature specs and the input size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.errors import UserError
from backbones.features import FeatureSpec
from detection.boxes import cxcywh_to_xyxy

Size = tuple[int, int]

_MAX_RATIOS = 32


@dataclass(kw_only=True, slots=True)
class AnchorConfig:
    min_scale: float = 0.2
    """Scale of the anchors on the first (finest) feature map, as a fraction of the input's shorter side."""
    max_scale: float = 0.95
    """Scale of the anchors on the last map, in the same unit. The maps between are spaced evenly (SSD, eq. 4)."""
    scales: tuple[float, ...] | None = None
    """Scales given one by one, in the same unit: one per map and one more for the last map's extra square anchor. None: spaced
    evenly from min_scale to max_scale, then 1."""
    ratios: tuple[float, ...] = (1.0, 2.0, 1 / 2, 3.0, 1 / 3)
    """Width divided by height of the anchors of a cell. One more square anchor is added, of the geometric mean of this map's
    scale and the next one's (SSD, section 2.2)."""
    reduce_first_map: bool = True
    """Use only three anchors per cell on the first map: half the scale at ratio 1, the full scale at ratios 2 and 1/2, as
    TensorFlow's SSD does."""
    centre_steps: tuple[float, ...] | None = None
    """Distance between the centres of neighbouring cells, one per map, as a fraction of the input's sides. None: 1 / number of
    cells."""

    def validate(self) -> None:
        if self.scales is None and not 0 < self.min_scale <= self.max_scale:
            raise UserError(
                f"anchors need 0 < min_scale <= max_scale, got min_scale={self.min_scale}, max_scale={self.max_scale}"
            )
        if not 1 <= len(self.ratios) <= _MAX_RATIOS or not min(self.ratios) > 0:
            raise UserError(f"anchor ratios must be positive and 1 to {_MAX_RATIOS} of them, got {self.ratios[:20]}")
        if self.scales is not None and not all(scale > 0 for scale in self.scales):
            raise UserError(f"anchor scales must be positive, got {self.scales[:20]}")


class AnchorGenerator:
    """Default boxes of SSD (arXiv 1512.02325, section 2.2), with the reduced first map of TensorFlow's SSD.

    Map k of n has scale s_k, spaced evenly from min_scale to max_scale, as a fraction of the input's shorter side, so that a
    ratio is a ratio in pixels even if the input is not square. Every cell has an anchor of width s_k * sqrt(r) and height
    s_k / sqrt(r) for each ratio r, and a square one of side sqrt(s_k * s_{k+1}), where s_{n+1} is 1. Centres lie at
    (i + 0.5) / cells, fractions of the input. Multiples of the stride would differ on maps whose sides were rounded up;
    ``centre_steps`` is for weights that were trained with other distances.

    Args:
        config: see ``AnchorConfig``.
        specs: the feature maps, from the finest.

    Raises:
        UserError: scales or steps that make no sense, or not as many as there are maps.

    Attributes:
        num_anchors: anchors per cell, one number per map.
    """

    def __init__(self, config: AnchorConfig, specs: Sequence[FeatureSpec]) -> None:
        config.validate()
        self.strides = [spec.stride for spec in specs]
        num_maps = len(specs)
        if config.scales is not None:
            if len(config.scales) != num_maps + 1:
                raise UserError(
                    f"{num_maps} feature maps need {num_maps + 1} anchor scales (one a map and one more for the last map's "
                    f"extra anchor), got {len(config.scales)}: {config.scales}"
                )
            scales = list(config.scales)
        else:
            step = (config.max_scale - config.min_scale) / max(num_maps - 1, 1)
            scales = [config.min_scale + step * k for k in range(num_maps)] + [1.0]
        self.shapes: list[list[tuple[float, float]]] = []  # (width, height) as shares of the shorter side
        for k in range(num_maps):
            scale, between = scales[k], math.sqrt(scales[k] * scales[k + 1])
            if k == 0 and config.reduce_first_map:
                shapes = [_shape(scale / 2, 1.0), _shape(scale, 2.0), _shape(scale, 0.5)]
            else:
                shapes = [_shape(scale, ratio) for ratio in config.ratios] + [(between, between)]
            self.shapes.append(shapes)
        self.centre_steps = config.centre_steps
        if self.centre_steps is not None and len(self.centre_steps) != num_maps:
            raise UserError(f"{num_maps} feature maps need {num_maps} centre_steps, got {self.centre_steps}")
        self.num_anchors = [len(shapes) for shapes in self.shapes]

    def grid_sizes(self, input_size: Size) -> list[Size]:
        """(rows, columns) of every map for an input of (height, width)."""
        height, width = input_size
        return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in self.strides]

    def __call__(self, input_size: Size) -> Tensor:
        """Anchors of all maps, in the order of the head's output: map, row, column, anchor of the cell.

        Args:
            input_size: (height, width) of the network's input in pixels.

        Returns:
            float32 [A, 4], xyxy in pixels of the input. They may stick out of it: clipping them would move their centres.
        """
        height, width = input_size
        side = min(input_size)
        maps = []
        for k, ((rows, columns), shapes) in enumerate(zip(self.grid_sizes(input_size), self.shapes, strict=True)):
            step_y, step_x = (1 / rows, 1 / columns) if self.centre_steps is None else (self.centre_steps[k],) * 2
            cy = (torch.arange(rows, dtype=torch.float64) + 0.5) * (height * step_y)
            cx = (torch.arange(columns, dtype=torch.float64) + 0.5) * (width * step_x)
            wh = torch.tensor(shapes, dtype=torch.float64) * side
            cells = torch.cartesian_prod(cy, cx).flip(-1)  # [rows * columns, (x, y)]
            cxcywh = torch.cat((cells[:, None].expand(-1, len(wh), -1), wh.expand(len(cells), -1, -1)), -1)
            maps.append(cxcywh_to_xyxy(cxcywh).flatten(0, 1))
        return torch.cat(maps).float()


def _shape(scale: float, ratio: float) -> tuple[float, float]:
    return scale * math.sqrt(ratio), scale / math.sqrt(ratio)


def stride_squares(strides: Sequence[int], input_size: Size) -> Tensor:
    """Anchor points of all maps: a square for each cell, with the stride as its side and the cell's centre as its own.

    Args:
        strides: of the maps.
        input_size: (height, width) of the network's input in pixels.

    Returns:
        float32 [A, 4], xyxy in pixels of the input, in the order map, row, column.
    """
    maps = []
    for stride in strides:
        rows, columns = (math.ceil(side / stride) for side in input_size)
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)  # [rows * columns, (x, y)]
        maps.append(torch.cat((cells, cells + 1), -1) * stride)
    return torch.cat(maps).float()

"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) with named feature maps.

Letters in shapes: B batch, C channels, H W height and width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import gt
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # of SyncBatchNorm too, which is no BatchNorm2d

from backbones.errors import UserError
from backbones.features import Backbone, FeatureSpec
from backbones.layers import ConvNormAct, PaddingMode, make_divisible

PAPER_SETTINGS = (
    # t, c, n, s: expansion, channels, blocks, stride of the first block (table 2 of the paper)
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
# A config may come from a file that nobody checked: beyond these a network would take all memory that there is.
_MAX_STAGES = 20
_MAX_ROW = (16, 2048, 64, 2)
_MAX_LAST_CHANNELS = 16_384


@dataclass(kw_only=True, slots=True)
class MobileNetV2Config:
    """What can be chosen about a MobileNetV2."""

    fields_of_weights: ClassVar[tuple[str, ...]] = (
        "width", "settings", "last_channels", "fixed_ends", "residual", "padding", "norm_eps",
    )  # fmt: skip
    """Fields that change what the weights' numbers mean; the others (freezing, momentum) may differ."""

    renamed_fields: ClassVar[Mapping[str, str | None]] = {}
    """Names that fields had in files of before -> their names today, None for a field that was dropped."""

    width: float = 1.0
    """Multiplier of all channel counts; the paper and the public weights use 0.35 to 1.4."""
    settings: tuple[tuple[int, int, int, int], ...] = PAPER_SETTINGS
    """A row for each stage: expansion t, channels c, blocks n, stride s of the first block (table 2 of the paper)."""
    last_channels: int = 1280
    """Channels of the last 1x1 convolution. A width above 1 multiplies them, a width below 1 leaves them."""
    fixed_ends: bool = False
    """The stem keeps 32 channels and the last convolution last_channels, whatever the width (timm's deeper networks)."""
    residual: Literal["identity", "projection"] = "identity"
    """identity: blocks of stride 1 that keep their channels add their input (the paper). projection: every block of
    stride 1 adds a 1x1 convolution + batch norm of its input."""
    padding: PaddingMode = "symmetric"
    """How 3x3 convolutions of stride 2 pad; part of the weights. Torchvision's need symmetric, TensorFlow's tf_same."""
    norm_eps: float = 1e-5
    """Added to the variance in batch norms; part of the weights. Torchvision's need 1e-5, TensorFlow's 1e-3."""
    norm_momentum: float = 0.1
    """Share of the new batch in the running statistics of batch norms."""
    frozen_stages: int = 0
    """So many parts, counted from the input, keep their weights and batch norm statistics: 1 is the stem alone, 2 the
    stem and stage1, ... With table 2 of the paper 8 leaves the last 1x1 convolution, 9 freezes everything."""
    freeze_norm: bool = False
    """All batch norms keep their statistics, scales and shifts, also in training."""

    def validate(self) -> None:
        """Raise UserError, with the value and what is allowed, where a value makes no sense."""
        if not 0.1 <= self.width <= 4:
            raise UserError(f"width is {self.width}; it can be 0.1 to 4 (public weights exist for 0.35 to 1.4)")
        if not 1 <= len(self.settings) <= _MAX_STAGES:
            raise UserError(
                f"settings has {len(self.settings)} rows; 1 to {_MAX_STAGES} stages (t, c, n, s) can be built"
            )
        for row in self.settings:
            if len(row) != 4 or min(row) < 1 or any(map(gt, row, _MAX_ROW)):
                raise UserError(
                    f"settings row {row}: t, c, n, s are at least 1 and at most {', '.join(map(str, _MAX_ROW))}"
                )
        if not 1 <= self.last_channels <= _MAX_LAST_CHANNELS:
            raise UserError(f"last_channels is {self.last_channels}; it can be 1 to {_MAX_LAST_CHANNELS}")
        if self.residual not in ("identity", "projection"):
            raise UserError(f"residual is {self.residual!r}; it can be 'identity' or 'projection'")
        if self.padding not in ("symmetric", "tf_same"):
            raise UserError(f"padding is {self.padding!r}; it can be 'symmetric' or 'tf_same'")
        if not 0 < self.norm_eps < math.inf or not 0 < self.norm_momentum <= 1:
            raise UserError(
                f"norm_eps is {self.norm_eps} and norm_momentum {self.norm_momentum}; "
                "the first is above 0 and finite, the second above 0 and at most 1"
            )
        num_parts = len(self.settings) + 2
        if not 0 <= self.frozen_stages <= num_parts:
            raise UserError(
                f"frozen_stages is {self.frozen_stages}; it can be 0 (nothing) to {num_parts} "
                f"(stem, {len(self.settings)} stages and the last convolution)"
            )


class InvertedResidual(nn.Module):
    """Expand 1x1, filter 3x3 depthwise, project 1x1 without activation (the paper, section 3.3 and table 1).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1 or 2, taken by the depthwise convolution.
        expansion: t of table 2; with 1 there is no expanding convolution.
        config: residual, padding and batch norm values.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expansion: int, config: MobileNetV2Config
    ) -> None:
        super().__init__()
        eps, momentum = config.norm_eps, config.norm_momentum
        hidden = in_channels * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion > 1:
            self.expand = ConvNormAct(in_channels, hidden, 1, norm_eps=eps, norm_momentum=momentum)
        self.depthwise = ConvNormAct(
            hidden, hidden, 3, stride, groups=hidden, padding=config.padding, norm_eps=eps, norm_momentum=momentum
        )
        self.project = ConvNormAct(hidden, out_channels, 1, activation=False, norm_eps=eps, norm_momentum=momentum)
        self.shortcut: nn.Module | None = None
        if stride == 1 and config.residual == "projection":
            self.shortcut = ConvNormAct(
                in_channels, out_channels, 1, activation=False, norm_eps=eps, norm_momentum=momentum
            )
        elif stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)]."""
        return self.forward_with_inner(x)[0]

    def forward_with_inner(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the expansion and the depthwise output (both after ReLU6)."""
        expanded = self.expand(x)
        filtered = self.depthwise(expanded)
        out = self.project(filtered)
        return out if self.shortcut is None else out + self.shortcut(x), expanded, filtered


class MobileNetV2(Backbone):
    """The network up to its last 1x1 convolution; any input size.

    The parts are the attributes ``stem``, ``stage1`` .. ``stageN`` and ``last``; each is also a feature. Where a stage
    goes from stride 16 to 32 there are two more of the same shape (576 channels at width 1), not to be confused:

    * ``stride16_expansion``: what the first block of that stage expands its input to, after ReLU6. SSDLite's first map
      (the paper, section 6.2; ``layer_15/expansion_output`` of TensorFlow).
    * ``stride16_depthwise``: the depthwise output, after ReLU6, inside the block before.

    Parts after the last requested feature are built, so that the weights stay complete, but they do not run and take no
    gradient; with ``complete=False`` they are not there at all. Frozen parts (``config.frozen_stages``) take no gradient
    either, and keep their statistics under ``train()``.

    Initialisation: He et al. 2015 (arXiv 1502.01852) on fan-out for convolutions, scale 1 and shift 0 for batch norms.

    Args:
        config: see ``MobileNetV2Config``.
        out_features: the features that ``forward`` gives.
        complete: keep the parts after the last of them.

    Attributes:
        left_out: names of the parts that are not there; whoever loads weights leaves their tensors aside.

    Raises:
        UserError: for a feature that is not there, or a config that makes no sense.
    """

    def __init__(
        self, config: MobileNetV2Config, out_features: Sequence[str] = ("last",), *, complete: bool = True
    ) -> None:
        super().__init__()
        config.validate()
        self.config = config
        eps, momentum = config.norm_eps, config.norm_momentum

        channels = STEM_CHANNELS if config.fixed_ends else make_divisible(STEM_CHANNELS * config.width)
        stride = 2
        self.stem = ConvNormAct(3, channels, 3, stride=2, padding=config.padding, norm_eps=eps, norm_momentum=momentum)
        self.feature_specs = {"stem": FeatureSpec(channels, stride)}
        inner_features: dict[tuple[str, int], str] = {}  # (stage, block) -> the feature taken from inside it
        previous_block, previous_hidden = ("", 0), 0
        for number, (expansion, base_channels, num_blocks, first_stride) in enumerate(config.settings, start=1):
            name = f"stage{number}"
            out_channels = make_divisible(base_channels * config.width)
            if stride == 16 and first_stride == 2 and number > 1 and expansion > 1:
                inner_features[previous_block] = "stride16_depthwise"
                inner_features[name, 0] = "stride16_expansion"
                stage_before = f"stage{number - 1}"
                spec_before = self.feature_specs.pop(stage_before)  # comes back in the order of the computation
                self.feature_specs["stride16_depthwise"] = FeatureSpec(previous_hidden, stride)
                self.feature_specs[stage_before] = spec_before
                self.feature_specs["stride16_expansion"] = FeatureSpec(channels * expansion, stride)
            blocks = []
            for position in range(num_blocks):
                block_stride = first_stride if position == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, block_stride, expansion, config))
                previous_hidden = channels * expansion
                channels = out_channels
            previous_block = (name, num_blocks - 1)
            stride *= first_stride
            self.add_module(name, nn.Sequential(*blocks))
            self.feature_specs[name] = FeatureSpec(channels, stride)
        last_channels = config.last_channels
        if not config.fixed_ends:
            last_channels = make_divisible(last_channels * max(1.0, config.width))
        self.last = ConvNormAct(channels, last_channels, 1, norm_eps=eps, norm_momentum=momentum)
        self.feature_specs["last"] = FeatureSpec(last_channels, stride)

        unknown = [name for name in out_features if name not in self.feature_specs]
        if unknown or not out_features:
            asked = ", ".join(map(repr, unknown)) or "nothing"
            raise UserError(f"asked for the feature {asked}; there are: {', '.join(self.feature_specs)}")
        self.out_features = tuple(out_features)
        self._inner_features = {place: name for place, name in inner_features.items() if name in out_features}
        part_names = [name for name, _ in self.named_children()]
        home = {name: name for name in part_names} | {name: part for (part, _), name in inner_features.items()}
        self._last_part = max((home[name] for name in out_features), key=part_names.index)
        self.left_out: tuple[str, ...] = ()
        if not complete:
            num_kept = part_names.index(self._last_part) + 1
            self.left_out = tuple(part_names[num_kept:])
            for name in self.left_out:
                delattr(self, name)
            self.feature_specs = {
                name: spec for name, spec in self.feature_specs.items() if home.get(name, name) not in self.left_out
            }
            part_names = part_names[:num_kept]

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, _BatchNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
                module.requires_grad_(not config.freeze_norm)
        parts = list(self.children())
        self._frozen_parts = part_names[: config.frozen_stages]
        for part in parts[: config.frozen_stages] + parts[part_names.index(self._last_part) + 1 :]:
            part.requires_grad_(False)
        self.train()

    def without_left_out(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A complete backbone's state dict without the tensors of the parts that are left out here."""
        prefixes = tuple(f"{name}." for name in self.left_out)
        return {key: tensor for key, tensor in state.items() if not key.startswith(prefixes)}

    def train(self, mode: bool = True) -> "MobileNetV2":
        """Training or evaluation mode; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        for name, part in self.named_children():
            for module in part.modules():
                if isinstance(module, _BatchNorm) and (self.config.freeze_norm or name in self._frozen_parts):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Float images [B, 3, H, W], already normalised -> the maps of ``out_features``.

        Each is [B, C, ceil(H / stride), ceil(W / stride)] with the channels and stride of its spec.
        """
        maps = {}
        x = images
        for name, part in self.named_children():
            for position, block in enumerate(part if isinstance(part, nn.Sequential) else [part]):
                inner_feature = self._inner_features.get((name, position))
                if inner_feature is not None and isinstance(block, InvertedResidual):
                    x, expanded, filtered = block.forward_with_inner(x)
                    maps[inner_feature] = expanded if inner_feature == "stride16_expansion" else filtered
                else:
                    x = block(x)
            if name in self.out_features:
                maps[name] = x
            if name == self._last_part:
                break
        return {name: maps[name] for name in self.out_features}

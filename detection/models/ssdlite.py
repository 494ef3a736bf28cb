"""SSDLite: MobileNetV2, extra maps and a separable head over default boxes.

Letters in shapes: B batch, A anchors, C columns of class logits, D numbers of a box code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor, nn

from backbones.errors import UserError
from backbones.layers import ConvNormAct
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from detection.models.anchors import AnchorConfig, AnchorGenerator
from detection.models.box_coders import SSDBoxCoder
from detection.models.detector import MAX_SIDE, Detector, DetectorConfig, Score, Triple
from detection.models.heads import Extras, SSDLiteHead, names_of_parameters
from detection.structures import ResizeMode

_MAX_MAPS = 16
_MAX_CHANNELS = 4096


@dataclass(kw_only=True, slots=True)
class SSDLiteConfig(DetectorConfig):
    fields_of_weights: ClassVar[tuple[str, ...]] = (
        "features", "extra_channels", "anchors", "score", "background_column", "norm_eps",
    )  # fmt: skip
    fields_of_training: ClassVar[tuple[str, ...]] = ("norm_momentum", "init_std", "prior")

    kind: Literal["ssdlite"] = "ssdlite"
    """Which detector this config describes."""
    backbone: MobileNetV2Config = field(default_factory=MobileNetV2Config)
    """The network under the head."""
    input_size: tuple[int, int] = (320, 320)
    """(height, width) of the network's input in pixels, 96 to 4096 each. Need not be square."""
    resize: ResizeMode = "stretch"
    """How an image comes to the input size: sides scaled each for itself, or both alike with a border. stretch_tensorflow
    picks pixels as TensorFlow 1 does, for weights of it: without averaging, and shifted by up to half a pixel."""
    features: tuple[str, ...] = ("stride16_expansion", "last")
    """Names of the backbone's maps that the head sees, from the finest."""
    extra_channels: tuple[int, ...] = (512, 256, 256, 128)
    """Channels of the maps beyond the backbone's last, each of half the size."""
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    """Scales and ratios of the anchors."""
    score: Score = "softmax"
    """How class logits become scores. sigmoid goes with the focal loss."""
    background_column: bool = True
    """Whether column 0 of the class logits is the background. softmax needs it."""
    norm_eps: float = 0.001
    """Epsilon of the batch norms in the extra maps and the head."""
    norm_momentum: float = 0.03
    """Momentum of those batch norms."""
    init_std: float = 0.03
    """Standard deviation of the new layers' first weights (normal distribution)."""
    prior: float = 0.01
    """sigmoid: the score that an untrained head gives (RetinaNet, arXiv 1708.02002, section 4.1)."""
    mean: Triple | None = None
    """Mean of the input's channels (R, G, B, of pixel / 255). None: as the weights say, ImageNet's where they say nothing."""
    std: Triple | None = None
    """Standard deviation of the input's channels, in the same way."""

    def validate(self) -> None:
        self.backbone.validate()
        if len(self.input_size) != 2 or min(self.input_size) < 96 or max(self.input_size) > MAX_SIDE:
            raise UserError(
                f"model.input_size is (height, width), each 96 to {MAX_SIDE} pixels; got {tuple(self.input_size)}"
            )
        if not 1 <= len(self.features) <= _MAX_MAPS:
            raise UserError(f"model.features names 1 to {_MAX_MAPS} maps of the backbone, got {len(self.features)}")
        if len(self.extra_channels) > _MAX_MAPS or not all(1 <= c <= _MAX_CHANNELS for c in self.extra_channels):
            raise UserError(
                f"model.extra_channels are at most {_MAX_MAPS} numbers from 1 to {_MAX_CHANNELS}; got {self.extra_channels[:20]}"
            )
        if self.score == "softmax" and not self.background_column:
            raise UserError("model.score softmax needs model.background_column; without it a score has no rival")
        if self.std is not None and not min(self.std) > 0:
            raise UserError(f"model.std must be positive, got {self.std}")
        if not 0 < self.prior < 1 or not self.norm_eps > 0 or not 0 < self.norm_momentum <= 1:
            raise UserError(
                f"model.prior is between 0 and 1, model.norm_eps above 0, model.norm_momentum above 0 and at most 1; got "
                f"{self.prior}, {self.norm_eps}, {self.norm_momentum}"
            )
        self.anchors.validate()

    def box_coder(self) -> SSDBoxCoder:
        return SSDBoxCoder()


class SSDLite(Detector):
    """MobileNetV2 with SSDLite (arXiv 1801.04381, section 6.2).

    Args:
        config: see ``SSDLiteConfig``.
        num_classes: K, classes without the background, at least 1.

    Raises:
        UserError: a config value makes no sense, or the backbone has no map of a given name.
    """

    config: SSDLiteConfig

    def __init__(self, config: SSDLiteConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.backbone = MobileNetV2(config.backbone, config.features)
        specs = [self.backbone.feature_specs[name] for name in config.features]
        layer = partial(ConvNormAct, norm_eps=config.norm_eps, norm_momentum=config.norm_momentum)
        self.extras = Extras(specs[-1], config.extra_channels, config.backbone.padding, layer)
        specs += self.extras.feature_specs
        generator = AnchorGenerator(config.anchors, specs)
        self.anchors_per_cell = generator.num_anchors
        num_columns = num_classes + int(config.background_column)
        self.head = SSDLiteHead(specs, generator.num_anchors, config.box_coder().code_size, num_columns, layer)
        self.register_buffer("anchors", generator(config.input_size), persistent=False)
        self.extras.apply(self._initialise)
        self.head.apply(self._initialise)
        if config.score == "sigmoid":
            for output in self.head.class_outputs():
                assert output.bias is not None
                nn.init.constant_(output.bias, -math.log((1 - config.prior) / config.prior))

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = list(self.backbone(images).values())
        maps += self.extras(maps[-1])
        codes, class_logits = self.head(maps)
        return codes, class_logits

    def class_tensors(self) -> frozenset[str]:
        return names_of_parameters(self, self.head.class_outputs())

    def box_tensors(self) -> frozenset[str]:
        """Names in ``state_dict`` of the tensors whose first axis is (anchor of the cell, number of the box code)."""
        return names_of_parameters(self, self.head.box_outputs())

    def parts(self) -> Mapping[str, nn.Module]:
        return {**dict(self.backbone.named_children()), "extras": self.extras, "head": self.head}

"""SSDLite: MobileNetV2, extra feature maps and a head of separable convolutions over default boxes.

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
from detection.models.detector import MAX_MAPS, Detector, DetectorConfig, Score, Triple
from detection.models.heads import Extras, SSDLiteHead, names_of_parameters
from detection.structures import ResizeMode

_MAX_CHANNELS = 4096


@dataclass(kw_only=True, slots=True)
class SSDLiteConfig(DetectorConfig):
    fields_of_weights: ClassVar[tuple[str, ...]] = (
        "features", "extra_channels", "anchors", "score", "background_column", "norm_eps",
    )  # fmt: skip

    kind: Literal["ssdlite"] = "ssdlite"
    """Which detector this config describes."""
    backbone: MobileNetV2Config = field(default_factory=MobileNetV2Config)
    """The backbone, which makes the first feature maps."""
    input_size: tuple[int, int] = (320, 320)
    """(height, width) of the network's input in pixels, 96 to 4096 each. Need not be square."""
    resize: ResizeMode = "stretch"
    """How an image is brought to the input size. stretch: each side is scaled on its own. letterbox: both sides are scaled
    alike and a border fills the rest. stretch_tensorflow: stretch with the pixel sampling of TensorFlow 1, for its weights."""
    features: tuple[str, ...] = ("stride16_expansion", "last")
    """Names of the backbone's feature maps that the head uses, from the finest."""
    extra_channels: tuple[int, ...] = (512, 256, 256, 128)
    """Channels of each feature map after the backbone's last. Each map is half the size of the one before."""
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    """Sizes, shapes and positions of the anchors."""
    score: Score = "softmax"
    """How class logits become scores: softmax over all columns, or sigmoid of each column, which the focal loss trains."""
    background_column: bool = True
    """Whether the class logits have a column for the background (column 0). softmax needs one."""
    norm_eps: float = 0.001
    """Epsilon of the batch norms in the extra maps and the head."""
    norm_momentum: float = 0.03
    """Momentum of those batch norms: the weight of a new batch in the running mean and variance."""
    init_std: float = 0.03
    """Standard deviation of the normal distribution from which the first weights of the extra maps and the head are drawn."""
    prior: float = 0.01
    """sigmoid only: probability, above 0 and below 1, that an untrained head gives each class; it gives the background 1 - prior
    (RetinaNet, arXiv 1708.02002, section 4.1)."""
    mean: Triple | None = None
    """Mean of the input's channels R, G, B, in units of pixel / 255. None: what the weights were trained with, else
    ImageNet's."""
    std: Triple | None = None
    """Standard deviation of the input's channels R, G, B, in units of pixel / 255. None: as for mean."""

    def validate(self) -> None:
        self.validate_common()
        if len(self.extra_channels) > MAX_MAPS or not all(1 <= c <= _MAX_CHANNELS for c in self.extra_channels):
            raise UserError(
                f"model.extra_channels are at most {MAX_MAPS} numbers from 1 to {_MAX_CHANNELS}; got {self.extra_channels[:20]}"
            )
        if self.score == "softmax" and not self.background_column:
            raise UserError("model.score softmax needs model.background_column; without it a score has no rival")
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
        num_columns = num_classes + int(config.background_column)
        self.head = SSDLiteHead(specs, generator.num_anchors, config.box_coder().code_size, num_columns, layer)
        self.register_buffer("anchors", generator(config.input_size), persistent=False)
        self.extras.apply(self._initialise)
        self.head.apply(self._initialise)
        if config.score == "sigmoid":
            for output in self.head.class_outputs():
                self._start_at_prior(output)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _start_at_prior(self, output: nn.Conv2d) -> None:
        """Biases that start every class at probability ``prior``, and the background, if it has a column, at 1 - ``prior``."""
        assert output.bias is not None
        rare = math.log(self.config.prior / (1 - self.config.prior))
        nn.init.constant_(output.bias, rare)
        if self.config.background_column:
            nn.init.constant_(output.bias.view(-1, self.head.num_columns)[:, 0], -rare)

    def codes_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
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

"""The detector: backbone, extra maps, SSDLite head and anchors as one network.

Letters in shapes: B batch, H W height and width of the input, A anchors, C columns of class logits.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from backbones.layers import ConvNormAct
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from backbones.weights import IMAGENET_MEAN, IMAGENET_STD
from detection.anchors import AnchorConfig, AnchorGenerator
from detection.box_coder import BoxCoder
from detection.head import Extras, SSDLiteHead
from detection.losses import DetectionLoss, LossConfig
from detection.postprocess import Postprocess, PostprocessConfig
from detection.structures import RawPredictions, ResizeMode, Target

Triple = tuple[float, float, float]


@dataclass(kw_only=True, slots=True)
class DetectorConfig:
    backbone: MobileNetV2Config = field(default_factory=MobileNetV2Config)
    """The network under the head."""
    input_size: tuple[int, int] = (320, 320)
    """(height, width) of the network's input in pixels, at least 96 each. Need not be square."""
    resize: ResizeMode = "stretch"
    """How an image comes to the input size: sides scaled each for itself, or both alike with a border. stretch_tensorflow
    picks pixels as TensorFlow 1 does, for weights of it: without averaging, and shifted by up to half a pixel."""
    features: tuple[str, ...] = ("stride16_expansion", "last")
    """Names of the backbone's maps that the head sees, from the finest."""
    extra_channels: tuple[int, ...] = (512, 256, 256, 128)
    """Channels of the maps beyond the backbone's last, each of half the size."""
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    """Scales and ratios of the anchors."""
    score: Literal["softmax", "sigmoid"] = "softmax"
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
        if len(self.input_size) != 2 or min(self.input_size) < 96:
            raise ValueError(f"model.input_size is (height, width), each at least 96 pixels; got {self.input_size}")
        if len(self.features) < 1:
            raise ValueError("model.features names no map of the backbone")
        if self.score == "softmax" and not self.background_column:
            raise ValueError("model.score softmax needs model.background_column; without it a score has no rival")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"model.std must be positive, got {self.std}")
        self.anchors.validate()

    def check_loss(self, loss: LossConfig) -> None:
        """Raises ValueError where a loss trains another kind of score than this network gives."""
        trains = {"cross_entropy": "softmax", "focal": "sigmoid"}[loss.classification]
        if self.score != trains:
            raise ValueError(
                f"loss.classification {loss.classification} trains {trains} scores, model.score is {self.score}; "
                "change one of them"
            )


class Detector(nn.Module):
    """MobileNetV2 with SSDLite (arXiv 1801.04381, section 6.2).

    The network normalises its input itself and says nothing of thresholds: ``Postprocess`` turns its predictions into
    detections, ``DetectionLoss`` into a loss.

    Args:
        config: see ``DetectorConfig``.
        num_classes: classes without the background, at least 1.

    Raises:
        ValueError: a config value makes no sense, or the backbone has no map of a given name.
    """

    anchors: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: DetectorConfig, num_classes: int) -> None:
        super().__init__()
        config.validate()
        if num_classes < 1:
            raise ValueError(f"a detector needs at least one class, got num_classes={num_classes}")
        self.config = config
        self.num_classes = num_classes
        self.backbone = MobileNetV2(config.backbone, config.features)
        specs = [self.backbone.feature_specs[name] for name in config.features]
        layer = partial(ConvNormAct, norm_eps=config.norm_eps, norm_momentum=config.norm_momentum)
        self.extras = Extras(specs[-1], config.extra_channels, config.backbone.padding, layer)
        specs += self.extras.feature_specs
        generator = AnchorGenerator(config.anchors, specs)
        num_columns = num_classes + int(config.background_column)
        self.head = SSDLiteHead(specs, generator.num_anchors, num_columns, layer)
        self.box_coder = BoxCoder()
        # Derived from the config, so not part of the weights: the same weights run at any input size.
        self.register_buffer("anchors", generator(config.input_size), persistent=False)
        self.register_buffer("mean", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(1, 3, 1, 1), persistent=False)
        self.normalise_with(config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD)
        self.extras.apply(self._initialise)
        self.head.apply(self._initialise)
        if config.score == "sigmoid":
            for name, parameter in self.head.classes.named_parameters():
                if name.endswith(".1.bias"):  # the last convolution of a branch
                    nn.init.constant_(parameter, -math.log((1 - config.prior) / config.prior))

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def normalise_with(self, mean: Triple, std: Triple) -> None:
        """Normalise the input as the weights expect it.

        Args:
            mean, std: of the channels R, G, B, in units of pixel / 255.
        """
        self.config = replace(self.config, mean=mean, std=std)
        for buffer, values in ((self.mean, mean), (self.std, std)):
            buffer.copy_(torch.tensor(values).mul(255).view(1, 3, 1, 1))

    @property
    def fill(self) -> tuple[int, int, int]:
        """The colour (R, G, B in 0..255) that the network sees as nothing: the mean."""
        red, green, blue = (round(value) for value in self.mean.flatten().tolist())
        return red, green, blue

    def forward(self, images: Tensor) -> RawPredictions:
        """Images at the config's input size -> what every anchor says.

        Args:
            images: [B, 3, H, W], RGB in 0..255, uint8 or floating point.

        Raises:
            ValueError: the images have another size than the anchors were made for.
        """
        if tuple(images.shape[-2:]) != tuple(self.config.input_size):
            raise ValueError(
                f"this detector was built for inputs of {self.config.input_size} (height, width), "
                f"got {tuple(images.shape[-2:])}; build it with another model.input_size"
            )
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        maps = list(self.backbone(x.contiguous(memory_format=torch.channels_last)).values())
        maps += self.extras(maps[-1])
        boxes, classes = self.head(maps)
        return RawPredictions(boxes, classes, self.anchors)

    def loss(self, config: LossConfig) -> DetectionLoss:
        """The loss that fits this network's output."""
        self.config.check_loss(config)
        return DetectionLoss(config, self.box_coder, self.config.background_column)

    def postprocess(self, config: PostprocessConfig, class_names: tuple[str, ...] = ()) -> Postprocess:
        """The post-processing that fits this network's output."""
        return Postprocess(config, self.box_coder, self.config.score, self.config.background_column, class_names)


class TrainingStep(nn.Module):
    """Network and loss as one module: what is compiled, wrapped in DDP and called once a step."""

    def __init__(self, model: Detector, loss: DetectionLoss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, images: Tensor, boxes: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W], and the fields of ``Target`` -> scalar losses, ``loss`` the one to minimise."""
        losses: dict[str, Tensor] = self.loss(self.model(images), Target(boxes, labels, valid))
        return losses

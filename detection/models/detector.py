"""The contract that every detector meets, for whatever trains, evaluates, exports or runs it.

Letters in shapes: B batch, H W height and width of the input, A anchors, C columns of class logits, D numbers of a box code.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from backbones.errors import UserError
from backbones.layers import IMAGENET_MEAN, IMAGENET_STD, Normalise
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from detection.models.box_coders import BoxCoder
from detection.structures import RawPredictions, ResizeMode

Triple = tuple[float, float, float]
Score = Literal["softmax", "sigmoid"]
# A config may come from a file that nobody checked: beyond these a network would take all memory that there is.
MAX_SIDE = 4096  # pixels of the input's sides
MAX_MAPS = 16  # feature maps of a kind
MAX_CLASSES = 20_000
_Config = TypeVar("_Config", bound="DetectorConfig")


class DetectorConfig(ABC):
    """How a detector is built. Each kind of detector has one dataclass derived from this; ``kind`` names it in a file.

    Attributes:
        kind: of the detector; ``detection.models.build`` has the table.
        backbone: the network under the head.
        input_size: (height, width) of the network's input in pixels.
        resize: how an image comes to the input size.
        score: how class logits become scores.
        background_column: whether column 0 of the class logits is the background.
        mean, std: normalisation of the input (R, G, B) in units of pixel / 255; None: not chosen, so the weights decide.
        fields_of_weights: fields that the weights depend on, besides the backbone's; they come with the weights.
        features: names of the backbone's maps that the rest of the network sees.
        norm_eps, norm_momentum: of the batch norms after the backbone.
        prior: score that an untrained head with sigmoid scores gives each class.
    """

    __slots__ = ()

    fields_of_weights: ClassVar[tuple[str, ...]]

    kind: str
    backbone: MobileNetV2Config
    input_size: tuple[int, int]
    resize: ResizeMode
    features: tuple[str, ...]
    score: Score
    background_column: bool
    norm_eps: float
    norm_momentum: float
    prior: float
    mean: Triple | None
    std: Triple | None

    def validate_common(self) -> None:
        """What ``validate`` of every kind begins with.

        Raises:
            UserError: a value that no detector can have.
        """
        self.backbone.validate()
        if len(self.input_size) != 2 or min(self.input_size) < 96 or max(self.input_size) > MAX_SIDE:
            raise UserError(
                f"model.input_size is (height, width), each 96 to {MAX_SIDE} pixels; got {tuple(self.input_size)}"
            )
        if not 1 <= len(self.features) <= MAX_MAPS:
            raise UserError(f"model.features names 1 to {MAX_MAPS} maps of the backbone, got {len(self.features)}")
        if self.std is not None and not all(0 < std < math.inf for std in self.std):
            raise UserError(f"model.std must be positive and finite, got {self.std}")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise UserError(f"model.mean must be finite, got {self.mean}")
        if not 0 < self.prior < 1 or not 0 < self.norm_eps < math.inf or not 0 < self.norm_momentum <= 1:
            raise UserError(
                "model.prior is between 0 and 1, model.norm_eps above 0 and finite, model.norm_momentum above 0 and at most "
                f"1; got {self.prior}, {self.norm_eps}, {self.norm_momentum}"
            )

    @abstractmethod
    def validate(self) -> None:
        """Raises UserError for values that make no sense, alone or together."""

    @abstractmethod
    def box_coder(self) -> BoxCoder:
        """The coder of the network's box codes."""

    def replaced(self: _Config, **changes: Any) -> _Config:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @property
    def fill(self) -> tuple[int, int, int]:
        """The colour (R, G, B in 0..255) that normalisation turns into zero: the mean."""
        red, green, blue = (round(255 * value) for value in self.mean or IMAGENET_MEAN)
        return red, green, blue


class Detector(nn.Module, ABC):
    """A network that predicts class logits and a box code for every anchor.

    It normalises its input itself and knows no thresholds: ``Postprocess`` turns its predictions into detections, and a loss
    of ``detection.training`` compares them with the objects of a batch.

    Args:
        config: see ``DetectorConfig``; kept as a copy in which ``mean`` and ``std`` are filled in.
        num_classes: K, classes without the background, at least 1.

    Raises:
        UserError: a config value or the number of classes makes no sense.

    Attributes:
        config: how it is built.
        num_classes: K, classes without the background.
        backbone: makes the feature maps.
        normalise: from pixels to the numbers that the backbone was trained on.
        anchors: float32 [A, 4], xyxy in pixels of the input. Derived from the config and no part of the weights, so that the
            same weights run at any input size.
    """

    config: DetectorConfig
    num_classes: int
    backbone: MobileNetV2
    normalise: Normalise
    anchors: Tensor

    def __init__(self, config: DetectorConfig, num_classes: int) -> None:
        super().__init__()
        config.validate()
        if not 1 <= num_classes <= MAX_CLASSES:
            raise UserError(f"a detector has 1 to {MAX_CLASSES} classes, got num_classes={num_classes}")
        mean, std = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD
        self.config = config.replaced(mean=mean, std=std)
        self.num_classes = num_classes
        self.normalise = Normalise(mean, std)

    @abstractmethod
    def codes_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float images [B, 3, H, W], channels-last -> box codes [B, A, D], class logits [B, A, C].

        ``forward`` calls this; whoever uses a detector calls the detector.
        """

    @abstractmethod
    def class_tensors(self) -> frozenset[str]:
        """Names in ``state_dict`` of the tensors that depend on the classes; they stay new if a training has other classes."""

    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """The parts by name, in the order of the computation; every layer is in exactly one of them."""

    def normalise_with(self, mean: Triple, std: Triple) -> None:
        """Normalise the input as the weights expect it.

        Args:
            mean, std: of the channels R, G, B, in units of pixel / 255.
        """
        self.config = self.config.replaced(mean=mean, std=std)
        self.normalise.set(mean, std)

    def forward(self, images: Tensor) -> RawPredictions:
        """Images at the config's input size -> raw predictions for every anchor.

        Args:
            images: [B, 3, H, W], RGB in 0..255, uint8 or floating point.

        Raises:
            UserError: the images have another size than the anchors were made for.
        """
        codes, class_logits = self.codes_and_logits(self.network_input(images))
        return RawPredictions(codes, class_logits, self.anchors)

    def network_input(self, images: Tensor) -> Tensor:
        """Images as ``forward`` takes them -> normalised, channels-last.

        Raises:
            UserError: as for ``forward``.
        """
        if tuple(images.shape[-2:]) != tuple(self.config.input_size):
            raise UserError(
                f"this detector was built for inputs of {self.config.input_size} (height, width), "
                f"got {tuple(images.shape[-2:])}; build it with another model.input_size"
            )
        normalised: Tensor = self.normalise(images).contiguous(memory_format=torch.channels_last)
        return normalised

"""What every detector is: the contract between a network and whatever trains, evaluates, exports or runs it.

Letters in shapes: B batch, H W height and width of the input, A anchors, C columns of class logits, D numbers of a box code.
"""

import dataclasses
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
MAX_CLASSES = 20_000
_Config = TypeVar("_Config", bound="DetectorConfig")


class DetectorConfig(ABC):
    """How a detector is built: the base of one typed dataclass for each kind, which ``kind`` tells apart in a file.

    Attributes:
        kind: of the detector; ``detection.models.build`` has the table.
        backbone: the network under the head.
        input_size: (height, width) of the network's input in pixels.
        resize: how an image comes to the input size.
        score: how class logits become scores.
        background_column: whether column 0 of the class logits is the background.
        mean, std: normalisation of the input in units of pixel / 255; None as long as no weights have said theirs.
        fields_of_weights: fields that change what the weights' numbers mean, beside those of the backbone.
        fields_of_training: fields that only matter in training (initialisation, momenta): always the user's.
    """

    __slots__ = ()

    fields_of_weights: ClassVar[tuple[str, ...]]
    fields_of_training: ClassVar[tuple[str, ...]]

    kind: str
    backbone: MobileNetV2Config
    input_size: tuple[int, int]
    resize: ResizeMode
    score: Score
    background_column: bool
    mean: Triple | None
    std: Triple | None

    @abstractmethod
    def validate(self) -> None:
        """Raises UserError for values that make no sense, alone or together."""

    @abstractmethod
    def box_coder(self) -> BoxCoder:
        """The code that the network's boxes are written in."""

    def replaced(self: _Config, **changes: Any) -> _Config:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @property
    def fill(self) -> tuple[int, int, int]:
        """The colour (R, G, B in 0..255) that the network sees as nothing: the mean."""
        red, green, blue = (round(255 * value) for value in self.mean or IMAGENET_MEAN)
        return red, green, blue


class Detector(nn.Module, ABC):
    """A network that says of every anchor which class it shows and where its object lies.

    It normalises its input itself and says nothing of thresholds: ``Postprocess`` turns its predictions into detections, a
    loss of ``detection.training`` into a loss.

    Attributes:
        config: how it is built.
        num_classes: K, without the background.
        backbone: gives the feature maps.
        normalise: from pixels to what the backbone was trained on.
        anchors: float32 [A, 4], xyxy in pixels of the input. Derived from the config, so no part of the weights: the same
            weights run at any input size.
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
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float images [B, 3, H, W], channels-last -> box codes [B, A, D], class logits [B, A, C]."""

    @abstractmethod
    def class_tensors(self) -> frozenset[str]:
        """Names in ``state_dict`` of the tensors that depend on the classes: new where a training has other classes."""

    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """The parts in the order of the computation, each layer in one of them."""

    def normalise_with(self, mean: Triple, std: Triple) -> None:
        """Normalise the input as the weights expect it.

        Args:
            mean, std: of the channels R, G, B, in units of pixel / 255.
        """
        self.config = self.config.replaced(mean=mean, std=std)
        self.normalise.set(mean, std)

    def forward(self, images: Tensor) -> RawPredictions:
        """Images at the config's input size -> what every anchor says.

        Args:
            images: [B, 3, H, W], RGB in 0..255, uint8 or floating point.

        Raises:
            UserError: the images have another size than the anchors were made for.
        """
        if tuple(images.shape[-2:]) != tuple(self.config.input_size):
            raise UserError(
                f"this detector was built for inputs of {self.config.input_size} (height, width), "
                f"got {tuple(images.shape[-2:])}; build it with another model.input_size"
            )
        x = self.normalise(images).contiguous(memory_format=torch.channels_last)
        codes, class_logits = self.predict(x)
        return RawPredictions(codes, class_logits, self.anchors)

"""What can be chosen when a classifier is trained."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from backbones.classifier import ClassifierConfig
from backbones.errors import UserError
from detection.engine.config import TrainConfig


@dataclass(kw_only=True, slots=True)
class TransformConfig:
    """How images become inputs of the network."""

    size: int = 224
    """Side of the square training input in pixels. Less than eval_size is quicker and often better: random crops show
    objects larger than evaluation does (Touvron et al. 2019, arXiv 1906.06423)."""
    eval_size: int = 224
    """Side of the square input in evaluation."""
    min_scale: float = 0.08
    """A training crop takes this share of the image's area at least (Szegedy et al. 2015, arXiv 1409.4842, section 6)."""
    max_aspect: float = 4 / 3
    """Width over height of a training crop lies between this and its inverse."""
    flip: float = 0.5
    """Probability that a training image is mirrored left to right."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation change by factors of up to 1 +- this."""
    trivial_augment: bool = False
    """One random operation of random strength on each training image (Mueller, Hutter 2021, arXiv 2103.10158)."""
    random_erasing: float = 0.0
    """Probability that a rectangle of a training image is blanked (Zhong et al. 2017, arXiv 1708.04896)."""
    eval_resize: Literal["center_crop", "squash"] = "center_crop"
    """center_crop: a square from the middle of the image. squash: the whole image, its sides scaled apart."""
    eval_crop_share: float = 0.875
    """With center_crop, side of the square over the shorter side of the image (224 of 256 is the custom)."""

    def validate(self) -> None:
        """Raise UserError, with the value and what is allowed, where a value makes no sense."""
        for name in ("size", "eval_size"):
            if getattr(self, name) < 32:
                raise UserError(f"transform.{name} is {getattr(self, name)}; at least 32 pixels are needed")
        for name in ("min_scale", "eval_crop_share"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"transform.{name} is {getattr(self, name)}; it is above 0 and at most 1")
        for name in ("flip", "random_erasing", "color_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"transform.{name} is {getattr(self, name)}; it can be 0 to 1")
        if self.max_aspect < 1:
            raise UserError(f"transform.max_aspect is {self.max_aspect}; at least 1 is needed")
        if self.eval_resize not in ("center_crop", "squash"):
            raise UserError(f"transform.eval_resize is {self.eval_resize!r}; it can be 'center_crop' or 'squash'")


@dataclass(kw_only=True, slots=True)
class ClassificationDataConfig:
    train: Path | None = None
    """A folder of images to learn from, with a folder for each class."""
    val: Path | None = None
    """A folder of images to measure accuracy on, with the same classes."""
    workers: int = 2
    """Processes that read and augment images. 0: the training process itself."""
    val_batch_size: int = 32
    """Images of a batch in evaluation, per process. It changes speed and memory, not accuracy."""


@dataclass(kw_only=True, slots=True)
class ClassificationConfig:
    run_dir: Path = Path("runs/classifier")
    """Folder for everything that the training writes."""
    weights: str | None = None
    """Where to start: a backbone or classifier file (ours, torchvision's, timm's), or a published name
    (litedet convert-weights --list). The network is then built as these weights need it."""
    backbone_lr_scale: float = 1.0
    """Factor of the learning rate in the backbone, where it is trained already."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""
    licence: str = ""
    """What may be done with the weights; written into their file."""
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The network."""
    data: ClassificationDataConfig = field(default_factory=ClassificationDataConfig)
    """Which images."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """How they are changed."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, how fast, on what."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense, alone or together. Called once, after all overrides."""
        for part in (self.model, self.transform, self.train):
            part.validate()
        if self.data.workers < 0 or self.data.val_batch_size < 1:
            raise UserError(
                f"data.workers must be at least 0 and data.val_batch_size at least 1, got {self.data.workers} and "
                f"{self.data.val_batch_size}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; it can be 0 up to, but not including, 1")
        frozen = self.model.backbone.frozen_stages
        if frozen and self.weights is None:
            raise UserError(
                f"model.backbone.frozen_stages is {frozen} and there are no weights to start from: random layers would "
                "stay random; give --weights, or --model.backbone.frozen-stages 0"
            )
        if self.backbone_lr_scale <= 0:
            raise UserError(
                f"backbone_lr_scale must be positive, got {self.backbone_lr_scale}; model.backbone.frozen-stages freezes"
            )

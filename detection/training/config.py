"""The composed config of a detector's training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from backbones.errors import UserError
from detection.data.augment import AugmentConfig
from detection.data.dataset import ExifRule
from detection.engine.config import TrainConfig
from detection.engine.plain import from_plain
from detection.images.decode import MAX_PIXELS
from detection.models.build import config_type
from detection.models.detector import DetectorConfig
from detection.models.ssdlite import SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.training.distillation import DistillationConfig
from detection.training.litedet_loss import LiteDetLossConfig
from detection.training.losses import LossConfig
from detection.training.ssd_loss import SSDLossConfig

_LOSSES: dict[str, type[LossConfig]] = {"ssd": SSDLossConfig, "litedet": LiteDetLossConfig}


def loss_type(plain: Mapping[str, Any]) -> type[LossConfig]:
    """The dataclass of a loss's config that was read from a file; files from before there were kinds hold SSD's.

    Raises:
        UserError: a kind that this version does not know.
    """
    kind = plain.get("kind", "ssd")
    if kind not in _LOSSES:
        raise UserError(f"this is a loss of kind {kind!r}; this version knows {', '.join(_LOSSES)}")
    return _LOSSES[kind]


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    annotations: Path | None = None
    """A COCO json. Other formats: litedet convert."""
    images: Path | None = None
    """The folder that the file names in it start from."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    root: Path | None = None
    """Relative paths of the splits start here."""
    train: SplitConfig = field(default_factory=SplitConfig)
    """Images to learn from."""
    val: SplitConfig = field(default_factory=SplitConfig)
    """Images to measure AP on."""
    exif: ExifRule = "auto"
    """Which pixels boxes count where EXIF turns an image without changing its size: of the turned image (applied) or as
    stored (ignored). auto: what the annotation file says, else applied, with a warning."""
    max_pixels: int = MAX_PIXELS
    """Width times height above which an image is not decoded and counts as unreadable."""
    workers: int = 2
    """Processes that read and augment images. 0: the training process itself."""
    val_batch_size: int = 16
    """Images of a batch in evaluation, per process. It changes speed and memory, not AP."""

    def split(self, name: str) -> tuple[Path, Path]:
        """(annotation file, image folder) of ``train`` or ``val``, under ``root``."""
        split: SplitConfig = getattr(self, name)
        for what, value in (("annotations", split.annotations), ("images", split.images)):
            if value is None:
                raise UserError(f"no --data.{name}.{what} given; it is needed to train")
        root = self.root or Path()
        return root / cast(Path, split.annotations), root / cast(Path, split.images)


@dataclass(kw_only=True, slots=True)
class DetectionConfig:
    run_dir: Path = Path("runs/detector")
    """Folder for everything that the training writes."""
    weights: str | None = None
    """Where to start: a detector (a checkpoint, .safetensors), a backbone or classifier (ours, torchvision's, timm's), or a
    published name (litedet convert-weights --list). The network is then built as these weights need it."""
    weights_part: Literal["all", "backbone"] = "all"
    """Of a whole detector: everything, or the backbone alone under a new head with the config's taps and anchors."""
    backbone_lr_scale: float = 1.0
    """Factor of the learning rate in the backbone, which is trained already."""
    model: DetectorConfig = field(default_factory=SSDLiteConfig)
    """The network."""
    loss: LossConfig = field(default_factory=SSDLossConfig)
    """What it learns from."""
    quantize: Literal["off", "int8"] = "off"
    """int8: fine-tune the detector of --weights while it rounds to 8 bits, for exports that lose too much without. A short run
    with a small learning rate; needs pip install 'litedet[qat]'."""
    teacher: str | None = None
    """A trained detector to learn from beside the labels: of the same kind and classes, larger than the model (a file, or a
    published name). None: the labels alone."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """How much is learnt from the teacher."""
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    """How its predictions become detections."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training images are changed."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, how fast, on what."""

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], source: str | Path = "") -> "DetectionConfig":
        """The config in a run's record.

        Args:
            plain: of this version or one before.
            source: the file, for the message.

        Raises:
            UserError: a field that this version does not know, or a value of another type; the message names it.
        """
        return from_plain(plain, cls, {DetectorConfig: config_type, LossConfig: loss_type}, source)

    def validate(self) -> None:
        """Raises UserError for values that make no sense, alone or together. Called once, after all overrides."""
        parts = (
            self.model,
            self.model.backbone,
            self.loss,
            self.distillation,
            self.postprocess,
            self.augment,
            self.train,
        )
        for part in parts:
            part.validate()
        if self.data.workers < 0 or self.data.val_batch_size < 1:
            raise UserError(
                f"data.workers must be at least 0 and data.val_batch_size at least 1, got {self.data.workers} and "
                f"{self.data.val_batch_size}"
            )
        if self.backbone_lr_scale <= 0:
            raise UserError(
                f"backbone_lr_scale must be positive, got {self.backbone_lr_scale}; model.backbone.frozen_stages freezes"
            )
        self.loss.check(self.model)
        if self.quantize != "off":
            self._validate_quantized()
        frozen = self.model.backbone.frozen_stages
        if frozen and self.weights is None and not self.train.resume:
            raise UserError(
                f"model.backbone.frozen_stages is {frozen} and there are no weights to start from: random layers would "
                "stay random; give --weights, or --model.backbone.frozen-stages 0"
            )

    def _validate_quantized(self) -> None:
        if self.weights is None and not self.train.resume:
            raise UserError("--quantize int8 fine-tunes a trained detector; name its checkpoint: --weights RUN/best.pt")
        if self.train.amp != "off" or self.train.compile:
            raise UserError(
                "--quantize int8 computes in float32 and is not compiled: leave --train.amp and --train.compile out"
            )
        if self.weights_part != "all":
            raise UserError("--quantize int8 fine-tunes a whole trained detector; leave --weights-part out")

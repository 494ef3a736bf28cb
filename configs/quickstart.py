"""Recipes of litedet quickstart: a whole training in minutes on two CPU cores, from drawn images and nothing else."""

from backbones.classifier import ClassifierConfig
from backbones.mobilenetv2 import MobileNetV2Config
from detection.classification.config import ClassificationConfig, ClassificationDataConfig, TransformConfig
from detection.data.augment import AugmentConfig
from detection.engine.config import TrainConfig
from detection.engine.ema import EmaConfig
from detection.engine.optim import OptimConfig
from detection.models.litedet import LiteDetConfig
from detection.training.config import DataConfig, DetectionConfig
from detection.training.litedet_loss import LiteDetLossConfig

WIDTH = 0.35


def classifier() -> ClassificationConfig:
    """A classifier of the drawn shapes, from scratch, for its backbone."""
    return ClassificationConfig(
        model=ClassifierConfig(backbone=MobileNetV2Config(width=WIDTH)),
        data=ClassificationDataConfig(workers=1),
        transform=TransformConfig(size=64, eval_size=64, min_scale=0.7, max_aspect=1.2, eval_resize="squash"),
        train=TrainConfig(
            epochs=2,
            batch_size=64,
            optim=OptimConfig(name="adamw", lr=3e-3, weight_decay=0.05, clip_norm=10.0),
            ema=EmaConfig(),
        ),
    )


def detector() -> DetectionConfig:
    """A detector of the drawn shapes at 160 px, from the backbone of ``classifier``."""
    return DetectionConfig(
        model=LiteDetConfig(
            backbone=MobileNetV2Config(width=WIDTH, frozen_stages=1),
            input_size=(160, 160),
            neck_width=64,
        ),
        loss=LiteDetLossConfig(),
        augment=AugmentConfig(crop_probability=0.0, horizontal_flip=0.5),
        data=DataConfig(workers=1),
        train=TrainConfig(
            epochs=7,
            batch_size=16,
            eval_every=7,
            optim=OptimConfig(name="adamw", lr=6e-3, weight_decay=0.05, clip_norm=10.0),
            ema=EmaConfig(),
        ),
    )

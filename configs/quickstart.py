"""Recipes of tools/quickstart.py: a whole training in minutes on two CPU cores, from drawn pictures and nothing else."""

from backbones.classifier import ClassifierConfig
from backbones.mobilenetv2 import MobileNetV2Config
from backbones.pretrain import TransformConfig
from detection.anchors import AnchorConfig
from detection.classification import ClassificationConfig, ClassificationDataConfig
from detection.config import DataConfig, DetectionConfig
from detection.data.augment import AugmentConfig
from detection.engine.ema import EmaConfig
from detection.engine.optim import OptimConfig
from detection.engine.trainer import TrainConfig
from detection.model import DetectorConfig

WIDTH = 0.5


def classifier() -> ClassificationConfig:
    """A classifier of the drawn shapes, from scratch, for its backbone."""
    return ClassificationConfig(
        model=ClassifierConfig(backbone=MobileNetV2Config(width=WIDTH)),
        data=ClassificationDataConfig(workers=1),
        transform=TransformConfig(size=64, eval_size=64, min_scale=0.7, max_aspect=1.2, eval_resize="squash"),
        train=TrainConfig(
            epochs=4,
            batch_size=64,
            optim=OptimConfig(name="adamw", lr=3e-3, weight_decay=0.05, clip_norm=10.0),
            ema=EmaConfig(),
        ),
    )


def detector() -> DetectionConfig:
    """A detector of the drawn shapes at 192 px, from the backbone of ``classifier``.

    Its first stages, which take half of the time, stay as the classifier left them.
    """
    return DetectionConfig(
        model=DetectorConfig(
            backbone=MobileNetV2Config(width=WIDTH, frozen_stages=3),
            input_size=(192, 192),
            anchors=AnchorConfig(min_scale=0.1, reduce_first_map=False),
        ),
        augment=AugmentConfig(crop_probability=0.3, crop_scale=(0.7, 1.0), horizontal_flip=0.5, vertical_flip=0.5),
        data=DataConfig(workers=1),
        train=TrainConfig(
            epochs=11,
            batch_size=8,
            eval_every=11,
            optim=OptimConfig(name="adamw", lr=2e-3, weight_decay=0.05, clip_norm=10.0),
            ema=EmaConfig(),
        ),
    )

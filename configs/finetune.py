"""Recipes for your own data, on one GPU or a CPU."""

from detection.config import DetectionConfig
from detection.data.augment import finetune_augment
from detection.engine.ema import EmaConfig
from detection.engine.optim import OptimConfig
from detection.engine.trainer import TrainConfig


def detector() -> DetectionConfig:
    """Fine-tune a detector on your own pictures, from an ImageNet backbone."""
    return DetectionConfig(
        augment=finetune_augment(),
        train=TrainConfig(
            epochs=25,
            batch_size=8,
            optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.05, warmup_steps=100, clip_norm=10.0),
            ema=EmaConfig(),
        ),
    )

"""Recipes for your own data, on one GPU or a CPU."""

from backbones.classifier import ClassifierConfig
from backbones.mobilenetv2 import MobileNetV2Config
from detection.classification.config import ClassificationConfig, TransformConfig
from detection.data.augment import finetune_augment
from detection.engine.config import TrainConfig
from detection.engine.ema import EmaConfig
from detection.engine.optim import OptimConfig
from detection.models.anchors import AnchorConfig
from detection.models.litedet import LiteDetConfig
from detection.models.ssdlite import SSDLiteConfig
from detection.training.config import DetectionConfig
from detection.training.litedet_loss import LiteDetLossConfig


def detector() -> DetectionConfig:
    """The detector to begin with: ``litedet``."""
    return litedet()


def ssdlite() -> DetectionConfig:
    """Fine-tune SSDLite on your own images, from an ImageNet backbone or another detector.

        litedet train finetune:ssdlite --data.train.annotations FILE --data.train.images DIR \
            --data.val.annotations FILE --data.val.images DIR --weights FILE --run-dir RUN

    Made for some hundred to some ten thousand images on a CPU or one GPU. What differs from the paper's network and
    training, and why:

    * Six anchors a cell on the first map too, the smallest a tenth of the image: objects of 10 to 20 % of the image,
      which most datasets of users are full of, find an anchor of their size.
    * AdamW with batches of 8: many steps in few epochs.
    * The stem and the first two stages stay as they are: they take most of the time and see edges that all images share.
    * Mild changes of the images: with few epochs the network should meet objects at the size they will have.
    """
    return DetectionConfig(
        model=SSDLiteConfig(
            backbone=MobileNetV2Config(frozen_stages=3),
            anchors=AnchorConfig(min_scale=0.1, reduce_first_map=False),
        ),
        augment=finetune_augment(),
        train=TrainConfig(
            epochs=25,
            batch_size=8,
            optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.05, warmup_steps=100, clip_norm=10.0),
            ema=EmaConfig(),
        ),
    )


def litedet() -> DetectionConfig:
    """Fine-tune LiteDet on your own images, from an ImageNet backbone or another LiteDet.

        litedet train finetune:litedet --data.train.annotations FILE --data.train.images DIR \
            --data.val.annotations FILE --data.val.images DIR --weights FILE --run-dir RUN

    Made for some hundred to some ten thousand images on a CPU or one GPU, as ``ssdlite``, and trained on the same images. The
    network has a map at stride 8 and no anchor sizes to choose, for objects from a few pixels to the whole image. All of it
    but the backbone is new and learns four times as fast; the backbone, which knows a thousand classes already, moves at a
    sixth of that.
    """
    config = ssdlite()
    config.model = LiteDetConfig(backbone=MobileNetV2Config(frozen_stages=3))
    config.loss = LiteDetLossConfig()
    config.train.optim.lr = 4e-3
    config.backbone_lr_scale = 0.15
    return config


def classifier() -> ClassificationConfig:
    """Fine-tune a classifier on your own folders of images, from ImageNet weights.

        litedet train-cls finetune:classifier --data.train DIR --data.val DIR --weights FILE \
            --run-dir RUN

    Made for some hundred to some ten thousand images on a CPU or one GPU. Training crops of 160 px for an evaluation
    at 224 take half the time and agree with it in the size of objects; the first stages, which take most of the time
    and see edges that all images share, stay as they are.
    """
    return ClassificationConfig(
        backbone_lr_scale=0.2,
        label_smoothing=0.1,
        model=ClassifierConfig(backbone=MobileNetV2Config(frozen_stages=3)),
        transform=TransformConfig(size=160, eval_size=224, min_scale=0.4, color_jitter=0.2, eval_resize="squash"),
        train=TrainConfig(
            epochs=10,
            batch_size=32,
            optim=OptimConfig(name="adamw", lr=3e-3, weight_decay=0.05, warmup_steps=30, clip_norm=10.0),
        ),
    )

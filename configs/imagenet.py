"""Recipes for ImageNet-1k: DIR/train and DIR/val with a folder for each class, as torchvision's ImageFolder wants them."""

from backbones.classifier import ClassifierConfig
from backbones.mobilenetv2 import MobileNetV2Config
from detection.classification.config import ClassificationConfig, ClassificationDataConfig, TransformConfig
from detection.engine.config import TrainConfig
from detection.engine.ema import EmaConfig
from detection.engine.optim import OptimConfig

_STEPS_PER_EPOCH = 1_281_167 // 1024


def mobilenetv2() -> ClassificationConfig:
    """MobileNetV2 x1.0 at 224 px from scratch.

        litedet train-cls imagenet:mobilenetv2 --data.train DIR/train --data.val DIR/val
        torchrun --nproc-per-node 8 -m detection.cli.train_cls imagenet:mobilenetv2 \\
            --data.train DIR/train --data.val DIR/val

    The batch of 1024 is over all GPUs together, so both commands train the same: 8 GPUs of 16 GB, or one of 80 GB. On
    fewer gigabytes lower --train.batch-size and raise --train.accumulate by the same factor.

    The recipe is the published one with 72.834 top-1 (github.com/d-li14/mobilenetv2.pytorch: 250 epochs, batch 1024, SGD
    with learning rate 0.4 and a cosine, 5 epochs of warm-up, dropout 0.2, decay 4e-5 on weights alone, no decay on biases
    and norms). It has no moving average, and neither has this one. The learning rate belongs to the batch: somebody who
    halved both and took 200 epochs got 68.5 (issue 26 there).

    Published: 72.834 top-1; the paper has 72.0. Not trained here.
    """
    return ClassificationConfig(
        data=ClassificationDataConfig(workers=8, val_batch_size=128),
        transform=TransformConfig(size=224, eval_size=224, min_scale=0.08, eval_resize="center_crop"),
        train=TrainConfig(
            epochs=250,
            batch_size=1024,
            amp="fp16",
            log_every=100,
            ema=EmaConfig(enabled=False),
            optim=OptimConfig(
                name="sgd",
                lr=0.4,
                momentum=0.9,
                weight_decay=4e-5,
                warmup_steps=5 * _STEPS_PER_EPOCH,
                warmup_max_share=1.0,
            ),
        ),
    )


def mobilenetv2_075() -> ClassificationConfig:
    """MobileNetV2 x0.75; commands and hardware as for ``mobilenetv2``.

    Published: 69.8 top-1 (TensorFlow's mobilenet_v2_0.75_224). Not trained here.
    """
    return _narrower(0.75)


def mobilenetv2_050() -> ClassificationConfig:
    """MobileNetV2 x0.5; commands and hardware as for ``mobilenetv2``.

    Published: 65.4 top-1 (TensorFlow's mobilenet_v2_0.5_224), 65.93 (timm's mobilenetv2_050, RandAugment and a moving
    average). Not trained here.
    """
    return _narrower(0.5)


def mobilenetv2_035() -> ClassificationConfig:
    """MobileNetV2 x0.35; commands and hardware as for ``mobilenetv2``.

    Published: 60.3 top-1 (TensorFlow's mobilenet_v2_0.35_224). Not trained here.
    """
    return _narrower(0.35)


def _narrower(width: float) -> ClassificationConfig:
    config = mobilenetv2()
    config.model = ClassifierConfig(backbone=MobileNetV2Config(width=width))
    return config

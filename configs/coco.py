"""Recipes for COCO 2017: COCO_DIR holds annotations/, train2017/ and val2017/ as COCO ships them."""

from pathlib import Path

from backbones.mobilenetv2 import MobileNetV2Config
from detection.data.augment import AugmentConfig, ssd_augment
from detection.engine.config import TrainConfig
from detection.engine.ema import EmaConfig
from detection.engine.optim import OptimConfig
from detection.models.litedet import LiteDetConfig
from detection.models.ssdlite import SSDLiteConfig
from detection.training.config import DataConfig, DetectionConfig, SplitConfig
from detection.training.litedet_loss import LiteDetLossConfig
from detection.training.ssd_loss import SSDLossConfig


def _coco() -> DataConfig:
    return DataConfig(
        train=SplitConfig(annotations=Path("annotations/instances_train2017.json"), images=Path("train2017")),
        val=SplitConfig(annotations=Path("annotations/instances_val2017.json"), images=Path("val2017")),
        workers=8,
    )


def ssdlite_mnv2_320() -> DetectionConfig:
    """SSDLite of the MobileNetV2 paper at 320 px (arXiv 1801.04381, section 6.2), from an ImageNet backbone.

        litedet train coco:ssdlite_mnv2_320 --data.root COCO_DIR --weights torchvision
        torchrun --nproc-per-node 8 -m detection.cli.train coco:ssdlite_mnv2_320 --data.root COCO_DIR \\
            --weights torchvision

    The batch of 192 is over all GPUs together, so both commands train the same. It takes one GPU of 24 GB.

    The network, the matching, the mining and the losses are the paper's; the schedule is the one that public trainings
    agree on: 192 images a batch, SGD with a cosine over hundreds of epochs, weight decay 4e-5 (mmdetection: 600 epochs,
    21.3; torchvision with MobileNetV3: 660 epochs, 21.3). Ours starts from ImageNet and takes 300.

    Published: 22.1 AP on test-dev (the paper, table 6), 21.3 on val2017 (mmdetection). Not trained here.
    """
    return DetectionConfig(
        weights="torchvision",
        augment=ssd_augment(),
        data=_coco(),
        train=TrainConfig(
            epochs=300,
            batch_size=192,
            eval_every=10,
            amp="bf16",
            optim=OptimConfig(name="sgd", lr=0.06, momentum=0.9, weight_decay=4e-5, warmup_steps=2000),
            ema=EmaConfig(decay=0.9998),
        ),
    )


def ssdlite_mnv2_320_focal() -> DetectionConfig:
    """The same with sigmoid focal loss and no mining: the only public PyTorch SSDLite that reached 22.3 trained so.

        torchrun --nproc-per-node 8 -m detection.cli.train coco:ssdlite_mnv2_320_focal --data.root COCO_DIR

    Published: 22.3 AP on val2017 (ssdlite-pytorch-mobilenext, its MobileNetV2 row: batch 256, weight 5 on the class loss,
    prior 0.01). Not trained here.
    """
    config = ssdlite_mnv2_320()
    config.model = SSDLiteConfig(score="sigmoid", background_column=False)
    config.loss = SSDLossConfig(classification="focal", classification_weight=5.0)
    config.train.batch_size = 256
    config.train.optim.lr = 0.08
    return config


def ssdlite_mnv2_x0_5_320() -> DetectionConfig:
    """Half the width: 16.6 AP on test-dev in the MobileNetV3 paper (arXiv 1905.02244, table 6). Not trained here.

    Torchvision publishes no weights of this width; pretrain a backbone with configs/imagenet.py and pass it as --weights.
    """
    config = ssdlite_mnv2_320()
    config.weights = None
    config.model = SSDLiteConfig()
    config.model.backbone.width = 0.5
    return config


def litedet_096_320() -> DetectionConfig:
    """LiteDet on MobileNetV2 x1.0 at 320 px: 0.719 G multiply-adds, 2.14 M parameters.

        litedet train coco:litedet_096_320 --data.root COCO_DIR --weights torchvision
        torchrun --nproc-per-node 8 -m detection.cli.train coco:litedet_096_320 --data.root COCO_DIR \\
            --weights torchvision

    The batch of 192 is over all GPUs together, so both commands train the same. A step of images that are in memory
    took 68 ms and 12.7 GiB on one H200, which makes 300 epochs 3.5 hours, by calculation, where the data keeps up.

    The schedule is that of the relatives: some 300 epochs (NanoDet-Plus, PicoDet, RTMDet) with AdamW, a cosine, a moving
    average and clipped gradients. Objects change their size by crops of 0.3 to 1 and canvases of 1 to 2 (RTMDet and YOLOX
    found for their smallest networks that weaker changes win: YOLOX-Nano 25.3 with a scale of 0.5 to 1.5 and no mixup, 24.0
    with 0.1 to 2 and mixup).

    Published for relatives of this size on val2017 at 320 px: 27.0 (NanoDet-Plus-m, 0.9 G), 29.1 (PicoDet-S, 0.97 G), 26.6
    on minival (MnasFPN with this backbone, 0.92 G); SSDLite with this backbone 21.3 (mmdetection). Not trained here.
    """
    return DetectionConfig(
        weights="torchvision",
        model=LiteDetConfig(),
        loss=LiteDetLossConfig(),
        augment=AugmentConfig(
            expand_probability=0.5,
            expand_max_scale=2.0,
            crop_probability=0.8,
            crop_scale=(0.3, 1.0),
            crop_aspect=(0.7, 1.4),
            horizontal_flip=0.5,
            brightness=0.1,
            contrast=0.3,
            saturation=0.3,
            hue=0.02,
            min_visible=0.2,
        ),
        data=_coco(),
        train=TrainConfig(
            epochs=300,
            batch_size=192,
            eval_every=10,
            amp="bf16",
            optim=OptimConfig(name="adamw", lr=2e-3, weight_decay=0.05, warmup_steps=1000, clip_norm=35.0),
            ema=EmaConfig(decay=0.9998),
        ),
    )


def litedet_064_320() -> DetectionConfig:
    """The smaller one, on MobileNetV2 x0.5: 0.250 G multiply-adds, 0.64 M parameters. Not trained here.

    Torchvision publishes no weights of this width; pretrain a backbone with configs/imagenet.py and pass it as --weights.
    """
    config = litedet_096_320()
    config.weights = None
    config.model = LiteDetConfig(backbone=MobileNetV2Config(width=0.5), neck_width=64)
    return config


def litedet_128_320() -> DetectionConfig:
    """The larger one, on MobileNetV2 x1.4: 1.349 G multiply-adds, 4.05 M parameters. Not trained here.

    timm publishes weights of this width (mobilenetv2_140); pass its file as --weights.
    """
    config = litedet_096_320()
    config.weights = None
    config.model = LiteDetConfig(backbone=MobileNetV2Config(width=1.4), neck_width=128)
    return config

"""Recipes for COCO 2017: COCO_DIR holds annotations/, train2017/ and val2017/ as COCO ships them."""

from pathlib import Path

from detection.data.augment import ssd_augment
from detection.engine.ema import EmaConfig
from detection.engine.loop import TrainConfig
from detection.engine.optim import OptimConfig
from detection.models.ssdlite import SSDLiteConfig
from detection.training.config import DataConfig, DetectionConfig, SplitConfig
from detection.training.ssd_loss import SSDLossConfig


def _coco() -> DataConfig:
    return DataConfig(
        train=SplitConfig(annotations=Path("annotations/instances_train2017.json"), images=Path("train2017")),
        val=SplitConfig(annotations=Path("annotations/instances_val2017.json"), images=Path("val2017")),
        workers=8,
    )


def ssdlite_mnv2_320() -> DetectionConfig:
    """SSDLite of the MobileNetV2 paper at 320 px (arXiv 1801.04381, section 6.2), from an ImageNet backbone.

        python tools/train_det.py configs/coco.py:ssdlite_mnv2_320 --data.root COCO_DIR --weights torchvision
        torchrun --nproc-per-node 8 tools/train_det.py configs/coco.py:ssdlite_mnv2_320 --data.root COCO_DIR \\
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
            sync_norm=True,
            optim=OptimConfig(name="sgd", lr=0.06, momentum=0.9, weight_decay=4e-5, warmup_steps=2000),
            ema=EmaConfig(decay=0.9998),
        ),
    )


def ssdlite_mnv2_320_focal() -> DetectionConfig:
    """The same with sigmoid focal loss and no mining: the only public PyTorch SSDLite that reached 22.3 trained so.

        torchrun --nproc-per-node 8 tools/train_det.py configs/coco.py:ssdlite_mnv2_320_focal --data.root COCO_DIR

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

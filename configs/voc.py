"""Recipes for Pascal VOC, after litedet convert has made COCO files of it."""

from pathlib import Path

from detection.data.augment import ssd_augment
from detection.engine.config import TrainConfig
from detection.engine.optim import OptimConfig
from detection.training.config import DataConfig, DetectionConfig, SplitConfig


def ssdlite_mnv2_320() -> DetectionConfig:
    """SSDLite at 320 px on VOC 2007, from an ImageNet backbone; one GPU, or a patient CPU.

        litedet convert voc --annotations VOC2007/Annotations --images VOC2007/JPEGImages \\
            --list VOC2007/ImageSets/Main/trainval.txt --out VOC2007/trainval.json
        litedet convert voc --annotations VOC2007/Annotations --images VOC2007/JPEGImages \\
            --list VOC2007/ImageSets/Main/test.txt --out VOC2007/test.json
        litedet train voc:ssdlite_mnv2_320 --data.root VOC2007 --weights torchvision

    Published for MobileNetV2 SSDLite trained on VOC 2007 + 2012: 68.6 to 68.9 mAP at IoU 0.5, VOC's own measure
    (pytorch-ssd, lufficc/SSD). Not trained here.
    """
    return DetectionConfig(
        run_dir=Path("runs/voc"),
        augment=ssd_augment(),
        data=DataConfig(
            train=SplitConfig(annotations=Path("trainval.json"), images=Path("JPEGImages")),
            val=SplitConfig(annotations=Path("test.json"), images=Path("JPEGImages")),
            workers=4,
        ),
        train=TrainConfig(
            epochs=120,
            batch_size=32,
            eval_every=5,
            optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.05, clip_norm=10.0),
        ),
    )

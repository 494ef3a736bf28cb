"""What one would write today with torchvision's own parts: the side that LiteDet is measured against.

The network is the same, layer for layer and weight for weight, and so are the anchors, the thresholds and the loss. What
differs is how it is run: torchvision's layout, its transforms, its loop over classes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models import mobilenet_v2
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

from backbones.errors import UserError
from detection.data.coco import CocoIndex
from detection.models.anchors import AnchorGenerator
from detection.models.ssdlite import SSDLite
from detection.postprocess import PostprocessConfig

PEER_CANDIDATES = 300  # of each class, torchvision's own value for SSDLite


class _Features(nn.Module):
    """torchvision's MobileNetV2 cut at the expansion of the first 160-channel block, and four extra maps."""

    def __init__(
        self, norm: partial[nn.BatchNorm2d], extra_norm: partial[nn.BatchNorm2d], channels: Sequence[int]
    ) -> None:
        super().__init__()
        features = mobilenet_v2(norm_layer=norm).features
        expand, *rest = features[14].conv
        self.to_stride16 = nn.Sequential(*features[:14], expand)
        self.to_stride32 = nn.Sequential(*rest, *features[15:])
        self.extras = nn.ModuleList()
        layer = partial(Conv2dNormActivation, norm_layer=extra_norm, activation_layer=nn.ReLU6)
        for before, after in zip((1280, *channels), channels, strict=False):
            middle = after // 2
            self.extras.append(
                nn.Sequential(
                    layer(before, middle, kernel_size=1),
                    layer(middle, middle, kernel_size=3, stride=2, groups=middle),
                    layer(middle, after, kernel_size=1),
                )
            )

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = [self.to_stride16(x)]
        maps.append(self.to_stride32(maps[-1]))
        for block in self.extras:
            maps.append(block(maps[-1]))
        return OrderedDict((str(number), x) for number, x in enumerate(maps))


class _Anchors(DefaultBoxGenerator):
    """torchvision's generator with the shapes of another detector, so that both have the same anchors."""

    def __init__(self, shapes: Sequence[Sequence[tuple[float, float]]]) -> None:
        super().__init__([[2, 3] for _ in shapes], clip=False)
        self._wh_pairs = [torch.tensor(pairs) for pairs in shapes]

    def num_anchors_per_location(self) -> list[int]:
        return [len(pairs) for pairs in self._wh_pairs]


def build_peer(model: SSDLite, postprocess: PostprocessConfig) -> SSD:
    """torchvision's SSD with the weights of a detector: MobileNetV2 x1.0, symmetric padding, square input, softmax.

    Args:
        model: whose weights, anchors and normalisation are copied.
        postprocess: thresholds and the number of detections. Candidates are torchvision's: 300 of each class.

    Raises:
        UserError: a detector that torchvision's parts cannot make.
    """
    config = model.config
    backbone = config.backbone
    height, width = config.input_size
    given = (backbone.width, backbone.padding, config.score, config.resize, height == width)
    if given != (1.0, "symmetric", "softmax", "stretch", True):
        raise UserError(
            "torchvision's parts make a MobileNetV2 of width 1.0 with symmetric padding, softmax scores and square, "
            f"stretched input; this detector has width {backbone.width}, padding {backbone.padding}, score "
            f"{config.score}, input {height}x{width}, resize {config.resize}"
        )
    extra_norm = partial(nn.BatchNorm2d, eps=config.norm_eps, momentum=config.norm_momentum)
    norm = partial(nn.BatchNorm2d, eps=backbone.norm_eps, momentum=backbone.norm_momentum)
    features = _Features(norm, extra_norm, config.extra_channels)
    specs = [model.backbone.feature_specs[name] for name in config.features] + model.extras.feature_specs
    shapes = AnchorGenerator(config.anchors, specs).shapes
    num_columns = model.num_classes + 1
    head = SSDLiteHead([spec.channels for spec in specs], [len(pairs) for pairs in shapes], num_columns, extra_norm)
    assert config.mean is not None
    assert config.std is not None
    peer = SSD(
        features,
        _Anchors(shapes),
        config.input_size,
        num_columns,
        head=head,
        image_mean=list(config.mean),
        image_std=list(config.std),
        score_thresh=postprocess.score_threshold,
        nms_thresh=postprocess.nms_threshold,
        detections_per_img=postprocess.max_detections,
        topk_candidates=PEER_CANDIDATES,
    )
    # Both sides list their layers in the order of the computation, so the names need no table.
    _copy_weights(model.backbone, nn.ModuleList([features.to_stride16, features.to_stride32]))
    _copy_weights(model.extras, features.extras)
    _copy_weights(model.head.classes, head.classification_head)
    _copy_weights(model.head.box, head.regression_head)
    return peer.train(model.training)


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    pairs = zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise UserError(f"a layer of {tuple(ours.shape)} stands against one of {tuple(theirs.shape)}")
        theirs.copy_(ours)


def as_peer_input(image: NDArray[np.uint8]) -> Tensor:
    """RGB uint8 [H, W, 3] -> float32 [3, H, W] in 0..1, what torchvision's detectors take."""
    converted: Tensor = v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True)
    return converted


class _PeerDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images through the ``ssdlite`` preset of torchvision's detection references, transforms v2, PIL decoding."""

    def __init__(self, index: CocoIndex, image_dir: Path) -> None:
        self.index = index
        self.image_dir = image_dir
        self.transform = v2.Compose(
            [
                v2.RandomIoUCrop(),
                v2.RandomHorizontalFlip(0.5),
                v2.ToImage(),
                v2.ToDtype(torch.float, scale=True),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = Image.open(self.image_dir / self.index.file_name(position)).convert("RGB")
        objects = self.index.objects(position, usable_only=True)
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(objects.boxes), format="XYXY", canvas_size=(image.height, image.width)
        )
        target = {"boxes": boxes, "labels": torch.from_numpy(objects.labels) + 1}
        sample: tuple[Tensor, dict[str, Tensor]] = self.transform(image, target)
        return sample


def _collate(samples: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*samples, strict=True))


def build_peer_loader(index: CocoIndex, image_dir: Path, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Batches as torchvision's references make them. The images keep their size: its network resizes them itself."""
    return DataLoader(
        _PeerDataset(index, image_dir),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        collate_fn=_collate,
        persistent_workers=num_workers > 0,
    )

"""Annotation files and detections of COCO's size, drawn: what opening and evaluating them costs does not depend on what they
show."""

import math
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detection.data.coco import CocoIndex
from detection.models.litedet import LiteDet
from detection.models.ssdlite import SSDLite

NUM_CLASSES = 80
# COCO numbers its 80 classes up to 90.
_CATEGORY_IDS = np.setdiff1d(np.arange(1, 91), (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
_HEIGHT, _WIDTH = 480, 640
_NUM_CORNERS = 12
_CHUNK = 50_000  # records that exist as Python objects at a time


def draw_annotations(
    path: Path, num_images: int, num_boxes: int, file_names: tuple[str, ...] = (), seed: int = 0
) -> Path:
    """Write a COCO json with the fields of COCO's own, polygons of 12 corners included.

    Args:
        path: written whole or not at all.
        num_images: all of 640x480.
        num_boxes: fall on the images at random; 1.2 % are crowds.
        file_names: used in turn for the images; without any, names as COCO's.
        seed: the same seed gives the same file.
    """
    rng = np.random.default_rng(seed)
    image_ids = np.sort(rng.choice(600_000, num_images, replace=False))
    sides = np.exp(rng.normal(4, 1, (num_boxes, 2))).clip(4, (600, 440))
    corners = rng.random((num_boxes, 2)) * ((_WIDTH, _HEIGHT) - sides)
    boxes = np.concatenate([corners, sides], axis=1).round(2)
    images = image_ids[rng.integers(num_images, size=num_boxes)]
    categories = _CATEGORY_IDS[rng.integers(NUM_CLASSES, size=num_boxes)]
    crowd = rng.random(num_boxes) < 0.012
    encode = msgspec.json.encode
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(b'{"info":{},"licenses":[],"images":')
        file.write(
            encode(
                [
                    {
                        "license": 4,
                        "file_name": file_names[place % len(file_names)] if file_names else f"{image_id:012d}.jpg",
                        "coco_url": f"http://images.cocodataset.org/train2017/{image_id:012d}.jpg",
                        "height": _HEIGHT,
                        "width": _WIDTH,
                        "date_captured": "2013-11-14 17:02:52",
                        "flickr_url": "http://farm7.staticflickr.com/6116/6255196340_da26cf2c9e_z.jpg",
                        "id": image_id,
                    }
                    for place, image_id in enumerate(image_ids.tolist())
                ]
            )
        )
        file.write(b',"annotations":[')
        for start in range(0, num_boxes, _CHUNK):
            part = slice(start, start + _CHUNK)
            polygons = np.tile(boxes[part, :2], _NUM_CORNERS) + rng.random(
                (len(boxes[part]), 2 * _NUM_CORNERS)
            ) * np.tile(boxes[part, 2:], _NUM_CORNERS)
            rows = zip(
                polygons.round(2).tolist(),
                boxes[part].tolist(),
                crowd[part].tolist(),
                images[part].tolist(),
                categories[part].tolist(),
                strict=True,
            )
            records = [
                {
                    "segmentation": [polygon],
                    "area": box[2] * box[3],
                    "iscrowd": int(is_crowd),
                    "image_id": image_id,
                    "bbox": box,
                    "category_id": category,
                    "id": number,
                }
                for number, (polygon, box, is_crowd, image_id, category) in enumerate(rows, start + 1)
            ]
            file.write((b"," if start else b"") + encode(records)[1:-1])
        file.write(b'],"categories":')
        file.write(encode([{"id": i, "name": f"class {i}", "supercategory": "any"} for i in _CATEGORY_IDS.tolist()]))
        file.write(b"}")
    temporary.replace(path)
    return path


def draw_detections(index: CocoIndex, per_image: int = 100, seed: int = 0) -> tuple[NDArray[np.float64], ...]:
    """Detections as a trained detector might give them: good ones, shifted ones, mistaken classes, noise.

    Returns:
        image_ids int64 [N], boxes xywh float64 [N, 4] in pixels with two decimals, scores float64 [N] with five, labels
        int64 [N]; N = per_image times the number of images, grouped by image.
    """
    rng = np.random.default_rng(seed)
    num = len(index) * per_image
    rank = np.tile(np.arange(per_image), len(index))
    objects = np.repeat(np.diff(index.offsets), per_image)
    copies = rank // np.maximum(objects, 1)  # each object is found up to three times, ever less exactly
    found = (objects > 0) & (copies < 3)
    record = np.where(found, np.repeat(index.offsets[:-1], per_image) + rank % np.maximum(objects, 1), 0)
    noise = rng.normal(0, 1, (num, 4)) * 0.08 * (1 + copies[:, None])
    truth = index.xywh[record]
    moved = np.concatenate([truth[:, :2] + noise[:, :2] * truth[:, 2:], truth[:, 2:] * np.exp(noise[:, 2:])], axis=1)
    boxes = np.where(found[:, None], moved, rng.random((num, 4)) * (500, 300, 140, 180))
    labels = np.where(found & (rng.random(num) < 0.8), index.labels[record], rng.integers(index.num_classes, size=num))
    scores = np.where(found, rng.beta(4 - np.minimum(copies, 3), 2), rng.beta(1, 6, num))
    return np.repeat(index.image_ids, per_image), boxes.round(2), scores.round(5), labels


@torch.no_grad()
def draw_weights(model: SSDLite | LiteDet, images: Tensor, seed: int = 0) -> None:
    """Random weights under which a detector's scores are spread as after a training, in place.

    An untrained head gives every class about the same score, which is the most expensive case for a loop over classes. Here the
    batch norms have the statistics of the given images, the class logits of an anchor vary with a standard deviation of 1.5
    and, with softmax, the background leads the sum of the classes by 4 in logits: so it was after a short training on COCO
    images, where 3 to 5 % of all (anchor, class) pairs scored above 0.001. With sigmoid scores the bias leaves 4 % above that.

    Args:
        model: SSDLite with softmax scores, or LiteDet.
        images: uint8 [B, 3, H, W], at least four.
        seed: of the weights of the class outputs.
    """
    generator = torch.Generator(model.anchors.device).manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    was_training = model.training
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    for output in model.head.class_outputs():
        assert output.bias is not None
        output.weight.normal_(generator=generator)
        # ReLU6 of a normal variable has a mean square of about a half.
        output.weight.mul_(1.5 * (2 / output.in_channels) ** 0.5)
        if isinstance(model, SSDLite):
            output.bias.zero_()
            # The log of the sum of exp over K normal logits of deviation s is about log K + s * s / 2.
            lead = 4.0 + float(np.log(model.num_classes)) + 1.5**2 / 2
            output.bias.view(-1, model.head.num_columns)[:, 0] = lead
        else:
            # A normal variable lies 1.75 deviations above its mean in 4 % of all cases.
            output.bias.fill_(math.log(0.001 / 0.999) - 1.75 * 1.5)
    model.train(was_training)

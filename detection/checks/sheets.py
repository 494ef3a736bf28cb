"""Contact sheets: training images as the network gets them, and which anchors answer for which object.

Letters in shapes: B batch, A anchors, M objects of an image (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import supervision as sv
import torch
from numpy.typing import NDArray

from detection.data.augment import TrainTransform
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset
from detection.data.loader import EpochSampler, build_loader
from detection.images.draw import draw_target, image_grid
from detection.models.detector import Detector
from detection.structures import Batch
from detection.training.assignment import Assignment
from detection.training.config import DetectionConfig
from detection.training.litedet_loss import LiteDetLoss
from detection.training.ssd_loss import SSDLoss

_CELL = 640  # longer side of an image in a sheet, in pixels
_MISSED = (255, 40, 40)  # RGB of an object that no anchor answers for
_NEGATIVE = (160, 160, 160)
_COLOURS = [  # of the objects that have anchors, without the palette's own red
    colour.as_rgb()
    for colour in sv.ColorPalette.DEFAULT.colors
    if np.abs(np.subtract(colour.as_rgb(), _MISSED)).max() > 60
]


@dataclass(slots=True, kw_only=True)
class Assigned:
    """What the anchors of a batch would learn in a training step now.

    Attributes:
        assignment: [B, A], on the CPU.
        negatives: bool [B, A], the anchors that learn "nothing here": of SSD the hard ones alone, else all the others.
        anchors: float32 [A, 4], xyxy in pixels of the input.
        as_points: whether anchors are points (their centres count) rather than boxes.
    """

    assignment: Assignment
    negatives: NDArray[np.bool_]
    anchors: NDArray[np.float32]
    as_points: bool


def training_batch(index: CocoIndex, config: DetectionConfig, num_images: int, epoch: int = 0) -> Batch:
    """The first images of an epoch of a training, as its network gets them.

    Args:
        index: the training images.
        config: of the training; its data must name the folder.
        num_images: B; fewer where the set has fewer.
        epoch: from 0.

    Raises:
        UserError, FileNotFoundError: there is nothing to train on, or images are missing.
    """
    index.require_objects()
    model, data = config.model, config.data
    transform = TrainTransform(
        config.augment, model.input_size, resize_mode=model.resize, fill=model.fill, seed=config.train.seed
    )
    images = data.split("train")[1]
    dataset = DetectionDataset(index, images, transform, exif=data.exif, max_pixels=data.max_pixels)
    loader = build_loader(dataset, batch_size=min(num_images, len(dataset)), seed=config.train.seed)
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)
    batch: Batch = next(iter(loader))
    return batch


def augmented_sheet(batch: Batch, class_names: Sequence[str]) -> NDArray[np.uint8]:
    """The images of a batch with their boxes, uint8 RGB."""
    return image_grid([_with_boxes(batch, row, class_names) for row in range(len(batch))], cell=_CELL)


def _pixels(batch: Batch, row: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(batch.images[row].permute(1, 2, 0).numpy())


def _with_boxes(batch: Batch, row: int, class_names: Sequence[str]) -> NDArray[np.uint8]:
    valid = batch.valid[row]
    return draw_target(
        _pixels(batch, row), batch.boxes[row][valid], batch.labels[row][valid], class_names, min_side=_CELL
    )


@torch.inference_mode()
def assign(batch: Batch, model: Detector, config: DetectionConfig) -> Assigned:
    """What the anchors would learn of a batch, as the loss of the config sees it.

    Args:
        batch: as a training gets it.
        model: the network as it is now; some assigners and the choice of negatives look at its predictions.
        config: says which loss.
    """
    raw = model.eval()(batch.images)
    loss = config.loss.build(model)
    assert isinstance(loss, SSDLoss | LiteDetLoss)
    assignment = loss.assigner(raw, batch.target)
    negatives = ~assignment.positive
    if isinstance(loss, SSDLoss) and loss.config.classification == "cross_entropy":
        negatives = loss.hard_negatives(raw.class_logits.float(), assignment.positive)
    return Assigned(
        assignment=assignment,
        negatives=negatives.numpy(),
        anchors=raw.anchors.numpy(),
        as_points=isinstance(loss, LiteDetLoss),
    )


def positives_of_objects(batch: Batch, assigned: Assigned) -> NDArray[np.int64]:
    """int64 [objects of the batch], the anchors that answer for each object, image by image."""
    counts = []
    for row in range(len(batch)):
        objects = assigned.assignment.objects[row][assigned.assignment.positive[row]].numpy()
        counts.append(np.bincount(objects, minlength=batch.valid.shape[1])[batch.valid[row].numpy()])
    return np.concatenate(counts) if counts else np.zeros(0, np.int64)


def assignment_sheet(batch: Batch, assigned: Assigned) -> NDArray[np.uint8]:
    """Positives and negatives of every image, uint8 RGB.

    An object and its positives have one colour: thin boxes are anchors, dots are anchor points, the stronger the better they
    fit. An object in thick red has none. Small grey dots are the centres of negatives (of SSD, the hard ones that it learns).
    """
    return image_grid([_assigned_image(batch, assigned, row) for row in range(len(batch))], cell=_CELL)


def _assigned_image(batch: Batch, assigned: Assigned, row: int) -> NDArray[np.uint8]:
    pixels = _pixels(batch, row)
    scale = _CELL / max(pixels.shape[:2])
    size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
    scene = np.asarray(
        cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC) // 2, np.uint8
    )  # darker, so that lines show
    anchors = assigned.anchors * scale
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    if not assigned.as_points:
        for place in np.flatnonzero(assigned.negatives[row]).tolist():
            cv2.circle(scene, _point(centres[place]), 2, _NEGATIVE, -1, cv2.LINE_AA)
    positive = assigned.assignment.positive[row].numpy()
    objects, quality = assigned.assignment.objects[row].numpy(), assigned.assignment.quality[row].numpy()
    for place in np.flatnonzero(positive).tolist():
        colour = _COLOURS[objects[place] % len(_COLOURS)]
        if assigned.as_points:
            radius = max(3, round(float(anchors[place, 2] - anchors[place, 0]) / 6))
            cv2.circle(scene, _point(centres[place]), radius, colour, -1 if quality[place] >= 0.5 else 2, cv2.LINE_AA)
        else:
            cv2.rectangle(scene, _point(anchors[place, :2]), _point(anchors[place, 2:]), colour, 1, cv2.LINE_AA)
    answered = set(objects[positive].tolist())
    for number in np.flatnonzero(batch.valid[row].numpy()).tolist():
        x1, y1, x2, y2 = (batch.boxes[row, number].numpy() * scale).tolist()
        colour = _COLOURS[number % len(_COLOURS)] if number in answered else _MISSED
        cv2.rectangle(scene, _point((x1, y1)), _point((x2, y2)), colour, 3 if number in answered else 5)
    return scene


def _point(place: Sequence[float] | NDArray[np.float32]) -> tuple[int, int]:
    return round(float(place[0])), round(float(place[1]))


def describe_assignment(batch: Batch, assigned: Assigned) -> str:
    """A few lines: how many anchors answer for an object, and for how many objects none does."""
    counts = positives_of_objects(batch, assigned)
    lines = [f"{len(batch)} images, {len(counts)} objects, {len(assigned.anchors)} anchors an image"]
    if len(counts):
        lines.append(
            f"anchors that answer for an object: median {np.median(counts):g}, {counts.min()} to {counts.max()}; "
            f"{(counts == 0).sum()} objects have none"
        )
    negatives = assigned.negatives.sum() / max(len(batch), 1)
    lines.append(f"anchors that learn that nothing is there: {negatives:.0f} an image")
    return "\n".join(lines)

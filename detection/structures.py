"""The types on the way from an image file to detections, each defined once.

* Boxes are ``xyxy``: x1, y1, x2, y2 in absolute pixels of the image they accompany, float32, 0 <= x1 < x2 <= W.
* Labels are ``0 .. K-1``; the background is never counted.
* Sizes are (height, width).
* Images are RGB uint8 until they reach the device; the network normalises them itself.

Letters in shapes: B batch, H W height and width, A anchors, M objects of an image (padded), N boxes, K classes,
C columns of class logits (K, or K + 1 with the background as column 0), D numbers of a box code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# How an image is brought to the network's input size; see ``detection.images.place.place``.
ResizeMode = Literal["stretch", "letterbox", "stretch_tensorflow"]

_Batch = TypeVar("_Batch", bound="Batch")


class Placement(NamedTuple):
    """Where an image lies in the network's input: input_x = image_x * scale_x + offset_x, the same for y."""

    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float


@dataclass(slots=True, kw_only=True)
class Sample:
    """One image of a dataset, ready to become part of a batch.

    Attributes:
        image: uint8 [H, W, 3], RGB, already at the network's input size.
        boxes: float32 [N, 4], xyxy in pixels of ``image``.
        labels: int64 [N].
        image_id: the id of the image in its annotation file.
        original_size: (height, width) of the image on disk.
        placement: where the image on disk lies in ``image``. Meaningless after a random flip or crop.
        skipped: "path: reason" of every unreadable image that this one replaces.
        damaged: "path: what the decoder says" of an image that decoded to partly wrong pixels; "" for all others.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    image_id: int
    original_size: tuple[int, int]
    placement: Placement
    skipped: tuple[str, ...] = ()
    damaged: str = ""


class Target(NamedTuple):
    """The objects of a batch, padded to the same number M.

    Attributes:
        boxes: float32 [B, M, 4], xyxy in pixels of the network's input; zeros where not valid.
        labels: int64 [B, M]; zero where not valid.
        valid: bool [B, M], false on padding.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor


@dataclass(slots=True, kw_only=True)
class Batch:
    """Images and their objects, stacked.

    Attributes:
        images: uint8 [B, 3, H, W], RGB, channels-last in memory.
        boxes, labels, valid: the fields of ``Target``.
        image_ids: int64 [B]. Stays on the host.
        original_sizes: int64 [B, 2], (height, width) of each image on disk. Stays on the host.
        placements: float32 [B, 4], the fields of ``Placement`` in their order. Stays on the host.
        skipped: "path: reason" of every image that could not be read while this batch was made.
        damaged: "path: what the decoder says" of every image in it that decoded to partly wrong pixels.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    valid: Tensor
    image_ids: Tensor
    original_sizes: Tensor
    placements: Tensor
    skipped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def target(self) -> Target:
        return Target(self.boxes, self.labels, self.valid)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a training step takes: images, boxes, labels, valid."""
        return self.images, self.boxes, self.labels, self.valid

    def to(self: _Batch, device: torch.device, non_blocking: bool = False) -> _Batch:
        """The same batch with ``inputs`` on another device; from pinned memory with ``non_blocking`` the host does not wait."""
        return self._with_inputs(value.to(device, non_blocking=non_blocking) for value in self.inputs())

    def pin_memory(self: _Batch) -> _Batch:
        """The same batch with ``inputs`` in page-locked memory. ``DataLoader(pin_memory=True)`` calls this."""
        return self._with_inputs(value.pin_memory() for value in self.inputs())

    def _with_inputs(self: _Batch, inputs: Iterable[Tensor]) -> _Batch:
        images, boxes, labels, valid = inputs
        return replace(self, images=images, boxes=boxes, labels=labels, valid=valid)


class RawPredictions(NamedTuple):
    """The network's output for every anchor, before any threshold; half precision under autocast.

    Attributes:
        codes: floating point [B, A, D], the box coder's numbers.
        class_logits: floating point [B, A, C].
        anchors: float32 [A, 4], xyxy in pixels of the network's input.
    """

    codes: Tensor
    class_logits: Tensor
    anchors: Tensor


@dataclass(slots=True, kw_only=True)
class Detections:
    """What was found in one image, best first.

    Attributes:
        boxes: float32 [N, 4], xyxy in pixels of the image as it was given.
        scores: float32 [N] in 0..1.
        labels: int64 [N].
        class_names: name of each label; empty if the names are not known.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float | Tensor) -> Detections:
        """The detections with at least this score: one for all, or one for each label, [K] on the same device."""
        keep = self.scores >= (score[self.labels] if isinstance(score, Tensor) else score)
        return replace(self, boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep])

    def cpu(self) -> Detections:
        return replace(self, boxes=self.boxes.cpu(), scores=self.scores.cpu(), labels=self.labels.cpu())

    def names(self) -> list[str]:
        """The class name of each detection, or its label as text if the name is not known."""
        return [self.class_names[i] if i < len(self.class_names) else str(i) for i in self.labels.tolist()]


class Runner(Protocol):
    """Anything that computes a detector's raw predictions: a network in torch, an exported file, a plain function.

    A runner may also have these attributes:

    * ``device``: the ``torch.device`` on which it takes images and leaves predictions; without it, the CPU.
    * ``max_batch``: images that it takes at once at most; without it, or where it is None, any number.
    * ``own_threads``: true where another library's threads do its work, so that torch's should stay out of the way.
    """

    def __call__(self, images: Tensor) -> RawPredictions:
        """uint8 [B, 3, H, W], RGB, at the network's input size -> raw predictions [B, A, ...]."""
        ...


def device_of(runner: Runner) -> torch.device:
    """Where a runner takes its images."""
    device: torch.device = getattr(runner, "device", torch.device("cpu"))
    return device


def run_in_parts(runner: Runner, images: Tensor) -> RawPredictions:
    """What a runner says of images [B, 3, H, W], given to it in parts where it takes fewer than B at once."""
    most: int | None = getattr(runner, "max_batch", None)
    if most is None or len(images) <= most:
        return runner(images)
    parts = [runner(part) for part in images.split(most)]
    return RawPredictions(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.class_logits for part in parts]),
        parts[0].anchors,
    )

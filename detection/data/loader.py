"""Images and objects from the disk to batches.

Letters in shapes: B batch, H W height and width, M objects of an image (padded), N objects of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from backbones.errors import UserError
from detection.data.augment import EvalTransform, TrainTransform
from detection.data.coco import CocoIndex
from detection.engine.workers import BatchLoader
from detection.structures import Batch, Sample

_NUM_SUBSTITUTES = 20  # unreadable images in a row before a training sample gives up
_NUM_PROBES = 20  # files looked for before anything else is done
_PAD_MULTIPLE = 8  # objects per image are padded to a multiple, so that a compiled step sees few different shapes

_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


class UnreadableImageError(ValueError):
    """An image that is not there, does not decode, or is not the one its annotation speaks of."""


class SkippedSample(NamedTuple):
    """What stands in the place of an evaluation sample whose image cannot be read."""

    reason: str
    input_size: tuple[int, int]


class DetectionDataset(Dataset[Sample | SkippedSample]):
    """The images of an index, each through a transform.

    Its keys are (epoch, position): a worker process that lives through the whole training learns the epoch from the
    key.

    Args:
        index: what the annotation file says.
        image_dir: the folder that the file names of the index are relative to.
        transform: a ``TrainTransform`` draws samples with the objects that can be learnt from; an image that cannot
            be read is replaced by another one. An ``EvalTransform`` gives each image as it is, and a
            ``SkippedSample`` for an unreadable one.

    Raises:
        FileNotFoundError: the folder is not there, or holds none of the first images that were looked for.
        UserError: there is nothing to train on.
    """

    def __init__(self, index: CocoIndex, image_dir: str | Path, transform: TrainTransform | EvalTransform) -> None:
        self.index = index
        self.image_dir = Path(image_dir)
        self.transform = transform
        self.training = isinstance(transform, TrainTransform)
        if self.training:
            index.require_objects()
        _require_images(index, self.image_dir)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample | SkippedSample:
        """The sample of (epoch, position)."""
        epoch, position = key
        try:
            return self._sample(epoch, position, ())
        except UnreadableImageError as error:
            skipped = [str(error)]
        if not self.training:
            return SkippedSample(skipped[0], self.transform.input_size)
        substitutes = np.random.default_rng((epoch, position, len(self))).integers(len(self), size=_NUM_SUBSTITUTES)
        for substitute in substitutes.tolist():
            try:
                return self._sample(epoch, substitute, tuple(dict.fromkeys(skipped)))
            except UnreadableImageError as error:
                skipped.append(str(error))
        raise UnreadableImageError(f"{len(skipped)} images in a row cannot be read; the first: {skipped[0]}")

    def _sample(self, epoch: int, position: int, skipped: tuple[str, ...]) -> Sample:
        index = self.index
        size = index.size(position)
        image = _EncodedImage(self.image_dir / index.file_name(position), size)
        objects = index.objects(position, usable_only=True)
        boxes = objects.boxes.clip(0, np.array([size[1], size[0], size[1], size[0]], np.float32))
        placed = self.transform(image.decode, size, boxes, objects.labels, epoch, position)
        return Sample(
            image=placed.image,
            boxes=placed.boxes,
            labels=placed.labels,
            image_id=int(index.image_ids[position]),
            original_size=size,
            placement=placed.placement,
            skipped=skipped,
        )


class _EncodedImage:
    """The bytes of an image file, decoded at the size that is asked for.

    Annotations count pixels of the image as it lies in the file. Some tools turn it first as its EXIF tag says, and
    write the turned size; whichever of the two agrees with the annotation's size is taken.
    """

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self.path = path
        self.size = size
        try:
            self.encoded = np.fromfile(path, np.uint8)
        except OSError as error:
            raise UnreadableImageError(f"{path}: {error.strerror or error}") from None
        # Other formats are decoded whole and then made smaller, which costs time and saves none.
        self.is_jpeg = bytes(self.encoded[:2]) == b"\xff\xd8"

    def decode(self, reduction: int) -> NDArray[np.uint8]:
        """RGB uint8; each side is that of the annotation over the reduction, rounded up."""
        flags = cv2.IMREAD_COLOR_RGB | (_REDUCED[reduction] if self.is_jpeg else 0)
        image = self._decode(flags | cv2.IMREAD_IGNORE_ORIENTATION)
        scale = reduction if self.is_jpeg else 1
        wanted = (-(-self.size[0] // scale), -(-self.size[1] // scale))
        if image.shape[:2] != wanted:
            raw = image.shape[:2]
            if raw == wanted[::-1]:
                image = self._decode(flags)
            if image.shape[:2] != wanted:
                height, width = self._decode(cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION).shape[:2]
                raise UnreadableImageError(
                    f"{self.path}: the image is {width}x{height} pixels, its annotation says {self.size[1]}x{self.size[0]}"
                )
        if scale != reduction:
            width, height = -(-self.size[1] // reduction), -(-self.size[0] // reduction)
            image = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        return image

    def _decode(self, flags: int) -> NDArray[np.uint8]:
        try:
            image = cv2.imdecode(self.encoded, flags) if self.encoded.size else None
        except cv2.error:
            image = None
        if image is None:
            raise UnreadableImageError(f"{self.path}: the image does not decode ({self.encoded.size} bytes)")
        return np.asarray(image, np.uint8)


def _require_images(index: CocoIndex, image_dir: Path) -> None:
    if not image_dir.is_dir():
        raise FileNotFoundError(f"image folder {image_dir} does not exist or is not a folder")
    probes = np.unique(np.linspace(0, len(index) - 1, min(_NUM_PROBES, len(index))).astype(int)).tolist()
    paths = [image_dir / index.file_name(position) for position in probes]
    if paths and not any(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"image folder {image_dir} has none of {len(paths)} images of {index.path}; the first that was looked for is "
            f"{paths[0]}"
        )


class EpochSampler(Sampler[tuple[int, int]]):
    """The keys (epoch, position) of one process.

    For training the positions are shuffled by (seed, epoch), and every process gets equally many (at most world_size
    - 1 images sit out an epoch). For evaluation each position comes exactly once over all processes, in order.
    """

    def __init__(self, num_images: int, *, training: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank is {rank} and world_size {world_size}; 0 <= rank < world_size is needed")
        self.num_images = num_images
        self.training = training
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is for."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.training:
            return self.num_images // self.world_size
        return len(range(self.rank, self.num_images, self.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        if self.training:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
            order = order[: len(self) * self.world_size]
        else:
            order = np.arange(self.num_images)
        for position in order[self.rank :: self.world_size]:
            yield epoch, int(position)


def collate(samples: Sequence[Sample | SkippedSample]) -> Batch:
    """Stack samples to a batch; objects are padded to the same number, a multiple of 8.

    Images that could not be read are left out and named in ``skipped``; a batch may be empty for that reason.
    """
    kept = [sample for sample in samples if isinstance(sample, Sample)]
    skipped = [sample.reason for sample in samples if isinstance(sample, SkippedSample)]
    skipped += [reason for sample in kept for reason in sample.skipped]
    B = len(kept)
    most = max((len(sample.labels) for sample in kept), default=0)
    M = max(-(-most // _PAD_MULTIPLE), 1) * _PAD_MULTIPLE
    boxes, labels, valid = np.zeros((B, M, 4), np.float32), np.zeros((B, M), np.int64), np.zeros((B, M), np.bool_)
    for row, sample in enumerate(kept):
        N = len(sample.labels)
        boxes[row, :N], labels[row, :N], valid[row, :N] = sample.boxes, sample.labels, True
    if kept:
        images = np.stack([sample.image for sample in kept])
    else:
        sizes = {sample.input_size for sample in samples if isinstance(sample, SkippedSample)}
        images = np.zeros((0, *(sizes.pop() if sizes else (1, 1)), 3), np.uint8)
    return Batch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),  # height, width, channel in memory: channels-last as it is
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        valid=torch.from_numpy(valid),
        image_ids=torch.tensor([sample.image_id for sample in kept], dtype=torch.int64),
        original_sizes=torch.tensor([sample.original_size for sample in kept], dtype=torch.int64).reshape(B, 2),
        placements=torch.tensor([sample.placement for sample in kept], dtype=torch.float32).reshape(B, 4),
        skipped=skipped,
    )


def build_loader(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> BatchLoader[Batch]:
    """Batches of a dataset: shuffled and without a last incomplete one for training, each image once for evaluation.

    Call ``loader.sampler.set_epoch(epoch)`` before each epoch of a training.

    Args:
        dataset: says by its transform whether this is training.
        batch_size: images per batch and process.
        num_workers: processes that decode and augment; 0 does it in this one. They stay alive between epochs.
        seed: of the order of images.
        rank, world_size: this process among those that share the work.
        pin_memory: page-locked batches, for copies to CUDA that the host does not wait for.

    Raises:
        UserError: a training epoch would have no batch at all.
    """
    sampler = EpochSampler(len(dataset), training=dataset.training, seed=seed, rank=rank, world_size=world_size)
    if dataset.training and len(sampler) < batch_size:
        raise UserError(
            f"batch size {batch_size} is larger than the {len(sampler)} images per process of {dataset.index.path}; "
            "an incomplete batch is not trained on (batch norm fails on a single image), so the epoch would be empty"
        )
    return BatchLoader(
        dataset,
        sampler=sampler,
        collate=collate,
        batch_size=batch_size,
        num_workers=num_workers,
        drop_last=dataset.training,
        pin_memory=pin_memory,
        seed=seed,
    )

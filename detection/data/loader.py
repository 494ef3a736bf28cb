"""Samples to batches, in the order that training and evaluation want.

Letters in shapes: B batch, M objects of an image (padded).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from backbones.errors import UserError
from detection.data.dataset import DetectionDataset, SkippedSample
from detection.engine.workers import BatchLoader
from detection.structures import Batch, Sample

_PAD_MULTIPLE = 8  # objects per image are padded to a multiple, so that a compiled step sees few different shapes


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
        self.first_key = 0

    def set_epoch(self, epoch: int, first_key: int = 0) -> None:
        """The epoch that the next iterations are for, and the number of this process's keys that they leave out."""
        self.epoch, self.first_key = epoch, first_key

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
        for position in order[self.rank :: self.world_size][self.first_key :]:
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
        damaged=[sample.damaged for sample in kept if sample.damaged],
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

    Call ``loader.set_epoch(epoch)`` before each epoch of a training.

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

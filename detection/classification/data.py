"""Folders of images, and how they become batches.

Letters in shapes: B batch, H W height and width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from backbones.errors import UserError
from detection.classification.config import TransformConfig
from detection.data.loader import EpochSampler
from detection.engine.runtime import Runtime
from detection.engine.workers import BatchLoader
from detection.images.decode import IMAGE_SUFFIXES, EncodedImage, UnreadableImageError

_NUM_SUBSTITUTES = 20  # unreadable images in a row before a training sample gives up
_NUM_NAMED = 8  # classes or files named in a message


@dataclass(slots=True, frozen=True)
class ImageFolder:
    """The images of a folder that has a folder for each class (torchvision's layout).

    Attributes:
        root: the folder.
        files: bytes [N], paths below ``root``; one array, so that worker processes share it.
        labels: int64 [N], index into ``class_names``.
        class_names: the names of the class folders, sorted.
    """

    root: Path
    files: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, position: int) -> Path:
        return self.root / os.fsdecode(self.files[position].item())


def read_image_folder(root: str | Path, class_names: tuple[str, ...] | None = None) -> ImageFolder:
    """List the images of ``root/CLASS/**``; hidden files and files of other kinds are left aside.

    Args:
        root: the folder.
        class_names: the classes that have to be there, None for those that are.

    Raises:
        FileNotFoundError: no such folder.
        UserError: no class folders, a class without images, or other classes than ``class_names``.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} does not exist or is not a folder")
    found = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not found:
        raise UserError(f"image folder {root} has no class folders; images are expected as {root}/CLASS/NAME.jpg")
    if class_names is not None and found != class_names:
        missing = sorted(set(class_names) - set(found))
        extra = sorted(set(found) - set(class_names))
        raise UserError(
            f"image folder {root} has other classes than the training data; missing: {_some(missing)}; "
            f"not in the training data: {_some(extra)}"
        )
    files: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(found):
        own = [
            os.fsencode(os.path.relpath(os.path.join(folder, file), root))
            for folder, _, names in os.walk(root / name, followlinks=True)
            for file in names
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
        ]
        if not own:
            raise UserError(
                f"class folder {root / name} has no image ({', '.join(IMAGE_SUFFIXES)}); add some or remove it"
            )
        files += sorted(own)
        labels += [label] * len(own)
    return ImageFolder(root, np.array(files, np.bytes_), np.array(labels, np.int64), found)


class TrainTransform:
    """Random crop, flip and what else the config asks for; what is drawn depends on (seed, epoch, position) alone.

    Args:
        config: what is done how much.
        seed: of the training.
    """

    def __init__(self, config: TransformConfig, seed: int = 0) -> None:
        self.seed = seed
        self.size = config.size
        steps: list[nn.Module] = [
            v2.RandomResizedCrop(
                config.size,
                scale=(config.min_scale, 1.0),
                ratio=(1 / config.max_aspect, config.max_aspect),
                antialias=True,
            ),
            v2.RandomHorizontalFlip(config.flip),
        ]
        if config.color_jitter:
            steps.append(v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter))
        if config.trivial_augment:
            steps.append(v2.TrivialAugmentWide())
        if config.random_erasing:
            steps.append(v2.RandomErasing(config.random_erasing))
        self._steps = v2.Compose(steps)

    def __call__(self, image: NDArray[np.uint8], epoch: int, position: int) -> NDArray[np.uint8]:
        """Uint8 [H, W, 3] -> uint8 [size, size, 3]."""
        drawn = np.random.SeedSequence((self.seed, epoch, position)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):  # v2 draws from the global generator, which is put back afterwards
            torch.manual_seed(int(drawn[0] >> np.uint64(1)))
            changed: Tensor = self._steps(torch.from_numpy(image).permute(2, 0, 1))
        return changed.permute(1, 2, 0).contiguous().numpy()


class EvalTransform:
    """The middle or the whole of an image at the evaluation's size; nothing is random."""

    def __init__(self, config: TransformConfig) -> None:
        self.size = config.eval_size
        self.crop_share = config.eval_crop_share if config.eval_resize == "center_crop" else None
        self._resize = v2.Resize((config.eval_size, config.eval_size), antialias=True)

    def __call__(self, image: NDArray[np.uint8], epoch: int, position: int) -> NDArray[np.uint8]:
        """Uint8 [H, W, 3] -> uint8 [size, size, 3]."""
        if self.crop_share is not None:
            height, width = image.shape[:2]
            side = max(round(min(height, width) * self.crop_share), 1)
            top, left = (height - side) // 2, (width - side) // 2
            image = image[top : top + side, left : left + side]
        resized: Tensor = self._resize(torch.from_numpy(image).permute(2, 0, 1))
        return resized.permute(1, 2, 0).contiguous().numpy()


class ClassifiedImage(NamedTuple):
    """An image with its class.

    Attributes:
        image: uint8 [H, W, 3], RGB, at the network's input size; None for an image of an evaluation that is unreadable.
        label: 0 .. K-1.
        skipped: "path: reason" of every unreadable image in whose place this one stands.
        damaged: "path: what the decoder says" of an image that decoded to partly wrong pixels; "" for all others.
        position: of the image in its folder.
    """

    image: NDArray[np.uint8] | None
    label: int
    skipped: tuple[str, ...] = ()
    damaged: str = ""
    position: int = 0


class ClassificationDataset(Dataset[ClassifiedImage]):
    """The images of a folder, each through a transform.

    Its keys are (epoch, position): a worker process that lives through the whole training learns the epoch from the
    key. With a ``TrainTransform`` another image stands in for one that cannot be read; in evaluation it is left out.
    """

    def __init__(self, folder: ImageFolder, transform: TrainTransform | EvalTransform) -> None:
        self.folder = folder
        self.transform = transform
        self.training = isinstance(transform, TrainTransform)

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: tuple[int, int]) -> ClassifiedImage:
        """The image of (epoch, position)."""
        epoch, position = key
        skipped: list[str] = []
        positions = [position]
        if self.training:
            substitutes = np.random.default_rng((epoch, position, len(self))).integers(len(self), size=_NUM_SUBSTITUTES)
            positions += substitutes.tolist()
        for place in positions:
            try:
                encoded = EncodedImage(self.folder.path(place), watch=True)
                image = encoded.decode()
            except UnreadableImageError as error:
                skipped.append(str(error))
                continue
            label = int(self.folder.labels[place])
            damaged = f"{encoded.path}: {encoded.damage}" if encoded.damage else ""
            changed = self.transform(image, epoch, place)
            return ClassifiedImage(changed, label, tuple(dict.fromkeys(skipped)), damaged, place)
        if self.training:
            raise UnreadableImageError(f"{len(skipped)} images in a row cannot be read; the first: {skipped[0]}")
        return ClassifiedImage(None, int(self.folder.labels[position]), tuple(skipped))


@dataclass(slots=True, kw_only=True)
class ClassificationBatch:
    """Images and their classes, stacked.

    Attributes:
        images: uint8 [B, 3, H, W], RGB, channels-last in memory.
        labels: int64 [B].
        image_ids: int64 [B], positions in the folder; they stay on the host.
        skipped: "path: reason" of every image that could not be read while this batch was made.
        damaged: "path: what the decoder says" of every image in it that decoded to partly wrong pixels.
    """

    images: Tensor
    labels: Tensor
    image_ids: Tensor
    skipped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """What a training step takes: images, labels."""
        return self.images, self.labels

    def to(self, device: torch.device, non_blocking: bool = False) -> "ClassificationBatch":
        """The same batch on another device; from pinned memory with ``non_blocking`` the host does not wait."""
        images = self.images.to(device, non_blocking=non_blocking)
        return replace(self, images=images, labels=self.labels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ClassificationBatch":
        """The same batch in page-locked memory. ``DataLoader(pin_memory=True)`` calls this."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def collate(samples: Sequence[ClassifiedImage]) -> ClassificationBatch:
    """Stack images; those that could not be read are left out and named, so that a batch may be empty."""
    kept = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    images = np.stack([image for image, _ in kept]) if kept else np.zeros((0, 1, 1, 3), np.uint8)
    return ClassificationBatch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        labels=torch.tensor([label for _, label in kept], dtype=torch.int64),
        image_ids=torch.tensor([sample.position for sample in samples if sample.image is not None], dtype=torch.int64),
        skipped=[reason for sample in samples for reason in sample.skipped],
        damaged=[sample.damaged for sample in samples if sample.damaged],
    )


def build_loader(
    dataset: ClassificationDataset, *, batch_size: int, num_workers: int, seed: int, runtime: Runtime
) -> BatchLoader[ClassificationBatch]:
    """This process's batches: shuffled and without an incomplete last one for training, each image once for evaluation.

    Args:
        dataset: says by its transform whether this is training.
        batch_size: images per batch and process.
        num_workers: processes that decode and augment; 0 does it in this one.
        seed: of the order of images.
        runtime: this process.
    """
    return BatchLoader(
        dataset,
        sampler=EpochSampler(
            len(dataset), training=dataset.training, seed=seed, rank=runtime.rank, world_size=runtime.world_size
        ),
        collate=collate,
        batch_size=batch_size,
        num_workers=num_workers,
        drop_last=dataset.training,
        pin_memory=runtime.device.type == "cuda",
        seed=seed,
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED]) or "none"
    return shown + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")

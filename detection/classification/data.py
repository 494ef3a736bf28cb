"""What classification needs beyond a network: folders of images, transforms, the training step, top-k accuracy.

The training loop is not here: it is the same for every task, and this file gives it its pieces.

Letters in shapes: B batch, H W height and width, K classes.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from backbones.classifier import Classifier
from backbones.errors import UserError
from backbones.layers import Normalise
from detection.images.decode import IMAGE_SUFFIXES, UnreadableImageError, read_image

_NUM_SUBSTITUTES = 20  # unreadable images in a row before a training sample gives up
_NUM_NAMED = 8  # classes or files named in a message


@dataclass(kw_only=True, slots=True)
class TransformConfig:
    """How images become inputs of the network."""

    size: int = 224
    """Side of the square training input in pixels. Less than eval_size is quicker and often better: random crops show
    objects larger than evaluation does (Touvron et al. 2019, arXiv 1906.06423)."""
    eval_size: int = 224
    """Side of the square input in evaluation."""
    min_scale: float = 0.08
    """A training crop takes this share of the image's area at least (Szegedy et al. 2015, arXiv 1409.4842, section 6)."""
    max_aspect: float = 4 / 3
    """Width over height of a training crop lies between this and its inverse."""
    flip: float = 0.5
    """Probability that a training image is mirrored left to right."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation change by factors of up to 1 +- this."""
    trivial_augment: bool = False
    """One random operation of random strength on each training image (Mueller, Hutter 2021, arXiv 2103.10158)."""
    random_erasing: float = 0.0
    """Probability that a rectangle of a training image is blanked (Zhong et al. 2017, arXiv 1708.04896)."""
    eval_resize: Literal["center_crop", "squash"] = "center_crop"
    """center_crop: a square from the middle of the image. squash: the whole image, its sides scaled apart."""
    eval_crop_share: float = 0.875
    """With center_crop, side of the square over the shorter side of the image (224 of 256 is the custom)."""

    def validate(self) -> None:
        """Raise UserError, with the value and what is allowed, where a value makes no sense."""
        for name in ("size", "eval_size"):
            if getattr(self, name) < 32:
                raise UserError(f"transform.{name} is {getattr(self, name)}; at least 32 pixels are needed")
        for name in ("min_scale", "eval_crop_share"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"transform.{name} is {getattr(self, name)}; it is above 0 and at most 1")
        for name in ("flip", "random_erasing", "color_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"transform.{name} is {getattr(self, name)}; it can be 0 to 1")
        if self.max_aspect < 1:
            raise UserError(f"transform.max_aspect is {self.max_aspect}; at least 1 is needed")
        if self.eval_resize not in ("center_crop", "squash"):
            raise UserError(f"transform.eval_resize is {self.eval_resize!r}; it can be 'center_crop' or 'squash'")


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
    """

    image: NDArray[np.uint8] | None
    label: int
    skipped: tuple[str, ...] = ()


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
                image = read_image(self.folder.path(place))
            except UnreadableImageError as error:
                skipped.append(str(error))
                continue
            label = int(self.folder.labels[place])
            return ClassifiedImage(self.transform(image, epoch, place), label, tuple(dict.fromkeys(skipped)))
        if self.training:
            raise UnreadableImageError(f"{len(skipped)} images in a row cannot be read; the first: {skipped[0]}")
        return ClassifiedImage(None, int(self.folder.labels[position]), tuple(skipped))


@dataclass(slots=True, kw_only=True)
class ClassificationBatch:
    """Images and their classes, stacked.

    Attributes:
        images: uint8 [B, 3, H, W], RGB, channels-last in memory.
        labels: int64 [B].
        skipped: "path: reason" of every image that could not be read while this batch was made.
    """

    images: Tensor
    labels: Tensor
    skipped: list[str] = field(default_factory=list)

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
        skipped=[reason for sample in samples for reason in sample.skipped],
    )


class ClassificationStep(nn.Module):
    """Images and labels to the loss: cross entropy with smoothed labels (Szegedy et al. 2016, arXiv 1512.00567, section 7).

    Args:
        model: the classifier.
        normalise: what is done to the images first.
        label_smoothing: share of the target that is spread evenly over all classes.
    """

    def __init__(self, model: Classifier, normalise: Normalise, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.normalise = normalise
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Uint8 [B, 3, H, W] and int64 [B] -> {"loss": float32 []}."""
        logits = self.model(self.normalise(images))
        return {"loss": F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)}


def count_correct(logits: Tensor, labels: Tensor, top: Sequence[int] = (1, 5)) -> Tensor:
    """How many images have their label among the k highest logits.

    Args:
        logits: float [B, K]. Not-a-numbers rank above the label.
        labels: int64 [B].
        top: the values of k; a k above K counts every image.

    Returns:
        int64 [len(top)].
    """
    of_label = logits.gather(1, labels[:, None])
    # Ties count against the label: a network that says the same of every class knows nothing.
    rank = (~(logits < of_label)).sum(1)
    return torch.stack([(rank <= k).sum() for k in top])


@dataclass(slots=True, kw_only=True)
class Accuracy:
    """Counts of an evaluation, or of the part of it that one process did.

    Attributes:
        counts: int64 [3] on the device: right at the first place, right among the first five, all.
        skipped: "path: reason" of every image that could not be read; they are in no count.
    """

    counts: Tensor
    skipped: list[str]

    def scalars(self) -> dict[str, float]:
        """The shares top1 and top5.

        Raises:
            UserError: not one image could be read.
        """
        top1, top5, total = self.counts.tolist()
        if total == 0:
            raise UserError(f"no image of the evaluation can be read: {_some(self.skipped)}")
        return {"top1": top1 / total, "top5": top5 / total}


@torch.inference_mode()
def measure_accuracy(model: nn.Module, loader: Iterable[Any], normalise: Normalise, device: torch.device) -> Accuracy:
    """Run a classifier, put in evaluation mode before, over the batches of a loader."""
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    skipped: list[str] = []
    for batch in loader:
        skipped += batch.skipped
        if len(batch) == 0:
            continue
        moved = batch.to(device, non_blocking=True)
        logits = model(normalise(moved.images))
        counts[:2] += count_correct(logits, moved.labels)
        counts[2] += len(batch)
    return Accuracy(counts=counts, skipped=skipped)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED]) or "none"
    return shown + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")

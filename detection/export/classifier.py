"""A classifier as what is exported: its logits, its accuracy.

Letters in shapes: B batch, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from backbones.classifier import Classifier
from backbones.errors import UserError
from backbones.layers import Normalise
from backbones.state import load_plain, sha256_of
from backbones.weights.info import WeightsInfo
from backbones.weights.native import read_model
from backbones.weights.readers import WeightsFile
from detection.classification.accuracy import count_correct
from detection.classification.config import TransformConfig
from detection.classification.data import EvalTransform, ImageFolder, read_image_folder
from detection.classification.exported import ClassifierRecord, MeasuredAccuracy, open_classifier
from detection.engine.checkpoint import is_checkpoint
from detection.engine.plain import from_plain
from detection.engine.progress import progress_bar
from detection.export.calibration import image_files, spread
from detection.export.module import Network
from detection.export.subjects import layout_of, versions
from detection.export.verification import Bounds, milliseconds, processor_name
from detection.images.decode import UnreadableImageError, read_image
from detection.inference.exported import Precision
from detection.models.folding import fold_norms
from detection.postprocess import PostprocessConfig

if TYPE_CHECKING:
    from detection.export.run import ExportJob

_BATCH = 16


class Logits(nn.Module):
    """A classifier as a function of pixels, its batch norms folded.

    Args:
        model: it stays as it is.
        info: gives the normalisation.
    """

    def __init__(self, model: Classifier, info: WeightsInfo) -> None:
        super().__init__()
        self.normalise = Normalise(info.mean, info.std)
        self.model = fold_norms(copy.deepcopy(model).cpu().eval()).requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """uint8 [B, 3, H, W], RGB -> (class logits [B, K],)."""
        return (self.model(self.normalise(images).contiguous(memory_format=torch.channels_last)),)


@dataclass(kw_only=True, slots=True)
class LogitDifference:
    """How far an exported classifier is from the checkpoint in torch, on the same images.

    Attributes:
        num_images: how many images.
        logits: largest difference of a logit.
        same: images with the same class in the first place.
    """

    num_images: int
    logits: float
    same: int

    @property
    def error(self) -> float:
        """The share of images of another class, then the logits."""
        return 1 - self.same / self.num_images + 0.001 * self.logits

    @property
    def complete(self) -> bool:
        """Every image has the same class."""
        return self.same == self.num_images

    def broken(self, bounds: Bounds) -> str | None:
        """What is out of bounds; None where nothing is."""
        if bounds.heads is not None and not self.logits <= bounds.heads:
            return f"logits differ by {self.logits:.3g}, allowed is {bounds.heads:g}"
        if self.same < bounds.found * self.num_images:
            return f"{self.same} of {self.num_images} images have the same class, wanted is {bounds.found:.0%}"
        return None

    def __str__(self) -> str:
        return f"on {self.num_images} images: logits {self.logits:.2g}, {self.same} with the same class"


class ClassifierSubject:
    """A classifier; see ``detection.export.subjects.Subject``.

    Args:
        job: what is wanted.
        file: the checkpoint.
        source: its path.
        packages: whose versions travel along.
        precision: of the file.

    Raises:
        UserError: no classifier, or options that a classifier does not have.
    """

    figure_name = "top-1"
    postprocess = PostprocessConfig()

    def __init__(
        self, job: ExportJob, file: WeightsFile, source: Path, packages: Sequence[str], precision: Precision
    ) -> None:
        if job.annotations is not None:
            raise UserError(
                f"{source} is a classifier: its accuracy is measured with --labelled FOLDER, not --annotations"
            )
        model, info = read_model(file)
        if not isinstance(model, Classifier):
            raise UserError(f"{source} holds a backbone without a classifier; there is nothing to export")
        transform = _transform(source, job)
        self._transform = EvalTransform(transform)
        side = transform.eval_size
        self.network = Network(module=Logits(model, info), input_size=(side, side), outputs=("logits",))
        self._images = self.inputs(spread(image_files(job.images), job.num_verification))
        self._folder = None if job.labelled is None else _labelled(job.labelled, info.class_names, model.num_classes)
        self.figure_torch = job.known_figure
        if self._folder is not None and self.figure_torch is None:
            self.figure_torch = self._top1(self._torch)
        self.record: ClassifierRecord = ClassifierRecord(
            format=job.to,
            precision=precision,
            info=info,
            transform=transform,
            num_classes=model.num_classes,
            layout=layout_of(job.to),
            versions=versions(packages),
            checkpoint_sha256=sha256_of(source) if source.is_file() else "",
            measured=MeasuredAccuracy(
                top1_torch=self.figure_torch,
                num_images=0 if self._folder is None else len(self._folder),
                images="" if job.labelled is None else job.labelled.name,
                processor=processor_name(),
            ),
        )

    def inputs(self, files: Sequence[Path]) -> NDArray[np.uint8]:
        """Images as the network sees them: uint8 [B, 3, H, W]. Those that cannot be read are left out.

        Raises:
            UserError: none can be read.
        """
        found = []
        for path in files:
            try:
                found.append(self._transform(read_image(path), 0, 0))
            except UnreadableImageError:
                continue
        if not found:
            raise UserError(f"none of {len(files)} images can be read; the first is {files[0]}")
        return np.ascontiguousarray(np.stack(found).transpose(0, 3, 1, 2))

    def run(self, path: Path) -> tuple[LogitDifference, float | None, float]:
        """See ``Subject``."""
        classifier = open_classifier(path)
        pixels = torch.from_numpy(self._images).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            wanted, found = self.network.module(pixels)[0], classifier.logits(pixels)
        difference = LogitDifference(
            num_images=len(pixels),
            logits=float((wanted - found).abs().max()),
            same=int((wanted.argmax(1) == found.argmax(1)).sum()),
        )
        figure = None if self._folder is None else self._top1(classifier.logits)
        return difference, figure, milliseconds(classifier.runner, self._images, classifier.logits)

    def milliseconds_torch(self) -> float:
        """See ``Subject``."""
        return milliseconds(self._torch, self._images)

    def _torch(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network.module(images)[0]
        return logits

    def check(self, path: Path) -> None:
        """See ``Subject``."""
        open_classifier(path)

    def measured(self, figure: float | None, milliseconds: float | None) -> ClassifierRecord:
        """See ``Subject``."""
        return replace(self.record, measured=replace(self.record.measured, top1=figure, milliseconds=milliseconds))

    def _top1(self, logits: Callable[[Tensor], Tensor]) -> float:
        """The share of the labelled images whose class is in the first place; those that cannot be read are left out."""
        assert self._folder is not None
        right = total = 0
        for start in progress_bar(range(0, len(self._folder), _BATCH), desc="top-1", unit="batch", leave=False):
            places = range(start, min(start + _BATCH, len(self._folder)))
            kept = []
            for place in places:
                try:
                    kept.append(
                        (self._transform(read_image(self._folder.path(place)), 0, 0), self._folder.labels[place])
                    )
                except UnreadableImageError:
                    continue
            if not kept:
                continue
            pixels = torch.from_numpy(np.stack([image for image, _ in kept])).permute(0, 3, 1, 2)
            with torch.inference_mode():
                found = logits(pixels)
            right += int(count_correct(found, torch.tensor([int(label) for _, label in kept]), (1,)))
            total += len(kept)
        if not total:
            raise UserError(f"none of the images in {self._folder.root} can be read")
        return right / total


def _transform(source: Path, job: ExportJob) -> TransformConfig:
    """How images become inputs: as the checkpoint's training evaluated, else as is the custom (224 pixels, middle)."""
    transform = TransformConfig()
    content = load_plain(source) if source.suffix == ".pt" else None
    if is_checkpoint(content):
        assert isinstance(content, dict)
        transform = from_plain(content["config"]["transform"], TransformConfig, source=source)
    if job.input_size is not None:
        if job.input_size[0] != job.input_size[1]:
            raise UserError(f"a classifier's input is a square here, got --input-size {job.input_size}")
        transform = replace(transform, eval_size=job.input_size[0])
    if job.resize is not None:
        transform = replace(transform, eval_resize=job.resize)
    transform.validate()
    return transform


def _labelled(root: Path, class_names: tuple[str, ...], num_classes: int) -> ImageFolder:
    """A folder with a folder for each class, or for some; where the classes have no names, their numbers name the folders.

    Raises:
        FileNotFoundError, UserError: see ``read_image_folder``; or a folder is none of the classes.
    """
    folder = read_image_folder(root)
    names = class_names or tuple(map(str, range(num_classes)))
    unknown = [name for name in folder.class_names if name not in names]
    if unknown:
        raise UserError(
            f"{root}: the classifier has no class {', '.join(map(repr, unknown[:5]))}; it has {', '.join(names[:10])}"
            + ("" if class_names else " and so on, numbers, as the checkpoint holds no names")
        )
    order = np.array([names.index(name) for name in folder.class_names], np.int64)
    return replace(folder, labels=order[folder.labels], class_names=names)

"""What the stages measure with: images, a detector, and the same detector of torchvision's parts."""

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.models.detection.ssd import SSD

from backbones.errors import UserError
from detection.benchmark import drawn
from detection.benchmark.config import NUM_IMAGES, BenchmarkConfig
from detection.benchmark.peer import build_peer
from detection.data.augment import TrainTransform, ssd_augment
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset
from detection.data.drawn import draw_detection_set
from detection.inference.predictor import Predictor, read_image
from detection.inference.runners import Backend, build_runner
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.weights.hub import locate
from detection.weights.info import DetectorInfo
from detection.weights.native import read_detector


@dataclass(kw_only=True, slots=True)
class Inputs:
    """Made once, used by every stage.

    Attributes:
        config: what was asked for.
        folder: of the images.
        index: the images' annotations.
        images: RGB uint8 [H, W, 3], some of them in memory.
        model: our network, in eval mode.
        info: its classes and thresholds.
        peer: torchvision's network with the same weights.
        notes: what a reader of the result should know; stages add to them.
    """

    config: BenchmarkConfig
    folder: Path
    index: CocoIndex
    images: list[NDArray[np.uint8]]
    model: SSDLite
    info: DetectorInfo
    peer: SSD
    notes: list[str] = field(default_factory=list)
    _turn: int = 0

    def next_image(self) -> int:
        """A position in ``images``, the same for two calls in a row: both sides of a round see the same image."""
        self._turn += 1
        return self._turn // 2 % len(self.images)

    def predictor(self, backend: Backend) -> Predictor:
        """Our network behind a backend on the CPU."""
        return Predictor(build_runner(self.model, backend, torch.device("cpu")), self.info)

    def training_set(self) -> DetectionDataset:
        """The images with SSD's augmentation at the network's input size."""
        return DetectionDataset(self.index, self.folder, TrainTransform(ssd_augment(), self.model.config.input_size))


def open_inputs(config: BenchmarkConfig) -> Inputs:
    """Reads or draws what ``config`` asks for.

    Raises:
        UserError: too few images, or weights that torchvision's parts cannot have.
    """
    folder, annotations = find_images(config)
    index = _first(CocoIndex.read(annotations), NUM_IMAGES)
    if len(index) < config.batch_size:
        raise UserError(f"{annotations} has {len(index)} images, fewer than --batch-size {config.batch_size}")
    images = [read_image(folder / index.file_name(position)) for position in range(min(8, len(index)))]
    if config.weights is None:
        model, info = _drawn_detector(images)
        note = "weights: drawn, scores spread as after a training on COCO"
    else:
        model, info = _own_detector(config.weights)
        note = f"weights: {config.weights.name}, {len(info.class_names)} classes"
    return Inputs(
        config=config,
        folder=folder,
        index=index,
        images=images,
        model=model.eval(),
        info=info,
        peer=build_peer(model, info.postprocess),
        notes=[note],
    )


def _drawn_detector(images: list[NDArray[np.uint8]]) -> tuple[SSDLite, DetectorInfo]:
    torch.manual_seed(0)
    model = SSDLite(SSDLiteConfig(), drawn.NUM_CLASSES)
    height, width = model.config.input_size
    small = np.stack([cv2.resize(image, (width, height)) for image in images])
    drawn.draw_weights(model, torch.from_numpy(small).permute(0, 3, 1, 2))
    info = DetectorInfo(
        model=model.config,
        postprocess=PostprocessConfig(),
        class_names=tuple(f"class {number}" for number in range(drawn.NUM_CLASSES)),
        category_ids=tuple(range(drawn.NUM_CLASSES)),
    )
    return model, info


def _own_detector(path: Path) -> tuple[SSDLite, DetectorInfo]:
    model, info = read_detector(locate(path))
    if not isinstance(model, SSDLite):
        raise UserError(f"{path} holds a detector of kind {model.config.kind}; the peer is an SSDLite")
    info.postprocess.score_threshold = 0.001
    return model, info


def find_images(config: BenchmarkConfig) -> tuple[Path, Path]:
    """(folder, annotation file) of the images, drawn where none are given."""
    if config.images is not None and config.annotations is not None:
        return config.images, config.annotations
    folder = config.cache / "images"
    if not (folder / "val.json").is_file():  # written last
        draw_detection_set(folder, num_train=NUM_IMAGES, num_val=1, size=(480, 640))
    return folder / "train", folder / "train.json"


def _first(index: CocoIndex, number: int) -> CocoIndex:
    """The first images of a file that have something to learn from, as a file of their own."""
    position = np.repeat(np.arange(len(index)), np.diff(index.offsets))
    chosen = np.unique(position[index.usable])[:number]
    return index.select(chosen)

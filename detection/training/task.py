"""What is trained when a detector is trained: data, network, loss and AP as one task for the engine."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from backbones.errors import UserError
from backbones.weights.native import check_statistics
from detection.data.augment import EvalTransform, TrainTransform
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset, check_images
from detection.data.loader import build_loader, collate
from detection.data.summary import describe
from detection.engine.config import TrainConfig
from detection.engine.runtime import Runtime, seed_everything
from detection.engine.workers import BatchLoader
from detection.evaluation.coco_ap import CocoEvaluator
from detection.evaluation.run import evaluate
from detection.images.draw import draw_detections, draw_target, image_grid
from detection.inference.runners import TorchRunner
from detection.models.build import build_detector
from detection.models.detector import Detector
from detection.models.quantized import QuantizedDetector
from detection.postprocess import build_postprocess
from detection.structures import Batch
from detection.training.config import DetectionConfig
from detection.training.distillation import Distillation, read_teacher
from detection.training.losses import TrainingStep
from detection.weights.hub import locate
from detection.weights.info import DetectorInfo
from detection.weights.native import DetectorFile, read_file
from detection.weights.start import adopt_network, start_from

_log = logging.getLogger(__name__)

_NUM_IMAGES = 8  # drawn for TensorBoard
_NUM_CALIBRATION = 64  # training images that give a detector in 8 bits its first ranges
_SHOWN_SCORE = 0.3  # detections below are not drawn there


class DetectionTask:
    """Train a detector on one COCO file and measure its AP on another.

    Args:
        config: validated; its data must name both splits.
        runtime: this process.
        adopted: of a resumed run, the config that its network was built with. The network is then built as that one, and
            its weights are left to the checkpoint.

    Attributes:
        config: the config as adopted: with network and loss as the weights to start from need them.
        model: the network.
        step: network and loss, what the engine calls.
        metric: the figure that decides which weights are the best.
        num_train: training images.
        lr_scales: factor of the learning rate of the backbone.

    Raises:
        UserError, FileNotFoundError: no data, data that does not fit or is not there, weights that do not fit. What can be
            known before the first step is checked here.
    """

    metric = "AP"

    def __init__(self, config: DetectionConfig, runtime: Runtime, adopted: DetectionConfig | None = None) -> None:
        self.runtime = runtime
        train_file, self._train_images = config.data.split("train")
        val_file, self._val_images = config.data.split("val")
        self.train_index = CocoIndex.read(train_file).require_objects()
        names = self.train_index.class_names
        self.val_index = CocoIndex.read(val_file).with_categories(self.train_index.category_ids, names)
        _log.info("%s", describe(self.train_index, config.model.input_size))
        self._evaluator = CocoEvaluator(self.val_index)
        seed_everything(config.train.seed)  # the first weights of new layers
        self.config, self.model = build_model(config, names, adopted)
        distillation = None
        if config.teacher is not None:
            distillation = Distillation(config.distillation, *read_teacher(config.teacher, self.model.config, names))
        self.step = TrainingStep(self.model, self.config.loss.build(self.model), distillation)
        self.num_train = len(self.train_index)
        prefix = QuantizedDetector.PREFIX if isinstance(self.model, QuantizedDetector) else ""
        self.lr_scales: Mapping[str, float] = {f"{prefix}backbone.": config.backbone_lr_scale}
        self.postprocess = build_postprocess(self.model.config, config.postprocess, names)
        self._shown: Batch | None = None
        self._train_loader = self._build_train_loader()
        self._val_loader = self._build_val_loader()
        _require_files(self.train_index, self._train_images, config.train, "training")
        _require_files(self.val_index, self._val_images, config.train, "validation")
        if isinstance(self.model, QuantizedDetector) and adopted is None:
            self._calibrate(self.model)

    def _calibrate(self, model: QuantizedDetector) -> None:
        """Gives the ranges a first value, of training images as evaluation sees them; a checkpoint holds them."""
        shown = self._some_images(self.train_index, self._train_images, _NUM_CALIBRATION)
        if not len(shown):
            raise UserError("none of the training images that would give the 8 bits their first ranges can be read")
        for images in shown.images.split(_NUM_IMAGES):
            model.calibrate(images)

    def _build_train_loader(self) -> BatchLoader[Any]:
        model, train = self.config.model, self.config.train
        transform = TrainTransform(
            self.config.augment,
            model.input_size,
            resize_mode=model.resize,
            fill=self.model.config.fill,
            seed=train.seed,
        )
        return build_loader(
            self._dataset(self.train_index, self._train_images, transform),
            batch_size=train.batch_size_per_process(self.runtime.world_size),
            num_workers=self.config.data.workers,
            seed=train.seed,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            pin_memory=self.runtime.device.type == "cuda",
        )

    def _dataset(self, index: CocoIndex, images: Path, transform: TrainTransform | EvalTransform) -> DetectionDataset:
        data = self.config.data
        return DetectionDataset(index, images, transform, exif=data.exif, max_pixels=data.max_pixels)

    def _build_val_loader(self) -> BatchLoader[Any]:
        model = self.config.model
        transform = EvalTransform(model.input_size, resize_mode=model.resize, fill=self.model.config.fill)
        return build_loader(
            self._dataset(self.val_index, self._val_images, transform),
            batch_size=self.config.data.val_batch_size,
            num_workers=self.config.data.workers,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            pin_memory=self.runtime.device.type == "cuda",
        )

    def train_loader(self) -> BatchLoader[Any]:
        return self._train_loader

    def data_fingerprint(self) -> dict[str, int | str]:
        """The training images, their boxes and classes; not where they lie."""
        index = self.train_index
        digest = hashlib.sha256("\0".join(index.class_names).encode())
        for values in (index.image_ids, index.sizes, index.offsets, index.xywh, index.labels, index.usable):
            digest.update(values.tobytes())
        return {"images": len(index), "boxes": len(index.labels), "content": digest.hexdigest()[:16]}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The twelve COCO figures on the validation images, in float32 whatever the training computes in.

        So they are those that an evaluation of the checkpoint gives.
        """
        evaluator = self._evaluator
        evaluator.reset()
        evaluate(TorchRunner(model, self.runtime.device), self._val_loader, self.postprocess, evaluator)
        evaluator.merge_across_processes()
        return evaluator.compute().figures if self.runtime.is_main else {}

    def image_names(self, image_ids: Sequence[int]) -> list[str]:
        """The files of training images."""
        index = self.train_index
        return [index.file_name(int(np.flatnonzero(index.image_ids == image_id)[0])) for image_id in image_ids]

    def checkpoint_extra(self) -> dict[str, Any]:
        info = DetectorInfo(
            model=self.model.config,
            postprocess=self.config.postprocess,
            class_names=self.train_index.class_names,
            category_ids=tuple(self.train_index.category_ids.tolist()),
            quantize=self.config.quantize,
        )
        return {"detector": info.to_plain()}

    def log_images(self, writer: SummaryWriter, step: int, batch: Batch, model: nn.Module) -> None:
        """Training images with the boxes they teach, the same validation images each time with truth beside what is found,
        and a histogram of the scores of the last evaluation."""
        self._log_validation(writer, step, model)
        shown = slice(0, _NUM_IMAGES)
        images = batch.images[shown].permute(0, 2, 3, 1).cpu().numpy()
        names = self.train_index.class_names
        targets = [
            draw_target(image, boxes[valid].numpy(), labels[valid].numpy(), names)
            for image, boxes, labels, valid in zip(
                images, batch.boxes[shown].cpu(), batch.labels[shown].cpu(), batch.valid[shown].cpu(), strict=True
            )
        ]
        writer.add_image("training/targets", image_grid(targets, columns=4), step, dataformats="HWC")
        with torch.inference_mode():
            raw = model(batch.images[shown])
        # The image is the network's input itself: it lies where it is.
        height, width = batch.images.shape[-2:]
        placements = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(len(images), 4)
        sizes = torch.tensor([[height, width]]).expand(len(images), 2)
        found = [d.above(_SHOWN_SCORE) for d in self.postprocess(raw, placements, sizes)]
        drawn = [draw_detections(np.ascontiguousarray(image), d) for image, d in zip(images, found, strict=True)]
        writer.add_image("training/predictions", image_grid(drawn, columns=4), step, dataformats="HWC")

    def _log_validation(self, writer: SummaryWriter, step: int, model: nn.Module) -> None:
        if self._shown is None:
            self._shown = self._validation_batch()
        shown, names = self._shown, self.train_index.class_names
        if len(shown):
            images = shown.images.permute(0, 2, 3, 1).numpy()
            with torch.inference_mode():
                raw = model(shown.images.to(self.runtime.device))
            height, width = shown.images.shape[-2:]
            placements = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(len(images), 4)
            found = self.postprocess(raw, placements, torch.tensor([[height, width]]).expand(len(images), 2))
            drawn = []
            for image, boxes, labels, valid, one in zip(
                images, shown.boxes, shown.labels, shown.valid, found, strict=True
            ):
                pixels = np.ascontiguousarray(image)
                drawn.append(draw_target(pixels, boxes[valid].numpy(), labels[valid].numpy(), names))
                drawn.append(draw_detections(pixels, one.above(_SHOWN_SCORE)))
            writer.add_image("validation/truth_and_found", image_grid(drawn, columns=4), step, dataformats="HWC")
        if len(self._evaluator.table):
            writer.add_histogram("validation/scores", self._evaluator.table.scores, step)

    def _validation_batch(self) -> Batch:
        """Some validation images; see ``_some_images``."""
        return self._some_images(self.val_index, self._val_images, _NUM_IMAGES)

    def _some_images(self, index: CocoIndex, images: Path, number: int) -> Batch:
        """Some images with objects, evenly picked, as evaluation sees them; those that cannot be read are left out."""
        model = self.config.model
        having = np.flatnonzero(np.diff(index.offsets) > 0)
        picked = having[np.linspace(0, len(having) - 1, min(number, len(having))).astype(np.int64)]
        transform = EvalTransform(model.input_size, resize_mode=model.resize, fill=self.model.config.fill)
        dataset = self._dataset(index.select(picked), images, transform)
        return collate([dataset[0, place] for place in range(len(picked))])


def build_model(
    config: DetectionConfig, names: tuple[str, ...], adopted: DetectionConfig | None
) -> tuple[DetectionConfig, Detector]:
    """The config as adopted, which is another object than ``config``, and its network.

    The network is filled with the weights to start from, or built as ``adopted`` says and left to a checkpoint.

    Raises:
        UserError, FileNotFoundError: weights that are not there or do not fit.
    """
    if adopted is not None:
        config = replace(config, model=adopted.model, loss=adopted.loss)
        return config, _quantized(build_detector(config.model, len(names)), config)
    if config.weights is None:
        return replace(config), build_detector(config.model, len(names))
    source = read_file(locate(config.weights))
    if config.quantize != "off" and not (isinstance(source, DetectorFile) and source.info.class_names == names):
        raise UserError(
            f"--quantize int8 fine-tunes a trained detector of the same classes ({', '.join(names[:10])}), and "
            f"{config.weights} holds none; train one first"
        )
    model_config, remark = adopt_network(config.model, source, config.weights_part)
    if remark:
        _log.info("%s", remark)
    loss_config, remark = config.loss.fitted(model_config)
    if remark:
        _log.info("%s", remark)
    config = replace(config, model=model_config, loss=loss_config)
    config.validate()
    model = build_detector(config.model, len(names))
    _log.info("%s", start_from(model, source, names, config.weights_part))
    check_statistics(model.backbone, source.source)
    return config, _quantized(model, config)


def _quantized(model: Detector, config: DetectionConfig) -> Detector:
    return QuantizedDetector(model) if config.quantize == "int8" else model


def _require_files(index: CocoIndex, folder: Path, config: TrainConfig, which: str) -> None:
    """Refuses a split of which more images are missing than may be unreadable.

    Raises:
        UserError: names some of them.
    """
    missing = [f"{folder / name}: there is no such file" for name in check_images(index, folder)]
    if len(missing) > config.num_skipped_allowed(len(index)):
        raise UserError(config.too_many_skipped(missing, len(missing), len(index), which))
    if missing:
        _log.warning("%d of %d %s images are not there, first %s", len(missing), len(index), which, missing[0])

"""What is trained when a classifier is trained: data, network, loss and accuracy as one task for the engine."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from backbones.classifier import Classifier, ClassifierConfig
from backbones.errors import UserError
from backbones.layers import Normalise
from backbones.state import load_state
from backbones.weights.info import WeightsInfo
from backbones.weights.native import adopt_config, check_statistics, load_classifier, save_weights
from detection.classification.accuracy import measure_accuracy
from detection.classification.config import ClassificationConfig
from detection.classification.data import (
    ClassificationBatch,
    ClassificationDataset,
    EvalTransform,
    TrainTransform,
    build_loader,
    read_image_folder,
)
from detection.classification.step import ClassificationStep
from detection.engine.checkpoint import load_checkpoint
from detection.engine.plain import differences, from_plain
from detection.engine.runtime import Runtime, seed_everything
from detection.engine.workers import BatchLoader
from detection.images.draw import image_grid
from detection.weights.hub import locate
from detection.weights.native import DetectorFile, read_file

_log = logging.getLogger(__name__)

_NUM_IMAGES = 8  # drawn for TensorBoard


class ClassificationTask:
    """Train a classifier on one folder of images and measure its accuracy on another.

    Args:
        config: validated; its data must name both folders.
        runtime: this process.
        resumed: of a resumed run, what travels with its weights (``Run.extra``). The network is then built as that says,
            and its weights are left to the checkpoint.

    Attributes:
        config: the config as adopted, another object than the one given: with the network as the weights need it.
        model: the network.
        step: network and loss, what the engine calls.
        metric: the figure that decides which weights are the best.
        num_train: training images.
        lr_scales: factor of the learning rate of the backbone.
        class_names: name of each label.

    Raises:
        UserError, FileNotFoundError: no data, data that does not fit, weights that do not fit.
    """

    metric = "top1"

    def __init__(
        self, config: ClassificationConfig, runtime: Runtime, resumed: Mapping[str, Any] | None = None
    ) -> None:
        self.config = replace(config)
        self.runtime = runtime
        if config.data.train is None or config.data.val is None:
            missing = "train" if config.data.train is None else "val"
            raise UserError(f"no --data.{missing} given; a folder with a folder of images for each class is needed")
        self._train_folder = train_folder = read_image_folder(config.data.train)
        self.class_names = train_folder.class_names
        val_folder = read_image_folder(config.data.val, self.class_names)
        seed_everything(config.train.seed)  # the first weights of new layers
        self.model, self._weights_info = self._build_model(config.weights, resumed)
        self.normalise = Normalise(self._weights_info.mean, self._weights_info.std)
        self.step = ClassificationStep(self.model, self.normalise, config.label_smoothing)
        self.num_train = len(train_folder)
        self.lr_scales: Mapping[str, float] = {"backbone.": config.backbone_lr_scale}
        self._train_loader = build_loader(
            ClassificationDataset(train_folder, TrainTransform(config.transform, config.train.seed)),
            batch_size=config.train.batch_size_per_process(runtime.world_size),
            num_workers=config.data.workers,
            seed=config.train.seed,
            runtime=runtime,
        )
        self._val_loader = build_loader(
            ClassificationDataset(val_folder, EvalTransform(config.transform)),
            batch_size=config.data.val_batch_size,
            num_workers=config.data.workers,
            seed=config.train.seed,
            runtime=runtime,
        )

    def _build_model(self, weights: str | None, resumed: Mapping[str, Any] | None) -> tuple[Classifier, WeightsInfo]:
        """The network, built as the weights to start from need it and filled with them, and what travels with these.

        Of a resumed run it is built as the checkpoint says, which holds its weights.
        """
        asked = self.config.model
        if resumed is not None:
            recorded = resumed["classifier"]
            self.config = replace(self.config, model=from_plain(recorded["model"], ClassifierConfig))
            info = WeightsInfo(
                mean=tuple(recorded["mean"]),
                std=tuple(recorded["std"]),
                source=recorded.get("started_from", ""),
                licence=recorded.get("licence", ""),
            )
            return Classifier(self.config.model, len(self.class_names)), info
        if weights is None:
            return Classifier(asked, len(self.class_names)), WeightsInfo()
        found = read_file(locate(weights))
        source = found.backbone() if isinstance(found, DetectorFile) else found
        backbone, _ = adopt_config(asked.backbone, source)
        changes = differences(asked.backbone, backbone)
        if changes:
            _log.info("the network is built as %s needs it: backbone %s", source.source, ", ".join(map(str, changes)))
        self.config = replace(self.config, model=replace(asked, backbone=backbone))
        model = Classifier(self.config.model, len(self.class_names))
        info, remark = load_classifier(model, source, self.class_names)
        check_statistics(model.backbone, source.source)
        _log.info("%s", remark or f"classifier from {weights}")
        return model, info

    def data_fingerprint(self) -> dict[str, int | str]:
        """The training images and their classes; not where they lie."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        folder = self._train_folder
        digest.update(b"\0".join(folder.files.tolist()))
        digest.update(folder.labels.tobytes())
        return {"images": len(folder), "content": digest.hexdigest()[:16]}

    def train_loader(self) -> BatchLoader[Any]:
        return self._train_loader

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The shares top1 and top5 of the validation images."""
        accuracy = measure_accuracy(model, self._val_loader, self.normalise, self.runtime.device)
        self.runtime.sum_over_processes(accuracy.counts)
        skipped = sorted(self.runtime.union_over_processes(accuracy.skipped))
        accuracy.skipped = skipped
        share = self.config.train.max_skipped_share
        total = len(skipped) + int(accuracy.counts[2])
        if len(skipped) > share * total:
            raise UserError(
                f"{len(skipped)} of {total} validation images cannot be read, more than --train.max-skipped-share "
                f"{share:g} allows: {'; '.join(skipped[:5])}. Repair them, take them out, or raise the share"
            )
        for text in skipped:
            _log.warning("left out of the accuracy, it cannot be read: %s", text)
        return accuracy.scalars()

    def image_names(self, image_ids: Sequence[int]) -> list[str]:
        """The files of training images, below the folder."""
        return [str(self._train_folder.path(position)) for position in image_ids]

    def checkpoint_extra(self) -> dict[str, Any]:
        info = self.weights_info()
        return {
            "classifier": {
                "model": asdict(self.config.model),
                "class_names": list(info.class_names),
                "mean": list(info.mean),
                "std": list(info.std),
                "started_from": self._weights_info.source or self.config.weights or "",
                "licence": info.licence,
            }
        }

    def log_images(self, writer: SummaryWriter, step: int, batch: ClassificationBatch, model: nn.Module) -> None:
        """Training images as the network sees them, with the class they are to teach and the one it says now."""
        images = batch.images[:_NUM_IMAGES]
        with torch.inference_mode():
            predicted = model(self.normalise(images)).argmax(1).tolist()
        drawn = []
        labels = batch.labels[:_NUM_IMAGES].tolist()
        for image, label, guess in zip(images.permute(0, 2, 3, 1).cpu().numpy(), labels, predicted, strict=True):
            canvas = np.ascontiguousarray(image)
            color = (0, 160, 0) if label == guess else (220, 0, 0)
            for line, text in enumerate((self.class_names[label], self.class_names[guess])):
                cv2.putText(canvas, text, (4, 16 * (line + 1)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, 1, cv2.LINE_AA)
            drawn.append(canvas)
        writer.add_image("training/images", image_grid(drawn), step, dataformats="HWC")

    def weights_info(self) -> WeightsInfo:
        """What travels with the trained weights."""
        began = self._weights_info.source or self.config.weights
        trained = f"trained on {self.num_train} images of {len(self.class_names)} classes"
        return WeightsInfo(
            mean=self._weights_info.mean,
            std=self._weights_info.std,
            class_names=self.class_names,
            source=f"{trained}, from {began}" if began else trained,
            licence=self.config.licence or self._weights_info.licence,
            padding=self.config.model.backbone.padding,
        )

    def save_best(self, best_path: Path, path: Path) -> dict[str, float]:
        """Write the weights of a checkpoint as the file that ``--weights`` takes, the linear layer with them.

        Returns:
            What the checkpoint's evaluation gave, and its epoch.
        """
        content = load_checkpoint(best_path)
        best = Classifier(self.config.model, len(self.class_names))
        load_state(best, content["weights"], str(best_path))
        save_weights(path, best, self.weights_info())
        return {"epoch": content["epoch"], **content["metrics"]}

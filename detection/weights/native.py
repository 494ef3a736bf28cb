"""A detector on disk, in our own two kinds of file, and every file that a training can start from, read once.

A checkpoint of a training (``best.pt``) and a ``.safetensors`` file hold the same, the latter without the state of the
training.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.classifier import ClassifierConfig
from backbones.errors import UserError
from backbones.layers import IMAGENET_MEAN, IMAGENET_STD
from backbones.state import check_state, existing_file, load_plain, load_state
from backbones.weights.info import WeightsInfo
from backbones.weights.native import write_safetensors
from backbones.weights.readers import (
    WeightsFile,
    is_download,
    read_metadata,
    read_safetensors,
    read_weights,
    weights_of,
)
from detection.engine.checkpoint import check_checkpoint, is_checkpoint
from detection.engine.plain import from_plain
from detection.models.build import build_detector
from detection.models.detector import Detector
from detection.models.quantized import QuantizedDetector
from detection.weights.info import DetectorInfo

LAYOUT = "litedet detector"


@dataclass(kw_only=True, slots=True)
class DetectorFile:
    """A whole detector, as it was read; its tensors fit the network that ``info`` describes.

    Attributes:
        source: where from, for messages.
        state: name -> tensor, those of ``Detector.state_dict``.
        info: what travels with them.
    """

    source: str
    state: dict[str, Tensor]
    info: DetectorInfo

    def backbone(self) -> WeightsFile:
        """Its backbone alone.

        Raises:
            UserError: a detector that was fine-tuned in eight bits, whose backbone is part of a graph.
        """
        if self.info.quantize != "off":
            raise UserError(f"{self.source} was fine-tuned in 8 bits; take the checkpoint that it was made of")
        model = self.info.model
        return WeightsFile(
            source=self.source,
            layout="litedet",
            state={key: tensor for key, tensor in self.state.items() if key.startswith("backbone.")},
            info=WeightsInfo(
                mean=model.mean or IMAGENET_MEAN,
                std=model.std or IMAGENET_STD,
                source=self.info.source or f"backbone of the detector {Path(self.source).name}",
                licence=self.info.licence,
                padding=model.backbone.padding,
            ),
            config=model.backbone,
        )


def read_file(source: str | Path) -> DetectorFile | WeightsFile:
    """What a file holds: a whole detector, or a backbone or classifier.

    Args:
        source: a training's ``best.pt`` or ``last.pt`` (of a detector or a classifier), a ``.safetensors`` of ours, or what
            ``backbones.weights.readers.read_weights`` takes. Published names: see ``detection.weights.hub``.

    Raises:
        FileNotFoundError: no such file.
        UserError: it holds something else, was written by another version, or its tensors do not fit its own config.
        OSError: it cannot be read or downloaded.
    """
    if is_download(source):
        return read_weights(source)
    path = existing_file(source)
    if path.suffix == ".safetensors":
        if read_metadata(path).get("layout") != LAYOUT:
            return read_weights(path)
        state, metadata = read_safetensors(path)
        try:
            plain = json.loads(metadata["detector"])
        except (KeyError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: its metadata cannot be read ({type(error).__name__}: {error})") from error
        return _detector(path, state, plain)
    return file_of(load_plain(path), path)


def file_of(content: object, path: Path) -> DetectorFile | WeightsFile:
    """``read_file`` for what ``torch.save`` wrote and ``backbones.state.load_plain`` has read."""
    return (
        _of_checkpoint(path, check_checkpoint(content, path)) if is_checkpoint(content) else weights_of(content, path)
    )


def read_detector_file(path: str | Path) -> DetectorFile:
    """The detector of a file; see ``read_file``.

    Raises:
        FileNotFoundError, OSError: as ``read_file``.
        UserError: as ``read_file``, or the file holds no detector.
    """
    path = Path(path)  # a text that is meant as the name of a download is a file's name here
    file = read_file(path)
    if isinstance(file, WeightsFile):
        raise UserError(
            f"{path} holds no detector but a backbone or classifier ({file.info.layout}); train a detector from it: --weights"
        )
    return file


def read_detector(path: str | Path, input_size: tuple[int, int] | None = None) -> tuple[Detector, DetectorInfo]:
    """The detector of a file, on the CPU and in evaluation mode.

    Args:
        path: a training's ``best.pt`` or ``last.pt``, or a detector's ``.safetensors``.
            Published names: see ``detection.weights.hub``.
        input_size: (height, width) in place of the one it was trained at; the anchors follow.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file holds no detector, or one that does not fit its own config.
    """
    file = read_detector_file(path)
    info = file.info
    if input_size is not None:
        info.model = info.model.replaced(input_size=input_size)
    if info.quantize == "int8" and input_size is not None:
        raise UserError(f"{path} was fine-tuned in 8 bits at one input size; leave the other one out")
    model = build_detector(info.model, len(info.class_names))
    if info.quantize == "int8":
        model = QuantizedDetector(model)
    load_state(model, file.state, file.source)
    return model.eval(), info


def save_detector(path: Path, model: Detector, info: DetectorInfo) -> None:
    """Write a detector as ``.safetensors``; a run that is killed leaves no half file.

    Raises:
        UserError: the name does not end in .safetensors.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a detector is written as .safetensors; give the file that ending")
    metadata = {"layout": LAYOUT, "detector": json.dumps(info.to_plain(), ensure_ascii=False)}
    write_safetensors(path, model, metadata)


def check_size(info: DetectorInfo, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse a detector whose tensors are not those of the network it describes, before that network is built.

    A file of some kilobytes can describe a network of many gigabytes; it cannot hold one.

    Raises:
        UserError: the config makes no sense, or the tensors do not fit it.
    """
    try:
        with torch.device("meta"):
            network = build_detector(info.model, len(info.class_names))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if info.quantize == "int8":  # a graph, which is not built without numbers
        given, wanted = (sum(tensor.numel() for tensor in one.values()) for one in (state, network.state_dict()))
        if wanted > 2 * given + 1_000_000:
            raise UserError(f"{source}: its config describes a network of {wanted} numbers, it holds {given}")
        return
    check_state(network, state, source)


def _detector(path: Path, state: dict[str, Tensor], plain: Any) -> DetectorFile:
    info = DetectorInfo.from_plain(plain, path)
    check_size(info, state, path)
    return DetectorFile(source=str(path), state=state, info=info)


def _of_checkpoint(path: Path, content: Mapping[str, Any]) -> DetectorFile | WeightsFile:
    weights, extra = content.get("weights"), content.get("extra")
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} is a checkpoint without weights")
    state = dict(weights)
    if isinstance(extra, Mapping) and "detector" in extra:
        return _detector(path, state, extra["detector"])
    if isinstance(extra, Mapping) and "classifier" in extra:
        return _classifier(path, state, extra["classifier"])
    raise UserError(
        f"{path} is a checkpoint, but not of a detector or classifier; train one with litedet train or litedet train-cls"
    )


@dataclass(kw_only=True, slots=True)
class _ClassifierRecord:
    """What the checkpoint of a classifier's training says of it."""

    model: ClassifierConfig
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str = ""
    licence: str = ""


def _classifier(path: Path, state: dict[str, Tensor], plain: Any) -> WeightsFile:
    record = from_plain(plain, _ClassifierRecord, source=path)
    config = record.model.backbone
    try:
        record.model.validate()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    info = WeightsInfo(
        mean=record.mean,
        std=record.std,
        class_names=record.class_names,
        source=record.source or f"{path.name} of a training",
        licence=record.licence,
        padding=config.padding,
    )
    return WeightsFile(source=str(path), layout="litedet", state=state, info=info, config=config)

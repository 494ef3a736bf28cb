"""Weights of other libraries, and our own trainings, recognised by what is in the file: one entry for every layout that is read.

What is an archive is looked into: TensorFlow publishes graphs and .tflite files in .tar.gz.
"""

import tarfile
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.classifier import Classifier
from backbones.errors import UserError
from backbones.mobilenetv2 import MobileNetV2
from backbones.state import existing_file, load_plain, load_state, sha256_of
from backbones.weights.info import WeightsInfo
from backbones.weights.native import read_model, save_weights
from backbones.weights.readers import WeightsFile, state_dict_of, weights_of
from backbones.weights.tflite import is_tflite, read_tflite, unfold_norms
from detection.engine.checkpoint import is_checkpoint
from detection.models.build import build_detector
from detection.models.detector import Detector
from detection.models.ssdlite import SSDLiteConfig
from detection.weights.info import DetectorInfo
from detection.weights.mmdetection import is_mmdetection, read_mmdetection
from detection.weights.native import DetectorFile, file_of, read_file, save_detector
from detection.weights.tensorflow import is_frozen_graph, read_frozen_graph

_ARCHIVE_LIMIT = 2 << 30  # bytes of a member; more is no weights file of a small network
_KNOWN = (
    "known are torchvision's and timm's MobileNetV2 state dicts, TensorFlow Lite MobileNetV2 classifiers (.tflite), frozen "
    "graphs of ssdlite_mobilenet_v2 (.pb), SSDLite checkpoints of mmdetection, a .tar.gz with one of these, and our own "
    ".safetensors, best.pt and last.pt"
)


@dataclass(kw_only=True, slots=True)
class Converted:
    """A network as ours.

    Attributes:
        layout: what the file was recognised as.
        model: the network, in evaluation mode.
        info: what travels with its weights.
        remarks: on what was done to them.
    """

    layout: str
    model: Classifier | MobileNetV2 | Detector
    info: WeightsInfo | DetectorInfo
    remarks: list[str]

    def save(self, path: Path) -> None:
        """Write it as ``.safetensors``."""
        if isinstance(self.model, Detector):
            assert isinstance(self.info, DetectorInfo)
            save_detector(path, self.model, self.info)
        else:
            assert isinstance(self.info, WeightsInfo)
            save_weights(path, self.model, self.info)

    def describe(self) -> list[str]:
        """What it holds, in lines."""
        backbone = self.model if isinstance(self.model, MobileNetV2) else self.model.backbone
        config = backbone.config
        lines = [
            f"backbone MobileNetV2 x{config.width:g}, blocks {' '.join(str(n) for _, _, n, _ in config.settings)}",
            f"padding {config.padding}, batch norm epsilon {config.norm_eps:g}",
        ]
        if isinstance(self.model, Detector):
            model = self.model.config
            line = f"detector {model.kind} {model.input_size[0]}x{model.input_size[1]}"
            if isinstance(model, SSDLiteConfig):
                line += f", features {' '.join(model.features)}, extra maps {' '.join(map(str, model.extra_channels))}"
            lines.append(f"{line}, {len(self.model.anchors)} anchors, {model.score} score")
            mean, std = model.mean, model.std
        else:
            assert isinstance(self.info, WeightsInfo)
            mean, std = self.info.mean, self.info.std
        lines.append(f"input RGB / 255, mean {_numbers(mean)}, standard deviation {_numbers(std)}")
        names = self.info.class_names
        if isinstance(self.model, MobileNetV2):
            lines.append("no classes: a backbone alone")
        else:
            some = f": {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else ", without names"
            lines.append(f"{self.model.num_classes} classes{some}")
        lines.append(
            f"source {self.info.source or 'not stated'}; licence {self.info.licence or 'not stated by the file'}"
        )
        return lines + self.remarks


def convert(path: Path, class_names: tuple[str, ...] = (), images: Iterable[Any] | None = None) -> Converted:
    """Read a file of another library, or a checkpoint or weights of ours.

    Args:
        path: the file.
        class_names: names of the classes, for files that hold none; empty for what the file says.
        images: sample images, uint8 [H, W, 3] RGB at the network's input size, to measure the batch norm statistics of
            a network whose norms are folded. None leaves them folded: fit for prediction, not for training.

    Raises:
        FileNotFoundError: no such file.
        UserError: an unknown file, or a network that differs from ours; everything that differs is named.
        ImportError: a package that reads this kind of file is missing.
    """
    if _is_gzip(existing_file(path)):
        with tempfile.TemporaryDirectory() as folder:
            inside = unpack(path, Path(folder))
            if _is_gzip(existing_file(inside)):
                raise UserError(f"{path}: {inside.name} in it is an archive again; unpack it first")
            converted = _convert(inside, class_names, images)
            converted.info.source += f", sha256 {sha256_of(inside)}"
        converted.info.source += f" in {path.name}"
        return converted
    converted = _convert(path, class_names, images)
    converted.info.source += f", sha256 {sha256_of(path)}"
    return converted


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"  # gzip's magic number; none of the other formats begins so


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the one weights file of a .tar.gz into a folder.

    Nothing else is written: a member is read as a stream and its name in the archive decides nothing, so that it can lead
    nowhere.

    Raises:
        UserError: a damaged archive, or none or several files in it that could be meant.
    """
    try:
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.isfile()]
            found = [m for m in members if Path(m.name).name == "frozen_inference_graph.pb"]
            found = found or [m for m in members if m.name.endswith(".tflite")]
            if len(found) != 1:
                names = ", ".join(member.name for member in members[:8]) or "nothing"
                raise UserError(
                    f"{archive}: expected one frozen_inference_graph.pb or one .tflite in it, found {len(found)} ({names})"
                )
            if found[0].size > _ARCHIVE_LIMIT:
                raise UserError(f"{archive}: {found[0].name} has {found[0].size} bytes, too many for a small network")
            target = folder / Path(found[0].name).name
            source = tar.extractfile(found[0])
            assert source is not None
            with target.open("wb") as file:
                while chunk := source.read(1 << 20):
                    file.write(chunk)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be unpacked, it is damaged or not whole: {error}") from error
    return target


def _convert(path: Path, class_names: tuple[str, ...], images: Iterable[Any] | None) -> Converted:
    if is_tflite(path):
        classifier, info, remarks = read_tflite(path)
        if images is None:
            remarks.append("the batch norms stay folded: good for prediction, not for training (--statistics-from)")
        else:
            num_images = unfold_norms(classifier, _batches(images, info))
            remarks.append(f"batch norm statistics measured on {num_images} images")
        return Converted(
            layout="TensorFlow Lite MobileNetV2 classifier",
            model=classifier,
            info=_with_names(info, classifier, class_names, path),
            remarks=remarks,
        )
    if is_frozen_graph(path):
        model, detector_info, remarks = read_frozen_graph(path, class_names)
        return Converted(
            layout="TensorFlow Object Detection API frozen graph", model=model, info=detector_info, remarks=remarks
        )
    file = _read(path)
    if not isinstance(file, DetectorFile | WeightsFile):
        model, detector_info, remarks = read_mmdetection(path, file, class_names)
        return Converted(layout="mmdetection SSDLite checkpoint", model=model, info=detector_info, remarks=remarks)
    if isinstance(file, DetectorFile):
        detector = build_detector(file.info.model, len(file.info.class_names))
        load_state(detector, file.state, file.source)
        if class_names and len(class_names) != detector.num_classes:
            raise UserError(f"{path} has {detector.num_classes} classes, {len(class_names)} names were given")
        return Converted(
            layout="litedet detector",
            model=detector.eval(),
            info=replace(
                file.info, class_names=class_names or file.info.class_names, source=file.info.source or path.name
            ),
            remarks=[],
        )
    network, info = read_model(file)
    return Converted(
        layout=f"{info.layout} MobileNetV2 {'classifier' if isinstance(network, Classifier) else 'backbone'}",
        model=network,
        info=_with_names(info, network, class_names, path),
        remarks=[],
    )


def _read(path: Path) -> DetectorFile | WeightsFile | dict[str, Tensor]:
    """A file of ours, torchvision's or timm's, or the state dict of mmdetection."""
    try:
        if path.suffix == ".safetensors":
            return read_file(path)
        content = load_plain(path)
        if is_checkpoint(content):
            return file_of(content, path)
        state = state_dict_of(content, path)
        return state if is_mmdetection(state) else weights_of(state, path)
    except UserError as error:
        raise UserError(f"{error}\n{_KNOWN}") from error


def _with_names(
    info: WeightsInfo, model: Classifier | MobileNetV2, class_names: tuple[str, ...], path: Path
) -> WeightsInfo:
    if not class_names:
        return info
    if not isinstance(model, Classifier) or len(class_names) != model.num_classes:
        number = model.num_classes if isinstance(model, Classifier) else "no"
        raise UserError(f"{path} has {number} classes, {len(class_names)} names were given")
    return replace(info, class_names=class_names)


def _batches(images: Iterable[Any], info: WeightsInfo, size: int = 16) -> Iterable[Tensor]:
    mean, std = (torch.tensor(values).mul(255).view(1, 3, 1, 1) for values in (info.mean, info.std))
    batch: list[Tensor] = []
    for image in images:
        batch.append(torch.from_numpy(image).permute(2, 0, 1))
        if len(batch) == size:
            yield (torch.stack(batch).float() - mean) / std
            batch = []
    if batch:
        yield (torch.stack(batch).float() - mean) / std


def _numbers(values: tuple[float, ...] | None) -> str:
    return " ".join(f"{value:g}" for value in values or ())

"""A detector for use: images in, detections out.

from detection import load_detector

detector = load_detector("runs/detector/best.pt")
detections = detector(image)  # RGB uint8 [H, W, 3], or the path of an image
"""

from dataclasses import replace
from pathlib import Path
from typing import overload

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from backbones.errors import UserError
from backbones.layers import ConvNormAct
from detection.engine.runtime import DeviceChoice, choose_device
from detection.images.place import place
from detection.inference.runners import Backend, build_network, threads_for
from detection.models.detector import Detector
from detection.postprocess import build_postprocess
from detection.structures import Detections
from detection.weights.hub import locate
from detection.weights.info import DetectorInfo
from detection.weights.native import read_detector

Image = NDArray[np.uint8] | str | Path


class Predictor:
    """A detector with everything around it: placing the image, the network, post-processing.

    Args:
        model: the network; batch norms are folded into the convolutions, so it can no longer be trained.
        info: what travels with its weights.
        device: where to compute.
        backend: what runs the network, see ``detection.inference.runners``.

    Attributes:
        class_names: name of each label.
        info: as given.
    """

    def __init__(self, model: Detector, info: DetectorInfo, device: torch.device, backend: Backend = "torch") -> None:
        self.info = info
        self.class_names = info.class_names
        self.device = device
        self.model = fold_norms(model.eval()).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.backend = backend
        self.network = build_network(self.model, backend, device)
        self.postprocess = build_postprocess(info.model, info.postprocess, info.class_names)

    @overload
    def __call__(self, images: Image) -> Detections: ...
    @overload
    def __call__(self, images: list[Image]) -> list[Detections]: ...
    def __call__(self, images: Image | list[Image]) -> Detections | list[Detections]:
        """Find objects.

        Args:
            images: RGB uint8 [H, W, 3] of any size, or the path of an image; or a list of these, which makes one batch.

        Returns:
            The detections of the image, on the CPU, boxes in its pixels; a list of them for a list.

        Raises:
            FileNotFoundError, UserError: an image that is not there, does not decode, or is no RGB uint8 array.
        """
        if isinstance(images, np.ndarray | str | Path):
            return self([images])[0]
        if not images:
            return []
        arrays = [_as_array(image) for image in images]
        config = self.info.model
        placed = [place(array, config.input_size, config.resize, config.fill) for array in arrays]
        pixels = torch.from_numpy(np.stack([image for image, _ in placed])).permute(0, 3, 1, 2)
        placements = torch.tensor([placement for _, placement in placed])
        sizes = torch.tensor([array.shape[:2] for array in arrays])
        with torch.inference_mode(), threads_for(self.backend):
            raw = self.network(pixels.to(self.device, non_blocking=True))
            return [found.cpu() for found in self.postprocess(raw, placements.to(self.device), sizes.to(self.device))]


def load_detector(
    path: str | Path,
    *,
    device: DeviceChoice = "auto",
    score_threshold: float = 0.25,
    nms_threshold: float | None = None,
    input_size: tuple[int, int] | None = None,
    backend: Backend = "torch",
) -> Predictor:
    """The detector of a file, ready to use.

    Args:
        path: a training's ``best.pt``, a detector's ``.safetensors``, or a published name, which is downloaded once:
            ``load_detector("ssdlite_mobilenet_v2_coco")``.
        device: "auto", "cpu", "cuda", "cuda:1", "mps" or a ``torch.device``; see ``choose_device``.
        score_threshold: detections below it are dropped.
        nms_threshold: None takes the one in the file.
        input_size: (height, width) of the network's input; None takes the one it was trained at.
        backend: what runs the network. "torch" needs nothing, "compile" a C++ compiler and time at the first call; on a CPU
            it is no quicker. "onnxruntime" and "openvino" are for CPUs and need ``pip install 'litedet[export]'``.

    Raises:
        FileNotFoundError, UserError: see ``read_detector``; CUDA asked for where there is none; a backend whose package is
            not installed.
    """
    chosen = choose_device(device)
    model, info = read_detector(locate(path), input_size)
    postprocess = replace(info.postprocess, score_threshold=score_threshold)
    if nms_threshold is not None:
        postprocess.nms_threshold = nms_threshold
    return Predictor(model, replace(info, postprocess=postprocess), chosen, backend)


def fold_norms(model: Detector) -> Detector:
    """Fold every batch norm into the convolution before it, in place: the same function with half the layers."""
    for module in model.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()  # type: ignore[assignment]
    return model


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """An image file as RGB uint8 [H, W, 3], turned as its EXIF data says.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file does not decode as an image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such image")
    # Through memory, not cv2.imread: that one cannot open every file name on Windows.
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB) if Path(path).stat().st_size else None
    if image is None:
        raise UserError(f"{path} does not decode as an image")
    return np.asarray(image, np.uint8)


def _as_array(image: Image) -> NDArray[np.uint8]:
    if isinstance(image, str | Path):
        return read_image(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(
            f"an image is an RGB uint8 array of shape (height, width, 3), got {image.dtype} {image.shape}; "
            "a grey one becomes RGB with cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)"
        )
    return image

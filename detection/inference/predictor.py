"""A detector for use: images in, detections out.

from detection import load_detector

detector = load_detector("runs/detector/best.pt")
detections = detector(image)  # the path of an image, an RGB array, a PIL image, a tensor; or a list of these
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from backbones.errors import UserError
from detection.engine.runtime import DeviceChoice, choose_device
from detection.evaluation.run import Postprocessing
from detection.images.decode import read_image
from detection.images.place import place
from detection.inference.exported import FilePostprocess, is_exported, open_exported
from detection.inference.inputs import Image, to_array
from detection.inference.runners import Amp, Backend, build_runner, threads_for
from detection.postprocess import build_postprocess
from detection.structures import Detections, Runner, device_of, run_in_parts
from detection.weights.hub import locate
from detection.weights.info import DetectorInfo
from detection.weights.native import read_detector

__all__ = ["Image", "Predictor", "load_detector", "read_image"]


class Predictor:
    """A runner with everything around it: placing the image, the network, post-processing.

    It may be called from several threads at once, and be pickled and copied where its runner can (all of
    ``detection.inference.runners`` can; a lambda cannot).

    Args:
        runner: computes raw predictions: of ``build_runner``, an exported file, or any function.
        info: what travels with the weights: how images are placed, what the predictions mean, the names. Where it has
            thresholds, detections below that of their class are dropped.
        postprocess: raw predictions -> detections; None: the one that fits ``info``.

    Attributes:
        runner, info: as given.
        class_names: name of each label.
        device: where the runner computes.
        postprocess: raw predictions -> detections.
    """

    def __init__(self, runner: Runner, info: DetectorInfo, postprocess: Postprocessing | None = None) -> None:
        self.runner = runner
        self.info = info
        self.class_names = info.class_names
        self.device = device_of(runner)
        self._given = postprocess
        self.postprocess: Postprocessing = postprocess or build_postprocess(
            info.model, info.postprocess, info.class_names
        )

    @overload
    def __call__(self, images: list[Image] | tuple[Image, ...]) -> list[Detections]: ...
    @overload
    def __call__(self, images: Image) -> Detections: ...
    def __call__(self, images: Image | list[Image] | tuple[Image, ...]) -> Detections | list[Detections]:
        """Find objects.

        Args:
            images: an image of any size (see ``Image``: a path, an RGB uint8 array [H, W, 3], a PIL image, an RGB tensor
                [3, H, W]), or a list of these, which makes one batch.

        Returns:
            The detections of the image, on the CPU, boxes in its pixels; a list of them for a list.

        Raises:
            FileNotFoundError, UserError: an image that is not there, does not decode, or is none of these.
        """
        if not isinstance(images, list | tuple):
            return self._batch([images])[0]
        return self._batch(images) if images else []

    def _batch(self, images: Sequence[Image]) -> list[Detections]:
        arrays = [to_array(image) for image in images]
        config = self.info.model
        placed = [place(array, config.input_size, config.resize, config.fill) for array in arrays]
        # Batched on the channels-last side, where it is one copy; the network takes it as it lies.
        pixels = torch.from_numpy(np.stack([image for image, _ in placed])).permute(0, 3, 1, 2)
        placements = torch.tensor([placement for _, placement in placed])
        sizes = torch.tensor([array.shape[:2] for array in arrays])
        return self.detect(pixels, placements, sizes)

    def detect(self, pixels: Tensor, placements: Tensor, sizes: Tensor) -> list[Detections]:
        """Find objects in images that are placed already, for who reads and places them in other processes.

        Args:
            pixels: uint8 [B, 3, H, W], RGB, at the network's input size, best channels-last in memory; on any device.
            placements: float32 [B, 4], where each image lies in them (``Placement``); on the host.
            sizes: int64 [B, 2], (height, width) of each image; on the host.

        Returns:
            B detections on the CPU, boxes in pixels of the images.
        """
        if not len(pixels):
            return []
        with torch.inference_mode(), threads_for(self.runner):
            raw = run_in_parts(self.runner, pixels.to(self.device, non_blocking=True))
            found = self.postprocess(raw, placements, sizes)
        if not self.info.thresholds:
            return found
        limits = torch.tensor(self.info.thresholds, dtype=torch.float64)
        return [one.above(limits) for one in found]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.runner, self.info, self._given)


def load_detector(
    path: str | Path,
    *,
    device: DeviceChoice = "auto",
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    input_size: int | tuple[int, int] | None = None,
    backend: Backend = "torch",
    amp: Amp = "off",
    default_score: float | None = 0.25,
) -> Predictor:
    """The detector of a file, ready to use.

    Args:
        path: a training's ``best.pt``, a detector's ``.safetensors``, a file of ``litedet export`` (``.onnx``, ``.xml``,
            ``.tflite``, ``.pt2``, ``.pte``, ``.param``), or a published name, which is downloaded once:
            ``load_detector("ssdlite_mobilenet_v2_coco")``.
        device: "auto", "cpu", "cuda", "cuda:1", "mps" or a ``torch.device``; see ``choose_device``.
        score_threshold: detections below it are dropped. None: below the best threshold of their class where the file has
            them (``litedet eval --write-thresholds``), else below ``default_score``.
        nms_threshold: None takes the one in the file.
        input_size: (height, width) of the network's input, or one number for both; None takes the one it was trained at.
        backend: what runs the network. "torch" needs nothing, "compile" a C++ compiler and time at the first call; on a CPU
            it is no quicker. "onnxruntime" and "openvino" are for CPUs and need ``pip install 'litedet[export]'``. An
            exported file is run by its own library; "openvino" runs an ONNX file too.
        amp: number format of the convolutions: "off" is float32, "fp16" half precision (GPUs), "bf16" bfloat16.
        default_score: see ``score_threshold``. None: everything that the file's own post-processing keeps, whatever the class, as
            AP needs it.

    Raises:
        FileNotFoundError, UserError: see ``read_detector``; CUDA asked for where there is none; see ``build_runner`` and
            ``open_exported``.
    """
    chosen = choose_device("cpu" if is_exported(path) and device == "auto" else device)
    if is_exported(path):
        return _load_exported(path, chosen, score_threshold, nms_threshold, input_size, backend, amp, default_score)
    model, info = read_detector(locate(path), None if input_size is None else _size(input_size))
    info = _with_thresholds(info, score_threshold, nms_threshold, default_score)
    return Predictor(build_runner(model, backend, chosen, amp), info)


def _with_thresholds(
    info: DetectorInfo, score: float | None, nms: float | None, default_score: float | None
) -> DetectorInfo:
    """What travels with a detector, with the thresholds that were asked for; see ``load_detector``."""
    thresholds = info.thresholds
    if score is not None or default_score is None:
        thresholds = ()
        score = info.postprocess.score_threshold if score is None else score
    elif thresholds:  # just below the lowest as float32, which scores are: detections at a threshold stay
        score = float(np.nextafter(np.float32(min(thresholds)), np.float32(0)))
    else:
        score = default_score
    own = info.postprocess
    postprocess = replace(own, score_threshold=score, nms_threshold=own.nms_threshold if nms is None else nms)
    return replace(info, thresholds=thresholds, postprocess=postprocess)


def _load_exported(
    path: str | Path,
    device: torch.device,
    score_threshold: float | None,
    nms_threshold: float | None,
    input_size: object,
    backend: Backend,
    amp: Amp,
    default_score: float | None,
) -> Predictor:
    if input_size is not None:
        raise UserError(f"{path}: an exported file has one input size; export the checkpoint with another one")
    if device.type != "cpu" or amp != "off":
        raise UserError(f"{path}: an exported file runs on the CPU in the numbers that it was exported with")
    opened = open_exported(path, backend=None if backend == "torch" else backend)
    info = opened.record.info
    own = info.postprocess
    if opened.record.outputs == "raw":
        return Predictor(opened.runner, _with_thresholds(info, score_threshold, nms_threshold, default_score))
    if nms_threshold is not None and nms_threshold != own.nms_threshold:
        raise UserError(
            f"{path} suppresses boxes itself, at IoU {own.nms_threshold:g}; leave nms_threshold out, or export with --raw"
        )
    info = _with_thresholds(info, score_threshold, None, default_score)
    return Predictor(opened.runner, info, FilePostprocess(info.postprocess.score_threshold, info.class_names))


def _size(given: Any) -> tuple[int, int]:
    sides = (given, given) if isinstance(given, int) else given
    if (
        not isinstance(sides, tuple | list)
        or len(sides) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    ):
        raise UserError(f"input_size is (height, width) in pixels, or one number for both; got {given!r}")
    return sides[0], sides[1]

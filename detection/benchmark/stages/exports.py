"""Exported files against torchvision's prediction in floating point."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from detection.benchmark.inputs import Inputs
from detection.benchmark.stages.predict import predict_own, predict_peer
from detection.benchmark.timing import Comparison, compare, interleave
from detection.export import onnx, openvino
from detection.export.module import network_of
from detection.export.options import Exporter, ExportOptions
from detection.export.verification import processor_name
from detection.inference.exported import ExportRecord, Format
from detection.inference.predictor import Predictor, load_detector

_MADE: dict[Format, Exporter] = {"openvino": openvino.variants, "onnx": onnx.variants}
_SUFFIX = {"openvino": ".xml", "onnx": ".onnx"}


def exports(inputs: Inputs) -> Iterator[Comparison]:
    """Array in memory -> detections: the given files, or the detector in int8; the bar is for the fastest int8 file."""
    with tempfile.TemporaryDirectory(prefix="litedet-benchmark-") as folder:
        given = inputs.config.exported
        predictors = {path.name: load_detector(path, default_score=None) for path in given} or _made(
            inputs, Path(folder)
        )
        compared = []
        for name, ours in predictors.items():
            times = interleave(
                {"ours": partial(predict_own, inputs, ours), "peer": partial(predict_peer, inputs)},
                inputs.config.rounds,
                warm_up=3,
            )
            compared.append(compare(f"predict, {name}", "torchvision, float", times["ours"], times["peer"], bar=None))
    if compared and not given:
        # Instructions for sums of products of 8 bits halve the time again.
        min(compared, key=lambda one: one.ratio).bar = 0.2 if "vnni" in processor_name() else 0.25
    yield from compared


def _made(inputs: Inputs, folder: Path) -> dict[str, Predictor]:
    """The benchmark's detector in int8, to its raw heads, in the formats whose packages are installed."""
    height, width = inputs.model.config.input_size
    small = np.stack([cv2.resize(image, (width, height)) for image in inputs.images])
    options = ExportOptions(
        raw=True,
        int8=True,
        postprocess=inputs.info.postprocess,
        calibration=np.ascontiguousarray(small.transpose(0, 3, 1, 2)),
    )
    found = {}
    for to, exporter in _MADE.items():
        path = folder / f"detector{_SUFFIX[to]}"
        try:
            artefact = next(exporter(network_of(inputs.model), options)).make()  # the first is a quick one
        except ImportError as error:
            inputs.notes.append(f"exports: {to} needs the package {error.name}, which is not installed")
            continue
        artefact.write(path, ExportRecord(format=to, outputs="raw", precision="int8", info=inputs.info))
        found[f"{to} int8"] = load_detector(path, default_score=None)
    return found

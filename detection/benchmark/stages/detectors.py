"""LiteDet against SSDLite, both ours: on the same backbone, with the same classes and input size."""

from collections.abc import Iterator
from functools import partial

import cv2
import numpy as np
import torch

from detection.benchmark import drawn
from detection.benchmark.apart import Side, run_apart
from detection.benchmark.config import Backend
from detection.benchmark.inputs import Inputs
from detection.benchmark.stages.train import own_step, training_arguments
from detection.benchmark.timing import Comparison, compare, interleave
from detection.inference.predictor import Predictor
from detection.inference.runners import build_runner
from detection.models.litedet import LiteDet, LiteDetConfig
from detection.weights.info import DetectorInfo

_PEER = "SSDLite"


def detectors(inputs: Inputs) -> Iterator[Comparison]:
    """The network alone and array to detections, by backend; and a training step."""
    ssdlite, num_classes = inputs.model.config, inputs.model.num_classes
    config = LiteDetConfig(backbone=ssdlite.backbone, input_size=ssdlite.input_size, resize=ssdlite.resize)
    litedet = LiteDet(config, num_classes)
    height, width = config.input_size
    small = np.stack([cv2.resize(image, (width, height)) for image in inputs.images])
    pixels = torch.from_numpy(small).permute(0, 3, 1, 2)
    drawn.draw_weights(litedet, pixels)
    info = DetectorInfo(
        model=litedet.config,
        postprocess=inputs.info.postprocess,
        class_names=inputs.info.class_names,
        category_ids=inputs.info.category_ids,
    )
    backends: tuple[Backend, ...] = ("torch", *(backend for backend in inputs.config.backends if backend != "torch"))
    for backend in backends:
        ours = Predictor(build_runner(litedet.eval(), backend, torch.device("cpu")), info)
        theirs = inputs.predictor(backend)
        for name, sides in (
            ("network", {"ours": partial(ours.runner, pixels[:1]), "peer": partial(theirs.runner, pixels[:1])}),
            ("predict", {"ours": partial(_predict, inputs, ours), "peer": partial(_predict, inputs, theirs)}),
        ):
            with torch.inference_mode():
                times = interleave(sides, inputs.config.rounds, warm_up=3)
            yield compare(f"LiteDet: {name}, {backend}", _PEER, times["ours"], times["peer"], bar=1.0)

    _, weights, batch, threads = training_arguments(inputs)
    apart = {
        "ours": Side(own_step, (info, litedet.state_dict(), batch, threads)),
        "peer": Side(own_step, (inputs.info, weights, batch, threads)),
    }
    with run_apart(apart) as calls:
        times = interleave(calls, max(inputs.config.rounds // 3, 2), warm_up=2)
    name = f"LiteDet: training step, {inputs.config.batch_size}"
    yield compare(name, _PEER, times["ours"], times["peer"], bar=1.15)


def _predict(inputs: Inputs, predictor: Predictor) -> object:
    return predictor(inputs.images[inputs.next_image()])

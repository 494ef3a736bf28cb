"""From images to detections: whole, by backend, and post-processing alone."""

import statistics
from collections.abc import Iterator
from functools import partial

import cv2
import torch

from detection.benchmark.inputs import Inputs
from detection.benchmark.peer import as_peer_input
from detection.benchmark.timing import Comparison, compare, interleave
from detection.inference.predictor import Predictor
from detection.postprocess import build_postprocess


def predict(inputs: Inputs) -> Iterator[Comparison]:
    """Array in memory -> detections, torch alone."""
    ours = inputs.predictor("torch")
    times = interleave(
        {"ours": partial(predict_own, inputs, ours), "peer": partial(predict_peer, inputs)},
        inputs.config.rounds,
        warm_up=3,
    )
    yield compare("predict, torch", "torchvision", times["ours"], times["peer"], bar=0.55)


def backends(inputs: Inputs) -> Iterator[Comparison]:
    """The same with other backends; the bar is for the fastest."""
    compared = []
    for backend in inputs.config.backends:
        ours = inputs.predictor(backend)
        times = interleave(
            {"ours": partial(predict_own, inputs, ours), "peer": partial(predict_peer, inputs)},
            inputs.config.rounds,
            warm_up=3,
        )
        compared.append(compare(f"predict, {backend}", "torchvision", times["ours"], times["peer"], bar=None))
    min(compared, key=lambda one: one.ratio).bar = 0.35
    yield from compared


def predict_own(inputs: Inputs, ours: Predictor) -> object:
    """Our prediction of the next image."""
    return ours(inputs.images[inputs.next_image()])


def predict_peer(inputs: Inputs) -> object:
    """torchvision's prediction of the next image."""
    with torch.inference_mode():
        return inputs.peer([as_peer_input(inputs.images[inputs.next_image()])])


def postprocess(inputs: Inputs) -> Iterator[Comparison]:
    """Raw predictions -> detections in the image's pixels."""
    height, width = inputs.model.config.input_size
    ours = inputs.predictor("torch")
    scores_of = build_postprocess(inputs.info.model, inputs.info.postprocess).scores
    with torch.inference_mode():
        small = [torch.from_numpy(cv2.resize(image, (width, height))).permute(2, 0, 1) for image in inputs.images]
        raws = [ours.runner(image[None]) for image in small]
        sizes = [tuple(image.shape[:2]) for image in inputs.images]
        placements = [torch.tensor([[width / w, height / h, 0.0, 0.0]]) for h, w in sizes]

        def own() -> object:
            place = inputs.next_image()
            return ours.postprocess(raws[place], placements[place], torch.tensor([sizes[place]]))

        def peer() -> object:
            place = inputs.next_image()
            outputs = {"bbox_regression": raws[place].codes, "cls_logits": raws[place].class_logits}
            found = inputs.peer.postprocess_detections(outputs, [raws[place].anchors], [(height, width)])
            return inputs.peer.transform.postprocess(found, [(height, width)], [sizes[place]])

        times = interleave({"ours": own, "peer": peer}, inputs.config.rounds * 3, warm_up=8)
        above = statistics.mean(
            int((scores_of(raw.class_logits) > inputs.info.postprocess.score_threshold).sum()) for raw in raws
        )
    inputs.notes.append(f"post-processing: {above:.0f} of {raws[0].class_logits[0, :, 1:].numel()} pairs above 0.001")
    yield compare("post-processing", "torchvision", times["ours"], times["peer"], bar=0.15)

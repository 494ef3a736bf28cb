"""The loop from a runner and a loader to an evaluator."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from detection.engine.progress import progress_bar
from detection.evaluation.coco_ap import CocoEvaluator
from detection.structures import Batch, Detections, RawPredictions, Runner, device_of, run_in_parts

_log = logging.getLogger(__name__)

_NUM_NAMED = 10  # unreadable or damaged images that a warning names before it only counts


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTiming:
    """Where the time of ``evaluate`` went, in milliseconds per image of this process.

    Attributes:
        network: from the batch on the device to raw predictions.
        postprocess: from raw predictions to detections on the host.
        wait: waiting for the loader, the copy to the device included.
    """

    network: float
    postprocess: float
    wait: float


Postprocessing = Callable[[RawPredictions, Tensor, Tensor], list[Detections]]
"""Raw predictions, placements [B, 4], original sizes [B, 2] -> B detections; see ``detection.postprocess.Postprocess``."""


@overload
def evaluate(
    runner: Runner,
    loader: Iterable[Batch],
    postprocess: Postprocessing,
    evaluator: CocoEvaluator,
    *,
    timing: Literal[True],
) -> EvaluationTiming: ...
@overload
def evaluate(
    runner: Runner,
    loader: Iterable[Batch],
    postprocess: Postprocessing,
    evaluator: CocoEvaluator,
    *,
    timing: Literal[False] = False,
) -> None: ...
def evaluate(
    runner: Runner,
    loader: Iterable[Batch],
    postprocess: Postprocessing,
    evaluator: CocoEvaluator,
    *,
    timing: bool = False,
) -> EvaluationTiming | None:
    """Hand everything that a detector finds in the images of a loader to an evaluator.

    In a run of several processes each goes through its own share; ``evaluator.merge_across_processes()`` comes after.

    Args:
        runner: computes raw predictions; ``detection.inference.runners.TorchRunner`` makes one of a network.
        loader: batches with ``placements``, as an ``EvalTransform`` makes them.
        postprocess: turns raw predictions into detections in pixels of the images on disk.
        evaluator: takes the detections, and the names of images that could not be read.
        timing: measure where the time goes. It waits for a GPU twice more in each batch.

    Returns:
        The timing, if asked for.
    """
    device = device_of(runner)
    clock = _Clock(device) if timing else None
    num_images = 0
    unreadable: list[str] = []
    damaged: list[str] = []
    bar = progress_bar(loader, desc="evaluation", unit="batch", leave=False)
    try:
        for batch in bar:
            unreadable += batch.skipped
            damaged += batch.damaged
            if not len(batch):
                continue
            images = batch.images.to(device, non_blocking=True)  # the rest is for the host
            if clock:
                clock.ends("wait")
            with torch.inference_mode():
                raw = run_in_parts(runner, images)
                if clock:
                    clock.ends("network")
                detections = postprocess(raw, batch.placements, batch.original_sizes)
            evaluator.update(batch.image_ids, detections)
            if clock:
                clock.ends("postprocess")
            num_images += len(batch)
    finally:
        bar.close()
    _warn("cannot be read, counts as an image in which nothing was found: %s", unreadable)
    _warn("a damaged image is evaluated as it decodes: %s", damaged)
    evaluator.note_unreadable(unreadable)
    if clock is None:
        return None
    return EvaluationTiming(**{name: 1000 * spent / max(num_images, 1) for name, spent in clock.spent.items()})


def _warn(message: str, images: list[str]) -> None:
    for text in images[:_NUM_NAMED]:
        _log.warning(message, text)
    if len(images) > _NUM_NAMED:
        _log.warning("... and %d more", len(images) - _NUM_NAMED)


class _Clock:
    """Adds up the seconds of each stage, each from the end of the one before until all asked of the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent = {"network": 0.0, "postprocess": 0.0, "wait": 0.0}
        self.last = time.perf_counter()

    def ends(self, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.spent[stage] += now - self.last
        self.last = now

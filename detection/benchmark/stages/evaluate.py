"""From detections to AP."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from detection.benchmark import drawn, scale
from detection.benchmark.inputs import Inputs
from detection.benchmark.timing import Comparison, compare, interleave
from detection.data.coco import CocoIndex
from detection.evaluation.coco_ap import FIGURES, CocoEvaluator


def evaluate(inputs: Inputs) -> Iterator[Comparison]:
    """Detections in memory and opened ground truth -> the twelve figures, which must agree to 1e-9."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    num = inputs.config.evaluate_images
    path = inputs.config.cache / f"evaluate_{num}.json"
    if not path.is_file():
        drawn.draw_annotations(path, num, round(num * 7.3562))
    index = CocoIndex.read(path)
    found = drawn.draw_detections(index)
    images = scale.feed(CocoEvaluator(index), index, found)
    truth = _quietly(lambda: COCO(str(path)))
    xyxy = torch.cat([image.boxes for image in images]).double().numpy()
    rows = zip(
        found[0].tolist(),
        index.category_ids[found[3]].tolist(),
        np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1).tolist(),
        torch.cat([image.scores for image in images]).double().tolist(),
        strict=True,
    )
    results = [{"image_id": i, "category_id": c, "bbox": box, "score": score} for i, c, box, score in rows]
    figures: dict[str, list[float]] = {}

    def own() -> None:
        evaluator = CocoEvaluator(index)
        for start in range(0, num, 16):
            evaluator.update(index.image_ids[start : start + 16].tolist(), images[start : start + 16])
        figures["ours"] = list(evaluator.compute().figures.values())

    def peer() -> None:
        def run() -> list[float]:
            evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            return [float(value) for value in evaluation.stats]

        figures["peer"] = _quietly(run)

    times = interleave({"ours": own, "peer": peer}, 2, warm_up=0)
    difference = max(abs(a - b) for a, b in zip(figures["ours"], figures["peer"], strict=True))
    assert difference <= 1e-9, f"AP differs by {difference}: {dict(zip(FIGURES, figures['ours'], strict=True))}"
    inputs.notes.append(f"AP: the twelve figures agree to {difference:.0e}")
    seconds = {name: [run / 1e3 for run in runs] for name, runs in times.items()}
    yield compare(f"AP of {num} images", "pycocotools", seconds["ours"], seconds["peer"], bar=0.12, unit="s")


def _quietly(run: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return run()

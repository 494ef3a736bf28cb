"""Measure a detector's COCO AP on images with a COCO json.

$ litedet eval RUN/best.pt --annotations FILE --images DIR --json OUT.json
$ litedet eval --from-predictions FILE --annotations FILE
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from backbones.errors import UserError
from detection.cli.outputs import refuse_overwrites
from detection.engine.errors import main_errors
from detection.images.decode import MAX_PIXELS

if TYPE_CHECKING:  # what loads torch is imported when the command line is parsed
    from detection.evaluation.coco_ap import EvaluationResult
    from detection.evaluation.run import EvaluationTiming


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    checkpoint: tyro.conf.Positional[Path | None] = None
    """A training's best.pt, a detector's .safetensors, a file of litedet export (.onnx, .xml, .tflite, .pt2), or a published
    name (litedet convert-weights --list)."""
    annotations: Path
    """A COCO json. Its classes are matched with the detector's by name; it may have fewer."""
    images: Path | None = None
    """The folder that the file names in it start from. Needed with a checkpoint."""
    exif: Literal["auto", "applied", "ignored"] = "auto"
    """Which pixels boxes count where EXIF turns an image without changing its size: of the turned image (applied) or as
    stored (ignored). auto: what the annotation file says, else applied, with a warning."""
    max_pixels: int = MAX_PIXELS
    """Width times height above which an image is not decoded and counts as unreadable."""
    from_predictions: Path | None = None
    """Measure the detections in this COCO result json, whoever wrote it, in place of a checkpoint's."""
    json: Path | None = None
    """Write the twelve figures, AP per class and the speed here."""
    predictions: Path | None = None
    """Write the detections here, as a COCO result json."""
    classes: tuple[str, ...] = ()
    """Evaluate these classes alone, by name. None given: all."""
    backend: Literal["faster", "pycocotools"] = "faster"
    """Who computes AP. Both give the same figures; pycocotools is the reference and takes 12 times as long."""
    runner: Literal["torch", "compile", "onnxruntime", "openvino"] = "torch"
    """What runs the network. compile needs a C++ compiler; onnxruntime and openvino run on the CPU and need
    pip install 'litedet[export]'."""
    batch_size: int = 32
    """Images per batch."""
    workers: int = 2
    """Processes that read images. 0: this process itself."""
    device: str = "auto"
    """Where the network runs: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:N or mps."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Number format of the network's convolutions. off: float32."""
    input_size: tuple[int, int] | None = None
    """(height, width) of the network's input. None: the one it was trained at."""
    score_threshold: float | None = None
    """Detections below it are dropped. None: the one in the checkpoint."""
    nms_threshold: float | None = None
    """Of two boxes of a class that overlap more (IoU), the one with the lower score goes. None: the one in the checkpoint."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense, alone or together."""
        if (self.checkpoint is None) == (self.from_predictions is None):
            raise UserError("give a checkpoint to evaluate, or --from-predictions FILE, and not both")
        if self.checkpoint is not None and self.images is None:
            raise UserError("--images is missing: the folder of the images that the detector is to see")
        if self.from_predictions is not None and self.predictions is not None:
            raise UserError(
                "--predictions writes what a checkpoint finds; with --from-predictions there is nothing new"
            )
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.workers < 0:
            raise UserError(f"--workers must not be negative, got {self.workers}")


@main_errors
def main(argv: Sequence[str] | None = None) -> EvaluationResult:
    config = tyro.cli(EvalConfig, args=sys.argv[1:] if argv is None else argv, description=__doc__)
    config.validate()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    refuse_overwrites(
        {
            "the checkpoint": config.checkpoint,
            "--annotations": config.annotations,
            "--images": config.images,
            "--from-predictions": config.from_predictions,
        },
        {"--json": config.json, "--predictions": config.predictions},
    )
    result, timing = _measure_file(config) if config.from_predictions else _measure_detector(config)
    print(table(result, timing))
    if config.predictions is not None:
        print(f"{result.num_detections} detections written to {config.predictions}")
    if config.json is not None:
        from detection.evaluation.table import write_json

        write_json(config.json, report(config, result, timing))
        print(f"figures written to {config.json}")
    return result


def _measure_file(config: EvalConfig) -> tuple[EvaluationResult, None]:
    from detection.data.coco import CocoIndex
    from detection.evaluation.coco_ap import coco_ap
    from detection.evaluation.table import read_coco_results

    assert config.from_predictions is not None
    index = CocoIndex.read(config.annotations)
    detections = read_coco_results(config.from_predictions, index)
    return coco_ap(index, detections, backend=config.backend, classes=config.classes or None), None


def _measure_detector(config: EvalConfig) -> tuple[EvaluationResult, EvaluationTiming]:
    import numpy as np

    from detection.data.augment import EvalTransform
    from detection.data.coco import CocoIndex
    from detection.data.dataset import DetectionDataset
    from detection.data.loader import build_loader
    from detection.evaluation.coco_ap import CocoEvaluator
    from detection.evaluation.run import evaluate
    from detection.inference.predictor import load_detector

    assert config.checkpoint is not None
    assert config.images is not None
    detector = load_detector(
        config.checkpoint,
        device=config.device,
        score_threshold=config.score_threshold,
        nms_threshold=config.nms_threshold,
        input_size=config.input_size,
        backend=config.runner,
        amp=config.amp,
    )
    info = detector.info

    index = CocoIndex.read(config.annotations)
    if config.classes:
        index = index.select(class_names=config.classes)
    index = index.with_categories(np.array(info.category_ids), info.class_names)
    evaluator = CocoEvaluator(index, config.backend, config.classes or None)
    transform = EvalTransform(info.model.input_size, resize_mode=info.model.resize, fill=info.model.fill)
    loader = build_loader(
        DetectionDataset(index, config.images, transform, exif=config.exif, max_pixels=config.max_pixels),
        batch_size=config.batch_size,
        num_workers=config.workers,
        pin_memory=detector.device.type == "cuda",
    )

    timing = evaluate(detector.runner, loader, detector.postprocess, evaluator, timing=True)
    result = evaluator.compute()
    if len(result.unreadable) == result.num_images:
        raise UserError(f"none of {result.num_images} images can be read; the first: {result.unreadable[0]}")
    if config.predictions is not None:
        evaluator.write_coco_results(config.predictions)
    return result, timing


def table(result: EvaluationResult, timing: EvaluationTiming | None = None) -> str:
    """The result for people: classes in the order of their labels, those without an object in the file with a dash."""
    width = max(len("class"), *(len(name) for name in result.class_ap))
    lines = [f"{'class':<{width}}  objects     AP"]
    for name, ap in result.class_ap.items():
        lines.append(f"{name:<{width}}  {result.class_counts[name]:>7}  {_figure(ap)}")
    lines.append("")
    lines += [f"{name:<10} {_figure(None if value < 0 else value)}" for name, value in result.figures.items()]
    lines += ["", f"{result.num_images} images, {result.num_detections} detections"]
    if timing is not None:
        lines.append(
            f"{timing.network:.1f} ms network, {timing.postprocess:.1f} ms post-processing, {timing.wait:.1f} ms waiting for "
            "data, per image"
        )
    if result.unreadable:
        lines.append(
            f"{len(result.unreadable)} images could not be read and count as images in which nothing was found"
        )
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return f"{'-':>5}" if value is None else f"{value:.3f}"


def report(config: EvalConfig, result: EvaluationResult, timing: EvaluationTiming | None) -> dict[str, object]:
    """The result for programs."""
    return {
        **result.figures,
        "AP_per_class": result.class_ap,
        "objects_per_class": result.class_counts,
        "num_images": result.num_images,
        "num_detections": result.num_detections,
        "unreadable": list(result.unreadable),
        **({} if timing is None else {"milliseconds_per_image": asdict(timing), "runner": config.runner}),
        "checkpoint": None if config.checkpoint is None else str(config.checkpoint),
        "from_predictions": None if config.from_predictions is None else str(config.from_predictions),
        "annotations": str(config.annotations),
        "backend": config.backend,
    }

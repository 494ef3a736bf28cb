"""Measure a detector's COCO AP on images with a COCO json.

$ litedet eval RUN/best.pt --annotations FILE --images DIR --json OUT.json
$ litedet eval RUN/best.pt --annotations FILE --images DIR --report DIR --against OTHER.pt
$ litedet eval --from-predictions FILE --annotations FILE
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from backbones.errors import UserError
from detection.cli.outputs import refuse_overwrites
from detection.engine.errors import main_errors
from detection.engine.streams import LineHandler
from detection.images.decode import MAX_PIXELS

DRAWN_SCORE = (
    0.25  # detections of a class without a threshold of its own are drawn from here on, as ``load_detector`` does
)

if TYPE_CHECKING:  # what loads torch is imported when the command line is parsed
    from detection.data.coco import CocoIndex
    from detection.data.dataset import DetectionDataset
    from detection.evaluation.coco_ap import EvaluationResult
    from detection.evaluation.compare import Comparison
    from detection.evaluation.errors import Outcomes
    from detection.evaluation.run import EvaluationTiming
    from detection.evaluation.table import DetectionTable


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    checkpoint: tyro.conf.Positional[Path | None] = None
    """A training's best.pt, a detector's .safetensors, a file of litedet export (.onnx, .xml, .tflite, .pt2, .pte,
    .param), or a published name (litedet convert-weights --list)."""
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
    report: Path | None = None
    """Write a report here, report.html in this folder: curves, errors and what they cost, confusion, the worst mistakes as
    images. One file that opens from disk."""
    against: Path | None = None
    """Compare with another detector, or with a COCO result json, on the same images, with 95% intervals: printed, and in
    the report."""
    against_runner: Literal["torch", "compile", "onnxruntime", "openvino"] | None = None
    """What runs the network of --against. None: what --runner says."""
    write_thresholds: Path | None = None
    """Write the detector here, as .safetensors, with the threshold of each class at which its F1 is highest. Predictor
    and video then draw from there on where no score is given."""
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
        if self.against is not None and self.against.suffix == ".json" and not self.against.is_file():
            raise UserError(f"--against {self.against}: there is no such file; a COCO result json is expected")
        if self.against_runner is not None and (self.against is None or self.against.suffix == ".json"):
            raise UserError("--against-runner says what runs the network of --against CHECKPOINT; there is none")
        if self.against is not None and self.against.suffix != ".json" and self.images is None:
            raise UserError("--images is missing: the folder of the images that the other detector is to see")
        if self.write_thresholds is not None:
            if self.checkpoint is None:
                raise UserError("--write-thresholds needs a checkpoint to write them into a copy of")
            from detection.inference.exported import is_exported

            if is_exported(self.checkpoint):
                raise UserError(
                    f"--write-thresholds: {self.checkpoint} is an exported file; give the checkpoint, and export its copy"
                )
            if self.write_thresholds.suffix != ".safetensors":
                raise UserError(f"--write-thresholds {self.write_thresholds}: give the file the ending .safetensors")
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.workers < 0:
            raise UserError(f"--workers must not be negative, got {self.workers}")


@main_errors
def main(argv: Sequence[str] | None = None) -> EvaluationResult:
    config = tyro.cli(EvalConfig, args=sys.argv[1:] if argv is None else argv, description=__doc__)
    config.validate()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[LineHandler(sys.stdout)])
    page = None if config.report is None else config.report / "report.html"
    refuse_overwrites(
        {
            "the checkpoint": config.checkpoint,
            "--annotations": config.annotations,
            "--images": config.images,
            "--from-predictions": config.from_predictions,
            "--against": config.against,
        },
        {
            "--json": config.json,
            "--predictions": config.predictions,
            "--report": page,
            "--write-thresholds": config.write_thresholds,
        },
    )
    measured = _measure_file(config, config.from_predictions) if config.from_predictions else _measure_detector(config)
    result, timing = measured.result, measured.timing
    print(table(result, timing))
    comparison, other = (None, None) if config.against is None else _compare(config, measured)
    if comparison is not None:
        print(f"\n{comparison_table(comparison)}")
    if config.predictions is not None:
        from detection.evaluation.table import write_coco_results

        labels = [measured.index.class_names.index(name) for name in result.class_counts]
        rows = np.isin(measured.table.labels, labels)
        write_coco_results(config.predictions, measured.index, measured.table.select(rows))
        print(f"{result.num_detections} detections written to {config.predictions}")
    if config.json is not None:
        from detection.evaluation.table import write_json

        write_json(config.json, report(config, result, timing, comparison))
        print(f"figures written to {config.json}")
    if config.write_thresholds is not None:
        _write_thresholds(config, measured)
    if page is not None:
        _write_page(config, page, measured, comparison, other)
    return result


@dataclass(kw_only=True, slots=True)
class _Measured:
    """Detections of one source beside the truth with its labels, their figures, and the time they took."""

    index: CocoIndex
    table: DetectionTable
    result: EvaluationResult
    timing: EvaluationTiming | None = None

    def outcomes(self) -> Outcomes:
        from detection.evaluation.errors import Outcomes

        return Outcomes.of(self.index, self.table, tuple(self.result.class_counts))


def _measure_file(config: EvalConfig, predictions: Path) -> _Measured:
    from detection.data.coco import CocoIndex
    from detection.evaluation.coco_ap import coco_ap
    from detection.evaluation.table import read_coco_results

    index = CocoIndex.read(config.annotations)
    detections = read_coco_results(predictions, index)
    result = coco_ap(index, detections, backend=config.backend, classes=config.classes or None)
    return _Measured(index=index, table=detections, result=result)


def _measure_detector(config: EvalConfig) -> _Measured:
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
        default_score=None,
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
    return _Measured(index=index, table=evaluator.table, result=result, timing=timing)


def _compare(config: EvalConfig, measured: _Measured) -> tuple[Comparison, Outcomes]:
    """The comparison, and the other's detections beside the same truth."""
    from dataclasses import replace

    from detection.evaluation.compare import compare
    from detection.evaluation.errors import Outcomes

    assert config.against is not None
    print(f"\nagainst {config.against}")
    if config.against.suffix == ".json":
        other = _measure_file(config, config.against)
    else:
        runner = config.against_runner or config.runner
        other = _measure_detector(replace(config, checkpoint=config.against, runner=runner))
    names = measured.index.class_names
    unknown = sorted(set(other.index.class_names) ^ set(names))
    evaluated = tuple(measured.result.class_counts)
    if missing := [
        name for name in evaluated if name not in other.index.class_names and measured.result.class_counts[name]
    ]:
        raise UserError(
            f"--against {config.against} does not know {', '.join(map(repr, missing))}; name others with --classes"
        )
    if unknown or other.index.class_names != names:  # other labels for the same names
        keep = [name for name in evaluated if name in other.index.class_names]
        order = {name: label for label, name in enumerate(names)}
        labels = [order.get(name, -1) for name in other.index.class_names]
        new = np.array(labels, np.int64)[other.table.labels]
        others = Outcomes.of(measured.index, replace(other.table, labels=new).select(new >= 0), tuple(keep))
        return compare(Outcomes.of(measured.index, measured.table, tuple(keep)), others), others
    others = Outcomes.of(measured.index, other.table, evaluated)
    return compare(measured.outcomes(), others), others


def comparison_table(comparison: Comparison) -> str:
    """A comparison for people: figures and classes with the intervals of their differences."""
    rows = [*comparison.overall, *comparison.classes]
    width = max(len(row.name) for row in rows)
    lines = [f"{'':<{width}}   this  other  difference  95% interval      other is"]
    lines += [
        f"{row.name:<{width}}  {row.first:.3f}  {row.second:.3f}      {row.second - row.first:+.3f}  "
        f"{row.low:+.3f} to {row.high:+.3f}  {row.verdict}"
        for row in rows
    ]
    return "\n".join(lines)


def _write_thresholds(config: EvalConfig, measured: _Measured) -> None:
    from detection.evaluation.errors import WORTH, threshold_curves
    from detection.weights.hub import locate
    from detection.weights.native import read_detector, save_detector

    assert config.checkpoint is not None
    assert config.write_thresholds is not None
    model, info = read_detector(locate(config.checkpoint))
    curves = threshold_curves(measured.outcomes())
    evaluated = {name for name, count in measured.result.class_counts.items() if count}
    before = info.thresholds or (DRAWN_SCORE,) * len(curves)
    info.thresholds = tuple(
        old if curve.best is None else curve.best for old, curve in zip(before, curves, strict=True)
    )
    save_detector(config.write_thresholds, model, info)
    print(f"the detector with the best threshold of each class written to {config.write_thresholds}")
    for name, threshold, curve in zip(info.class_names, info.thresholds, curves, strict=True):
        if curve.best is None:
            why = f"F1 stays below {WORTH}" if name in evaluated else "no object of it was evaluated"
            print(f"  {name}: {why}, {threshold:g} stays")


def _images(config: EvalConfig, index: CocoIndex) -> DetectionDataset | None:
    """The images as they are, to be shown."""
    from detection.data.augment import EvalTransform
    from detection.data.dataset import DetectionDataset

    if config.images is None:
        return None
    whole = EvalTransform((32, 32))  # of no effect: ``DetectionDataset.image`` does not go through it
    return DetectionDataset(index, config.images, whole, exif=config.exif, max_pixels=config.max_pixels)


def _write_page(
    config: EvalConfig, path: Path, measured: _Measured, comparison: Comparison | None, other: Outcomes | None
) -> None:
    from backbones.state import write_whole
    from detection.evaluation.report import Report

    source = config.checkpoint or config.from_predictions
    made = Report(
        title=f"{source} on {config.annotations.name}",
        outcomes=measured.outcomes(),
        result=measured.result,
        images=_images(config, measured.index),
        timing=measured.timing,
        comparison=comparison,
        other=str(config.against),
        other_outcomes=other,
    ).html()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, made)
    print(f"report written to {path} ({len(made) / 1e6:.1f} MB)")


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


def report(
    config: EvalConfig, result: EvaluationResult, timing: EvaluationTiming | None, comparison: Comparison | None = None
) -> dict[str, object]:
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
        **({} if comparison is None else {"against": str(config.against), "differences": _differences(comparison)}),
        "annotations": str(config.annotations),
        "backend": config.backend,
    }


def _differences(comparison: Comparison) -> list[dict[str, object]]:
    return [asdict(row) | {"verdict": row.verdict} for row in (*comparison.overall, *comparison.classes)]


if __name__ == "__main__":
    main()

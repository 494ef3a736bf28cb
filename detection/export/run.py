"""An export from beginning to end: make, run, compare, measure, choose, and only then put it under its name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from backbones.errors import UserError
from backbones.state import sha256_of
from detection.export import litert, onnx, openvino, torch_program
from detection.export.calibration import image_files, network_inputs, spread
from detection.export.options import Artefact, Exporter, ExportOptions
from detection.export.verification import BOUNDS, Difference, Evaluation, compare, milliseconds, processor_name
from detection.inference.exported import SUFFIXES, ExportRecord, Format, Measured, Precision
from detection.inference.predictor import Predictor, load_detector
from detection.inference.runners import build_runner
from detection.postprocess import PostprocessConfig
from detection.weights.hub import locate
from detection.weights.native import read_detector

_EXPORTERS: dict[Format, tuple[Exporter, tuple[str, ...]]] = {
    "onnx": (onnx.variants, onnx.PACKAGES),
    "openvino": (openvino.variants, openvino.PACKAGES),
    "litert": (litert.variants, litert.PACKAGES),
    "torch": (torch_program.variants, torch_program.PACKAGES),
}


@dataclass(kw_only=True, slots=True)
class ExportJob:
    """One export.

    Attributes:
        checkpoint: a training's best.pt, a detector's .safetensors or a published name.
        to: the format.
        out: the file to make.
        images: folder with images to verify the file on; those of ``annotations`` where these are given.
        annotations: a COCO json for AP; None: AP is not measured.
        raw: the file ends at the raw heads.
        int8, fp16: number format.
        calibration: folder with images for the ranges of int8.
        num_calibration, num_verification: images of the folders that are used.
        input_size: (height, width); None: the one it was trained at.
        score_threshold, nms_threshold, max_detections: inside a file that suppresses; None: the checkpoint's.
        enough: an int8 variant that loses less AP than this is taken, and no other is tried.
        max_drop: an int8 file that loses more AP than this is not written.
        all_variants: try every int8 variant.
    """

    checkpoint: str | Path
    to: Format
    out: Path
    images: Path
    annotations: Path | None = None
    raw: bool = False
    int8: bool = False
    fp16: bool = False
    calibration: Path | None = None
    num_calibration: int = 64
    num_verification: int = 16
    input_size: tuple[int, int] | None = None
    score_threshold: float | None = None
    nms_threshold: float | None = None
    max_detections: int = 100
    enough: float = 0.002
    max_drop: float = 0.05
    all_variants: bool = False

    def validate(self) -> None:
        """Raises UserError for values that make no sense, alone or together."""
        if SUFFIXES.get(self.out.suffix.lower()) != self.to:
            ending = next(suffix for suffix, kind in SUFFIXES.items() if kind == self.to)
            raise UserError(f"--out {self.out}: a file of the format {self.to} ends in {ending}")
        if self.int8 and self.calibration is None:
            raise UserError(
                "--int8 needs --calibration FOLDER: images like those it will see, and not those of --images"
            )
        if self.calibration is not None and not self.int8:
            raise UserError("--calibration is for --int8; add that, or leave the folder out")
        if self.int8 and self.fp16:
            raise UserError("--int8 and --fp16 are two number formats; give one")
        if self.fp16 and self.to != "openvino":
            raise UserError(f"--fp16 is for --to openvino, not {self.to}")
        if min(self.num_calibration, self.num_verification, self.max_detections) < 1:
            raise UserError("--num-calibration, --num-verification and --max-detections must be at least 1")
        if self.calibration is not None and self.images.resolve() == self.calibration.resolve() and self.annotations:
            raise UserError(
                f"--calibration and --images are the same folder, {self.images}; an AP on the images that the ranges were "
                "set on says too much"
            )


@dataclass(kw_only=True, slots=True)
class Tried:
    """One variant, run.

    Attributes:
        name: of the variant; "" for floating point.
        difference: from the checkpoint in torch.
        ap: COCO AP; None where it was not measured.
        size: of the file, or files, in bytes.
        milliseconds: time of one image.
    """

    name: str
    difference: Difference
    ap: float | None
    size: int
    milliseconds: float


@dataclass(kw_only=True, slots=True)
class ExportResult:
    """What came of an export.

    Attributes:
        path: of the file.
        record: what travels in it.
        tried: every variant that was run, in order.
        chosen: the one that was kept.
        ap_torch: of the checkpoint on the same images; None where it was not measured.
    """

    path: Path
    record: ExportRecord
    tried: list[Tried] = field(default_factory=list)
    chosen: Tried
    ap_torch: float | None


def export(job: ExportJob, say: Callable[[str], None] = print) -> ExportResult:
    """Makes a file, runs it, compares it with the checkpoint, and puts it under its name if it matches.

    Args:
        job: what is wanted.
        say: takes a line for each step.

    Raises:
        UserError: the options do not fit together, a package is missing, or no variant matches the checkpoint.
        FileNotFoundError: see ``read_detector``.
    """
    job.validate()
    source = locate(job.checkpoint)
    model, info = read_detector(source, job.input_size)
    reference = Predictor(build_runner(model, device=torch.device("cpu")), info)
    exporter, packages = _EXPORTERS[job.to]
    images = _verification_images(job, reference)
    evaluation = Evaluation(job.annotations, job.images, reference) if job.annotations else None
    inside = replace(info.postprocess)
    if not job.raw:
        inside = PostprocessConfig(
            score_threshold=inside.score_threshold if job.score_threshold is None else job.score_threshold,
            nms_threshold=inside.nms_threshold if job.nms_threshold is None else job.nms_threshold,
            candidates=inside.candidates,
            max_detections=job.max_detections,
        )
        inside.validate()
    twin = Predictor(
        reference.runner, replace(info, postprocess=inside)
    )  # what the file is to say, threshold for threshold
    options = ExportOptions(raw=job.raw, int8=job.int8, fp16=job.fp16, postprocess=inside)
    if job.calibration is not None:
        files = spread(image_files(job.calibration), job.num_calibration)
        options.calibration = network_inputs(files, info.model)
        say(f"calibration: {len(options.calibration)} images of {job.calibration}")
    precision: Precision = "int8" if job.int8 else "float16 weights" if job.fp16 else "float32"
    record = ExportRecord(
        format=job.to,
        outputs="raw" if job.raw else "detections",
        precision=precision,
        info=replace(info, postprocess=inside),
        layout="NHWC" if job.to == "litert" else "NCHW",
        versions=_versions(packages),
        checkpoint_sha256=sha256_of(Path(source)) if Path(source).is_file() else "",
        measured=Measured(
            num_images=0 if evaluation is None else len(evaluation),
            annotations="" if job.annotations is None else job.annotations.name,
            processor=processor_name(),
        ),
    )
    if evaluation is not None:
        record.measured.ap_torch = evaluation.ap(reference)
        say(f"torch: AP {record.measured.ap_torch:.4f} on {len(evaluation)} images")

    job.out.parent.mkdir(parents=True, exist_ok=True)
    tried: list[Tried] = []
    best: tuple[Tried, Artefact] | None = None
    with tempfile.TemporaryDirectory(dir=job.out.parent, prefix=".export-") as folder:
        staged = Path(folder, job.out.name)
        try:
            for variant in exporter(model, options):
                artefact = variant.make()
                artefact.write(staged, replace(record, variant=variant.name))
                one = _run(variant.name, staged, twin, images, evaluation)
                tried.append(one)
                say(_line(one, record.measured.ap_torch))
                broken = one.difference.broken(BOUNDS[precision])
                if broken:
                    say(f"  it does not match the checkpoint: {broken}")
                elif best is None or _loss(one) < _loss(best[0]):
                    best = one, artefact
                if not broken and not job.all_variants and _is_enough(one, record.measured.ap_torch, job.enough):
                    break
        except ImportError as error:
            extra = "litert" if job.to == "litert" else "export"
            raise UserError(
                f"--to {job.to} needs the package {error.name}, which is not installed; pip install 'litedet[{extra}]'"
            ) from error
        if best is None:
            raise UserError(
                f"no variant matches the checkpoint; {job.out} is not written. {_reasons(tried, precision)}"
            )
        chosen, artefact = best
        drop = None if chosen.ap is None or record.measured.ap_torch is None else record.measured.ap_torch - chosen.ap
        if drop is not None and drop > job.max_drop:
            raise UserError(
                f"the best variant ({chosen.name or precision}) loses {drop:.4f} AP, more than --max-drop {job.max_drop:g}; "
                f"{job.out} is not written"
            )
        record.variant = chosen.name
        record.measured.ap, record.measured.milliseconds = chosen.ap, chosen.milliseconds
        artefact.write(staged, record)
        load_detector(staged)  # the file with its last record opens
        for path in _files(staged):  # OpenVINO's weights come before the graph that names them
            os.replace(path, job.out.with_name(path.name))
    return ExportResult(path=job.out, record=record, tried=tried, chosen=chosen, ap_torch=record.measured.ap_torch)


def _run(name: str, path: Path, twin: Predictor, images: NDArray[np.uint8], evaluation: Evaluation | None) -> Tried:
    detector = load_detector(path, default_score=None)
    return Tried(
        name=name,
        difference=compare(detector, twin, images),
        ap=None if evaluation is None else evaluation.ap(detector),
        size=sum(file.stat().st_size for file in _files(path)),
        milliseconds=milliseconds(detector, images),
    )


def _files(path: Path) -> list[Path]:
    weights = path.with_suffix(".bin")
    return [weights, path] if path.suffix == ".xml" and weights.exists() else [path]


def _loss(one: Tried) -> float:
    return one.difference.error if one.ap is None else -one.ap


def _is_enough(one: Tried, ap_torch: float | None, enough: float) -> bool:
    if one.ap is None or ap_torch is None:
        return one.difference.found == one.difference.sure
    return ap_torch - one.ap < enough


def _line(one: Tried, ap_torch: float | None) -> str:
    parts = [one.name] if one.name else []
    if one.ap is not None and ap_torch is not None:
        parts.append(f"AP {one.ap:.4f} (drop {ap_torch - one.ap:+.4f})")
    parts += [f"{one.size / 1e6:.2f} MB", f"{one.milliseconds:.1f} ms", str(one.difference)]
    return "; ".join(parts)


def _reasons(tried: list[Tried], precision: Precision) -> str:
    return "; ".join(f"{one.name or precision}: {one.difference.broken(BOUNDS[precision])}" for one in tried)


def _verification_images(job: ExportJob, reference: Predictor) -> NDArray[np.uint8]:
    files = spread(image_files(job.images), job.num_verification)
    return network_inputs(files, reference.info.model)


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in ("litedet", "torch", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found

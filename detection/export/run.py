"""An export from beginning to end: make, run, compare, measure, choose, and only then put it under its name."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from backbones.errors import UserError
from backbones.state import write_whole
from backbones.weights.readers import WeightsFile
from detection.export.calibration import image_files, spread
from detection.export.classifier import ClassifierSubject
from detection.export.options import Artefact, ExportOptions, Record, Variant
from detection.export.sensitivity import LayerError, as_lines, chosen_layers, layer_errors
from detection.export.subjects import Comparison, DetectorSubject, Subject
from detection.export.verification import BOUNDS
from detection.inference.exported import EXTRAS, SUFFIXES, Format, Precision, files_of
from detection.weights.hub import locate
from detection.weights.native import read_detector, read_file

_EXPORTERS: dict[Format, str] = {
    "onnx": "onnx",
    "openvino": "openvino",
    "litert": "litert",
    "torch": "torch_program",
    "executorch": "executorch",
    "ncnn": "ncnn",
    "coreml": "coreml",
}
"""Format -> the module of this package that makes it; each has ``variants`` (an ``Exporter``) and ``PACKAGES``."""
RAW_ONLY: tuple[Format, ...] = ("torch", "executorch", "ncnn", "coreml")
"""Formats whose files end at the raw heads."""
FP16: tuple[Format, ...] = ("openvino", "ncnn", "coreml")
"""Formats whose weights can be stored in 16 bits."""
INT8: tuple[Format, ...] = ("onnx", "openvino", "litert", "executorch")
"""Formats that compute in 8 bits."""
_LEARNT: tuple[Format, ...] = ("onnx", "openvino")
"""Formats that take ranges that a training has learnt. Of ExecuTorch's, XNNPACK leaves some rounding over, and no file opens."""
_NOTABLE = 0.01  # a drop from which on the layers are looked at
_SAME = 0.001  # of figures that differ by less the faster file is better
_NUM_PROBED = 8  # images that the layers are looked at with


@dataclass(kw_only=True, slots=True)
class ExportJob:
    """One export.

    Attributes:
        checkpoint: of a detector or a classifier: a training's best.pt, a .safetensors or a published name.
        to: the format.
        out: the file to make.
        images: folder with images to verify the file on; those of ``annotations`` where these are given.
        annotations: a COCO json for AP; None: AP is not measured.
        labelled: of a classifier, a folder with a folder of images for each class, for top-1; None: it is not measured.
        resize: of a classifier, how an image becomes square; None: as its training did.
        raw: the file ends at the raw heads.
        int8, fp16: number format.
        compiled: of torch, an AOTInductor package.
        calibration: folder with images for the ranges of int8.
        num_calibration, num_verification: images of the folders that are used.
        input_size: (height, width); None: the one it was trained at.
        score_threshold, nms_threshold, max_detections: inside a file that suppresses; None: the checkpoint's.
        enough: an int8 variant that loses less AP than this is taken, and no other is tried.
        max_drop: an int8 file that loses more AP than this is not written.
        all_variants: try every int8 variant.
        keep_float: layers of an int8 file that stay in floating point: names, or one number N, the N that suffer most.
        known_figure: what the checkpoint has on these images, where that was measured before.
        portable: see ``ExportOptions``.
    """

    checkpoint: str | Path
    to: Format
    out: Path
    images: Path
    annotations: Path | None = None
    labelled: Path | None = None
    resize: Literal["center_crop", "squash"] | None = None
    raw: bool = False
    int8: bool = False
    fp16: bool = False
    compiled: bool = False
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
    keep_float: tuple[str, ...] = ()
    known_figure: float | None = None
    portable: bool = False

    @property
    def is_raw(self) -> bool:
        """The file ends at the raw heads."""
        return self.raw or self.to in RAW_ONLY

    @property
    def precision(self) -> Precision:
        """Number format of the file."""
        return "int8" if self.int8 else "float16 weights" if self.fp16 else "float32"

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
        if self.fp16 and self.to not in FP16:
            raise UserError(f"--fp16 is for --to {', '.join(FP16)}, not {self.to}")
        if self.compiled and self.to != "torch":
            raise UserError(f"--compiled is for --to torch, not {self.to}")
        other = {"openvino": ".param", "ncnn": ".xml"}.get(self.to)
        if other is not None and self.out.with_suffix(other).exists():
            raise UserError(
                f"--out {self.out}: {self.out.with_suffix(other)} has its weights in {self.out.stem}.bin, too"
            )
        if self.keep_float and not self.int8:
            raise UserError("--keep-float is for --int8; add that, or leave it out")
        if min(self.num_calibration, self.num_verification, self.max_detections) < 1:
            raise UserError("--num-calibration, --num-verification and --max-detections must be at least 1")
        if min(self.enough, self.max_drop) < 0:
            raise UserError(f"--enough and --max-drop must not be negative, got {self.enough:g} and {self.max_drop:g}")
        measured_on = self.images if self.annotations else self.labelled
        if self.calibration is not None and measured_on and measured_on.resolve() == self.calibration.resolve():
            raise UserError(
                f"--calibration and --{'images' if self.annotations else 'labelled'} are the same folder, {measured_on}; figures "
                "on the images that the ranges were set on says too much"
            )


@dataclass(kw_only=True, slots=True)
class Tried:
    """One variant, run.

    Attributes:
        name: of the variant; "" for floating point.
        difference: from the checkpoint in torch; None: nothing here runs the format.
        figure: COCO AP, of a classifier top-1; None where it was not measured.
        size: of the file, or files, in bytes.
        milliseconds: time of one image; None: nothing here runs the format.
    """

    name: str
    difference: Comparison | None
    figure: float | None
    size: int
    milliseconds: float | None


@dataclass(kw_only=True, slots=True)
class ExportResult:
    """What came of an export.

    Attributes:
        path: of the file.
        record: what travels in it.
        tried: every variant that was run, in order.
        chosen: the one that was kept.
        figure_name: "AP" or "top-1".
        figure_torch: of the checkpoint on the same images; None where it was not measured.
        layers: what 8 bits cost in each layer, the worst first; () where that was not asked.
    """

    path: Path
    record: Record
    tried: list[Tried] = field(default_factory=list)
    chosen: Tried
    figure_name: str
    figure_torch: float | None
    layers: list[LayerError] = field(default_factory=list)

    @property
    def drop(self) -> float | None:
        """What the file loses; None where it was not measured."""
        if self.chosen.figure is None or self.figure_torch is None:
            return None
        return self.figure_torch - self.chosen.figure


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
    exporter = importlib.import_module(f"detection.export.{_EXPORTERS[job.to]}")
    subject = open_subject(job, exporter.PACKAGES)
    if subject.figure_torch is not None:
        say(f"torch: {subject.figure_name} {subject.figure_torch:.4f} on {subject.record.measured.num_images} images")
    options = ExportOptions(
        raw=job.is_raw,
        int8=job.int8,
        fp16=job.fp16,
        compiled=job.compiled,
        postprocess=subject.postprocess,
        portable=job.portable,
    )
    layers: list[LayerError] = []
    if job.calibration is not None:
        options.calibration = subject.inputs(spread(image_files(job.calibration), job.num_calibration))
        say(f"calibration: {len(options.calibration)} images of {job.calibration}")
        if job.keep_float:
            layers = layer_errors(subject.network, options.calibration[:_NUM_PROBED])
            options.keep_float = chosen_layers(job.keep_float, layers)
            say(f"in floating point: {', '.join(options.keep_float)}")

    job.out.parent.mkdir(parents=True, exist_ok=True)  # said now where it cannot be, not after minutes
    # Not beside the file: an export that is killed leaves nothing among the user's own.
    with tempfile.TemporaryDirectory(prefix="litedet-export-") as folder, _missing_packages(job.to):
        staged = Path(folder, job.out.name)
        record = replace(subject.record, kept_float=options.keep_float)
        variants: Iterator[Variant] = exporter.variants(subject.network, options)
        if job.to == "coreml":
            return _unrun(job, subject, next(variants).make(), staged, record, say)
        tried, best = _try(job, subject, variants, staged, record, say)
        chosen, artefact = best
        drop = None
        if chosen.figure is not None and subject.figure_torch is not None:
            drop = subject.figure_torch - chosen.figure
        if drop is not None and drop > _NOTABLE and options.calibration is not None and not layers:
            layers = layer_errors(subject.network, options.calibration[:_NUM_PROBED])
            say("\n".join(as_lines(layers)))
            say("--keep-float N keeps the worst N in floating point, --keep-float NAME ... those")
        if drop is not None and drop > job.max_drop:
            raise UserError(
                f"the best variant ({chosen.name or record.precision}) loses {drop:.4f} {subject.figure_name}, more than "
                f"--max-drop {job.max_drop:g}; {job.out} is not written"
            )
        quicker = _quicker(tried, chosen)
        if quicker is not None and subject.figure_torch is not None:
            say(
                f"quicker, for a larger drop: {_line(quicker, subject)}. --enough takes the first variant that loses less "
                f"than it says (now {job.enough:g})"
            )
        final = subject.measured(chosen.figure, chosen.milliseconds)
        final = replace(final, variant=chosen.name, kept_float=options.keep_float)
        artefact.write(staged, final)
        subject.check(staged)  # the file with its last record opens
        for path in files_of(staged):  # weights come before the graph that names them
            write_whole(job.out.with_name(path.name), path.read_bytes())
    return ExportResult(
        path=job.out,
        record=final,
        tried=tried,
        chosen=chosen,
        figure_name=subject.figure_name,
        figure_torch=subject.figure_torch,
        layers=layers,
    )


def open_subject(job: ExportJob, packages: tuple[str, ...]) -> Subject:
    """The checkpoint of a job: a detector, or a classifier.

    Raises:
        FileNotFoundError, UserError: see ``read_file``; options that its kind does not have.
    """
    source = locate(job.checkpoint)
    file = read_file(source)
    if isinstance(file, WeightsFile):
        return ClassifierSubject(job, file, Path(source), packages, job.precision)
    if job.labelled is not None or job.resize is not None:
        raise UserError(
            f"{source} is a detector: its AP is measured with --annotations; leave --labelled and --resize out"
        )
    model, info = read_detector(source, job.input_size)
    if info.quantize == "int8":
        if job.int8 or job.fp16:
            raise UserError(
                f"{source} was fine-tuned in 8 bits and brings its ranges; leave --int8, --calibration and --fp16 out"
            )
        if job.to not in _LEARNT:
            raise UserError(
                f"{source} was fine-tuned in 8 bits, which --to {job.to} does not take; take {', '.join(_LEARNT)}"
            )
        return DetectorSubject(job, Path(source), model, info, packages, "int8")
    return DetectorSubject(job, Path(source), model, info, packages, job.precision)


def _try(
    job: ExportJob,
    subject: Subject,
    variants: Iterator[Variant],
    staged: Path,
    record: Record,
    say: Callable[[str], None],
) -> tuple[list[Tried], tuple[Tried, Artefact]]:
    """Makes and runs variants until one is good enough; gives all that were run, and the best.

    Raises:
        UserError: none matches the checkpoint.
    """
    tried: list[Tried] = []
    best: tuple[Tried, Artefact] | None = None
    for variant in variants:
        artefact = variant.make()
        artefact.write(staged, replace(record, variant=variant.name))
        difference, figure, milliseconds = subject.run(staged)
        size = sum(file.stat().st_size for file in files_of(staged))
        one = Tried(name=variant.name, difference=difference, figure=figure, size=size, milliseconds=milliseconds)
        tried.append(one)
        say(_line(one, subject))
        broken = difference.broken(BOUNDS[record.precision])
        if broken:
            say(f"  it does not match the checkpoint: {broken}")
        elif best is None or _is_better(one, best[0]):
            best = one, artefact
        if not broken and not job.all_variants and _is_enough(one, subject.figure_torch, job.enough):
            break
    if best is None:
        reasons = [(one, one.difference and one.difference.broken(BOUNDS[record.precision])) for one in tried]
        text = "; ".join(f"{one.name or record.precision}: {reason}" for one, reason in reasons)
        raise UserError(f"no variant matches the checkpoint; {job.out} is not written. {text}")
    return tried, best


def _unrun(
    job: ExportJob, subject: Subject, artefact: Artefact, staged: Path, record: Record, say: Callable[[str], None]
) -> ExportResult:
    """The end of an export to a format that nothing here runs: its structure is checked."""
    from detection.export import coreml

    artefact.write(staged, record)
    say(coreml.check(staged, subject.network))
    say(coreml.NOT_RUN)
    artefact.write(job.out, record)
    size = sum(file.stat().st_size for file in files_of(job.out))
    chosen = Tried(name="", difference=None, figure=None, size=size, milliseconds=None)
    return ExportResult(
        path=job.out,
        record=record,
        tried=[chosen],
        chosen=chosen,
        figure_name=subject.figure_name,
        figure_torch=subject.figure_torch,
    )


@contextlib.contextmanager
def _missing_packages(to: Format) -> Iterator[None]:
    """Says how to install what is missing."""
    try:
        yield
    except ImportError as error:
        extra = EXTRAS.get(to, "export")
        raise UserError(
            f"--to {to} needs the package {error.name}, which is not installed; pip install 'litedet[{extra}]'"
        ) from error


def _is_better(one: Tried, other: Tried) -> bool:
    if one.figure is not None and other.figure is not None:
        if abs(one.figure - other.figure) < _SAME and one.milliseconds is not None and other.milliseconds is not None:
            return one.milliseconds < other.milliseconds
        return one.figure > other.figure
    assert one.difference is not None
    assert other.difference is not None
    return one.difference.error < other.difference.error


def _quicker(tried: list[Tried], chosen: Tried) -> Tried | None:
    """The best of the variants that take less than two thirds of the chosen one's time and would be written; None: no such."""
    if chosen.milliseconds is None:
        return None
    least = 2 / 3 * chosen.milliseconds
    found = [
        one
        for one in tried
        if one.figure is not None
        and one.milliseconds is not None
        and one.milliseconds < least
        and one.difference is not None
        and not one.difference.broken(BOUNDS["int8"])
    ]
    return max(found, key=lambda one: one.figure or 0.0, default=None)


def _is_enough(one: Tried, figure_torch: float | None, enough: float) -> bool:
    if one.figure is None or figure_torch is None:
        return one.difference is not None and one.difference.complete
    return figure_torch - one.figure < enough


def signed(drop: float) -> str:
    """A drop with four digits and its sign, which one that rounds to nothing does not have."""
    return f"{drop:+.4f}" if abs(drop) >= 0.00005 else "0.0000"


def _line(one: Tried, subject: Subject) -> str:
    parts = [one.name] if one.name else []
    if one.figure is not None and subject.figure_torch is not None:
        parts.append(f"{subject.figure_name} {one.figure:.4f} (drop {signed(subject.figure_torch - one.figure)})")
    parts += [f"{one.size / 1e6:.2f} MB", f"{one.milliseconds:.1f} ms", str(one.difference)]
    return "; ".join(parts)

"""What is exported: a network with what travels with it, and how its file is compared with torch and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from backbones.state import sha256_of
from detection.export.calibration import image_files, network_inputs, spread
from detection.export.module import Network, network_of
from detection.export.options import Record
from detection.export.verification import Bounds, Difference, Evaluation, compare, milliseconds, processor_name
from detection.inference.exported import ExportRecord, Format, Measured, Precision
from detection.inference.predictor import Predictor, load_detector
from detection.inference.runners import build_runner
from detection.models.detector import Detector
from detection.postprocess import PostprocessConfig
from detection.weights.info import DetectorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from detection.export.run import ExportJob


class Comparison(Protocol):
    """How far a file is from torch; its text is for people."""

    @property
    def error(self) -> float:
        """One number to choose a variant by where no figure was measured."""

    @property
    def complete(self) -> bool:
        """The file finds all that torch is sure of."""

    def broken(self, bounds: Bounds) -> str | None:
        """What is out of bounds; None where nothing is."""


class Subject(Protocol):
    """A checkpoint that is exported.

    Attributes:
        network: what files are made of.
        postprocess: inside a file that suppresses.
        record: what travels in the file; ``measured.processor`` is filled in.
        figure_name: of the figure that says how good a file is: "AP" or "top-1".
        figure_torch: of the checkpoint; None where it is not measured.
    """

    network: Network
    postprocess: PostprocessConfig
    figure_name: str
    figure_torch: float | None

    @property
    def record(self) -> Record:
        """See above."""

    def inputs(self, files: Sequence[Path]) -> NDArray[np.uint8]:
        """Images as the network sees them: uint8 [B, 3, H, W]."""

    def run(self, path: Path) -> tuple[Comparison, float | None, float]:
        """Runs a file: its difference from torch, its figure (None: not measured), milliseconds of one image."""

    def milliseconds_torch(self) -> float:
        """Shortest time of one image through the checkpoint."""

    def check(self, path: Path) -> None:
        """Opens a file as its user will. Raises UserError where that fails."""

    def measured(self, figure: float | None, milliseconds: float | None) -> Record:
        """The record with what was measured."""


class DetectorSubject:
    """A detector; see ``Subject``.

    Args:
        job: what is wanted.
        source: the checkpoint's file.
        model, info: of that file.
        packages: whose versions travel along.
        precision: of the file.
    """

    figure_name = "AP"

    def __init__(
        self,
        job: ExportJob,
        source: Path,
        model: Detector,
        info: DetectorInfo,
        packages: Sequence[str],
        precision: Precision,
    ) -> None:
        self._info = info
        reference = Predictor(build_runner(model, device=torch.device("cpu")), info)
        self.network = network_of(model)
        self.postprocess = _postprocess(job, info)
        # What the file is to say, threshold for threshold.
        self._twin = Predictor(reference.runner, replace(info, postprocess=self.postprocess))
        self._images = self.inputs(spread(image_files(job.images), job.num_verification))
        self._evaluation = Evaluation(job.annotations, job.images, reference) if job.annotations else None
        self.figure_torch = job.known_figure
        if self._evaluation is not None and self.figure_torch is None:
            self.figure_torch = self._evaluation.ap(reference)
        self.record: ExportRecord = ExportRecord(
            format=job.to,
            outputs="raw" if job.is_raw else "detections",
            precision=precision,
            info=replace(info, postprocess=self.postprocess),
            layout=layout_of(job.to),
            versions=versions(packages),
            checkpoint_sha256=sha256_of(source) if source.is_file() else "",
            measured=Measured(
                ap_torch=self.figure_torch,
                num_images=0 if self._evaluation is None else len(self._evaluation),
                annotations="" if job.annotations is None else job.annotations.name,
                processor=processor_name(),
            ),
        )

    def inputs(self, files: Sequence[Path]) -> NDArray[np.uint8]:
        """See ``Subject``."""
        return network_inputs(list(files), self._info.model)

    def run(self, path: Path) -> tuple[Difference, float | None, float]:
        """See ``Subject``."""
        detector = load_detector(path, default_score=None)
        figure = None if self._evaluation is None else self._evaluation.ap(detector)
        return compare(detector, self._twin, self._images), figure, milliseconds(detector.runner, self._images)

    def milliseconds_torch(self) -> float:
        """See ``Subject``."""
        return milliseconds(self._twin.runner, self._images)

    def check(self, path: Path) -> None:
        """See ``Subject``."""
        load_detector(path)

    def measured(self, figure: float | None, milliseconds: float | None) -> ExportRecord:
        """See ``Subject``."""
        return replace(self.record, measured=replace(self.record.measured, ap=figure, milliseconds=milliseconds))


def _postprocess(job: ExportJob, info: DetectorInfo) -> PostprocessConfig:
    inside = replace(info.postprocess)
    if job.is_raw:
        return inside
    inside = PostprocessConfig(
        score_threshold=inside.score_threshold if job.score_threshold is None else job.score_threshold,
        nms_threshold=inside.nms_threshold if job.nms_threshold is None else job.nms_threshold,
        candidates=inside.candidates,
        max_detections=job.max_detections,
    )
    inside.validate()
    return inside


def layout_of(to: Format) -> Any:
    """Order of the axes of a format's input."""
    return "NHWC" if to == "litert" else "NCHW"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Package -> its version, "" where it is not installed."""
    found = {}
    for name in ("litedet", "torch", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found

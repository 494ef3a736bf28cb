"""Whether an exported file says what the checkpoint says: run on images, and measured."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from backbones.errors import UserError
from detection.data.augment import EvalTransform
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset
from detection.data.loader import build_loader
from detection.evaluation.coco_ap import CocoEvaluator
from detection.evaluation.run import evaluate
from detection.inference.exported import Precision
from detection.inference.predictor import Predictor
from detection.inference.runners import threads_for
from detection.structures import Detections, run_in_parts

_SURE = 0.3  # detections that both have to find
_NEAR = 0.1  # how far below it the other's score may be


@dataclass(kw_only=True, slots=True)
class Bounds:
    """How far a file may be from the checkpoint.

    Attributes:
        heads: largest difference of a raw number (code or logit); None: not asked.
        box: largest difference of a side of a box that both find, in pixels of the input; None: not asked.
        score: largest difference of such a detection's score; None: not asked.
        found: least share of the checkpoint's sure detections that the file has to find, IoU at least 0.5.
    """

    heads: float | None
    box: float | None
    score: float | None
    found: float


BOUNDS: dict[Precision, Bounds] = {
    "float32": Bounds(heads=0.01, box=0.1, score=0.001, found=1.0),
    # The other of two nearly equal candidates may win, whose box is some pixels away.
    "float16 weights": Bounds(heads=1.0, box=16.0, score=0.05, found=0.98),
    # Eight bits move boxes and scores; whether it is too much says AP. Here a file that is broken is told from one that is not.
    "int8": Bounds(heads=None, box=None, score=None, found=0.8),
}


@dataclass(kw_only=True, slots=True)
class Difference:
    """How far an exported file is from the checkpoint in torch, on the same images.

    Attributes:
        num_images: how many images.
        codes, class_logits: largest difference of the raw heads; None for a file that gives finished detections.
        box: largest difference of a side of a box that both find, in pixels of the input.
        score: largest difference of the score of such a detection.
        sure: how many detections torch is sure of.
        found: how many of them the file finds, of the same class at an IoU of at least 0.5.
    """

    num_images: int
    codes: float | None
    class_logits: float | None
    box: float
    score: float
    sure: int
    found: int

    @property
    def error(self) -> float:
        """One number to choose by where there is no AP: the share of sure detections not found, then score, then box."""
        missed = 1 - self.found / self.sure if self.sure else 0.0
        return missed + 0.1 * self.score + 0.001 * self.box

    @property
    def complete(self) -> bool:
        """The file finds all that torch is sure of."""
        return self.found == self.sure

    def broken(self, bounds: Bounds) -> str | None:
        """What is out of bounds; None where nothing is."""
        worst = [value for value in (self.codes, self.class_logits) if value is not None]
        checks = (
            ("raw heads", max(worst) if worst else None, bounds.heads),
            ("boxes (pixels)", self.box, bounds.box),
            ("scores", self.score, bounds.score),
        )
        for what, value, bound in checks:
            if value is not None and bound is not None and not value <= bound:
                return f"{what} differ by {value:.3g}, allowed is {bound:g}"
        if self.sure and self.found < bounds.found * self.sure:
            return (
                f"it finds {self.found} of the {self.sure} objects that torch is sure of, wanted is {bounds.found:.0%}"
            )
        return None

    def __str__(self) -> str:
        heads = ""
        if self.codes is not None:
            heads = f"codes {self.codes:.2g}, class logits {self.class_logits:.2g}, "
        return (
            f"on {self.num_images} images: {heads}boxes {self.box:.2g} px, scores {self.score:.2g}, "
            f"{self.found} of {self.sure} sure detections found"
        )


def compare(predictor: Predictor, reference: Predictor, images: NDArray[np.uint8]) -> Difference:
    """Runs both on the same images.

    Args:
        predictor: of the exported file.
        reference: of the checkpoint.
        images: uint8 [B, 3, H, W], at the input size.
    """
    pixels = torch.from_numpy(images)
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # as evaluation and prediction hand them over
    placements = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(len(images), -1)
    sizes = torch.tensor([images.shape[-2:]]).expand(len(images), -1)
    with torch.inference_mode():
        ours = run_in_parts(reference.runner, pixels)
        with threads_for(predictor.runner):
            theirs = run_in_parts(predictor.runner, pixels)
        wanted, found = (
            one.postprocess(raw, placements, sizes) for one, raw in ((reference, ours), (predictor, theirs))
        )
    raw = theirs.codes.shape == ours.codes.shape and theirs.class_logits.shape == ours.class_logits.shape
    pairs = [_pairs(one, other) for one, other in zip(wanted, found, strict=True)]
    return Difference(
        num_images=len(images),
        codes=_most(theirs.codes - ours.codes) if raw else None,
        class_logits=_most(theirs.class_logits - ours.class_logits) if raw else None,
        box=max((pair[2] for pair in pairs), default=0.0),
        score=max((pair[3] for pair in pairs), default=0.0),
        sure=sum(pair[0] for pair in pairs),
        found=sum(pair[1] for pair in pairs),
    )


def _most(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _pairs(wanted: Detections, found: Detections) -> tuple[int, int, float, float]:
    """Of one image: how many torch is sure of, how many of them were found, the worst box, the worst score."""
    wanted, found = wanted.above(_SURE), found.above(_SURE - _NEAR)
    if not len(wanted):
        return 0, 0, 0.0, 0.0
    if not len(found):
        return len(wanted), 0, 0.0, 0.0
    ious = box_iou(wanted.boxes, found.boxes) * (wanted.labels[:, None] == found.labels)
    best, which = ious.max(1)
    matched = best >= 0.5
    boxes = (wanted.boxes - found.boxes[which]).abs()[matched]
    scores = (wanted.scores - found.scores[which]).abs()[matched]
    return len(wanted), int(matched.sum()), _most(boxes), _most(scores)


class Evaluation:
    """AP of detectors on one annotated set.

    Args:
        annotations: a COCO json.
        images: the folder of its file names.
        reference: a detector of the checkpoint; it says which classes there are. Classes of the file that it does not know
            are left out, with those of its own that the file does not have.

    Raises:
        UserError: no class in common.
    """

    def __init__(self, annotations: Path, images: Path, reference: Predictor) -> None:
        self.images = images
        self.annotations = annotations
        info = reference.info
        index = CocoIndex.read(annotations)
        common = [name for name in index.class_names if name in info.class_names]
        if not common:
            raise UserError(
                f"{annotations} has none of the detector's classes ({', '.join(info.class_names[:20])}); it has "
                f"{', '.join(index.class_names[:20])}"
            )
        if len(common) < len(index.class_names):
            index = index.select(class_names=common)
        self.classes = common if len(common) < len(info.class_names) or len(common) < len(index.class_names) else None
        self.index = index.with_categories(np.array(info.category_ids), info.class_names)

    def __len__(self) -> int:
        return len(self.index)

    def ap(self, detector: Predictor) -> float:
        """COCO AP of a detector of the same classes."""
        model = detector.info.model
        evaluator = CocoEvaluator(self.index, "faster", self.classes)
        transform = EvalTransform(model.input_size, resize_mode=model.resize, fill=model.fill)
        dataset = DetectionDataset(self.index, self.images, transform)
        loader = build_loader(dataset, batch_size=8, num_workers=0, pin_memory=False)
        evaluate(detector.runner, loader, detector.postprocess, evaluator)
        return float(evaluator.compute().figures["AP"])


def milliseconds(
    runner: Any, images: NDArray[np.uint8], run: Callable[[torch.Tensor], object] | None = None, rounds: int = 20
) -> float:
    """Shortest time of one image, in milliseconds.

    Args:
        runner: a runner, with the threads that it was opened with, or any function of images.
        images: uint8 [B, 3, H, W].
        run: what is timed; None: the runner itself.
        rounds: after three to warm up.
    """
    run = run or runner
    one = torch.from_numpy(images[:1]).contiguous(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode(), threads_for(runner):
        for _ in range(rounds + 3):
            before = time.perf_counter()
            run(one)
            times.append(time.perf_counter() - before)
    return 1000 * min(times)  # what else the machine does only adds to it


def processor_name() -> str:
    """The processor and the vector units that 8-bit results depend on."""
    name, flags = platform.processor() or platform.machine(), ""
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = [line.split(":", 1) for line in information.read_text().splitlines() if ":" in line]
        fields = {key.strip(): value.strip() for key, value in lines}
        name = fields.get("model name", name)
        has = set(fields.get("flags", "").split())
        flags = " ".join(one for one in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if one in has)
    return f"{name} ({flags})" if flags else name

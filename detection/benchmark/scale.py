"""What a dataset's size does to the cost of an image: it should do nothing."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from backbones.errors import UserError
from detection.benchmark.drawn import draw_annotations, draw_detections
from detection.data.augment import TrainTransform, ssd_augment
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset
from detection.data.loader import build_loader
from detection.evaluation.coco_ap import CocoEvaluator
from detection.structures import Detections

BOXES_PER_IMAGE = 860_001 / 118_287  # train2017
DETECTIONS_PER_IMAGE = 20


class SizeCost(NamedTuple):
    """Costs with an annotation file of one size.

    Attributes:
        images: of the file.
        annotation_bytes: of the arrays in memory, per image.
        open_us: opening the file, microseconds per image.
        sample_ms: from JPEG to training sample, in this process.
        worker_growth_kib: by which the memory that a worker has for itself alone grows over three quarters of the
            samples, after the first quarter.
        evaluator_bytes: what the evaluator holds, per detection.
        evaluation_us: detections to AP, microseconds per image.
    """

    images: int
    annotation_bytes: float
    open_us: float
    sample_ms: float
    worker_growth_kib: float
    evaluator_bytes: float
    evaluation_us: float


def measure_scale(folder: Path, image_dir: Path, sizes: Sequence[int], samples: int = 640) -> list[SizeCost]:
    """Costs for drawn annotation files of these numbers of images, all of which share a few JPEGs.

    Args:
        folder: where the files are drawn, or lie from an earlier run.
        image_dir: JPEGs of 640x480.
        sizes: numbers of images.
        samples: training samples that are drawn for each size.
    """
    file_names = tuple(sorted(path.name for path in image_dir.glob("*.jpg")))
    _measure(folder, image_dir, file_names, min(sizes), samples)  # the first pays for imports, caches and allocations
    return [_measure(folder, image_dir, file_names, size, samples) for size in sizes]


def _measure(folder: Path, image_dir: Path, file_names: tuple[str, ...], size: int, samples: int) -> SizeCost:
    path = folder / f"scale_{size}.json"
    if not path.is_file():
        draw_annotations(path, size, round(size * BOXES_PER_IMAGE), file_names)
    start = time.perf_counter()
    index = CocoIndex.read(path, cache=False)
    opened = time.perf_counter() - start

    dataset = DetectionDataset(index, image_dir, TrainTransform(ssd_augment(), (320, 320)))
    positions = np.random.default_rng(0).integers(len(index), size=samples).tolist()
    start = time.perf_counter()
    for position in positions:
        dataset[0, position]
    sampled = time.perf_counter() - start

    detections = draw_detections(index, DETECTIONS_PER_IMAGE)
    evaluator = CocoEvaluator(index)
    feed(evaluator, index, detections)
    start = time.perf_counter()
    evaluator.compute()
    evaluated = time.perf_counter() - start
    return SizeCost(
        images=size,
        annotation_bytes=array_bytes(index) / size,
        open_us=opened / size * 1e6,
        sample_ms=sampled / samples * 1e3,
        worker_growth_kib=worker_growth(dataset, samples),
        evaluator_bytes=array_bytes(evaluator.table) / len(detections[0]),
        evaluation_us=evaluated / size * 1e6,
    )


def feed(
    evaluator: CocoEvaluator, index: CocoIndex, detections: tuple[np.ndarray, ...], batch_size: int = 16
) -> list[Detections]:
    """Give detections, as ``draw_detections`` makes them, to an evaluator in batches; returns them image by image."""
    _, boxes, scores, labels = detections
    xyxy = torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float32))
    per_image = len(boxes) // len(index)
    images = [
        Detections(boxes=box, scores=score, labels=label)
        for box, score, label in zip(
            xyxy.split(per_image),
            torch.from_numpy(scores.astype(np.float32)).split(per_image),
            torch.from_numpy(labels).split(per_image),
            strict=True,
        )
    ]
    for start in range(0, len(index), batch_size):
        part = slice(start, start + batch_size)
        evaluator.update(index.image_ids[part].tolist(), images[part])
    return images


def array_bytes(holder: object) -> int:
    """Bytes of the numpy arrays that an object holds, alone or in lists."""
    names = getattr(holder, "__slots__", None) or vars(holder)
    total = 0
    for name in names:
        value = getattr(holder, name)
        for array in value if isinstance(value, list) else [value]:
            total += array.nbytes if isinstance(array, np.ndarray) else 0
    return total


def worker_growth(dataset: DetectionDataset, samples: int, batch_size: int = 16) -> float:
    """KiB by which a worker's own memory grows over some batches, when the first quarter of them has filled its caches.

    Raises:
        UserError: this system does not say how much memory a process has for itself (Linux does).
    """
    loader = build_loader(dataset, batch_size=batch_size, num_workers=1)
    batches = iter(loader)
    num_batches = min(samples // batch_size, len(loader))
    for _ in range(max(num_batches // 4, 1)):  # the worker starts with the first
        next(batches)
    (worker,) = loader._iterator._workers  # type: ignore[union-attr]  # others may be active
    before = _own_kib(worker.pid)
    for _ in range(num_batches - max(num_batches // 4, 1)):
        next(batches)
    return _own_kib(worker.pid) - before


def _own_kib(pid: int | None) -> int:
    status = Path(f"/proc/{pid}/smaps_rollup")
    if not status.is_file():
        raise UserError("the memory of a worker is read from /proc, which this system does not have; leave out --scale")
    lines = (line.split() for line in status.read_text().splitlines()[1:])
    return sum(int(kib) for name, kib, *_ in lines if name in ("Private_Clean:", "Private_Dirty:"))


def table(costs: Sequence[SizeCost]) -> str:
    """The costs for people."""
    lines = [
        f"{'images':>9}  {'annotations':>13}  {'opening':>9}  {'sample':>8}  {'worker grows':>12}  {'detection':>10}  "
        f"{'evaluation':>11}",
        f"{'':>9}  {'B/image':>13}  {'us/image':>9}  {'ms':>8}  {'KiB':>12}  {'B':>10}  {'us/image':>11}",
    ]
    lines += [
        f"{cost.images:>9}  {cost.annotation_bytes:>13.0f}  {cost.open_us:>9.1f}  {cost.sample_ms:>8.2f}  "
        f"{cost.worker_growth_kib:>12.0f}  {cost.evaluator_bytes:>10.1f}  {cost.evaluation_us:>11.0f}"
        for cost in costs
    ]
    return "\n".join(lines)

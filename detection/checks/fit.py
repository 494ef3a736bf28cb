"""How well a detector's anchors fit the objects of a dataset, and settings that fit better.

For SSDLite the question is which objects an anchor overlaps enough to be matched with (the others are matched by force, with
whatever anchor is nearest). For LiteDet, whose anchor points predict distances, it is which objects have a point inside and lie
in the reach of those distances.

Both are answered for each anchor shape and feature map at once: of equal anchors on a grid, the one whose centre is nearest to
an object's centre overlaps it most, so only that one is looked at.

Letters in shapes: N objects, S anchor shapes of all maps (SSDLite) or strides (LiteDet).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError
from backbones.features import FeatureSpec
from backbones.mobilenetv2 import MobileNetV2
from detection.checks.split import Split
from detection.models.anchors import AnchorConfig, AnchorGenerator
from detection.models.build import build_detector
from detection.models.detector import DetectorConfig
from detection.models.litedet import LiteDet, LiteDetConfig
from detection.models.ssdlite import SSDLite, SSDLiteConfig

SMALL = 8.0
"""Pixels of the network's input: of an object that is smaller (square root of its area) little is left to see."""
_SIZE_EDGES = (0.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, math.inf)
_REACH = 0.9  # IoU of the best box that a LiteDet point can describe, from which on an object is in reach
MOST_OBJECTS = 50_000
"""Objects that are looked at; of more, a random choice, which tells a share to half a per cent."""
_LEAST_GAIN = 0.005  # of the recall, for a suggestion
_GAIN_OF_MAP = 0.03  # of the recall, for one more, finer feature map, which costs time
_MIN_SCALES = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3)
_MAX_SCALES = (0.5, 0.7, 0.8, 0.95)


class Objects(NamedTuple):
    """Objects at the network's input.

    Attributes:
        boxes: float64 [N, 4], xyxy in pixels of the input.
        records: int64 [N], the rows of their annotations in the split.
    """

    boxes: NDArray[np.float64]
    records: NDArray[np.int64]


class InputChoice(NamedTuple):
    """What another input size would change.

    Attributes:
        what: the size or the slicing.
        small: share of objects below ``SMALL`` pixels.
        recall: as ``Fit.recall``.
        cost: time of the network as a multiple of the present one, by pixels.
    """

    what: str
    small: float
    recall: float
    cost: float


@dataclass(slots=True, kw_only=True)
class Fit:
    """How a detector fits objects.

    Attributes:
        kind: of the detector.
        input_size: (height, width).
        objects: that were looked at.
        quality: float64 [N], the IoU of each object with its best anchor (SSDLite), or with the best box that a point inside
            can describe (LiteDet; 0 without a point inside).
        threshold: quality from which on an object is reached.
        header, rows: a line for each anchor shape or stride.
        choices: other input sizes, and slicing.
    """

    kind: str
    input_size: tuple[int, int]
    objects: Objects
    quality: NDArray[np.float64]
    threshold: float
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    choices: list[InputChoice]

    @property
    def reached(self) -> NDArray[np.bool_]:
        """bool [N]."""
        return self.quality >= self.threshold

    @property
    def recall(self) -> float:
        """Share of the objects that are reached; nan without objects."""
        return share(self.reached)

    def by_size(self) -> list[tuple[str, int, float]]:
        """For each range of sizes at the input: its name in pixels, the objects in it, the share that is reached."""
        sides = sides_of(self.objects.boxes)
        rows = []
        for low, high in pairwise(_SIZE_EDGES):
            inside = (sides >= low) & (sides < high)
            name = f"{low:.0f}–{high:.0f}" if math.isfinite(high) else f"{low:.0f}+"
            rows.append((name, int(inside.sum()), share(self.reached[inside])))
        return rows


@dataclass(slots=True, kw_only=True)
class Suggestion:
    """Settings that fit better.

    Attributes:
        overrides: as ``litedet train`` takes them; empty where nothing fits better.
        before, after: the recall, on the same objects.
        remark: what it costs, or why there is none.
    """

    overrides: list[str]
    before: float
    after: float
    remark: str


def objects_at_input(split: Split, config: DetectorConfig, input_size: tuple[int, int] | None = None) -> Objects:
    """The objects of a split that training uses, at the input of a network: all, or the same 50,000 every time.

    Args:
        split: with the sizes of its images.
        config: of the network.
        input_size: (height, width), in place of the config's.
    """
    height, width = input_size or config.input_size
    records = np.flatnonzero(split.usable())
    if len(records) > MOST_OBJECTS:
        records = np.sort(np.random.default_rng(0).choice(records, MOST_OBJECTS, replace=False))
    sizes = split.box_sizes()[records].astype(np.float64)
    boxes = split.xywh[records].copy()
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clip(0, sizes[:, [1, 0, 1, 0]])
    scale = np.array([width, height]) / sizes[:, ::-1]
    if config.resize == "letterbox":
        scale[:] = scale.min(axis=1, keepdims=True)
        offset = (np.array([width, height]) - sizes[:, ::-1] * scale) / 2
    else:
        offset = np.zeros_like(scale)
    return Objects(boxes * np.tile(scale, 2) + np.tile(offset, 2), records)


def fit_detector(split: Split, config: DetectorConfig, threshold: float = 0.5) -> Fit:
    """How the detector of a config fits the objects of a split.

    Args:
        split: with the sizes of its images.
        config: of an SSDLite or a LiteDet.
        threshold: SSDLite's IoU from which on an anchor is matched.

    Raises:
        UserError: there is no object, or the config makes no sense.
    """
    config.validate()
    objects = objects_at_input(split, config)
    if not len(objects.boxes):
        raise UserError(f"{split.path}: no object that training can use, so there is nothing that a detector could fit")
    if isinstance(config, SSDLiteConfig):
        specs = ssd_specs(config)
        generator = AnchorGenerator(config.anchors, specs)
        ious = shape_ious(objects.boxes, generator, config.input_size)
        best, side = ious.argmax(axis=1), min(config.input_size)
        shapes = [(spec.stride, *shape) for spec, maps in zip(specs, generator.shapes, strict=True) for shape in maps]
        rows: list[tuple[Any, ...]] = [
            (stride, f"{w * side:.0f} x {h * side:.0f}", share(ious[:, n] >= threshold), share(best == n))
            for n, (stride, w, h) in enumerate(shapes)
        ]
        header: tuple[str, ...] = (
            "stride",
            "anchor (width x height)",
            f"objects it can match (IoU {threshold:g})",
            "objects it fits best",
        )
        quality = ious.max(axis=1)
    else:
        assert isinstance(config, LiteDetConfig)
        strides = litedet_strides(config)
        ious, points = point_ious(objects.boxes, strides, config)
        quality, threshold = _best_point(ious, points), _REACH
        best = np.where(points > 0, ious, 0).argmax(axis=1)
        header = (
            "stride",
            "longest side in reach",
            "objects in its reach",
            "points in an object (median)",
            "objects it fits best",
        )
        rows = [
            (
                stride,
                f"{2 * (config.bins - 1 + config.first_bin) * stride:.0f} px",
                share(ious[:, n] >= _REACH),
                f"{np.median(points[:, n]):g}",
                share(best == n),
            )
            for n, stride in enumerate(strides)
        ]  # fmt: skip
    fit = Fit(
        kind=config.kind,
        input_size=config.input_size,
        objects=objects,
        quality=quality,
        threshold=threshold,
        header=header,
        rows=rows,
        choices=[],
    )
    fit.choices = list(_choices(split, config, threshold))
    return fit


def share(mask: NDArray[np.bool_]) -> float:
    return float(mask.mean()) if len(mask) else math.nan


def sides_of(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [N], the square root of each area; boxes are xyxy [N, 4]."""
    return np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


# -------------------------------------------------------------------------------------------------------------- SSDLite


def ssd_specs(config: SSDLiteConfig) -> list[FeatureSpec]:
    """The feature maps of an SSDLite, from the finest."""
    detector = build_detector(config, 1)
    assert isinstance(detector, SSDLite)
    return [*(detector.backbone.feature_specs[name] for name in config.features), *detector.extras.feature_specs]


def shape_ious(
    boxes: NDArray[np.float64], generator: AnchorGenerator, input_size: tuple[int, int]
) -> NDArray[np.float64]:
    """The IoU of each object with the best placed anchor of each shape.

    Args:
        boxes: float64 [N, 4], xyxy in pixels of the input.
        generator: of the anchors.
        input_size: (height, width).

    Returns:
        float64 [N, S], shapes in the order map, shape; equal to the maximum over the cells of a map.
    """
    height, width = input_size
    side = min(input_size)
    found = []
    for number, ((rows, columns), shapes) in enumerate(
        zip(generator.grid_sizes(input_size), generator.shapes, strict=True)
    ):
        steps = generator.centre_steps
        step_y, step_x = (1 / rows, 1 / columns) if steps is None else (steps[number],) * 2
        centres = nearest_points(boxes, (height * step_y, width * step_x), (rows, columns))
        for shape_width, shape_height in shapes:
            half = np.array([shape_width, shape_height]) * side / 2
            found.append(_paired_iou(boxes, np.concatenate([centres - half, centres + half], axis=1)))
    return np.stack(found, axis=1)


def nearest_points(
    boxes: NDArray[np.float64], steps: tuple[float, float], cells: tuple[int, int]
) -> NDArray[np.float64]:
    """float64 [N, 2], (x, y) of the grid point nearest to the centre of each box.

    Args:
        boxes: float64 [N, 4], xyxy.
        steps: (y, x), pixels between two points; the first lies half a step from the edge.
        cells: (rows, columns) of the grid.
    """
    step = np.array(steps[::-1])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    places = np.floor(centres / step).clip(0, np.array(cells[::-1]) - 1)
    return (places + 0.5) * step


def _paired_iou(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [N], the IoU of boxes xyxy [N, 4] one by one."""
    sides = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    overlap = sides.clip(min=0).prod(axis=1)
    areas = (first[:, 2:] - first[:, :2]).prod(axis=1) + (second[:, 2:] - second[:, :2]).prod(axis=1)
    return overlap / np.maximum(areas - overlap, 1e-12)


# -------------------------------------------------------------------------------------------------------------- LiteDet


def litedet_strides(config: LiteDetConfig) -> list[int]:
    """The strides of a LiteDet's maps, from the finest."""
    detector = build_detector(config, 1)
    assert isinstance(detector, LiteDet)
    return [spec.stride for spec in detector.neck.feature_specs]


def point_ious(
    boxes: NDArray[np.float64], strides: Sequence[int], config: LiteDetConfig
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What the points of each stride can describe of each object.

    Args:
        boxes: float64 [N, 4], xyxy in pixels of the input.
        strides: S of them.
        config: says how far the distances of a point reach, and the input size.

    Returns:
        float64 [N, S], the IoU of the object with the box that the point nearest to its centre describes best; int64 [N, S],
        the points inside the object.
    """
    low, high = config.first_bin, config.first_bin + config.bins - 1
    ious, counts = [], []
    for stride in strides:
        cells = np.array([math.ceil(side / stride) for side in config.input_size])
        points = nearest_points(boxes, (stride, stride), (int(cells[0]), int(cells[1])))
        before = ((points - boxes[:, :2]) / stride).clip(low, high) * stride
        behind = ((boxes[:, 2:] - points) / stride).clip(low, high) * stride
        corners = np.concatenate([points - before, np.maximum(points + behind, points - before)], axis=1)
        ious.append(_paired_iou(boxes, corners))
        first = np.ceil(boxes[:, :2] / stride - 0.5).clip(0, cells[::-1])  # points lie at (i + 0.5) * stride
        behind_last = np.floor(boxes[:, 2:] / stride - 0.5).clip(-1, cells[::-1] - 1) + 1
        counts.append((behind_last - first).clip(min=0).prod(axis=1).astype(np.int64))
    return np.stack(ious, axis=1), np.stack(counts, axis=1)


def _best_point(ious: NDArray[np.float64], points: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [N], the best IoU over the strides that have a point inside the object."""
    return np.where(points > 0, ious, 0).max(axis=1)


# ---------------------------------------------------------------------------------------------------------- suggestions


def _quality(
    boxes: NDArray[np.float64], config: DetectorConfig, specs: list[FeatureSpec] | None = None
) -> NDArray[np.float64]:
    """float64 [N], see ``Fit.quality``; ``specs`` of an SSDLite spare building it again."""
    if isinstance(config, SSDLiteConfig):
        generator = AnchorGenerator(config.anchors, specs or ssd_specs(config))
        return shape_ious(boxes, generator, config.input_size).max(axis=1)
    assert isinstance(config, LiteDetConfig)
    return _best_point(*point_ious(boxes, litedet_strides(config), config))


def _choices(split: Split, config: DetectorConfig, threshold: float) -> Iterable[InputChoice]:
    """What larger inputs, and slicing the image in four, would change."""
    height, width = config.input_size
    for factor in (1.0, 1.25, 1.5, 2.0):
        size = (round(height * factor / 32) * 32, round(width * factor / 32) * 32) if factor > 1 else (height, width)
        larger = config.replaced(input_size=size)
        boxes = objects_at_input(split, larger).boxes
        quality = _quality(boxes, larger)
        cost = size[0] * size[1] / (height * width)
        yield InputChoice(f"{size[1]} x {size[0]}", share(sides_of(boxes) < SMALL), share(quality >= threshold), cost)
    boxes = objects_at_input(split, config, (2 * height, 2 * width)).boxes
    # Each object in the slice that has its centre. One that a cut goes through sticks out, as it would with a margin.
    shift = np.floor((boxes[:, :2] + boxes[:, 2:]) / 2 / (width, height)) * (width, height)
    sliced = boxes - np.tile(shift, 2)
    whole = _quality(objects_at_input(split, config).boxes, config)
    recall = share(np.maximum(_quality(sliced, config), whole) >= threshold)
    yield InputChoice("whole, and in 2 x 2 slices", share(sides_of(boxes) < SMALL), recall, 5.0)


def suggest(split: Split, config: DetectorConfig, threshold: float = 0.5) -> Suggestion:
    """Settings of the same kind of detector that reach more objects.

    The network keeps its size: as many anchors in a cell at most; one finer map is suggested only where it reaches much more.

    Args:
        split, config, threshold: as for ``fit_detector``.
    """
    boxes = objects_at_input(split, config).boxes
    if isinstance(config, SSDLiteConfig):
        return _suggest_anchors(boxes, config, threshold)
    assert isinstance(config, LiteDetConfig)
    return _suggest_points(boxes, config)


def _suggest_anchors(boxes: NDArray[np.float64], config: SSDLiteConfig, threshold: float) -> Suggestion:
    specs = ssd_specs(config)
    before = _quality(boxes, config, specs)
    best, best_quality = config, before
    best, best_quality = _best_anchors(boxes, best, best_quality, specs, threshold)
    remark = "the network keeps its size"
    finer = _finer_features(config)
    if finer is not None:
        other = config.replaced(features=finer)
        other_specs = ssd_specs(other)
        other, quality = _best_anchors(boxes, other, _quality(boxes, other, other_specs), other_specs, threshold)
        if share(quality >= threshold) >= share(best_quality >= threshold) + _GAIN_OF_MAP:
            best, best_quality, remark = other, quality, "one finer feature map, which costs time"
    after = share(best_quality >= threshold)
    if after < share(before >= threshold) + _LEAST_GAIN:
        recall = share(before >= threshold)
        return Suggestion(
            overrides=[], before=recall, after=recall, remark="the anchors fit; nothing that was tried fits better"
        )
    overrides = []
    if best.features != config.features:
        overrides += ["--model.features", *best.features]
    old, new = config.anchors, best.anchors
    if new.scales != old.scales:
        overrides += ["--model.anchors.scales", "None"]
    for name in ("min_scale", "max_scale"):
        if getattr(new, name) != getattr(old, name):
            overrides += [f"--model.anchors.{name.replace('_', '-')}", f"{getattr(new, name):g}"]
    if new.ratios != old.ratios:
        overrides += ["--model.anchors.ratios", *(f"{ratio:g}" for ratio in new.ratios)]
    if new.reduce_first_map != old.reduce_first_map:
        overrides += ["--model.anchors.reduce-first-map", str(new.reduce_first_map)]
    return Suggestion(overrides=overrides, before=share(before >= threshold), after=after, remark=remark)


def _best_anchors(
    boxes: NDArray[np.float64],
    config: SSDLiteConfig,
    quality: NDArray[np.float64],
    specs: list[FeatureSpec],
    threshold: float,
) -> tuple[SSDLiteConfig, NDArray[np.float64]]:
    """The scales and ratios that reach the most objects, and of equals those that fit best: first scales, then ratios."""
    best, best_quality = config, quality
    rank = _rank(quality, threshold)
    anchors = config.anchors
    scales = [
        replace(anchors, scales=None, min_scale=low, max_scale=high, reduce_first_map=reduced)
        for low, high, reduced in product(
            _MIN_SCALES, _MAX_SCALES, sorted({anchors.reduce_first_map, False}, reverse=True)
        )
        if low < high
    ]
    for step in ("scales", "ratios"):
        candidates = scales
        if step == "ratios":
            candidates = [replace(best.anchors, ratios=ratios) for ratios in _ratio_sets(boxes, anchors)]
        for candidate in candidates:
            tried = config.replaced(anchors=candidate)
            tried_quality = _quality(boxes, tried, specs)
            if _rank(tried_quality, threshold) > rank + 1e-9:
                best, best_quality, rank = tried, tried_quality, _rank(tried_quality, threshold)
    return best, best_quality


def _rank(quality: NDArray[np.float64], threshold: float) -> float:
    return share(quality >= threshold) + 0.1 * float(quality.mean())


def _ratio_sets(boxes: NDArray[np.float64], anchors: AnchorConfig) -> list[tuple[float, ...]]:
    """Ratios to try, not more of them than there were: symmetric ones, and those of the objects."""
    ratios = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    most = len(anchors.ratios)
    sets: list[tuple[float, ...]] = []
    for count in {min(3, most), min(5, most)}:
        shares = (np.arange(count) + 0.5) / count
        sets.append(tuple(float(f"{ratio:.2g}") for ratio in np.quantile(ratios, shares)))
    if most >= 5:
        sets += [(1.0, long, 1 / long, longer, 1 / longer) for long, longer in ((1.5, 2.5), (2.0, 4.0), (3.0, 6.0))]
    rounded = [tuple(dict.fromkeys(float(f"{max(ratio, 0.05):.4g}") for ratio in ratios)) for ratios in sets]
    return [one for one in rounded if one]


def _finer_features(config: DetectorConfig) -> tuple[str, ...] | None:
    """The features with one more map of half the finest one's stride in front; None where the backbone has none."""
    specs = MobileNetV2(config.backbone, config.features[:1]).feature_specs
    stride = specs[config.features[0]].stride // 2
    names = [name for name, spec in specs.items() if spec.stride == stride and name.startswith("stage")]
    return (names[-1], *config.features) if stride >= 4 and names else None


def _suggest_points(boxes: NDArray[np.float64], config: LiteDetConfig) -> Suggestion:
    before = share(_quality(boxes, config) >= _REACH)
    tried = [
        (["--model.bins", str(bins)], config.replaced(bins=bins), "distances that reach further")
        for bins in (config.bins + 2, config.bins + 4, config.bins + 8)
    ]
    finer = _finer_features(config)
    if finer is not None:
        remark = "a finer feature map, which costs time and memory"
        tried.append((["--model.features", *finer], config.replaced(features=finer), remark))
    best: Suggestion = Suggestion(overrides=[], before=before, after=before, remark="the points reach the objects")
    for overrides, candidate, remark in tried:
        least = _GAIN_OF_MAP if "--model.features" in overrides else _LEAST_GAIN
        after = share(_quality(boxes, candidate) >= _REACH)
        if after >= best.after + least:
            best = Suggestion(overrides=overrides, before=before, after=after, remark=remark)
    if not best.overrides and before < 1 - _GAIN_OF_MAP:
        best.remark = "no setting that was tried reaches more at this input size; see the other input sizes"
    return best

"""Two tables of detections in the same images: which is better, and whether that is more than chance.

Letters in shapes: B resamples, I images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detection.evaluation.errors import Outcomes, resampled_ap

RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A figure of two tables.

    Attributes:
        name: of the figure or class.
        first, second: the figure, NaN where there is nothing to take it of.
        low, high: 95 per cent interval of ``second - first``.
    """

    name: str
    first: float
    second: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "better" or "worse" (the second than the first) if the interval leaves out 0, else "no difference shown"."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        overall: AP and AP50.
        classes: AP of each class with objects.
        images: float64 [I], F1 at IoU 0.5 of the second less that of the first in each image; see ``image_f1``.
        resamples: how many were drawn.
    """

    overall: list[Difference]
    classes: list[Difference]
    images: NDArray[np.float64]
    resamples: int


def compare(first: Outcomes, second: Outcomes, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare by a paired percentile bootstrap over images (Efron and Tibshirani, 1993, chapters 13 and 16).

    Each resample draws I images with replacement, the same for both tables, and takes the difference of AP; the interval is
    from the 2.5th to the 97.5th percentile. Detections and objects are weighed by how often their image was drawn, see
    ``errors.resampled_ap``; nothing is matched again. Many classes are many chances: of 80 intervals of which none shows a
    true difference four leave out 0.

    Args:
        first, second: of the same annotation file.
        resamples: B.
        seed: of the draws.
    """
    num = len(first.index)
    draws = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=resamples)
    weights = np.concatenate([np.ones((1, num), np.int64), draws]).astype(np.int32)
    ap = [resampled_ap(side, weights) for side in (first, second)]
    ap50 = [resampled_ap(side, weights, slice(0, 1)) for side in (first, second)]
    overall = [_difference(name, _over_classes(a), _over_classes(b)) for name, (a, b) in (("AP", ap), ("AP50", ap50))]
    names = first.index.class_names
    classes = [_difference(names[k], ap[0][:, k], ap[1][:, k]) for k in np.flatnonzero(first.num_objects > 0)]
    return Comparison(overall=overall, classes=classes, images=image_f1(second) - image_f1(first), resamples=resamples)


def image_f1(outcomes: Outcomes, from_score: float = 0.25) -> NDArray[np.float64]:
    """F1 at IoU 0.5 of the detections from a score on, in each image [I]; 1 where there is nothing and nothing is found."""
    index, matches = outcomes.index, outcomes.matches
    shown = (outcomes.table.scores >= from_score) & ~matches.ignored[0]
    found = np.bincount(outcomes.positions[shown], minlength=len(index))
    hits = np.bincount(outcomes.positions[shown & outcomes.right[0]], minlength=len(index))
    of_record = np.repeat(np.arange(len(index)), np.diff(index.offsets))
    objects = np.bincount(of_record[matches.counted], minlength=len(index))
    total = found + objects
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)


def _over_classes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[B, K] -> [B]: the mean over the classes that have objects."""
    there = np.isfinite(values)
    total = np.where(there, values, 0).sum(1)
    return np.where(there.any(1), total / np.maximum(there.sum(1), 1), np.nan)


def _difference(name: str, first: NDArray[np.float64], second: NDArray[np.float64]) -> Difference:
    """Of [1 + B] values, the first of which are those of all images."""
    drawn = (second - first)[1:]
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if len(drawn) else (float("nan"), float("nan"))
    return Difference(name=name, first=float(first[0]), second=float(second[0]), low=low, high=high)

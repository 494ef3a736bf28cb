"""The report of an evaluation: one page made of a truth and a table of detections, whoever made it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from backbones.errors import UserError
from detection import charts, pages
from detection.data.dataset import DetectionDataset
from detection.evaluation.coco_ap import EvaluationResult
from detection.evaluation.compare import Comparison
from detection.evaluation.errors import (
    FOREGROUND,
    KINDS,
    RECALLS,
    WORTH,
    ErrorSplit,
    Outcomes,
    ThresholdCurve,
    calibration,
    confusion,
    iou,
    shown_errors,
    split_errors,
    threshold_curves,
)
from detection.evaluation.run import EvaluationTiming
from detection.images.draw import draw_detections, draw_target, image_grid

_log = logging.getLogger(__name__)

_NUM_LINES = 10  # classes that have a line of their own in a chart
_NUM_BARS = 25  # classes in the bars of AP
_NUM_MATRIX = 30  # classes in the confusion matrix
_NUM_PAIRS = 10  # confusions that are named
_NUM_SHOTS = 12
_SHOT_SIDE = 400
_MEANINGS = {
    "class": "right place, wrong class",
    "localisation": "right class, box too far off (IoU 0.1 to 0.5)",
    "both": "wrong class and box off",
    "duplicate": "object already found by a better detection",
    "background": "nothing there",
    "missed": "object that nothing found",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a report is made of.

    Attributes:
        title: of the page.
        outcomes: the table beside the truth.
        result: the COCO figures of the same table.
        images: the images of the same index; None leaves them out.
        timing: speed, where the detector was run.
        comparison: with another table.
        other: what the other table is of, for the page.
        other_outcomes: that table beside the same truth; None leaves out the images that differ most.
    """

    title: str
    outcomes: Outcomes
    result: EvaluationResult
    images: DetectionDataset | None = None
    timing: EvaluationTiming | None = None
    comparison: Comparison | None = None
    other: str = ""
    other_outcomes: Outcomes | None = None

    def html(self) -> bytes:
        """The page, UTF-8, without script and outside address."""
        curves = threshold_curves(self.outcomes)
        split = split_errors(self.outcomes)
        sections = [self._figures(), self._classes(curves), self._curves(curves), self._errors(split, curves)]
        if self.comparison is not None:
            sections.insert(1, self._compared(self.comparison, curves))
        sections += [self._confusion(curves), self._calibration()]
        if self.images is not None:
            sections += [self._false_alarms(split, curves, self.images), self._misses(split, curves, self.images)]
        return pages.page(self.title, *sections).encode()

    def _figures(self) -> pages.Html:
        result = self.result
        cards = pages.tiles([("-" if v < 0 else f"{v:.3f}", name) for name, v in result.figures.items()])
        text = f"{result.num_images} images, {sum(result.class_counts.values())} objects, {result.num_detections} detections."
        if result.unreadable:
            text += (
                f" {len(result.unreadable)} images could not be read and count as images in which nothing was found."
            )
        if self.timing is not None:
            text += (
                f" Speed: {self.timing.network:.1f} ms network, {self.timing.postprocess:.1f} ms post-processing, "
                f"{self.timing.wait:.1f} ms waiting for data, per image."
            )
        return _section("COCO's twelve figures", text, cards)

    def _classes(self, curves: Sequence[ThresholdCurve]) -> pages.Html:
        by_size = [self.result.class_ap_of_size(area) for area in range(4)]
        names = self.outcomes.index.class_names
        rows = []
        for name, count in self.result.class_counts.items():
            curve = curves[names.index(name)]
            best = "-" if curve.best is None else f"{curve.best:.2f}"
            rows.append([name, count, *(of[name] for of in by_size), best, curve.best_f1])
        head = ["class", "objects", "AP", "small", "medium", "large", "threshold", "F1"]
        text = (
            "AP by class and size (below 32x32, up to 96x96, above); the threshold at which F1 is highest at IoU 0.5, and F1 "
            f"there. No threshold where F1 stays below {WORTH}; 0.5 stands in below."
        )
        measured = {name: ap for name, ap in by_size[0].items() if ap is not None}
        lowest = sorted(measured, key=lambda name: measured[name])[:_NUM_BARS]
        few = "" if len(lowest) == len(measured) else f", the {len(lowest)} lowest"
        bars = charts.bar_chart(f"AP by class{few}", lowest, [measured[name] for name in lowest])
        return _section("Classes", text, pages.wide([pages.table(head, rows), bars]))

    def _curves(self, curves: Sequence[ThresholdCurve]) -> pages.Html:
        shown = sorted(self.result.class_counts, key=lambda name: -self.result.class_counts[name])
        shown = [name for name in shown if self.result.class_counts[name]][:_NUM_LINES]
        order = list(self.result.class_counts)
        precision = [self.result.precision[0, :, order.index(name), 0] for name in shown]
        index_names = self.outcomes.index.class_names
        of_score = [curves[index_names.index(name)] for name in shown]
        marks = [(np.nan if curve.best is None else curve.best, curve.best_f1) for curve in of_score]
        pr = charts.line_chart([(n, RECALLS, p) for n, p in zip(shown, precision, strict=True)], "recall", "precision")
        f1 = charts.line_chart(
            [(n, c.thresholds, c.f1) for n, c in zip(shown, of_score, strict=True)],
            "score threshold",
            "F1",
            marks=marks,
        )
        few = (
            ""
            if len(shown) == sum(v > 0 for v in self.result.class_counts.values())
            else f" The {len(shown)} most frequent classes."
        )
        return _section(
            "Precision, recall and threshold",
            f"Left: precision over recall at IoU 0.5, as COCO has it. Right: F1 over the threshold, the best dotted.{few}",
            pages.wide([pr, f1]),
        )

    def _errors(self, split: ErrorSplit, curves: Sequence[ThresholdCurve]) -> pages.Html:
        costs = charts.bar_chart("AP50 that mending each gains", KINDS, [split.costs[kind] for kind in KINDS])
        shown = shown_errors(self.outcomes, split, _limits(curves))
        rows = [[kind, shown[kind], f"{split.costs[kind]:+.3f}", _MEANINGS[kind]] for kind in KINDS]
        return _section(
            "What goes wrong, and what it costs",
            f"Errors of TIDE (arXiv 2008.08115) at IoU 0.5. The bar is what AP50 ({split.ap50:.3f}) would gain if every error of "
            "this kind alone were mended, whatever its score, as AP counts. The numbers are of the detections that a user sees: "
            "those from each class's best threshold on.",
            pages.wide([costs, pages.table(["error", "number", "AP50", "meaning"], rows)]),
        )

    def _confusion(self, curves: Sequence[ThresholdCurve]) -> pages.Html:
        names = self.outcomes.index.class_names
        matrix = confusion(self.outcomes, _limits(curves))
        order = [names.index(name) for name in self.result.class_counts]
        order = sorted(order, key=lambda k: -(matrix[k].sum() + matrix[:, k].sum()))[:_NUM_MATRIX]
        order = [*sorted(order), len(names)]
        shown = [names[k] for k in order[:-1]]
        few = f" The {_NUM_MATRIX} most frequent classes." if len(self.result.class_counts) > _NUM_MATRIX else ""
        return _section(
            "What is taken for what",
            "Rows: the truth; columns: what was found, from each class's best threshold on (IoU 0.5 or more). Last column: "
            f"objects not found; last row: detections on background.{few}",
            pages.beside(
                [
                    charts.matrix_table(matrix[np.ix_(order, order)], [*shown, "background"], [*shown, "not found"]),
                    self._confused(matrix),
                ]
            ),
        )

    def _confused(self, matrix: NDArray[np.int64]) -> pages.Html:
        """The pairs of classes that are mistaken most often."""
        names = self.outcomes.index.class_names
        pairs = [
            (int(matrix[true, found]), true, found)
            for true, found in zip(*np.nonzero(matrix[:-1, :-1]), strict=True)
            if true != found
        ]
        rows = [
            [names[true], names[found], count, f"{100 * count / matrix[true].sum():.0f} %"]
            for count, true, found in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:_NUM_PAIRS]
        ]
        if not rows:
            return pages.paragraph("No class is taken for another.", class_="good")
        return pages.table(["class", "taken for", "number", "of the class"], rows)

    def _calibration(self) -> pages.Html:
        found = calibration(self.outcomes)
        chart = charts.line_chart(
            [("share of right detections", found.scores, found.right)], "score", "share that is right", diagonal=True
        )
        rows = [
            [f"{low:.1f} to {high:.1f}", count, score, right]
            for low, high, count, score, right in zip(
                found.edges, found.edges[1:], found.counts, found.scores, found.right, strict=False
            )
            if count
        ]
        return _section(
            "Can the scores be believed?",
            f"Expected calibration error {found.error:.3f}. On the dashed line, of detections with score 0.7 seven in ten are "
            "right (IoU 0.5); above it scores are too low, below it too high. Detections from 0.05 on.",
            pages.wide([chart, pages.table(["score", "detections", "mean score", "right"], rows)]),
        )

    def _compared(self, found: Comparison, curves: Sequence[ThresholdCurve]) -> pages.Html:
        rows = [
            [
                d.name,
                d.first,
                d.second,
                f"{d.second - d.first:+.3f}",
                f"{d.low:+.3f} to {d.high:+.3f}",
                d.verdict,
            ]
            for d in [*found.overall, *found.classes]
        ]
        head = ["", "this", "other", "difference", "95% interval", "other is"]
        index = self.outcomes.index
        order = np.argsort(found.images, kind="stable")
        ends = dict.fromkeys([*order[:5].tolist(), *order[-5:][::-1].tolist()])  # each once, where there are few
        differing = [place for place in ends if found.images[place]]
        rows_of_images = [[index.file_name(place), f"{found.images[place]:+.2f}"] for place in differing]
        parts = [pages.table(head, rows)]
        if differing:
            parts.append(pages.section("Images that differ most", level=3))
            shown = self._three(differing, found, curves)
            parts += shown or [pages.table(["image", "F1 of the other less this"], rows_of_images)]
        return _section(
            f"Against {self.other}",
            f"95 per cent intervals of the difference from {found.resamples} resamples of the images, the same for both. An "
            f"interval with 0 in it shows no difference. F1 is better in {(found.images > 0).sum()} images, worse in "
            f"{(found.images < 0).sum()}, equal in {(found.images == 0).sum()} (IoU 0.5, scores from 0.25).",
            *parts,
        )

    def _three(self, places: Sequence[int], found: Comparison, curves: Sequence[ThresholdCurve]) -> list[pages.Html]:
        """Truth, this and the other in the images that differ most, three each way."""
        if self.images is None or self.other_outcomes is None:
            return []
        index, other = self.outcomes.index, self.other_outcomes
        limits, other_limits = _limits(curves), _limits(threshold_curves(other))
        worse = [place for place in places if found.images[place] < 0][:3]
        better = [place for place in places if found.images[place] > 0][:3]
        shots = []
        for place in [*worse, *better]:
            small = self._small(place, self.images)
            if small is None:
                continue
            sides = [
                self._truth(place, *small),
                self._found(self.outcomes, limits, place, *small),
                self._found(other, other_limits, place, *small),
            ]
            caption = f"{index.file_name(place)}: F1 of the other {found.images[place]:+.2f}"
            trio = image_grid(sides, columns=3, cell=_SHOT_SIDE)
            shots.append(pages.figure(trio, caption, side=3 * _SHOT_SIDE))
        note = "Left the truth, then this, then the other, each from its classes' best thresholds on."
        return [pages.paragraph(note, class_="dim"), pages.wide(shots, large=True)]

    def _false_alarms(
        self, split: ErrorSplit, curves: Sequence[ThresholdCurve], images: DetectionDataset
    ) -> pages.Html:
        table = self.outcomes.table
        shots: list[pages.Html] = []
        for row in np.flatnonzero(split.kinds >= 0).tolist():  # best first
            if len(shots) == _NUM_SHOTS:
                break
            kind = KINDS[split.kinds[row]]
            text = f"{self.outcomes.index.class_names[table.labels[row]]} {table.scores[row]:.2f}: {kind} ({_MEANINGS[kind]})"
            shots += self._shot(int(self.outcomes.positions[row]), text, table.boxes[row], curves, images)
        return _section(
            "The surest false alarms",
            "Left the truth, right what was found from each class's best threshold on. The black and white frame is the mistake. "
            "Many of these are labels that are missing or wrong.",
            pages.wide(shots, large=True) if shots else pages.paragraph("None."),
        )

    def _misses(self, split: ErrorSplit, curves: Sequence[ThresholdCurve], images: DetectionDataset) -> pages.Html:
        index, table = self.outcomes.index, self.outcomes.table
        of_record = np.repeat(np.arange(len(index)), np.diff(index.offsets))
        areas = index.xywh[:, 2] * index.xywh[:, 3] / np.maximum(index.sizes[of_record].prod(1), 1)
        # Detections below the threshold are nothing to a user: an object that only they found is missed too.
        limits = _limits(curves)
        rows = self.outcomes.matches.detections[0]
        seen = (rows >= 0) & (table.scores[rows] >= limits[table.labels[rows]] if len(table) else False)
        missed = np.flatnonzero(self.outcomes.matches.counted & ~seen)
        shots: list[pages.Html] = []
        for record in missed[np.argsort(-areas[missed], kind="stable")].tolist():
            if len(shots) == _NUM_SHOTS:
                break
            x, y, w, h = index.xywh[record]
            own = np.flatnonzero(self.outcomes.positions == of_record[record])
            overlaps = iou(table.boxes[own], np.array([[x, y, x + w, y + h]]))[:, 0]
            near = own[overlaps >= FOREGROUND][:1]
            best = (
                f"best there: {index.class_names[table.labels[near[0]]]} {table.scores[near[0]]:.2f}"
                if len(near)
                else "nothing there"
            )
            text = f"{index.class_names[index.labels[record]]}, {100 * areas[record]:.0f}% of the image; {best}"
            shots += self._shot(int(of_record[record]), text, np.array([x, y, x + w, y + h]), curves, images)
        return _section(
            "The largest objects that were missed",
            f"{len(missed)} objects have no detection of their class from its best threshold on. Left the truth, right what was "
            "found; the frame is the object.",
            pages.wide(shots, large=True) if shots else pages.paragraph("None."),
        )

    def _shot(
        self,
        position: int,
        text: str,
        box: NDArray[np.floating[Any]],
        curves: Sequence[ThresholdCurve],
        images: DetectionDataset,
    ) -> list[pages.Html]:
        """The figure of a mistake; [] where its image cannot be read."""
        small = self._small(position, images)
        if small is None:
            return []
        sides = [self._truth(position, *small), self._found(self.outcomes, _limits(curves), position, *small)]
        for side in sides:
            _frame(side, box * small[1])
        pair = image_grid(sides, columns=2, cell=_SHOT_SIDE)
        return [pages.figure(pair, f"{self.outcomes.index.file_name(position)}: {text}", side=2 * _SHOT_SIDE)]

    def _small(self, position: int, images: DetectionDataset) -> tuple[NDArray[np.uint8], float] | None:
        """An image at the size at which it is shown, and by how much it was scaled; None where it cannot be read."""
        try:
            image = images.image(position)
        except (UserError, OSError) as error:
            _log.warning("left out of the report: %s", error)
            return None
        scale = _SHOT_SIDE / max(image.shape[:2])
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8), scale

    def _truth(self, position: int, image: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
        index = self.outcomes.index
        objects = index.objects(position)
        return draw_target(image, objects.boxes * np.float32(scale), objects.labels, index.class_names)

    def _found(
        self,
        outcomes: Outcomes,
        limits: NDArray[np.float64],
        position: int,
        image: NDArray[np.uint8],
        scale: float,
    ) -> NDArray[np.uint8]:
        index = outcomes.index
        found = outcomes.table.of_image(int(index.image_ids[position]), index.class_names)
        found = found.above(torch.from_numpy(limits))
        return draw_detections(image, replace(found, boxes=found.boxes * scale))


def _frame(image: NDArray[np.uint8], box: NDArray[np.floating[Any]]) -> None:
    """A white frame in a black one, which stands out on everything."""
    left, top, right, bottom = (round(float(value)) for value in box)
    cv2.rectangle(image, (left, top), (right, bottom), (0, 0, 0), 5)
    cv2.rectangle(image, (left, top), (right, bottom), (255, 255, 255), 2)


def _limits(curves: Sequence[ThresholdCurve]) -> NDArray[np.float64]:
    """The best threshold of each class [K]; of a class without one, its surest detections alone."""
    return np.array([0.5 if curve.best is None else curve.best for curve in curves])


def _section(title: str, text: str, *parts: pages.Html) -> pages.Html:
    """A heading, a line that says what to see, and what there is to see."""
    return pages.section(title, pages.paragraph(text, class_="dim"), *parts)

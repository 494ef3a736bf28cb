"""Boxes, class names and scores drawn on images, and images laid side by side. Drawing is supervision's.

Everything here takes and gives RGB uint8; supervision draws in OpenCV's BGR, so images are turned at its border.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import cv2
import numpy as np
import supervision as sv
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbones.errors import UserError
from detection.structures import Detections

_SMALLEST_TEXT = 0.45  # of OpenCV's font scale; what supervision advises for 320 pixels cannot be read
_MOST_SPREAD = 80  # labels that are moved apart: 14 ms for 80, but 0.8 s for 300, which nobody could read anyway
_PALETTE = sv.ColorPalette.DEFAULT
# Black on bright colours, white on dark ones (ITU-R BT.601 luma).
_TEXT_PALETTE = sv.ColorPalette(
    [
        sv.Color.BLACK if 0.299 * colour.r + 0.587 * colour.g + 0.114 * colour.b > 130 else sv.Color.WHITE
        for colour in _PALETTE.colors
    ]
)


def to_supervision(detections: Detections) -> sv.Detections:
    """The same boxes, scores, labels and class names in supervision's type, for its annotators and trackers."""
    detections = detections.cpu()
    return sv.Detections(
        xyxy=detections.boxes.numpy().astype(np.float32).reshape(-1, 4),
        confidence=detections.scores.numpy().astype(np.float32),
        class_id=detections.labels.numpy().astype(np.int64),
        data={"class_name": np.array(detections.names(), dtype=np.str_)},
    )


def draw_detections(
    image: NDArray[np.uint8], detections: Detections, min_side: int = 0, ids: Sequence[int | None] = ()
) -> NDArray[np.uint8]:
    """Draws what was found: a box and "class score" in the colour of the class, the best on top.

    The colour goes by the label alone, so a class has the same in every image and run.

    Args:
        image: uint8 RGB [H, W, 3]; it stays as it is.
        detections: boxes in pixels of ``image``.
        min_side: an image whose longer side is below this is enlarged before drawing, so that its labels can be read.
        ids: of the track of each detection, written before its class ("#3 cat 0.87"); None for one without; () for none.

    Returns:
        A new image, uint8 RGB; the given one, enlarged or not, where there are no boxes.
    """
    texts = [f"{name} {score:.2f}" for name, score in zip(detections.names(), detections.scores.tolist(), strict=True)]
    if ids:
        texts = [text if number is None else f"#{number} {text}" for text, number in zip(texts, ids, strict=True)]
    return _draw(image, detections, texts, min_side)


def draw_target(
    image: NDArray[np.uint8],
    boxes: NDArray[np.float32] | Tensor,
    labels: NDArray[np.int64] | Tensor,
    class_names: Sequence[str] = (),
    min_side: int = 0,
) -> NDArray[np.uint8]:
    """Draws what should be found: a box and the class name.

    Args:
        image: uint8 RGB [H, W, 3]; it stays as it is.
        boxes: [N, 4], xyxy in pixels of ``image``.
        labels: [N].
        class_names: name of each label; a label without one is written as its number.
        min_side: as for ``draw_detections``.

    Returns:
        A new image, uint8 RGB.
    """
    target = Detections(
        boxes=torch.as_tensor(boxes).reshape(-1, 4),
        scores=torch.ones(len(labels)),
        labels=torch.as_tensor(labels),
        class_names=tuple(class_names),
    )
    return _draw(image, target, target.names(), min_side)


def _draw(image: NDArray[np.uint8], detections: Detections, texts: list[str], min_side: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    factor = max(1.0, min_side / max(height, width))
    if factor > 1:
        width, height = round(width * factor), round(height * factor)
        image = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
    if not len(detections):
        return image.copy()
    first_on_top = replace(
        detections,
        boxes=detections.boxes.flip(0) * factor,
        scores=detections.scores.flip(0),
        labels=detections.labels.flip(0),
    )
    found = to_supervision(first_on_top)
    scene = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), np.uint8)
    resolution = (width, height)
    thickness = sv.calculate_optimal_line_thickness(resolution)
    text_scale = _fitting_scale(max(_SMALLEST_TEXT, sv.calculate_optimal_text_scale(resolution)), texts, width)
    boxes = sv.BoxAnnotator(color=_PALETTE, thickness=thickness)
    labels = sv.LabelAnnotator(
        color=_PALETTE,
        text_color=_TEXT_PALETTE,
        text_scale=text_scale,
        text_thickness=max(1, thickness // 2),
        text_padding=max(2, round(text_scale * 6)),
        smart_position=len(found) <= _MOST_SPREAD,  # keeps labels inside the image and apart
    )
    scene = labels.annotate(boxes.annotate(scene, found), found, texts[::-1])
    return np.asarray(cv2.cvtColor(scene, cv2.COLOR_BGR2RGB), np.uint8)


def _fitting_scale(scale: float, texts: Sequence[str], width: int) -> float:
    """The scale at which the longest text, with its margins, is no wider than the image; not below 0.3."""
    longest = max(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0] + 12 * scale for text in texts)
    return float(max(min(scale, 0.3), min(scale, scale * width / longest)))


def image_grid(
    images: Sequence[NDArray[np.uint8]], columns: int | None = None, cell: int = 320, gap: int = 4
) -> NDArray[np.uint8]:
    """Lays images of any size side by side, each fitted into a cell with its sides in proportion.

    Args:
        images: uint8 RGB [H, W, 3] each.
        columns: images in a row; by default as many as make the sheet about square.
        cell: longer side of the largest image in the sheet, in pixels.
        gap: pixels between two images.

    Returns:
        uint8 RGB; the cells are as high and wide as the images fitted need, so equal images leave no bands.

    Raises:
        UserError: no image was given, or a number is not positive.
    """
    if not len(images):
        raise UserError("image_grid: no image was given; it needs at least one")
    if cell < 1 or gap < 0 or (columns is not None and columns < 1):
        raise UserError(f"image_grid: columns {columns}, cell {cell} and gap {gap} must be positive")
    columns = min(len(images), columns or int(np.ceil(np.sqrt(len(images)))))
    rows = -(-len(images) // columns)
    fitted = []
    for image in images:
        factor = cell / max(image.shape[:2])
        size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
        if size != (image.shape[1], image.shape[0]):
            method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
            image = np.asarray(cv2.resize(image, size, interpolation=method), np.uint8)
        fitted.append(image)
    cell_height, cell_width = (max(image.shape[axis] for image in fitted) for axis in (0, 1))
    sheet = np.full((rows * (cell_height + gap) - gap, columns * (cell_width + gap) - gap, 3), 24, np.uint8)
    for number, image in enumerate(fitted):
        row, column = divmod(number, columns)
        top = row * (cell_height + gap) + (cell_height - image.shape[0]) // 2
        left = column * (cell_width + gap) + (cell_width - image.shape[1]) // 2
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def draw_frame_rate(image: NDArray[np.uint8], frames_per_second: float) -> NDArray[np.uint8]:
    """A new image with "12.3 frames/s" in its upper left corner, on a dark ground."""
    scale = max(_SMALLEST_TEXT, sv.calculate_optimal_text_scale((image.shape[1], image.shape[0])))
    text, padding = f"{frames_per_second:.1f} frames/s", max(2, round(scale * 8))
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    anchor = sv.Point(padding + width // 2, padding + height // 2)
    return sv.draw_text(
        image.copy(), text, anchor, sv.Color.WHITE, scale, 1, padding, background_color=sv.Color(32, 32, 32)
    )


class Traces:
    """Where tracked objects have been: a line behind each, in the colour of its class.

    Draw it before ``draw_detections``, so that boxes and labels lie on top.

    Args:
        rate: frames a second.
        size: (height, width) of the frames.
        seconds: that a trace goes back.
    """

    def __init__(self, rate: float, size: tuple[int, int], seconds: float = 2.0) -> None:
        self._annotator = sv.TraceAnnotator(
            color=_PALETTE,
            trace_length=max(2, round(rate * seconds)),
            thickness=sv.calculate_optimal_line_thickness((size[1], size[0])),
        )

    def __call__(
        self, image: NDArray[np.uint8], detections: Detections, ids: Sequence[int | None]
    ) -> NDArray[np.uint8]:
        """A new image, uint8 RGB [H, W, 3], with the traces up to this frame; boxes are in its pixels, ids as many."""
        rows = [row for row, number in enumerate(ids) if number is not None]
        chosen = torch.tensor(rows, dtype=torch.int64)
        tracked = to_supervision(
            replace(
                detections,
                boxes=detections.boxes[chosen],
                scores=detections.scores[chosen],
                labels=detections.labels[chosen],
            )
        )
        tracked.tracker_id = np.array([ids[row] for row in rows], np.int64)
        scene = self._annotator.annotate(np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), np.uint8), tracked)
        return np.asarray(cv2.cvtColor(scene, cv2.COLOR_BGR2RGB), np.uint8)


def draw_line(
    image: NDArray[np.uint8], line: tuple[float, float, float, float], counts: Mapping[str, Mapping[str, int]]
) -> NDArray[np.uint8]:
    """A new image with a line and what crossed it: "cat in 3 out 1" for each class, in the lower left corner.

    Args:
        image: uint8 RGB [H, W, 3].
        line: x1, y1, x2, y2 in pixels.
        counts: class name -> {"in": n, "out": n}.
    """
    height, width = image.shape[:2]
    start, end = (round(line[0]), round(line[1])), (round(line[2]), round(line[3]))
    drawn = image.copy()
    cv2.line(drawn, start, end, (255, 255, 255), sv.calculate_optimal_line_thickness((width, height)), cv2.LINE_AA)
    texts = [f"{name} in {count['in']} out {count['out']}" for name, count in sorted(counts.items())] or ["in 0 out 0"]
    for number, text in enumerate(reversed(texts)):
        drawn = _write(drawn, text, number)
    return drawn


def side_by_side(left: NDArray[np.uint8], right: NDArray[np.uint8], names: tuple[str, str]) -> NDArray[np.uint8]:
    """Two images [H, W, 3] of one size as one [H, 2 W, 3], each with its name in the lower left corner."""
    return np.concatenate([_write(left, names[0]), _write(right, names[1])], axis=1)


def _write(image: NDArray[np.uint8], text: str, line: int = 0) -> NDArray[np.uint8]:
    """A new image with a text, white on dark, in the lower left corner, ``line`` lines above it."""
    scale = max(_SMALLEST_TEXT, sv.calculate_optimal_text_scale((image.shape[1], image.shape[0])))
    scale = _fitting_scale(scale, [text], image.shape[1])
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    padding = max(2, round(scale * 8))
    anchor = sv.Point(padding + width // 2, image.shape[0] - padding - height // 2 - line * (height + 2 * padding))
    ground = sv.Color(32, 32, 32)
    return sv.draw_text(image.copy(), text, anchor, sv.Color.WHITE, scale, 1, padding, background_color=ground)

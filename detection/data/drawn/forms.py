"""What the drawn objects look like: six forms, and the pixels that one of them covers."""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

CLASS_NAMES = ("disc", "square", "triangle", "star", "ring", "cross")

_SUBPIXEL_BITS = 4  # cv2.fillPoly takes corners in 1/16 pixel
_FINE = 4  # forms are filled on a grid four times as fine: cv2.fillPoly makes them half a pixel larger on every side


@dataclass(slots=True)
class DrawnObject:
    """How one object looks and where it is.

    Attributes:
        label: index into ``CLASS_NAMES``.
        x, y: centre in pixels.
        side: longer side of its box in pixels.
        angle: rotation in radians.
        stretch: height over width before the rotation.
        colour: RGB in 0..255.
        shade: change of brightness from one side to the other, in 0..255.
        pattern_period: pixels from one stripe to the next; 0 for none.
        outline: brightness added on the edge; 0 for none.
        noise_corner: (row, column) of its grain in the sheet of noise.
    """

    label: int
    x: float
    y: float
    side: float
    angle: float
    stretch: float
    colour: NDArray[np.float32]
    shade: float
    pattern_period: float
    outline: float
    noise_corner: tuple[int, int]


class Mask(NamedTuple):
    """The pixels of one object: ``cover`` float32 [h, w] in 0..1 with its corner at (left, top), inside the image."""

    cover: NDArray[np.float32]
    left: int
    top: int

    @property
    def solid(self) -> NDArray[np.bool_]:
        return self.cover >= 0.5

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.cover.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def box(self) -> tuple[int, int, int, int]:
        """xyxy of the solid pixels."""
        solid = self.solid
        rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        return self.left + columns[0], self.top + rows[0], self.left + columns[-1] + 1, self.top + rows[-1] + 1


def _circle(radius: float, corners: int = 48) -> NDArray[np.float64]:
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _star() -> NDArray[np.float64]:
    turn = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)


def _cross(arm: float = 0.32) -> NDArray[np.float64]:
    corners = [np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])]
    for _ in range(3):  # a quarter turn each: (x, y) -> (-y, x)
        corners.append(np.stack([-corners[-1][:, 1], corners[-1][:, 0]], axis=1))
    return np.concatenate(corners)


# Closed lines around the origin; a point inside two of them is a hole.
_FORMS: dict[str, list[NDArray[np.float64]]] = {
    "disc": [_circle(1.0)],
    "square": [np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])],
    "triangle": [_circle(1.0, corners=3)[:, ::-1] * (1, -1)],  # points up
    "star": [_star()],
    "ring": [_circle(1.0), _circle(0.55)],
    "cross": [_cross()],
}


def draw_mask(drawn: DrawnObject, size: tuple[int, int]) -> Mask | None:
    """The object's pixels in an image of (height, width) ``size``; None where not one is inside."""
    cos, sin = np.cos(drawn.angle), np.sin(drawn.angle)
    turn = np.array([[cos, -sin], [sin, cos]]) * np.array([1.0, drawn.stretch])
    lines = [line @ turn.T for line in _FORMS[CLASS_NAMES[drawn.label]]]
    low, high = lines[0].min(0), lines[0].max(0)
    scale = drawn.side / (high - low).max()
    centre = np.array([drawn.x, drawn.y])
    lines = [(line - (low + high) / 2) * scale + centre for line in lines]

    height, width = size
    left, top = np.maximum(np.floor(lines[0].min(0)).astype(int) - 1, 0)
    right, bottom = np.minimum(np.ceil(lines[0].max(0)).astype(int) + 2, (width, height))
    if left >= right or top >= bottom:
        return None
    fine = np.zeros(((bottom - top) * _FINE, (right - left) * _FINE), np.uint8)
    # -0.5: corners lie on a grid that begins at the edge of the first pixel, OpenCV's at its centre.
    corners = [np.round(((line - (left, top)) * _FINE - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32) for line in lines]
    cv2.fillPoly(fine, corners, 255, cv2.LINE_8, _SUBPIXEL_BITS)
    cover = cv2.resize(fine, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    mask = Mask(cover.astype(np.float32) / np.float32(255), int(left), int(top))
    return mask if mask.solid.any() else None

"""Paint for drawn images: grounds, textures, colours, the look of an object, the camera."""

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from detection.data.drawn.forms import CLASS_NAMES, DrawnObject, Mask

LARGEST_TURN = 0.4  # radians to either side
_NOISE_SIDE = 1024


@cache
def _noise_sheet() -> NDArray[np.float32]:
    """Gaussian noise, the same in every process. Images cut their grain from it: new noise for each is slow."""
    return np.random.default_rng(0).standard_normal((_NOISE_SIDE, _NOISE_SIDE), dtype=np.float32)


def _noise_corner(rng: np.random.Generator, height: int, width: int) -> tuple[int, int]:
    return int(rng.integers(max(1, _NOISE_SIDE - height))), int(rng.integers(max(1, _NOISE_SIDE - width)))


def _noise(corner: tuple[int, int], height: int, width: int) -> NDArray[np.float32]:
    """A piece [height, width] of the sheet with its (row, column) corner; beyond the edge the sheet begins again."""
    top, left = corner
    if top + height <= _NOISE_SIDE and left + width <= _NOISE_SIDE:
        return _noise_sheet()[top : top + height, left : left + width]
    rows, columns = np.arange(top, top + height) % _NOISE_SIDE, np.arange(left, left + width) % _NOISE_SIDE
    return _noise_sheet()[np.ix_(rows, columns)]


def _colour(rng: np.random.Generator) -> NDArray[np.float32]:
    """A random RGB colour; grey ones are as likely as bright ones."""
    return _rgb(rng.uniform(0, 180), rng.uniform(0, 230), rng.uniform(30, 245))


def _colour_of_class(rng: np.random.Generator, label: int) -> NDArray[np.float32]:
    """A random RGB colour near the hue of a class; the ground, a stroke, rarely a neighbouring class may have it too."""
    hue = (label + rng.normal(0, 0.2)) * 180 / len(CLASS_NAMES)
    return _rgb(hue % 180, rng.uniform(90, 230), rng.uniform(90, 245))


def _rgb(hue: float, saturation: float, value: float) -> NDArray[np.float32]:
    """OpenCV's HSV, hue in 0..180 and the others in 0..255, as RGB."""
    pixel = np.array([[[hue, saturation, value]]], np.uint8)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def _ramp(height: int, width: int, angle: float) -> NDArray[np.float32]:
    """[height, width] from about -0.5 to 0.5 along ``angle``."""
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32) * np.float32(np.cos(angle))
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32) * np.float32(np.sin(angle))
    return y[:, None] + x[None, :]


def paint_background(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
    """RGB float32 [H, W, 3] around 0..255: a gradient, noise at several scales, often stripes, strokes and stains."""
    height, width = size
    texture: NDArray[np.float32] = np.zeros((height, width), np.float32)
    for cell, strength in ((2, 5.0), (8, 10.0), (32, 16.0)):
        rows, columns = height // cell + 2, width // cell + 2
        grain = _noise(_noise_corner(rng, rows, columns), rows, columns)
        texture += cv2.resize(grain, (width, height), interpolation=cv2.INTER_LINEAR) * np.float32(
            rng.uniform(0.2, 1.0) * strength
        )
    if rng.random() < 0.35:
        direction, period = rng.uniform(0, np.pi), rng.uniform(6, 40)
        x = np.arange(width, dtype=np.float32) * np.float32(np.cos(direction) / period)
        y = np.arange(height, dtype=np.float32) * np.float32(np.sin(direction) / period)
        waves = np.sin(2 * np.pi * (y[:, None] + x)) * rng.uniform(5, 22)
        texture += waves.astype(np.float32)
    if rng.random() < 0.5:  # stains: soft, without an edge
        stains = np.zeros((height // 4 + 1, width // 4 + 1), np.float32)
        for _ in range(rng.integers(1, 4)):
            centre = int(rng.integers(stains.shape[1])), int(rng.integers(stains.shape[0]))
            axes = tuple(int(a) for a in rng.integers(2, max(3, min(stains.shape) // 4), 2))
            cv2.ellipse(stains, centre, axes, rng.uniform(0, 180), 0, 360, rng.uniform(-60, 60), -1)
        soft = cv2.blur(cv2.blur(stains, (9, 9)), (9, 9))
        texture += np.asarray(cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)

    first, second = _colour(rng), _colour(rng)
    change = (second - first) * np.float32(rng.uniform(0.2, 0.8))
    # RGB = middle colour + ramp * change + texture, in one pass of OpenCV.
    layers = cv2.merge([_ramp(height, width, rng.uniform(0, 2 * np.pi)), texture])
    image = np.asarray(cv2.transform(layers, np.stack([change, np.ones(3), first + change / 2], axis=1)), np.float32)
    _strokes(rng, image)
    return image


def _strokes(rng: np.random.Generator, image: NDArray[np.float32]) -> None:
    """Open thin lines, straight, broken or bent: clutter with edges that is no object."""
    height, width = image.shape[:2]
    for _ in range(rng.integers(0, 5)):
        colour = tuple(float(c) for c in _colour(rng))
        thickness = int(rng.integers(1, 4))
        start = rng.uniform(0, 1, 2) * (width, height)
        reach = rng.uniform(0.08, 0.5) * min(height, width)
        if rng.random() < 0.4:
            sweep = rng.uniform(40, 170)
            angle = rng.uniform(0, 360)
            axes = int(reach / 2) + 2, int(reach / 2 * rng.uniform(0.3, 1)) + 2
            centre = int(start[0]), int(start[1])
            cv2.ellipse(image, centre, axes, angle, 0, sweep, colour, thickness, cv2.LINE_AA)
        else:
            steps = rng.uniform(-1, 1, (int(rng.integers(1, 4)), 2)) * reach
            corners = np.concatenate([start[None], start + np.cumsum(steps, axis=0)]).astype(np.int32)
            cv2.polylines(image, [corners], False, colour, thickness, cv2.LINE_AA)


def paint(image: NDArray[np.float32], mask: Mask, drawn: DrawnObject) -> None:
    """Lay the object over ``image`` [H, W, 3] in place."""
    height, width = mask.cover.shape
    texture = _ramp(height, width, drawn.angle * 3) * np.float32(drawn.shade)
    texture += _noise(drawn.noise_corner, height, width) * np.float32(5)
    if drawn.pattern_period:
        texture += np.sin(_ramp(height, width, drawn.angle) * np.float32(2 * np.pi * width / drawn.pattern_period)) * 18
    if drawn.outline:
        inner = cv2.erode(mask.cover, np.ones((3, 3), np.uint8))
        texture += (mask.cover - inner) * np.float32(drawn.outline)
    window = image[mask.window]
    window += mask.cover[..., None] * (drawn.colour + texture[..., None] - window)


def random_softness(rng: np.random.Generator) -> float:
    """Of a lens, as the standard deviation of its blur in pixels; 0 for a sharp one, which most are."""
    return rng.uniform(0.4, 0.9) if rng.random() < 0.25 else 0.0


def finish(rng: np.random.Generator, image: NDArray[np.float32], softness: float) -> NDArray[np.uint8]:
    """The camera: its lens, some grain, then uint8."""
    height, width = image.shape[:2]
    if softness:
        image = np.asarray(cv2.GaussianBlur(image, (3, 3), softness), np.float32)
    grain = _noise(_noise_corner(rng, height, width), height, width) * np.float32(rng.uniform(1, 6))
    return np.asarray(cv2.add(image, cv2.merge([grain, grain, grain]), dtype=cv2.CV_8U), np.uint8)


def random_object(
    rng: np.random.Generator, label: int, x: float, y: float, side: float, background: NDArray[np.float32]
) -> DrawnObject:
    """An object with a random look. It takes that of four colours which stands out most from the ground below it."""
    row, column = np.clip((y, x), 0, np.array(background.shape[:2]) - 1).astype(int)
    ground = background[row, column]
    colours = np.stack([_colour_of_class(rng, label) for _ in range(4)])
    patch = int(side) + 4
    return DrawnObject(
        label=label,
        x=x,
        y=y,
        side=side,
        angle=rng.uniform(-LARGEST_TURN, LARGEST_TURN),
        stretch=np.exp(rng.uniform(-0.25, 0.25)),
        colour=colours[np.abs(colours - ground).sum(1).argmax()],
        shade=rng.uniform(-70, 70),
        pattern_period=rng.uniform(5, 16) if side > 30 and rng.random() < 0.3 else 0.0,
        outline=rng.choice((-60.0, 60.0)) if rng.random() < 0.4 else 0.0,
        noise_corner=_noise_corner(rng, patch, patch),
    )

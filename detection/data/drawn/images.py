"""Whole drawn images: for detection, for classification, frames of a video."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detection.data.drawn.forms import CLASS_NAMES, DrawnObject, Mask, draw_mask
from detection.data.drawn.painting import finish, paint, paint_background, random_object, random_softness

SMALLEST_SIDE = 12  # pixels, of the longer side of an object's box before it is cut at the border
LARGEST_SHARE = 0.5  # of the shorter side of the image
HIDDEN_AT_MOST = 0.4  # share of an object that others may cover
EMPTY_SHARE = 0.08  # of the images have no object

VIDEO_STREAM = 2  # of random numbers; those of the sets are in sets.py


class DrawnImage(NamedTuple):
    """An image and what is in it.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        boxes: float32 [N, 4], xyxy in pixels, of the whole object also where another covers it, cut at the
            image's border.
        labels: int64 [N], indices into ``CLASS_NAMES``.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


def _visible(masks: list[Mask], size: tuple[int, int]) -> list[float]:
    """Share of each object that is seen, when the masks are painted in their order."""
    covered = np.zeros(size, np.bool_)
    shares = []
    for mask in reversed(masks):
        solid, above = mask.solid, covered[mask.window]
        shares.append(float((solid & ~above).sum() / solid.sum()))
        above |= solid
    return shares[::-1]


def draw_image(rng: np.random.Generator, size: tuple[int, int], max_objects: int = 5) -> DrawnImage:
    """One image of (height, width) ``size`` with 0 to ``max_objects`` objects.

    An object that others would hide by more than 40 % is not drawn at all, so nothing visible lacks its box.
    """
    height, width = size
    image = paint_background(rng, size)
    largest = LARGEST_SHARE * min(size) - 1  # a side of 160.0 touches up to 161 pixels
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, max_objects + 1))
    pairs: list[tuple[DrawnObject, Mask]] = []
    for _ in range(count):
        side = SMALLEST_SIDE * (largest / SMALLEST_SIDE) ** (rng.random() ** 0.7)  # few of the smallest
        reach = side * 0.35  # of its half side of 0.5: some objects are cut at the border
        x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
        drawn = random_object(rng, int(rng.integers(len(CLASS_NAMES))), x, y, side, image)
        if (mask := draw_mask(drawn, size)) is not None:
            pairs.append((drawn, mask))
    while pairs:  # one at a time: what the dropped one hid may be seen again
        visible = _visible([mask for _, mask in pairs], size)
        worst = int(np.argmin(visible))
        if visible[worst] >= 1 - HIDDEN_AT_MOST:
            break
        del pairs[worst]
    for drawn, mask in pairs:
        paint(image, mask, drawn)
    boxes = np.array([mask.box() for _, mask in pairs], np.float32).reshape(-1, 4)
    labels = np.array([drawn.label for drawn, _ in pairs], np.int64)
    return DrawnImage(finish(rng, image, random_softness(rng)), boxes, labels)


def draw_crop(rng: np.random.Generator, label: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A classifier's image, uint8 RGB [H, W, 3]: a whole object of class ``label``, often with part of another."""
    height, width = size
    image = paint_background(rng, size)
    side = rng.uniform(0.4, 0.85) * min(size)
    slack_x, slack_y = (width - side) / 2, (height - side) / 2
    x, y = width / 2 + rng.uniform(-1, 1) * slack_x, height / 2 + rng.uniform(-1, 1) * slack_y
    drawn = [random_object(rng, label, x, y, side, image)]
    if rng.random() < 0.4:  # its centre lies on the border, the object in the middle lies over it
        along, turn = rng.uniform(0, 1), rng.integers(4)
        edge = [
            (along * width, 0.0),
            (along * width, float(height)),
            (0.0, along * height),
            (float(width), along * height),
        ]
        neighbour = int(rng.integers(len(CLASS_NAMES)))
        drawn.insert(0, random_object(rng, neighbour, *edge[turn], side * rng.uniform(0.3, 0.7), image))
    for one in drawn:
        if (mask := draw_mask(one, size)) is not None:
            paint(image, mask, one)
    return finish(rng, image, random_softness(rng))


def draw_video_frames(num_frames: int, size: tuple[int, int], seed: int, num_objects: int = 6) -> Iterator[DrawnImage]:
    """The frames of a video: objects that glide, turn and bounce off the border, over a ground that stands still.

    The boxes of a frame leave out an object while others hide more than 40 % of it.
    """
    rng = np.random.default_rng((seed, VIDEO_STREAM))
    background = paint_background(rng, size)
    softness = random_softness(rng)  # one camera for the whole video
    limits = np.array([size[1], size[0]], np.float64)
    objects, speeds, turns = [], [], []
    for number in range(num_objects):
        side = rng.uniform(0.14, 0.4) * min(size)
        x, y = rng.uniform(side / 2, limits - side / 2)
        objects.append(random_object(rng, number % len(CLASS_NAMES), x, y, side, background))
        heading, pace = rng.uniform(0, 2 * np.pi), rng.uniform(0.005, 0.012) * min(size)
        speeds.append(np.array([np.cos(heading), np.sin(heading)]) * pace)
        turns.append(rng.uniform(-0.005, 0.005))
    for _ in range(num_frames):
        image = background.copy()
        masks = [draw_mask(drawn, size) for drawn in objects]
        pairs = [(drawn, mask) for drawn, mask in zip(objects, masks, strict=True) if mask is not None]
        for drawn, mask in pairs:
            paint(image, mask, drawn)
        visible = _visible([mask for _, mask in pairs], size)
        seen = [pair for pair, share in zip(pairs, visible, strict=True) if share >= 1 - HIDDEN_AT_MOST]
        boxes = np.array([mask.box() for _, mask in seen], np.float32).reshape(-1, 4)
        labels = np.array([drawn.label for drawn, _ in seen], np.int64)
        yield DrawnImage(finish(rng, image, softness), boxes, labels)
        for drawn, speed, turn in zip(objects, speeds, turns, strict=True):
            place, half = np.array([drawn.x, drawn.y]) + speed, drawn.side / 2
            speed[place < half] = np.abs(speed[place < half])
            speed[place > limits - half] = -np.abs(speed[place > limits - half])
            drawn.x, drawn.y = place
            drawn.angle += turn

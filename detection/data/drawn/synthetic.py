"""Images with known objects, drawn: a detection set, a classification set, the frames of a video. No download.

Six kinds of objects that differ in form, and in the hue that each kind likes: something to learn from in minutes. Size,
rotation (a little to either side), stretch, saturation, brightness, shading and texture are drawn at random. They lie on
textured backgrounds of any hue, with strokes and stains that are no object.

Everything depends on the seed alone: image i of a set is the same however many images are drawn before it.

The boxes are measured on the drawn masks: x1, y1 is the first pixel of the object, x2, y2 one past its last.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError

_Result = TypeVar("_Result")

CLASS_NAMES = ("disc", "square", "triangle", "star", "ring", "cross")

SMALLEST_SIDE = 12  # pixels, of the longer side of an object's box before it is cut at the border
LARGEST_SHARE = 0.5  # of the shorter side of the image
LARGEST_TURN = 0.4  # radians to either side
HIDDEN_AT_MOST = 0.4  # share of an object that others may cover
EMPTY_SHARE = 0.08  # of the images have no object

_TRAIN, _VAL, _VIDEO = range(3)  # streams of random numbers that never meet
_SUBPIXEL_BITS = 4  # cv2.fillPoly takes corners in 1/16 pixel
_FINE = 4  # forms are filled on a grid four times as fine: cv2.fillPoly makes them half a pixel larger on every side


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


class DetectionSet(NamedTuple):
    """Where a drawn detection set lies: COCO json files and the folders of their images."""

    train_annotations: Path
    train_images: Path
    val_annotations: Path
    val_images: Path


@dataclass(slots=True)
class _Object:
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


class _Mask(NamedTuple):
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


# ---------------------------------------------------------------------------------------------------------------- forms


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


def _mask(drawn: _Object, size: tuple[int, int]) -> _Mask | None:
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
    mask = _Mask(cover.astype(np.float32) / np.float32(255), int(left), int(top))
    return mask if mask.solid.any() else None


# ------------------------------------------------------------------------------------------------------------- painting


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


def _background(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
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


def _paint(image: NDArray[np.float32], mask: _Mask, drawn: _Object) -> None:
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


def _softness(rng: np.random.Generator) -> float:
    """Of a lens, as the standard deviation of its blur in pixels; 0 for a sharp one, which most are."""
    return rng.uniform(0.4, 0.9) if rng.random() < 0.25 else 0.0


def _finish(rng: np.random.Generator, image: NDArray[np.float32], softness: float) -> NDArray[np.uint8]:
    """The camera: its lens, some grain, then uint8."""
    height, width = image.shape[:2]
    if softness:
        image = np.asarray(cv2.GaussianBlur(image, (3, 3), softness), np.float32)
    grain = _noise(_noise_corner(rng, height, width), height, width) * np.float32(rng.uniform(1, 6))
    return np.asarray(cv2.add(image, cv2.merge([grain, grain, grain]), dtype=cv2.CV_8U), np.uint8)


def _random_object(
    rng: np.random.Generator, label: int, x: float, y: float, side: float, background: NDArray[np.float32]
) -> _Object:
    """An object with a random look. It takes that of four colours which stands out most from the ground below it."""
    row, column = np.clip((y, x), 0, np.array(background.shape[:2]) - 1).astype(int)
    ground = background[row, column]
    colours = np.stack([_colour_of_class(rng, label) for _ in range(4)])
    patch = int(side) + 4
    return _Object(
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


# ------------------------------------------------------------------------------------------------------------- images


def _visible(masks: list[_Mask], size: tuple[int, int]) -> list[float]:
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
    image = _background(rng, size)
    largest = LARGEST_SHARE * min(size) - 1  # a side of 160.0 touches up to 161 pixels
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, max_objects + 1))
    pairs: list[tuple[_Object, _Mask]] = []
    for _ in range(count):
        side = SMALLEST_SIDE * (largest / SMALLEST_SIDE) ** (rng.random() ** 0.7)  # few of the smallest
        reach = side * 0.35  # of its half side of 0.5: some objects are cut at the border
        x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
        drawn = _random_object(rng, int(rng.integers(len(CLASS_NAMES))), x, y, side, image)
        if (mask := _mask(drawn, size)) is not None:
            pairs.append((drawn, mask))
    while pairs:  # one at a time: what the dropped one hid may be seen again
        visible = _visible([mask for _, mask in pairs], size)
        worst = int(np.argmin(visible))
        if visible[worst] >= 1 - HIDDEN_AT_MOST:
            break
        del pairs[worst]
    for drawn, mask in pairs:
        _paint(image, mask, drawn)
    boxes = np.array([mask.box() for _, mask in pairs], np.float32).reshape(-1, 4)
    labels = np.array([drawn.label for drawn, _ in pairs], np.int64)
    return DrawnImage(_finish(rng, image, _softness(rng)), boxes, labels)


def draw_crop(rng: np.random.Generator, label: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A classifier's image, uint8 RGB [H, W, 3]: a whole object of class ``label``, often with part of another."""
    height, width = size
    image = _background(rng, size)
    side = rng.uniform(0.4, 0.85) * min(size)
    slack_x, slack_y = (width - side) / 2, (height - side) / 2
    x, y = width / 2 + rng.uniform(-1, 1) * slack_x, height / 2 + rng.uniform(-1, 1) * slack_y
    drawn = [_random_object(rng, label, x, y, side, image)]
    if rng.random() < 0.4:  # its centre lies on the border, the object in the middle lies over it
        along, turn = rng.uniform(0, 1), rng.integers(4)
        edge = [
            (along * width, 0.0),
            (along * width, float(height)),
            (0.0, along * height),
            (float(width), along * height),
        ]
        neighbour = int(rng.integers(len(CLASS_NAMES)))
        drawn.insert(0, _random_object(rng, neighbour, *edge[turn], side * rng.uniform(0.3, 0.7), image))
    for one in drawn:
        if (mask := _mask(one, size)) is not None:
            _paint(image, mask, one)
    return _finish(rng, image, _softness(rng))


def draw_video_frames(num_frames: int, size: tuple[int, int], seed: int, num_objects: int = 6) -> Iterator[DrawnImage]:
    """The frames of a video: objects that glide, turn and bounce off the border, over a ground that stands still.

    The boxes of a frame leave out an object while others hide more than 40 % of it.
    """
    rng = np.random.default_rng((seed, _VIDEO))
    background = _background(rng, size)
    softness = _softness(rng)  # one camera for the whole video
    limits = np.array([size[1], size[0]], np.float64)
    objects, speeds, turns = [], [], []
    for number in range(num_objects):
        side = rng.uniform(0.14, 0.4) * min(size)
        x, y = rng.uniform(side / 2, limits - side / 2)
        objects.append(_random_object(rng, number % len(CLASS_NAMES), x, y, side, background))
        heading, pace = rng.uniform(0, 2 * np.pi), rng.uniform(0.005, 0.012) * min(size)
        speeds.append(np.array([np.cos(heading), np.sin(heading)]) * pace)
        turns.append(rng.uniform(-0.005, 0.005))
    for _ in range(num_frames):
        image = background.copy()
        masks = [_mask(drawn, size) for drawn in objects]
        pairs = [(drawn, mask) for drawn, mask in zip(objects, masks, strict=True) if mask is not None]
        for drawn, mask in pairs:
            _paint(image, mask, drawn)
        visible = _visible([mask for _, mask in pairs], size)
        seen = [pair for pair, share in zip(pairs, visible, strict=True) if share >= 1 - HIDDEN_AT_MOST]
        boxes = np.array([mask.box() for _, mask in seen], np.float32).reshape(-1, 4)
        labels = np.array([drawn.label for drawn, _ in seen], np.int64)
        yield DrawnImage(_finish(rng, image, softness), boxes, labels)
        for drawn, speed, turn in zip(objects, speeds, turns, strict=True):
            place, half = np.array([drawn.x, drawn.y]) + speed, drawn.side / 2
            speed[place < half] = np.abs(speed[place < half])
            speed[place > limits - half] = -np.abs(speed[place > limits - half])
            drawn.x, drawn.y = place
            drawn.angle += turn


# ----------------------------------------------------------------------------------------------------------------- sets


def _write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise OSError(f"{path}: the image could not be written (is the disk full, the folder read-only?)")


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < 2 * SMALLEST_SIDE + 8:
        raise UserError(
            f"size {size}: images need at least {2 * SMALLEST_SIDE + 8} pixels a side for objects of {SMALLEST_SIDE}"
        )


def _in_threads(work: Callable[[int], _Result], count: int) -> list[_Result]:
    # OpenCV and numpy let go of the interpreter lock while they draw.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(work, range(count)))


def _draw_split(
    annotations: Path, images: Path, num_images: int, size: tuple[int, int], stream: tuple[int, int]
) -> None:
    images.mkdir(parents=True, exist_ok=True)

    def draw(number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        image = draw_image(np.random.default_rng((*stream, number)), size)
        _write_jpeg(images / f"{number:06d}.jpg", image.image)
        return image.boxes, image.labels

    records: list[dict[str, object]] = []
    for number, (boxes, labels) in enumerate(_in_threads(draw, num_images)):
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            width, height = x2 - x1, y2 - y1
            records.append(
                {
                    "id": len(records) + 1,
                    "image_id": number + 1,
                    "category_id": label + 1,
                    "bbox": [x1, y1, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    image_records = [
        {"id": number + 1, "file_name": f"{number:06d}.jpg", "height": size[0], "width": size[1]}
        for number in range(num_images)
    ]
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)]
    annotations.write_text(json.dumps({"images": image_records, "annotations": records, "categories": categories}))


def draw_detection_set(
    out_dir: Path, num_train: int, num_val: int, size: tuple[int, int] = (320, 320), seed: int = 0
) -> DetectionSet:
    """Draws ``out_dir``/train.json, train/*.jpg, val.json and val/*.jpg.

    Args:
        out_dir: made if it is not there; files of the same names are replaced.
        num_train: number of images to train on.
        num_val: number of images to evaluate on; none of them is in the first part.
        size: (height, width) of every image.
        seed: the same seed gives the same files, byte for byte, with the same OpenCV and numpy.

    Raises:
        UserError: the size leaves no room for the smallest object.
        OSError: a file could not be written.
    """
    _check_size(size)
    found = DetectionSet(out_dir / "train.json", out_dir / "train", out_dir / "val.json", out_dir / "val")
    _draw_split(found.train_annotations, found.train_images, num_train, size, (seed, _TRAIN))
    _draw_split(found.val_annotations, found.val_images, num_val, size, (seed, _VAL))
    return found


def draw_classification_set(
    out_dir: Path, num_train: int, num_val: int, size: tuple[int, int] = (96, 96), seed: int = 0
) -> tuple[Path, Path]:
    """Draws ``out_dir``/train/CLASS/*.jpg and ``out_dir``/val/CLASS/*.jpg, torchvision's ImageFolder layout.

    Args:
        out_dir: made if it is not there; files of the same names are replaced.
        num_train: number of images of each class to train on.
        num_val: number of images of each class to evaluate on.
        size: (height, width) of every image.
        seed: the same seed gives the same files.

    Returns:
        The two folders.

    Raises:
        UserError: the size leaves no room for an object.
        OSError: a file could not be written.
    """
    _check_size(size)
    folders = out_dir / "train", out_dir / "val"
    for folder, num_images, stream in zip(folders, (num_train, num_val), (_TRAIN, _VAL), strict=True):
        for label, name in enumerate(CLASS_NAMES):
            class_dir = folder / name
            class_dir.mkdir(parents=True, exist_ok=True)

            def draw(number: int, label: int = label, class_dir: Path = class_dir, stream: int = stream) -> None:
                rng = np.random.default_rng((seed, stream, label, number))
                _write_jpeg(class_dir / f"{number:06d}.jpg", draw_crop(rng, label, size))

            _in_threads(draw, num_images)
    return folders

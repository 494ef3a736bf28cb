"""From an image on disk and its objects to a training sample, and to an evaluation sample.

A training sample is one rectangle of its image, the *view*. Expanding, cropping and the aspect ratio all come down
to which view is taken, so they are decided first, from the boxes and the image's size alone, before a single pixel
is decoded. A view several times larger than the network's input is then decoded at 1/2, 1/4 or 1/8 of its size
(libjpeg does that at a fraction of the cost), cut out, filled where it sticks out of the image, and resized once.
Colours change last, on the small result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError
from detection.data.colors import random_colors
from detection.images.place import place, resize, resize_as_tensorflow
from detection.structures import Placement, ResizeMode

Decode = Callable[[int], NDArray[np.uint8]]
"""Gives the image on disk, RGB uint8, each side divided by a reduction of 1, 2, 4 or 8 and rounded up."""

_NUM_TRIALS = 50  # views drawn at once for one overlap; SSD's original draws as many before it gives up


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """How a training sample differs from its image. The defaults change nothing at all."""

    expand_probability: float = 0.0
    """How often the image is laid on a larger canvas, so that its objects become smaller."""
    expand_max_scale: float = 4.0
    """The largest canvas, as a multiple of the image's width and height."""
    crop_probability: float = 0.0
    """How often a part of the image (or canvas) is cut out."""
    crop_min_overlaps: tuple[float, ...] = (0.0,)
    """One is drawn for each crop: the intersection over union that the crop must have with at least one object whose
    centre it holds. 0 asks for such an object alone. Where objects are small, larger values leave hardly any crop."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Width and height of the crop, each as a share of the whole, drawn uniformly."""
    crop_aspect: tuple[float, float] = (0.5, 2.0)
    """Width over height of the crop, in pixels, at least and at most."""
    horizontal_flip: float = 0.0
    """Probability of swapping left and right."""
    vertical_flip: float = 0.0
    """Probability of swapping top and bottom, for images that have no upper side (cells, satellites)."""
    quarter_turns: float = 0.0
    """Probability of turning the sample by 90, 180 or 270 degrees, for images that have no upper side."""
    brightness: float = 0.0
    """Brightness changes by up to this share of white, up or down."""
    contrast: float = 0.0
    """Contrast is multiplied by 1 - contrast to 1 + contrast."""
    saturation: float = 0.0
    """Saturation is multiplied by 1 - saturation to 1 + saturation."""
    hue: float = 0.0
    """Hue turns by up to this share of the colour circle, either way (at most 0.5)."""
    color_probability: float = 0.5
    """How often brightness and contrast change, and, drawn apart, saturation and hue."""
    channel_shuffle: float = 0.0
    """Probability of swapping the colour channels."""
    min_visible: float = 0.0
    """An object is dropped when less than this share of its area is left in the sample."""
    min_size: float = 1.0
    """An object is dropped when its width or height in the sample is below this many pixels."""

    def validate(self) -> None:
        """Refuse values that have no meaning.

        Raises:
            UserError: names the field, what it holds and what it may hold.
        """
        for name in (
            "expand_probability",
            "crop_probability",
            "horizontal_flip",
            "vertical_flip",
            "quarter_turns",
            "brightness",
            "contrast",
            "saturation",
            "color_probability",
            "channel_shuffle",
            "min_visible",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} is {getattr(self, name)}; it lies between 0 and 1")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"augment.hue is {self.hue}; it lies between 0 and 0.5")
        if not self.expand_max_scale >= 1:
            raise UserError(f"augment.expand_max_scale is {self.expand_max_scale}; it is at least 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"augment.crop_scale is {self.crop_scale}; two numbers with 0 < first <= second <= 1")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise UserError(f"augment.crop_aspect is {self.crop_aspect}; two numbers with 0 < first <= second")
        if not self.crop_min_overlaps or not all(0 <= overlap < 1 for overlap in self.crop_min_overlaps):
            raise UserError(f"augment.crop_min_overlaps is {self.crop_min_overlaps}; one or more numbers in 0 <= x < 1")
        if not self.min_size > 0:
            raise UserError(f"augment.min_size is {self.min_size}; it is above 0 pixels")


def ssd_augment() -> AugmentConfig:
    """SSD's own augmentation (arXiv 1512.02325, section 2.2 and 3.6): colours, expansion, crops of a minimum overlap,
    flip.

    The paper draws one of seven: the whole image, a crop with an overlap of 0.1, 0.3, 0.5, 0.7 or 0.9, any crop.
    "Any" means here that at least one object's centre is inside.
    """
    return AugmentConfig(
        expand_probability=0.5,
        expand_max_scale=4.0,
        crop_probability=6 / 7,
        crop_min_overlaps=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9),
        crop_scale=(0.3, 1.0),
        crop_aspect=(0.5, 2.0),
        horizontal_flip=0.5,
        brightness=32 / 255,
        contrast=0.5,
        saturation=0.5,
        hue=18 / 360,
        color_probability=0.5,
        channel_shuffle=0.0,
    )


def finetune_augment() -> AugmentConfig:
    """Milder changes, for a few hundred images and a short training: objects keep about the size they are found at."""
    return AugmentConfig(
        expand_probability=0.3,
        expand_max_scale=1.5,
        crop_probability=0.7,
        crop_min_overlaps=(0.0,),
        crop_scale=(0.6, 1.0),
        crop_aspect=(0.5, 2.0),
        horizontal_flip=0.5,
        brightness=0.1,
        contrast=0.1,
        saturation=0.1,
        hue=0.02,
        color_probability=0.5,
        min_visible=0.3,
    )


class Placed(NamedTuple):
    """An image at the network's input size, with what lies in it.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        boxes: float32 [N, 4], xyxy in pixels of ``image``, inside it and not empty.
        labels: int64 [N].
        placement: where the image on disk lies in ``image``, before any flip or turn.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    placement: Placement


class TrainTransform:
    """A random view of an image, with its objects.

    Everything that is drawn depends on (seed, epoch, index) alone, so a sample is the same whichever process makes it.

    Args:
        config: what may change, and how much.
        input_size: (height, width) of the sample.
        resize_mode: "stretch" a view to the input size, or "letterbox": widen the view to the input's aspect ratio
            first. "stretch_tensorflow" takes TensorFlow's pixels of a view, from the image at full size: what a smaller
            decoding averages away, evaluation will show.
        fill: RGB where a view sticks out of its image; best the network's mean colour, which becomes zero there.
        seed: of the training.

    Raises:
        UserError: the config holds a value without meaning.
    """

    def __init__(
        self,
        config: AugmentConfig,
        input_size: tuple[int, int],
        *,
        resize_mode: ResizeMode = "stretch",
        fill: tuple[int, int, int] = (124, 116, 104),
        seed: int = 0,
    ) -> None:
        config.validate()
        self.config = config
        self.input_size = input_size
        self.resize_mode = resize_mode
        self.fill = fill
        self.seed = seed

    def __call__(
        self,
        decode: Decode,
        size: tuple[int, int],
        boxes: NDArray[np.float32],
        labels: NDArray[np.int64],
        epoch: int,
        index: int,
    ) -> Placed:
        """Draw the sample that (seed, epoch, index) stands for.

        Args:
            decode: gives the image.
            size: (height, width) of the image at full size.
            boxes: float32 [N, 4], xyxy in pixels of the image at full size.
            labels: int64 [N].
            epoch, index: with the seed they fix everything that is drawn.
        """
        config, rng = self.config, np.random.default_rng((self.seed, epoch, index))
        view = _draw_view(rng, config, size, boxes)
        turns = int(rng.integers(1, 4)) if rng.random() < config.quarter_turns else 0
        mirrored, flipped = rng.random() < config.horizontal_flip, rng.random() < config.vertical_flip
        color_seed = int(rng.integers(2**31))

        height, width = self.input_size if turns % 2 == 0 else self.input_size[::-1]
        if self.resize_mode == "letterbox":
            view = _widen(view, width / height)
        as_tensorflow = self.resize_mode == "stretch_tensorflow"
        reduction = 1 if as_tensorflow else _reduction(view, (height, width))
        x1, y1, x2, y2 = edges = _snap(view, reduction)
        seen = _cut(decode(reduction), [edge // reduction for edge in edges], self.fill)
        image = (resize_as_tensorflow if as_tensorflow else resize)(seen, (height, width))
        scale_x, scale_y = width / (x2 - x1), height / (y2 - y1)
        placement = Placement(scale_x, scale_y, -x1 * scale_x, -y1 * scale_y)
        boxes, labels = _place_objects(boxes, labels, placement, (height, width), config)

        if mirrored:
            image, boxes = image[:, ::-1], _mirror(boxes, width)
        if flipped:
            image, boxes = image[::-1], _mirror(boxes[:, [1, 0, 3, 2]], height)[:, [1, 0, 3, 2]]
        if turns:
            image, boxes = np.rot90(image, turns), _turn(boxes, (height, width), turns)
        image = np.ascontiguousarray(image)
        image = random_colors(
            image,
            np.random.default_rng(color_seed),
            amounts=(config.brightness, config.contrast, config.saturation, config.hue),
            probability=config.color_probability,
            shuffle_probability=config.channel_shuffle,
        )
        return Placed(image, np.ascontiguousarray(boxes), labels, placement)


class EvalTransform:
    """The whole image at the network's input size, exactly as the predictor places it.

    Args:
        input_size: (height, width) of the sample.
        resize_mode: see ``place``.
        fill: RGB of the bars beside a letterboxed image.
    """

    def __init__(
        self,
        input_size: tuple[int, int],
        *,
        resize_mode: ResizeMode = "stretch",
        fill: tuple[int, int, int] = (124, 116, 104),
    ) -> None:
        self.input_size = input_size
        self.resize_mode = resize_mode
        self.fill = fill

    def __call__(
        self,
        decode: Decode,
        size: tuple[int, int],
        boxes: NDArray[np.float32],
        labels: NDArray[np.int64],
        epoch: int,
        index: int,
    ) -> Placed:
        """See ``TrainTransform.__call__``; nothing is drawn here, and every object stays that has some area inside."""
        image, placement = place(decode(1), self.input_size, self.resize_mode, self.fill)
        boxes, labels = _place_objects(boxes, labels, placement, self.input_size, None)
        return Placed(image, boxes, labels, placement)


# ------------------------------------------------------------------------------------------------------------- geometry


def _draw_view(
    rng: np.random.Generator, config: AugmentConfig, size: tuple[int, int], boxes: NDArray[np.float32]
) -> NDArray[np.float64]:
    """A rectangle, xyxy in pixels of the image; it may stick out of it."""
    height, width = size
    x, y, w, h = 0.0, 0.0, float(width), float(height)
    if rng.random() < config.expand_probability:
        scale = rng.uniform(1, config.expand_max_scale)
        x, y = -rng.random() * (scale - 1) * width, -rng.random() * (scale - 1) * height
        w, h = scale * width, scale * height
    whole = np.array([x, y, x + w, y + h])
    if rng.random() >= config.crop_probability:
        return whole

    # An image without objects is treated as one large object, so that a view never shows the filled canvas alone.
    objects = boxes.astype(np.float64) if len(boxes) else np.array([[0, 0, width, height]], np.float64)
    for min_overlap in rng.permutation(config.crop_min_overlaps):
        sides = rng.uniform(*config.crop_scale, (_NUM_TRIALS, 2)) * (w, h)
        corner = rng.random((_NUM_TRIALS, 2)) * ((w, h) - sides) + (x, y)
        views = np.concatenate([corner, corner + sides], axis=1)
        good = (sides[:, 0] >= config.crop_aspect[0] * sides[:, 1]) & (
            sides[:, 0] <= config.crop_aspect[1] * sides[:, 1]
        )
        good &= (_overlaps_of_held(views, objects) >= min_overlap).any(axis=1)
        if good.any():
            return views[good.argmax()]
    return whole


def _overlaps_of_held(views: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union [V, N] of each view with each box whose centre it holds, -1 for the others."""
    top_left = np.maximum(views[:, None, :2], boxes[None, :, :2])
    bottom_right = np.minimum(views[:, None, 2:], boxes[None, :, 2:])
    intersection = (bottom_right - top_left).clip(min=0).prod(axis=2)
    view_areas, box_areas = (views[:, 2:] - views[:, :2]).prod(axis=1), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    union = view_areas[:, None] + box_areas - intersection
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    held = ((centre > views[:, None, :2]) & (centre < views[:, None, 2:])).all(axis=2)
    return np.where(held, intersection / union, -1)


def _widen(view: NDArray[np.float64], aspect: float) -> NDArray[np.float64]:
    """The smallest rectangle of this width over height around the view, with the same centre."""
    width, height = view[2] - view[0], view[3] - view[1]
    more = np.array([max(height * aspect - width, 0), max(width / aspect - height, 0)]) / 2
    return view + np.concatenate([-more, more])


def _reduction(view: NDArray[np.float64], size: tuple[int, int]) -> int:
    """The largest of 8, 4, 2, 1 that leaves the view at least as large as the sample."""
    shrink = min((view[2] - view[0]) / size[1], (view[3] - view[1]) / size[0])
    return next((reduction for reduction in (8, 4, 2) if shrink >= reduction), 1)


def _snap(view: NDArray[np.float64], reduction: int) -> list[int]:
    """The view with its edges on whole pixels of the reduced image, so that boxes and pixels move alike."""
    x1, y1, x2, y2 = (round(edge / reduction) for edge in view.tolist())
    return [x1 * reduction, y1 * reduction, max(x2, x1 + 1) * reduction, max(y2, y1 + 1) * reduction]


def _cut(image: NDArray[np.uint8], view: list[int], fill: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The part of the image that the view covers, with the fill colour where there is no image."""
    (x1, y1, x2, y2), (height, width) = view, image.shape[:2]
    left, top, right, bottom = max(-x1, 0), max(-y1, 0), max(x2 - width, 0), max(y2 - height, 0)
    inside = image[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
    if not (left or top or right or bottom):
        return inside
    if not inside.size:
        return np.full((y2 - y1, x2 - x1, 3), fill, np.uint8)
    filled = cv2.copyMakeBorder(inside, top, bottom, left, right, cv2.BORDER_CONSTANT, value=fill)
    return np.asarray(filled, np.uint8)


def _place_objects(
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    placement: Placement,
    size: tuple[int, int],
    config: AugmentConfig | None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes in pixels of the sample, cut off at its edges. With a config those go that it does not want.

    SSD (section 2.2) keeps an object whose centre lies in the sample.
    """
    height, width = size
    limits = np.array([width, height, width, height], np.float64)
    moved = boxes * np.array(placement[:2] * 2) + np.array(placement[2:] * 2)
    clipped = moved.clip(0, limits)
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = (sides > 0).all(axis=1)
    if config is not None:
        centre = (moved[:, :2] + moved[:, 2:]) / 2
        keep &= ((centre > 0) & (centre < limits[:2])).all(axis=1) & (sides >= config.min_size).all(axis=1)
        keep &= sides.prod(axis=1) >= config.min_visible * (moved[:, 2:] - moved[:, :2]).prod(axis=1)
    return clipped[keep].astype(np.float32), labels[keep]


def _mirror(boxes: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    mirrored = boxes.copy()
    mirrored[:, 0], mirrored[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    return mirrored


def _turn(boxes: NDArray[np.float32], size: tuple[int, int], turns: int) -> NDArray[np.float32]:
    """Boxes after ``np.rot90(image, turns)``: quarter turns against the clock of an image of this (height, width)."""
    height, width = size
    for _ in range(turns):
        boxes = _mirror(boxes, width)[:, [1, 0, 3, 2]]
        height, width = width, height
    return boxes

"""Random colours on RGB uint8 images, by OpenCV's lookup tables. Each operator is a function of its amounts alone."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""Uint8 [H, W, 3], RGB."""


def brightness_contrast(image: Image, brightness: float, contrast: float) -> Image:
    """Multiplies by 1 + ``contrast`` and adds ``brightness`` as a share of white; cut off at black and white."""
    table = np.arange(256) * (1 + contrast) + 255 * brightness
    return np.asarray(cv2.LUT(image, table.round().clip(0, 255).astype(np.uint8)), np.uint8)


def saturation(image: Image, factor: float) -> Image:
    """Goes from the image's grey (0) through itself (1) to stronger colours (above 1)."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(cv2.addWeighted(image, factor, grey, 1 - factor, 0), np.uint8)


def hue(image: Image, turn: float) -> Image:
    """Turns the hue by this share of the colour circle."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)  # hue in 0 .. 179
    table = ((np.arange(256) + 180 * turn) % 180).astype(np.uint8)
    hsv[..., 0] = cv2.LUT(hsv[..., 0], table)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def random_colors(
    image: Image,
    rng: np.random.Generator,
    *,
    amounts: tuple[float, float, float, float],
    probability: float,
    shuffle_probability: float,
) -> Image:
    """Changes brightness and contrast, saturation and hue, and the order of the channels, each with its probability.

    Args:
        image: left as it is; the result may be the same array.
        rng: where all that is random comes from. It is asked for the same numbers whatever happens.
        amounts: the largest change of brightness (a share of white), contrast, saturation (shares of themselves) and hue
            (a share of the colour circle).
        probability: of the first two together, and of the next two together.
        shuffle_probability: of another order of the channels.
    """
    chances = rng.random(3)
    brighter, contrast, colorful, turn = rng.uniform(-1, 1, 4) * amounts
    hue_first, channels = rng.random() < 0.5, rng.permutation(3)
    if chances[0] < probability and (amounts[0] or amounts[1]):
        image = brightness_contrast(image, brighter, contrast)
    if chances[1] < probability and (amounts[2] or amounts[3]):
        steps: list[Callable[[Image], Image]] = []
        if amounts[2]:
            steps.append(lambda image: saturation(image, 1 + colorful))
        if amounts[3]:
            steps.append(lambda image: hue(image, turn))
        for step in reversed(steps) if hue_first else steps:
            image = step(image)
    if chances[2] < shuffle_probability:
        image = np.ascontiguousarray(image[..., channels])
    return image

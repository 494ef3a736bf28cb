"""An image at the network's input size: one function for evaluation, prediction and video, so that all see the same pixels."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from detection.structures import Placement, ResizeMode


def resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize uint8 [H, W, 3] to (height, width).

    Bilinear up to a shrinkage of two: there every pixel of the image still has a share in the result, and averaging
    over areas takes five times as long (1.1 against 0.2 ms from 640x480 to 320x320, more than decoding the JPEG).
    Beyond two, where bilinear sampling would skip pixels, averaging over areas.
    """
    height, width = size
    if image.shape[:2] == size:
        return image
    skips = image.shape[0] > 2 * height or image.shape[1] > 2 * width
    interpolation = cv2.INTER_AREA if skips else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), np.uint8)


def resize_as_tensorflow(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize uint8 [H, W, 3] to (height, width) with TensorFlow 1's bilinear sampling (``align_corners=False``).

    Pixel i of the result is the image at i * H / height: not at the middle of the pixel, and without averaging where the
    image shrinks. Networks trained so have learnt both. OpenCV 4 rounds these places to 32nds of a pixel: some levels beside
    TensorFlow's at sharp edges, where OpenCV 5 is within one.
    """
    height, width = size
    if image.shape[:2] == size:
        return image
    to_image = np.array([[image.shape[1] / width, 0, 0], [0, image.shape[0] / height, 0]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    resized = cv2.warpAffine(image, to_image, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(resized, np.uint8)


def place(
    image: NDArray[np.uint8],
    input_size: tuple[int, int],
    resize_mode: ResizeMode,
    fill: tuple[int, int, int],
) -> tuple[NDArray[np.uint8], Placement]:
    """Bring an image to the network's input size.

    Args:
        image: uint8 [H, W, 3], RGB.
        input_size: (height, width).
        resize_mode: "stretch" gives up the aspect ratio; "letterbox" keeps it and puts bars of equal width on two
            sides; "stretch_tensorflow" is "stretch" with the pixels that TensorFlow 1 gives (``resize_as_tensorflow``).
        fill: RGB of the bars.

    Returns:
        The image, uint8 [height, width, 3], and where the original lies in it.
    """
    (height, width), (input_height, input_width) = image.shape[:2], input_size
    if resize_mode == "stretch":
        return resize(image, input_size), Placement(input_width / width, input_height / height, 0.0, 0.0)
    if resize_mode == "stretch_tensorflow":
        return resize_as_tensorflow(image, input_size), Placement(input_width / width, input_height / height, 0.0, 0.0)
    scale = min(input_width / width, input_height / height)
    new_width, new_height = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (input_width - new_width) // 2, (input_height - new_height) // 2
    canvas = np.full((input_height, input_width, 3), fill, np.uint8)
    canvas[top : top + new_height, left : left + new_width] = resize(image, (new_height, new_width))
    return canvas, Placement(new_width / width, new_height / height, float(left), float(top))

from dataclasses import replace
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from detection.data.augment import (
    AugmentConfig,
    EvalTransform,
    Placed,
    TrainTransform,
    finetune_augment,
    ssd_augment,
)
from detection.images.place import place, resize

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]], np.uint8)
NO_BOXES = np.zeros((0, 4), np.float32)
NO_LABELS = np.zeros(0, np.int64)
PLAIN = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def draw(size: tuple[int, int], seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    """A dark image with up to six rectangles that do not touch, each in the colour of its label."""
    rng, (height, width) = np.random.default_rng(seed), size
    image = np.zeros((height, width, 3), np.uint8)
    boxes = []
    for cell in range(6):  # a grid of 3 x 2 keeps them apart
        left, top = (cell % 3) * width // 3, (cell // 3) * height // 2
        w, h = rng.integers(width // 8, width // 4), rng.integers(height // 6, height // 3)
        x, y = left + 8 + rng.integers(width // 24), top + 8 + rng.integers(height // 24)
        image[y : y + h, x : x + w] = COLORS[cell]
        boxes.append((x, y, x + w, y + h))
    return image, np.array(boxes, np.float32), np.arange(6)


def decoder(image: NDArray[np.uint8]) -> Any:
    """What a scaled JPEG decoder gives: each pixel the mean of a block, the last one of a part of it."""

    def decode(reduction: int) -> NDArray[np.uint8]:
        height, width = image.shape[:2]
        padded = cv2.copyMakeBorder(image, 0, -height % reduction, 0, -width % reduction, cv2.BORDER_REPLICATE)
        width, height = padded.shape[1] // reduction, padded.shape[0] // reduction
        return np.asarray(cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA), np.uint8)

    return decode


def check_fit(placed: Placed, tolerance: float) -> None:
    """Every box has its label's colour inside, and other colours outside, to within the tolerance."""
    height, width = placed.image.shape[:2]
    for box, label in zip(placed.boxes, placed.labels, strict=True):
        mask = (np.abs(placed.image.astype(int) - COLORS[label]) < 100).all(axis=2)
        x1, y1, x2, y2 = box.tolist()
        assert mask[int((y1 + y2) / 2), int((x1 + x2) / 2)], f"the centre of {box} is not of label {label}"
        ys, xs = np.nonzero(mask)
        seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(seen - box).max() <= tolerance, f"label {label}: pixels {seen}, box {box} of {width}x{height}"


def check_valid(placed: Placed, input_size: tuple[int, int]) -> None:
    height, width = input_size
    assert placed.image.shape == (height, width, 3)
    assert placed.image.dtype == np.uint8
    assert placed.image.flags.c_contiguous
    assert placed.boxes.dtype == np.float32
    assert placed.labels.dtype == np.int64
    assert placed.boxes.shape == (len(placed.labels), 4)
    assert (placed.boxes >= 0).all()
    assert (placed.boxes <= [width, height, width, height]).all()
    assert (placed.boxes[:, 2:] > placed.boxes[:, :2]).all()


@pytest.mark.parametrize("config", [AugmentConfig(), ssd_augment(), finetune_augment()])
def test_image_without_objects(config: AugmentConfig) -> None:
    image = np.full((48, 64, 3), 200, np.uint8)
    transform = TrainTransform(config, (32, 32), fill=(0, 0, 0))
    for index in range(50):
        placed = transform(decoder(image), (48, 64), NO_BOXES, NO_LABELS, 0, index)
        check_valid(placed, (32, 32))
        assert placed.image.max() > 20, "the sample shows nothing of its image"


@pytest.mark.parametrize("resize_mode", ["stretch", "letterbox"])
@pytest.mark.parametrize("recipe", [ssd_augment, finetune_augment])
# Views of the larger images are decoded at 1/2, 1/4 and 1/8; their sides are no multiples of any of them.
@pytest.mark.parametrize("size", [(90, 120), (180, 240), (401, 603), (803, 601)])
def test_boxes_fit_their_objects(
    recipe: Any, size: tuple[int, int], resize_mode: Literal["stretch", "letterbox"]
) -> None:
    config = replace(recipe(), **PLAIN, vertical_flip=0.5, quarter_turns=0.5, min_size=4.0)
    input_size = (72, 96)
    transform = TrainTransform(config, input_size, resize_mode=resize_mode, fill=(0, 0, 0))
    images = [draw(size, seed) for seed in range(3)]
    reductions, num_boxes = set(), 0
    for index in range(60):
        image, boxes, labels = images[index % 3]
        decode = decoder(image)

        def watched(reduction: int, decode: Any = decode) -> Any:
            reductions.add(reduction)
            return decode(reduction)

        placed = transform(watched, size, boxes, labels, 0, index)
        check_valid(placed, input_size)
        enlarged = max(placed.placement.scale_x, placed.placement.scale_y)
        check_fit(placed, 1.5 + enlarged)  # a blurred edge, and a pixel of the image
        num_boxes += len(placed.boxes)
    assert num_boxes > 60
    if size[0] > 400:
        assert max(reductions) >= 4


def test_identity() -> None:
    image, boxes, labels = draw((90, 120), 0)
    placed = TrainTransform(AugmentConfig(), (90, 120))(decoder(image), (90, 120), boxes, labels, 3, 5)
    np.testing.assert_array_equal(placed.image, image)
    np.testing.assert_array_equal(placed.boxes, boxes)
    assert placed.placement == (1, 1, 0, 0)


def test_a_image_no_larger_than_the_view_is_not_reduced() -> None:
    asked = []

    def decode(reduction: int) -> NDArray[np.uint8]:
        asked.append(reduction)
        return np.zeros((-(-100 // reduction), -(-400 // reduction), 3), np.uint8)

    for input_size in ((50, 50), (51, 50), (24, 50), (12, 50)):
        TrainTransform(AugmentConfig(), input_size)(decode, (100, 400), NO_BOXES, NO_LABELS, 0, 0)
    assert asked == [2, 1, 4, 8]


def one(config: AugmentConfig, boxes: list[list[float]], size: tuple[int, int] = (60, 80)) -> Placed:
    """The sample of an image whose upper left quarter is white, at its own size."""
    image = np.zeros((*size, 3), np.uint8)
    image[: size[0] // 2, : size[1] // 2] = 255
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return TrainTransform(config, size)(decoder(image), size, array, np.arange(len(array)), 0, 0)


def test_flips_by_hand() -> None:
    placed = one(AugmentConfig(horizontal_flip=1.0), [[10, 5, 30, 25]])
    assert placed.boxes.tolist() == [[50, 5, 70, 25]]
    assert placed.image[0, 79, 0] == 255
    assert placed.image[0, 0, 0] == 0
    placed = one(AugmentConfig(vertical_flip=1.0), [[10, 5, 30, 25]])
    assert placed.boxes.tolist() == [[10, 35, 30, 55]]
    assert placed.image[59, 0, 0] == 255


def test_quarter_turns_of_a_wide_input() -> None:
    image, boxes, labels = draw((90, 120), 1)
    transform = TrainTransform(AugmentConfig(quarter_turns=1.0), (90, 120))
    seen = set()
    for index in range(12):
        placed = transform(decoder(image), (90, 120), boxes, labels, 0, index)
        check_valid(placed, (90, 120))
        check_fit(placed, 3.0)
        seen.add(tuple(placed.boxes[0].tolist()))
    assert len(seen) == 3  # 90, 180 and 270 degrees


def test_minimum_overlap_is_kept() -> None:
    # One object of 40x30 in an image of 80x60: a crop with an overlap of at least 0.5 is at most twice as large as
    # the object.
    config = AugmentConfig(crop_probability=1.0, crop_min_overlaps=(0.5,))
    image = np.zeros((60, 80, 3), np.uint8)
    boxes = np.array([[20, 15, 60, 45]], np.float32)
    transform = TrainTransform(config, (60, 80))
    for index in range(50):
        placed = transform(decoder(image), (60, 80), boxes, np.zeros(1, np.int64), 0, index)
        scale_x, scale_y, offset_x, offset_y = placed.placement
        view = np.array(
            [-offset_x / scale_x, -offset_y / scale_y, (80 - offset_x) / scale_x, (60 - offset_y) / scale_y]
        )
        overlap = np.minimum(view[2:], boxes[0, 2:]) - np.maximum(view[:2], boxes[0, :2])
        intersection = overlap.prod()
        iou = intersection / ((view[2:] - view[:2]).prod() + 1200 - intersection)
        assert iou >= 0.5 - 0.03  # the view lies on whole pixels


def test_an_overlap_out_of_reach_leaves_the_whole_image() -> None:
    placed = one(AugmentConfig(crop_probability=1.0, crop_min_overlaps=(0.9,)), [[10, 5, 12, 7]])
    assert placed.placement == (1, 1, 0, 0)


def test_objects_whose_centre_is_outside_or_of_which_little_is_left_are_dropped() -> None:
    crop = {"crop_probability": 1.0, "crop_scale": (0.5, 0.5), "crop_min_overlaps": (0.0,)}
    # The small box must have its centre in the crop of 40x30, so the large one, whose centre is (40, 30), is inside
    # or not.
    for min_visible, kept in ((0.0, {0, 1}), (0.5, {0})):
        labels = set()
        for index in range(40):
            image = np.zeros((60, 80, 3), np.uint8)
            boxes = np.array([[38, 28, 42, 32], [0, 0, 80, 60]], np.float32)
            transform = TrainTransform(AugmentConfig(min_visible=min_visible, **crop), (60, 80))  # type: ignore[arg-type]
            labels |= set(transform(decoder(image), (60, 80), boxes, np.arange(2), 0, index).labels.tolist())
        assert labels == kept
    assert one(AugmentConfig(min_size=2.0), [[1, 1, 2.5, 9], [1, 1, 3.5, 9]]).labels.tolist() == [1]


def test_a_sample_depends_on_seed_epoch_and_index_alone() -> None:
    image, boxes, labels = draw((90, 120), 2)

    def sample(transform: TrainTransform, epoch: int, index: int) -> Placed:
        return transform(decoder(image), (90, 120), boxes, labels, epoch, index)

    config = replace(ssd_augment(), color_probability=1.0, channel_shuffle=0.5)
    transform, again = TrainTransform(config, (64, 64), seed=1), TrainTransform(config, (64, 64), seed=1)
    first = sample(transform, 4, 7)
    for index in range(5):  # other samples in between change nothing
        sample(again, 0, index)
    np.testing.assert_array_equal(sample(again, 4, 7).image, first.image)
    np.testing.assert_array_equal(sample(again, 4, 7).boxes, first.boxes)
    others = [sample(transform, 5, 7), sample(transform, 4, 8), sample(TrainTransform(config, (64, 64), seed=2), 4, 7)]
    assert all(not np.array_equal(other.image, first.image) for other in others)


def test_colours_change_and_boxes_do_not() -> None:
    image = np.full((60, 80, 3), (120, 90, 60), np.uint8)
    boxes = np.array([[10, 10, 20, 20]], np.float32)
    transform = TrainTransform(AugmentConfig(**(PLAIN | {"brightness": 0.2}), color_probability=1.0), (60, 80))
    shades = []
    for index in range(30):
        placed = transform(decoder(image), (60, 80), boxes, np.zeros(1, np.int64), 0, index)
        assert placed.boxes.tolist() == boxes.tolist()
        shades.append(int(placed.image[0, 0, 0]))
    # A fifth of white is 51.
    assert 69 <= min(shades) < 90
    assert 150 < max(shades) <= 171


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_probability", 1.5),
        ("horizontal_flip", -0.1),
        ("hue", 0.6),
        ("expand_max_scale", 0.5),
        ("crop_scale", (0.8, 0.5)),
        ("crop_aspect", (0.0, 1.0)),
        ("crop_min_overlaps", ()),
        ("crop_min_overlaps", (1.0,)),
        ("min_size", 0.0),
    ],
)
def test_values_without_meaning_are_refused(field: str, value: Any) -> None:
    config = AugmentConfig(**{field: value})
    with pytest.raises(ValueError, match=rf"augment.{field} is "):
        TrainTransform(config, (64, 64))


def test_evaluation_places_the_whole_image() -> None:
    image, boxes, labels = draw((60, 120), 0)
    placed = EvalTransform((60, 60))(decoder(image), (60, 120), boxes, labels, 0, 0)
    np.testing.assert_allclose(placed.boxes, boxes * [0.5, 1, 0.5, 1])
    np.testing.assert_array_equal(placed.image, place(image, (60, 60), "stretch", (0, 0, 0))[0])
    check_fit(placed, 1.0)

    placed = EvalTransform((60, 60), resize_mode="letterbox", fill=(9, 8, 7))(
        decoder(image), (60, 120), boxes, labels, 0, 0
    )
    # 120x60 becomes 60x30, with bars of 15 above and below.
    assert placed.placement == (0.5, 0.5, 0, 15)
    np.testing.assert_allclose(placed.boxes, boxes * 0.5 + [0, 15, 0, 15])
    assert placed.image[14].tolist() == [[9, 8, 7]] * 60
    assert placed.image[45].tolist() == [[9, 8, 7]] * 60
    check_fit(placed, 1.0)


def test_resize_leaves_no_pixel_out() -> None:
    # One white column in eight: a fourth of the width must still see a mean of 32 everywhere.
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::8] = 255
    assert resize(image, (64, 64)) is image
    small = resize(image, (16, 8))
    assert np.abs(small.astype(int) - 255 / 8).max() <= 1

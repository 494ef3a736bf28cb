"""Images at the network's input size, by hand. Run: pytest tests/test_place.py"""

import numpy as np
import pytest

from detection.images.place import place, resize, resize_as_tensorflow


def columns(*values: int, height: int = 2) -> np.ndarray:
    """uint8 [height, len(values), 3] whose columns have these grey values."""
    row = np.array(values, np.uint8)[None, :, None]
    return np.ascontiguousarray(np.broadcast_to(row, (height, len(values), 3)))


def test_an_image_of_that_size_is_handed_on() -> None:
    image = columns(1, 2, 3)
    assert resize(image, (2, 3)) is image
    assert resize_as_tensorflow(image, (2, 3)) is image


@pytest.mark.parametrize("turn", [False, True])
def test_bilinear_up_to_a_shrinkage_of_two_and_areas_beyond(turn: bool) -> None:
    def of(image: np.ndarray, width: int) -> list[int]:
        turned = image.transpose(1, 0, 2).copy() if turn else image
        resized = resize(turned, (width, 2) if turn else (2, width))
        return [int(value) for value in (resized[:, 0, 0] if turn else resized[0, :, 0])]

    # Pixel i of the result lies at 3 (i + 0.5) - 0.5 of six: bilinear would take pixels 1 and 4 alone, areas take all three.
    assert of(columns(0, 90, 0, 30, 0, 0), 2) == [30, 10]
    # 5 to 3 bilinear: 5/3 (i + 0.5) - 0.5 = 1/3, 2, 3 2/3. Areas would give (90 + 2/3 * 30) / (5/3) = 66 first. The other side
    # shrinks by two, which is not beyond it.
    assert of(columns(90, 30, 60, 0, 90, height=4), 3) == [70, 60, 60]


def test_tensorflows_pixels_begin_at_the_corner_and_are_not_averaged() -> None:
    # Pixel i of two is pixel 3 i of six; of four, pixel 1.5 i: between two of them, as much of each.
    assert resize_as_tensorflow(columns(10, 90, 0, 30, 0, 0), (2, 2))[..., 0].tolist() == [[10, 30]] * 2
    assert resize_as_tensorflow(columns(10, 90, 0, 30, 0, 0), (2, 4))[0, :, 0].tolist() == [10, 45, 30, 0]
    tall = columns(10, 90, 0, 30, 0, 0).transpose(1, 0, 2).copy()
    assert resize_as_tensorflow(tall, (2, 2))[..., 0].tolist() == [[10, 10], [30, 30]]
    # Beyond the last pixel it is repeated: pixels 0, 0.5, 1, 1.5.
    assert resize_as_tensorflow(columns(20, 80), (2, 4))[0, :, 0].tolist() == [20, 50, 80, 80]


@pytest.mark.parametrize("mode", ["stretch", "stretch_tensorflow"])
def test_stretched(mode: str) -> None:
    placed, placement = place(columns(9, 9, 9, 9), (6, 2), mode, (1, 2, 3))  # type: ignore[arg-type]
    assert placed.shape == (6, 2, 3)
    assert (placed == 9).all()
    assert placement == (0.5, 3.0, 0.0, 0.0)  # 2 of 4 wide, 6 of 2 high


def test_the_two_ways_to_stretch_differ() -> None:
    image = columns(10, 90, 0, 30, 0, 0)
    assert place(image, (2, 2), "stretch", (0, 0, 0))[0][0, :, 0].tolist() == [33, 10]
    assert place(image, (2, 2), "stretch_tensorflow", (0, 0, 0))[0][0, :, 0].tolist() == [10, 30]


def test_letterboxed_with_bars_above_and_below() -> None:
    # 4 x 2 into a square of 7: the scale is 1.75, 7 x 4 (3.5 rounds to the even 4), and of the 3 rows left 1 lies above.
    placed, placement = place(columns(9, 9, 9, 9), (7, 7), "letterbox", (1, 2, 3))
    assert placed.shape == (7, 7, 3)
    assert placed.dtype == np.uint8
    assert placed[:, 3].tolist() == [[1, 2, 3], *[[9, 9, 9]] * 4, *[[1, 2, 3]] * 2]
    assert (placed[1:5] == 9).all()
    assert placement == (1.75, 2.0, 0.0, 1.0)


def test_letterboxed_with_bars_left_and_right() -> None:
    placed, placement = place(columns(9, 9, height=4), (8, 9), "letterbox", (1, 2, 3))
    assert placed.shape == (8, 9, 3)
    assert placed[3].tolist() == [*[[1, 2, 3]] * 2, *[[9, 9, 9]] * 4, *[[1, 2, 3]] * 3]
    assert (placed[:, 2:6] == 9).all()
    assert placement == (2.0, 2.0, 2.0, 0.0)


def test_a_line_keeps_a_pixel() -> None:
    # 100 x 1 into 10 x 10: a tenth of a pixel high, which is one. The four rows above it are (10 - 1) // 2.
    placed, placement = place(columns(*[9] * 100, height=1), (10, 10), "letterbox", (0, 0, 0))
    assert placed[:, 5, 0].tolist() == [0, 0, 0, 0, 9, 0, 0, 0, 0, 0]
    assert placement == (0.1, 1.0, 0.0, 4.0)
    placed, placement = place(columns(9, height=100), (10, 10), "letterbox", (0, 0, 0))
    assert placed[5, :, 0].tolist() == [0, 0, 0, 0, 9, 0, 0, 0, 0, 0]
    assert placement == (1.0, 0.1, 4.0, 0.0)

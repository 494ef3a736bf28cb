"""Colour changes against figures worked out by hand."""

import numpy as np

from detection.data.colors import brightness_contrast, hue, random_colors, saturation

IMAGE = np.array([[[0, 100, 200], [255, 0, 0]]], np.uint8)
NOTHING = (0.0, 0.0, 0.0, 0.0)


def test_nothing_is_nothing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        same = random_colors(IMAGE, rng, amounts=NOTHING, probability=1.0, shuffle_probability=0.0)
        np.testing.assert_array_equal(same, IMAGE)


def test_by_hand() -> None:
    assert brightness_contrast(IMAGE, 0.2, 0.0).tolist() == [[[51, 151, 251], [255, 51, 51]]]
    assert brightness_contrast(IMAGE, 0.0, -0.5).tolist() == [[[0, 50, 100], [128, 0, 0]]]
    assert saturation(IMAGE, 1.0).tolist() == IMAGE.tolist()
    # grey of pure red is 0.299 * 255 = 76
    assert saturation(IMAGE, 0.0)[0, 1].tolist() == [76, 76, 76]
    assert saturation(IMAGE, 0.5)[0, 1].tolist() == [166, 38, 38]
    # a third of the circle: red to green, half: red to cyan
    assert hue(IMAGE, 1 / 3)[0, 1].tolist() == [0, 255, 0]
    assert hue(IMAGE, -0.5)[0, 1].tolist() == [0, 255, 255]


def test_probabilities_and_bounds() -> None:
    grey = np.full((1, 1, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    values = [
        int(random_colors(grey, rng, amounts=(0.2, 0.0, 0.5, 0.5), probability=0.25, shuffle_probability=0.5)[0, 0, 0])
        for _ in range(2000)
    ]
    changed = np.mean([value != 100 for value in values])
    assert 0.2 < changed < 0.3
    assert 49 <= min(values) < 55
    assert 145 < max(values) <= 151


def test_channels_are_shuffled_and_the_image_stays() -> None:
    rng = np.random.default_rng(0)
    before = IMAGE.copy()
    seen = {
        tuple(random_colors(IMAGE, rng, amounts=NOTHING, probability=0.0, shuffle_probability=1.0)[0, 0])
        for _ in range(60)
    }
    assert len(seen) == 6
    np.testing.assert_array_equal(IMAGE, before)

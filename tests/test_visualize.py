import time

import numpy as np
import pytest
import torch

from detection.images.draw import draw_detections, draw_frame_rate, draw_target, image_grid, to_supervision
from detection.structures import Detections


def found(boxes: list[list[float]], labels: list[int], class_names: tuple[str, ...] = ("cat", "dog")) -> Detections:
    return Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.linspace(0.9, 0.5, len(labels)),
        labels=torch.tensor(labels, dtype=torch.int64),
        class_names=class_names,
    )


def grey(height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def changed(image: np.ndarray) -> np.ndarray:
    return (image != 128).any(-1)


def test_nothing_found_leaves_the_image_as_it_is():
    image = grey()
    drawn = draw_detections(image, found([], []))
    np.testing.assert_array_equal(drawn, image)
    assert drawn is not image
    np.testing.assert_array_equal(draw_target(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64)), image)


def test_box_is_drawn_where_it_is_and_the_given_image_stays():
    image = grey()
    drawn = draw_detections(image, found([[40, 50, 100, 110]], [1]))
    assert not changed(image).any()
    assert drawn.dtype == np.uint8
    touched = changed(drawn)
    assert touched[80, 40]  # left side
    assert touched[110, 70]  # lower side
    assert not touched[60:105, 46:94].any()  # nothing inside
    assert touched[30:50, 40:100].any()  # the label above
    assert not touched[:, 125:].any()


def test_colour_of_the_class_in_rgb():
    # supervision's first two default colours are a violet (163, 81, 251) and a red (255, 64, 64)
    drawn = draw_detections(grey(), found([[10, 60, 60, 110], [90, 60, 140, 110]], [0, 1]))
    assert drawn[90, 10].tolist() == [163, 81, 251]
    assert drawn[90, 90].tolist() == [255, 64, 64]


def test_best_detection_lies_on_top():
    drawn = draw_detections(grey(), found([[10, 60, 60, 110], [10, 60, 60, 110]], [0, 1]))
    assert drawn[90, 10].tolist() == [163, 81, 251]


def test_labels_stay_inside_and_are_written():
    drawn = draw_detections(grey(), found([[0, 0, 20, 20]], [0], class_names=("a long name",)))
    assert changed(drawn)[:30, 30:90].any()


def test_small_image_is_enlarged_before_drawing():
    drawn = draw_detections(grey(60, 80), found([[20, 30, 50, 55]], [0]), min_side=320)
    assert drawn.shape == (240, 320, 3)
    assert drawn[160, 80].tolist() == [163, 81, 251]  # the left side, at four times 20
    assert draw_detections(grey(), found([], []), min_side=100).shape == (120, 160, 3)  # large enough already


def test_target_takes_arrays_and_tensors_alike():
    boxes, labels = np.array([[10, 60, 60, 110]], np.float32), np.array([1])
    from_arrays = draw_target(grey(), boxes, labels, ("cat", "dog"))
    from_tensors = draw_target(grey(), torch.from_numpy(boxes), torch.from_numpy(labels), ("cat", "dog"))
    np.testing.assert_array_equal(from_arrays, from_tensors)
    assert from_arrays[90, 10].tolist() == [255, 64, 64]
    assert (draw_target(grey(), boxes, labels) != from_arrays).any()  # without names it writes the number


def test_to_supervision_keeps_everything():
    theirs = to_supervision(found([[1, 2, 3, 4], [5, 6, 7, 8]], [1, 5]))
    np.testing.assert_array_equal(theirs.xyxy, [[1, 2, 3, 4], [5, 6, 7, 8]])
    np.testing.assert_allclose(theirs.confidence, [0.9, 0.5])
    assert theirs.class_id.tolist() == [1, 5]
    assert theirs.data["class_name"].tolist() == ["dog", "5"]
    empty = to_supervision(found([], []))
    assert len(empty) == 0
    assert empty.xyxy.shape == (0, 4)


def test_grid_of_equal_images():
    images = [np.full((40, 60, 3), value, np.uint8) for value in (50, 100, 150)]
    sheet = image_grid(images, columns=2, cell=60, gap=4)
    assert sheet.shape == (84, 124, 3)
    assert sheet[20, 30, 0] == 50
    assert sheet[20, 94, 0] == 100
    assert sheet[64, 30, 0] == 150
    assert sheet[64, 94, 0] == 24  # no fourth image


def test_grid_fits_images_of_any_size():
    sheet = image_grid([np.full((100, 50, 3), 200, np.uint8), np.full((10, 20, 3), 100, np.uint8)], cell=80, gap=0)
    assert sheet.shape == (80, 160, 3)  # 80 x 40 and 40 x 80 in two cells of 80 x 80
    assert (sheet[:, 20:60] == 200).all()
    assert (sheet[:, :20] == 24).all()
    assert (sheet[20:60, 80:] == 100).all()
    assert image_grid([grey()], cell=160).shape == (120, 160, 3)
    assert image_grid([grey(32, 32)] * 5, cell=32, gap=0).shape == (64, 96, 3)  # three in a row


def test_grid_refuses_what_it_cannot_lay():
    with pytest.raises(ValueError, match="no image was given"):
        image_grid([])
    with pytest.raises(ValueError, match="columns 0, cell 320 and gap 4 must be positive"):
        image_grid([grey()], columns=0)


def test_frame_rate_stands_in_the_corner():
    image = grey()
    drawn = draw_frame_rate(image, 12.34)
    assert not changed(image).any()
    assert changed(drawn)[:20, :60].any()
    assert not changed(drawn)[40:].any()
    assert (drawn != draw_frame_rate(image, 98.76)).any()


def test_crowded_image_does_not_stop_a_video():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 1, (300, 2)) * (560, 300)
    crowd = found(np.concatenate([corners, corners + 50], axis=1).tolist(), [0] * 300)
    begin = time.process_time()
    draw_detections(grey(360, 640), crowd)
    assert time.process_time() - begin < 0.3

import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from detection.data.drawn import (
    CLASS_NAMES,
    draw_classification_set,
    draw_crop,
    draw_detection_set,
    draw_image,
    draw_video_frames,
    images,
    sets,
)
from detection.data.drawn.forms import DrawnObject, Mask, draw_mask


def an_object(**changes: object) -> DrawnObject:
    look: dict = {"label": 1, "x": 20.0, "y": 10.0, "side": 8.0, "angle": 0.0, "stretch": 1.0}
    look |= {"colour": np.zeros(3, np.float32), "shade": 0.0, "pattern_period": 0.0, "outline": 0.0}
    look |= {"noise_corner": (0, 0)}
    return DrawnObject(**(look | changes))


def test_box_of_an_upright_square_is_exact():
    mask = draw_mask(an_object(), (40, 40))
    assert mask.box() == (16, 6, 24, 14)
    assert mask.solid.sum() == 64


def test_box_is_cut_at_the_border():
    mask = draw_mask(an_object(x=2.0), (40, 40))  # from -2 to 6
    assert mask.box() == (0, 6, 6, 14)


def test_object_outside_has_no_mask():
    assert draw_mask(an_object(x=-30.0), (40, 40)) is None


def test_stretch_is_height_over_width():
    x1, y1, x2, y2 = draw_mask(an_object(stretch=0.5, side=16.0), (40, 40)).box()
    assert (x2 - x1, y2 - y1) == (16, 8)


def test_ring_and_cross_have_their_form():
    ring = draw_mask(an_object(label=CLASS_NAMES.index("ring"), x=20.0, y=20.0, side=30.0), (40, 40))
    centre = (20 - ring.top, 20 - ring.left)
    assert not ring.solid[centre]  # a hole in the middle
    assert ring.solid.sum() == pytest.approx(np.pi * 15**2 * (1 - 0.55**2), rel=0.04)
    cross = draw_mask(an_object(label=CLASS_NAMES.index("cross"), x=20.0, y=20.0, side=30.0), (40, 40))
    arm = 0.32 * 30
    assert cross.solid.sum() == pytest.approx(2 * 30 * arm - arm**2, rel=0.06)
    assert not cross.solid[2, 2]  # nothing in the corners


def test_visible_share_counts_what_later_objects_cover():
    below = draw_mask(an_object(x=10.0), (20, 40))  # columns 6..14
    above = draw_mask(an_object(x=16.0), (20, 40))  # columns 12..20: covers 2 of 8
    assert images._visible([below, above], (20, 40)) == [0.75, 1.0]
    assert images._visible([above, below], (20, 40)) == [0.75, 1.0]
    assert images._visible([], (20, 40)) == []


def test_images_are_what_the_docstring_says():
    longest, counts = [], []
    for number in range(150):
        image, boxes, labels = draw_image(np.random.default_rng((7, number)), (160, 200))
        assert image.shape == (160, 200, 3)
        assert image.dtype == np.uint8
        assert boxes.dtype == np.float32
        assert boxes.shape == (len(labels), 4)
        assert labels.dtype == np.int64
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= (200, 160)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        counts.append(len(boxes))
        longest.extend((boxes[:, 2:] - boxes[:, :2]).max(1))
    assert min(counts) == 0
    assert max(counts) == 5
    assert max(longest) <= 80  # half of the shorter side
    assert max(longest) > 70
    assert 8 < min(longest) < 16  # 12 pixels, less where the border cuts one


def test_no_object_is_hidden_by_more_than_forty_percent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "EMPTY_SHARE", 0.0)
    painted: list[Mask] = []
    paint = images.paint

    def keep(image: np.ndarray, mask: Mask, drawn: DrawnObject) -> None:
        painted.append(mask)
        paint(image, mask, drawn)

    monkeypatch.setattr(images, "paint", keep)
    partly_hidden = 0
    for number in range(60):
        painted.clear()
        image = draw_image(np.random.default_rng(number), (128, 128), max_objects=12)
        assert len(painted) == len(image.boxes)  # what is painted has a box, and the other way round
        visible = images._visible(painted, (128, 128))
        assert min(visible) >= 0.6
        partly_hidden += sum(share < 1 for share in visible)
    assert partly_hidden > 30  # overlaps there are


def test_detection_set_on_disk(tmp_path: Path):
    found = draw_detection_set(tmp_path, num_train=12, num_val=5, size=(96, 128), seed=3)
    assert found.train_annotations == tmp_path / "train.json"
    assert found.val_images == tmp_path / "val"
    coco = json.loads(found.train_annotations.read_text())
    assert [record["name"] for record in coco["categories"]] == list(CLASS_NAMES)
    assert len(coco["images"]) == 12
    assert sorted(path.name for path in found.train_images.iterdir()) == [r["file_name"] for r in coco["images"]]
    assert (coco["images"][0]["height"], coco["images"][0]["width"]) == (96, 128)
    assert cv2.imread(str(found.train_images / "000000.jpg")).shape == (96, 128, 3)
    drawn = draw_image(np.random.default_rng((3, 0, 4)), (96, 128))
    of_fifth = [record for record in coco["annotations"] if record["image_id"] == 5]
    assert [record["category_id"] - 1 for record in of_fifth] == drawn.labels.tolist()
    x, y, width, height = np.array([record["bbox"] for record in of_fifth]).T
    np.testing.assert_array_equal(np.stack([x, y, x + width, y + height], 1), drawn.boxes)
    assert [record["area"] for record in of_fifth] == (width * height).tolist()
    assert len({record["id"] for record in coco["annotations"]}) == len(coco["annotations"])
    assert len(json.loads(found.val_annotations.read_text())["images"]) == 5


def test_jpeg_keeps_red_red(tmp_path: Path):
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    sets.write_jpeg(tmp_path / "red.jpg", red)
    blue, _, stored_red = cv2.imread(str(tmp_path / "red.jpg")).reshape(-1, 3).mean(0)
    assert stored_red > 190
    assert blue < 10


def test_same_seed_same_files_and_another_seed_others(tmp_path: Path):
    for name, count, seed in (("a", 4, 0), ("b", 6, 0), ("c", 4, 1)):
        draw_detection_set(tmp_path / name, num_train=count, num_val=1, size=(64, 64), seed=seed)
    first, longer, other = ((tmp_path / name / "train" / "000003.jpg").read_bytes() for name in "abc")
    assert first == longer
    assert first != other
    assert first != (tmp_path / "a" / "val" / "000000.jpg").read_bytes()


def test_classification_set_on_disk(tmp_path: Path):
    train, val = draw_classification_set(tmp_path, num_train=3, num_val=2, size=(64, 64), seed=0)
    assert (train, val) == (tmp_path / "train", tmp_path / "val")
    for folder, count in ((train, 3), (val, 2)):
        assert sorted(path.name for path in folder.iterdir()) == sorted(CLASS_NAMES)
        assert all(len(list((folder / name).glob("*.jpg"))) == count for name in CLASS_NAMES)
    assert (train / "disc" / "000000.jpg").read_bytes() != (val / "disc" / "000000.jpg").read_bytes()


def test_crop_holds_its_object_whole(monkeypatch: pytest.MonkeyPatch):
    masks: list[tuple[int, Mask]] = []
    monkeypatch.setattr(images, "paint", lambda image, mask, drawn: masks.append((drawn.label, mask)))
    for number in range(40):
        draw_crop(np.random.default_rng(number), number % 6, (64, 64))
        label, mask = masks[-1]  # the last one painted lies on top
        assert label == number % 6
        x1, y1, x2, y2 = mask.box()
        assert min(x1, y1) >= 0
        assert max(x2, y2) <= 64
        assert 24 <= max(x2 - x1, y2 - y1) <= 56


def test_video_moves_and_keeps_its_ground():
    frames = list(draw_video_frames(30, (120, 160), seed=0, num_objects=4))
    assert len(frames) == 30
    assert all(frame.image.shape == (120, 160, 3) for frame in frames)
    assert set(frames[0].labels) <= set(range(6))
    centres = [frame.boxes[:, :2] + frame.boxes[:, 2:] for frame in (frames[0], frames[-1])]
    assert not np.array_equal(*centres)
    assert all((f.boxes >= 0).all() and (f.boxes[:, 2:] <= (160, 120)).all() for f in frames)
    again = next(draw_video_frames(1, (120, 160), seed=0, num_objects=4))
    np.testing.assert_array_equal(again.image, frames[0].image)


def test_too_small_a_image_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"size \(20, 64\): images need at least 32 pixels a side"):
        draw_detection_set(tmp_path, num_train=1, num_val=1, size=(20, 64))


def test_unwritable_image_names_the_file(tmp_path: Path):
    with pytest.raises(OSError, match=r"nowhere/a\.jpg: the image could not be written"):
        sets.write_jpeg(tmp_path / "nowhere" / "a.jpg", np.zeros((8, 8, 3), np.uint8))


def test_drawing_is_fast():
    begin = time.process_time()
    for number in range(20):
        draw_image(np.random.default_rng(number), (320, 320))
    assert (time.process_time() - begin) / 20 < 0.05  # 5 ms where this was written

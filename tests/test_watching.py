"""What the video command adds to a frame: slices, ids, counts, halves."""

import numpy as np
import pytest
import supervision as sv
import torch

from detection.images.draw import Traces, draw_detections, draw_line, side_by_side
from detection.inference.slices import SlicedPredictor, merge, slice_windows
from detection.inference.track import LineCounter, Tracked, Tracker
from detection.structures import Detections

NO_TRACKERS = "--track needs the package trackers (pip install 'litedet[track]')"


def found(boxes: list[list[float]], scores: list[float], labels: list[int] | None = None) -> Detections:
    return Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels or [0] * len(scores), dtype=torch.int64),
        class_names=("cat", "dog"),
    )


def test_windows_cover_the_image_evenly():
    assert slice_windows((100, 100), 100, 0.2) == []
    assert slice_windows((100, 180), 100, 0.2) == [(0, 0, 100, 100), (80, 0, 180, 100)]
    assert slice_windows((50, 180), 100, 0.2) == [(0, 0, 100, 50), (80, 0, 180, 50)]
    assert len(slice_windows((181, 181), 100, 0.2)) == 9


def test_nothing_in_whole_and_slices_is_nothing():
    assert len(merge(found([], []), [found([], [])], [(0, 0, 50, 50)], (50, 90), 0.5)) == 0


def test_parts_of_a_large_object_go_and_small_objects_come():
    whole = found([[10, 10, 170, 90]], [0.6])
    left = found([[10, 10, 100, 90], [20, 20, 30, 30]], [0.9, 0.5], [0, 1])  # a part that is cut off, and a small dog
    right = found([[0, 10, 90, 90]], [0.8])  # the other part
    merged = merge(whole, [left, right], [(0, 0, 100, 100), (80, 0, 180, 100)], (100, 180), 0.5)
    assert merged.boxes.tolist() == [[10, 10, 170, 90], [20, 20, 30, 30]]
    assert merged.labels.tolist() == [0, 1]


def test_a_cut_object_that_nobody_sees_whole_stays():
    merged = merge(found([], []), [found([[60, 10, 100, 50]], [0.9])], [(0, 0, 100, 100)], (100, 180), 0.5)
    assert len(merged) == 1


def test_parts_of_an_object_that_no_slice_holds_whole_become_one():
    windows = [(0, 0, 100, 100), (80, 0, 180, 100)]
    left, right = found([[10, 10, 100, 90]], [0.6]), found([[0, 12, 90, 92]], [0.8])  # x 80 to 170 of the image
    joined = merge(found([], []), [left, right], windows, (100, 180), 0.5)
    assert joined.boxes.tolist() == [[10, 10, 170, 92]]
    assert joined.scores.tolist() == pytest.approx([0.8])
    # Merging by the share of the smaller box, as others do it, leaves two: they share 20 of 90 pixels.
    both = sv.Detections(
        xyxy=np.array([[10.0, 10, 100, 90], [80, 12, 170, 92]]), confidence=np.array([0.6, 0.8]), class_id=np.zeros(2, int)
    )  # fmt: skip
    assert len(both.with_nmm(0.5, overlap_metric=sv.OverlapMetric.IOS)) == 2


def test_parts_of_different_objects_stay_apart():
    windows = [(0, 0, 100, 100), (80, 0, 180, 100)]
    # In the strip that both slices see, x 80 to 100, one is above and the other below; or they are of different classes.
    for low, label in ((52, 0), (12, 1)):
        right = found([[0, low, 90, low + 38]], [0.8], [label])
        apart = merge(found([], []), [found([[10, 10, 100, 48]], [0.6]), right], windows, (100, 180), 0.5)
        assert len(apart) == 2
    # Two in one slice, both cut off, are two for the detector, so they stay two.
    two = found([[40, 10, 100, 50], [60, 20, 100, 50]], [0.9, 0.8])
    assert len(merge(found([], []), [two, found([], [])], windows, (100, 180), 0.6)) == 2


def test_an_object_over_four_slices_becomes_one():
    windows = [(x, y, x + 100, y + 100) for y in (0, 80) for x in (0, 80)]
    slices = [
        found([[max(20 - x, 0), max(20 - y, 0), min(160 - x, 100), min(160 - y, 100)]], [0.5]) for x, y, *_ in windows
    ]
    slices[0] = found([], [])  # one does not see it
    assert merge(found([], []), slices, windows, (180, 180), 0.5).boxes.tolist() == [[20, 20, 160, 160]]


def test_the_same_object_in_two_slices_is_one():
    slices = [found([[84, 40, 94, 50]], [0.5]), found([[4, 40, 14, 50]], [0.7])]
    merged = merge(found([], []), slices, [(0, 0, 100, 100), (80, 0, 180, 100)], (100, 180), 0.5)
    assert merged.boxes.tolist() == [[84, 40, 94, 50]]
    assert merged.scores.tolist() == pytest.approx([0.7])


def test_slices_go_through_the_predictor_in_batches():
    sizes: list[list[tuple[int, ...]]] = []

    def predictor(images: list[np.ndarray]) -> list[Detections]:
        sizes.append([image.shape[:2] for image in images])
        return [found([], []) for _ in images]

    SlicedPredictor(predictor, 100, batch=2)(np.zeros((100, 180, 3), np.uint8))
    assert sizes == [[(100, 180), (100, 100)], [(100, 100)]]


def test_ids_stay_with_their_objects_and_a_crossing_is_counted_once():
    pytest.importorskip("trackers", reason=NO_TRACKERS, exc_type=ModuleNotFoundError)
    tracker, counter = Tracker(10, 0.4), LineCounter((50, 100, 50, 0))  # upwards: from left to right is out
    ids = []
    for step in range(12):
        x = 10 + 6 * step
        tracked = tracker(found([[x, 20, x + 20, 60], [2, 70, 12, 95]], [0.8, 0.7], [1, 0]))
        counter(tracked)
        ids.append(tracked.ids)
    assert len({pair[0] for pair in ids[2:]}) == len({pair[1] for pair in ids[2:]}) == 1
    assert ids[-1][0] is not None
    assert ids[-1][0] != ids[-1][1]
    assert counter.counts == {"dog": {"in": 0, "out": 1}}


def test_weak_detections_continue_a_track_and_begin_none():
    pytest.importorskip("trackers", reason=NO_TRACKERS, exc_type=ModuleNotFoundError)
    tracker = Tracker(10, 0.4)
    assert len(tracker(found([], [])).detections) == 0
    assert len(tracker(found([[10, 10, 40, 60]], [0.2])).detections) == 0
    for _ in range(3):
        tracked = tracker(found([[10, 10, 40, 60]], [0.8]))
    weak = tracker(found([[10, 10, 40, 60], [100, 10, 140, 60]], [0.2, 0.2]))
    assert weak.ids == tracked.ids
    assert weak.detections.scores.tolist() == pytest.approx([0.2])
    dog = tracker(found([[10, 10, 40, 60]], [0.2], [1]))  # a cat does not become a dog that nobody is sure of
    assert len(dog.detections) == 0
    assert tracker(found([[10, 10, 40, 60]], [0.7], [1])).ids == tracked.ids


def test_detections_without_an_id_are_not_counted():
    counter = LineCounter((50, 100, 50, 0))
    for x in (10, 70):
        counter(Tracked(found([[x, 20, x + 20, 60]], [0.8]), [None]))
    assert counter.counts == {}


def test_traces_run_behind_objects_with_an_id():
    traces, image = Traces(10, (100, 200)), np.full((100, 200, 3), 128, np.uint8)
    assert (traces(image, found([], []), []) == 128).all()
    for x in (20, 60, 100):
        objects = found([[x, 40, x + 20, 60], [x, 80, x + 20, 90]], [0.8, 0.7])
        drawn = traces(image, objects, [7, None])
    assert (image == 128).all()
    assert (drawn[50, 31:109] != 128).any(axis=1).all()  # from the first centre to the last
    assert (drawn[85] == 128).all()  # without an id, without a trace
    box = draw_detections(image, objects)[40, 105]
    assert drawn[50, 70].tolist() == box.tolist()  # in the colour of its class
    assert (draw_detections(drawn, objects, ids=[7, None])[50, 40] == drawn[50, 40]).all()


def test_halves_and_lines_are_drawn_inside():
    image = np.full((120, 160, 3), 128, np.uint8)
    both = side_by_side(image, image, ("a very long name of a checkpoint.pt", "b.pt"))
    assert both.shape == (120, 320, 3)
    assert (both[:, 160:] != 128).any()
    drawn = draw_line(image, (80, 0, 80, 119), {"cat": {"in": 3, "out": 1}})
    assert drawn[10, 80].tolist() == [255, 255, 255]
    assert (image == 128).all()

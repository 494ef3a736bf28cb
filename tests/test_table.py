"""The table of detections, COCO's result files, and matches. Run: pytest tests/test_table.py"""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluation import draw, found, measure, write_index

from backbones.errors import UserError
from detection.data.coco import CocoIndex
from detection.evaluation.coco_ap import FIGURES, coco_ap, match_detections
from detection.evaluation.table import DetectionTable, read_coco_results, write_coco_results


def table_of(*rows: tuple[int, tuple[float, float, float, float], float, int]) -> DetectionTable:
    """A table from (image id, xyxy, score, label)."""
    return DetectionTable(
        image_ids=np.array([row[0] for row in rows], np.int64),
        boxes=np.array([row[1] for row in rows], np.float32).reshape(-1, 4),
        scores=np.array([row[2] for row in rows], np.float32),
        labels=np.array([row[3] for row in rows], np.int64),
    )


def test_rows_come_and_go_together() -> None:
    box = (0.0, 0.0, 1.0, 1.0)
    first = table_of((12, box, 0.5, 0), (10, box, 0.25, 1), (10, box, 0.75, 0))
    second = table_of((11, box, 0.125, 2), (10, box, 0.75, 3))
    whole = DetectionTable.concat([first, DetectionTable.empty(), second])
    assert len(whole) == 5
    assert whole.boxes.dtype == whole.scores.dtype == np.float32
    ordered = whole.sorted()
    assert ordered.image_ids.tolist() == [10, 10, 10, 11, 12]
    assert ordered.labels.tolist() == [0, 3, 1, 2, 0]
    assert whole.select(whole.scores > 0.3).image_ids.tolist() == [12, 10, 10]
    assert whole.select(np.array([4, 0])).labels.tolist() == [3, 0]
    assert whole.of_image(10, ("a", "b", "c", "d")).names() == ["a", "d", "b"]
    assert len(whole.of_image(99)) == len(DetectionTable.concat([])) == 0
    with pytest.raises(ValueError, match="as many ids"):
        DetectionTable(image_ids=whole.image_ids, boxes=first.boxes, scores=whole.scores, labels=whole.labels)


def test_a_table_of_detections() -> None:
    detections = [found(((1, 2, 3, 4), 0.5, 1)), found(), found(((0, 0, 9, 9), 0.25, 0), ((0, 0, 8, 8), 0.125, 0))]
    table = DetectionTable.of([7, 8, 9], detections)
    assert table.image_ids.tolist() == [7, 9, 9]
    assert table.boxes[:, 2].tolist() == [3, 9, 8]
    assert torch.equal(table.of_image(9).scores, detections[2].scores)


def test_a_result_file_gives_the_same_figures(tmp_path: Path) -> None:
    index, detections = draw(tmp_path)
    wanted = measure(index, "faster", detections)
    table = DetectionTable.of(list(detections), list(detections.values()))
    assert write_coco_results(tmp_path / "results.json", index, table) == len(table)
    again = read_coco_results(tmp_path / "results.json", index)
    assert coco_ap(index, again) == wanted
    assert np.array_equal(again.sorted().boxes, table.sorted().boxes)
    assert coco_ap(index, again.select(np.random.default_rng(0).permutation(len(again)))).figures.keys() == set(FIGURES)


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_other_tools_result_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = write_index(tmp_path, [(10, 3, (0, 0, 50, 50))], num_images=2)
    row = {"image_id": 10, "category_id": 7, "bbox": [0.1, 0.2, 30, 40], "score": 0.123456789012, "tool": "x"}
    caplog.set_level(logging.WARNING)
    table = read_coco_results(write(tmp_path / "r.json", [row, {**row, "category_id": 90}]), index)
    assert table.labels.tolist() == [1]
    assert table.scores.tolist() == [0.123456789012], "every digit is kept: equal scores would count in another order"
    assert "1 of 2 detections are of categories" in caplog.text
    assert len(read_coco_results(write(tmp_path / "r.json", []), index)) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"annotations": []}, r"is not a COCO result file, a list of detections"),
        ([{"image_id": 10, "category_id": 3, "bbox": [0, 0, 1]}], r"record 0: .*length 4"),
        ([{"image_id": 10, "category_id": 3, "bbox": [0, 0, 1, 1]}], r"record 0: .*`score`"),
        ([{"image_id": 99, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}], r"record 0 names image_id 99, which"),
    ],
)
def test_files_that_hold_no_results(tmp_path: Path, content: object, message: str) -> None:
    index = write_index(tmp_path, [(10, 3, (0, 0, 50, 50))])
    with pytest.raises(UserError, match=message):
        read_coco_results(write(tmp_path / "r.json", content), index)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    index = write_index(tmp_path, [(10, 3, (0, 0, 50, 50))])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_coco_results(tmp_path / "gone.json", index)
    (tmp_path / "r.json").write_text("no json")
    with pytest.raises(UserError, match="is not a json file"):
        read_coco_results(tmp_path / "r.json", index)
    (tmp_path / "r.json").write_text("[" * 5000)
    with pytest.raises(UserError, match=r"r\.json is not"):
        read_coco_results(tmp_path / "r.json", index)


# ------------------------------------------------------------------------------------------------------------ matches


@pytest.fixture
def index(tmp_path: Path) -> CocoIndex:
    """Image 10: two cats, a crowd of cats. Image 11: a dog."""
    return write_index(
        tmp_path,
        [
            (10, 3, (0, 0, 100, 100)),
            (10, 3, (200, 0, 100, 100)),
            (10, 3, (0, 300, 100, 100), 1),
            (11, 7, (0, 0, 50, 50)),
        ],
        num_images=2,
    )


def test_matches_by_hand(index: CocoIndex) -> None:
    table = table_of(
        (11, (0, 0, 50, 50), 0.9, 0),  # a cat where the dog is: wrong
        (10, (0, 0, 100, 100), 0.5, 0),  # the first cat, which is taken by a better score up to 0.60: then right
        (10, (24, 0, 124, 100), 0.8, 0),  # the first cat with IoU 76 / 124 = 0.613
        (10, (10, 310, 20, 320), 0.7, 0),  # lies in the crowd: ignored
        (10, (200, 0, 300, 100), 0.6, 1),  # a dog where the second cat is: wrong
    )
    matches = match_detections(index, table)
    assert matches.iou_thresholds == pytest.approx(np.linspace(0.5, 0.95, 10))
    low, high = 2, 3  # 0.60 and 0.65
    assert matches.annotations[low].tolist() == [-1, -1, 0, 2, -1]
    assert matches.annotations[high].tolist() == [-1, 0, -1, 2, -1]
    assert matches.ignored.tolist() == [[False, False, False, True, False]] * 10
    assert matches.detections[low].tolist() == [2, -1, 3, -1]
    assert matches.detections[high].tolist() == [1, -1, 3, -1]
    assert matches.counted.tolist() == [True, True, False, True]
    missed = matches.counted & (matches.detections[0] < 0)
    assert np.flatnonzero(missed).tolist() == [1, 3]


def test_matches_of_some_classes_and_of_none(index: CocoIndex) -> None:
    table = table_of((10, (0, 0, 100, 100), 0.5, 0), (11, (0, 0, 50, 50), 0.9, 1))
    matches = match_detections(index, table, classes=["dog"])
    assert matches.annotations[0].tolist() == [-1, 3]
    assert matches.ignored[0].tolist() == [True, False]
    assert matches.counted.tolist() == [False, False, False, True]
    nothing = match_detections(index, DetectionTable.empty())
    assert nothing.annotations.shape == (10, 0)
    assert (nothing.detections == -1).all()


def test_only_the_best_hundred_of_a_class_take_part(index: CocoIndex) -> None:
    rows = [(10, (400.0, 400.0, 410.0, 410.0), 0.9 - 0.001 * n, 0) for n in range(100)]
    table = table_of(*rows, (10, (0, 0, 100, 100), 0.1, 0))
    matches = match_detections(index, table)
    assert matches.ignored[0].tolist() == [False] * 100 + [True]
    assert matches.annotations[0, 100] == -1


@pytest.mark.parametrize("seed", [0, 1])
def test_matches_agree_with_the_figures(tmp_path: Path, seed: int) -> None:
    index, detections = draw(tmp_path, seed)
    table = DetectionTable.of(list(detections), list(detections.values()))
    matches = match_detections(index, table)
    recalls = []
    for label, name in enumerate(index.class_names):
        own = matches.counted & (index.labels == label)
        if own.any():
            recalls.append((matches.detections[:, own] >= 0).mean())
        assert own.sum() == coco_ap(index, table).class_counts[name]
    assert np.mean(recalls) == pytest.approx(coco_ap(index, table).figures["AR100"], abs=1e-9)
    # Both sides of a match name each other.
    for t in range(10):
        rows = np.flatnonzero((matches.annotations[t] >= 0) & ~matches.ignored[t])
        assert (matches.detections[t, matches.annotations[t, rows]] == rows).all()
        assert (index.labels[matches.annotations[t, rows]] == table.labels[rows]).all()

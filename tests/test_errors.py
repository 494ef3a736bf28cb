"""The error split, thresholds, confusion, calibration and the comparison by hand, and against pycocotools.

Run: pytest tests/test_errors.py
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.data.coco import CocoIndex
from detection.evaluation.coco_ap import coco_ap
from detection.evaluation.compare import compare, image_f1
from detection.evaluation.errors import (
    KINDS,
    Outcomes,
    calibration,
    confusion,
    resampled_ap,
    shown_errors,
    split_errors,
    threshold_curves,
)
from detection.evaluation.table import DetectionTable, read_coco_results, write_coco_results

Box = tuple[float, float, float, float]


def index_of(folder: Path, *boxes: tuple[int, int, Box], num_images: int = 1) -> CocoIndex:
    """Classes cat (0) and dog (1), images 0 .. of 100x100, boxes (image, label, xyxy)."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(num_images)],
        "annotations": [
            {
                "id": n,
                "image_id": image,
                "category_id": label + 1,
                "bbox": [x, y, r - x, b - y],
                "area": (r - x) * (b - y),
                "iscrowd": 0,
            }
            for n, (image, label, (x, y, r, b)) in enumerate(boxes, 1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return CocoIndex.read(path)


def table_of(*rows: tuple[int, int, float, Box]) -> DetectionTable:
    """Detections (image, label, score, xyxy)."""
    return DetectionTable(
        image_ids=np.array([row[0] for row in rows], np.int64),
        boxes=np.array([row[3] for row in rows], np.float32).reshape(-1, 4),
        scores=np.array([row[2] for row in rows], np.float32),
        labels=np.array([row[1] for row in rows], np.int64),
    )


CAT, DOG = (0.0, 0.0, 20.0, 20.0), (50.0, 50.0, 70.0, 70.0)


def split_of(folder: Path, *rows: tuple[int, int, float, Box]) -> tuple[dict[str, int], dict[str, float]]:
    index = index_of(folder, (0, 0, CAT), (0, 1, DOG))
    split = split_errors(Outcomes.of(index, table_of(*rows)))
    return {k: v for k, v in split.counts.items() if v}, {k: round(v, 6) for k, v in split.costs.items() if v}  # type: ignore[misc]


def test_without_detections_all_is_missed(tmp_path: Path) -> None:
    counts, costs = split_of(tmp_path)
    assert counts == {"missed": 2}
    assert costs == {"missed": 1}


@pytest.mark.parametrize(
    ("wrong", "kind", "missed"),
    [
        ((0, 1, 0.9, CAT), "class", 1),  # the cat is called a dog; the cat is not missed, the dog is
        ((0, 0, 0.9, (0.0, 0.0, 20.0, 8.0)), "localisation", 1),  # IoU 160 / 400 = 0.4
        ((0, 1, 0.9, (0.0, 0.0, 20.0, 8.0)), "both", 2),
        ((0, 0, 0.9, (80.0, 0.0, 100.0, 20.0)), "background", 2),
        ((0, 0, 0.9, (0.0, 0.0, 20.0, 1.0)), "background", 2),  # IoU 0.05
    ],
)
def test_each_kind(tmp_path: Path, wrong: tuple[int, int, float, Box], kind: str, missed: int) -> None:
    assert split_of(tmp_path, wrong)[0] == {kind: 1, "missed": missed}


def test_a_second_box_is_a_duplicate(tmp_path: Path) -> None:
    right, again, dog = (0, 0, 0.9, CAT), (0, 0, 0.8, CAT), (0, 1, 0.7, DOG)
    assert split_of(tmp_path, right, again, dog) == ({"duplicate": 1}, {})  # after the last right one it costs nothing


def test_what_errors_cost(tmp_path: Path) -> None:
    # cat: background 0.9, right 0.8 -> precision 1/2 everywhere, AP 0.5. dog: taken for a cat at 0.1 -> AP 0.
    rows = [(0, 0, 0.9, (80.0, 0.0, 100.0, 20.0)), (0, 0, 0.8, CAT), (0, 0, 0.1, DOG)]
    counts, costs = split_of(tmp_path, *rows)  # type: ignore[arg-type]
    assert counts == {"background": 1, "class": 1}
    # AP50 is 0.25. Without the background cat rises to 1; with its class mended dog rises to 1.
    assert costs == {"background": 0.25, "class": 0.5}


def test_errors_that_a_user_sees(tmp_path: Path) -> None:
    rows = [
        (0, 0, 0.9, CAT), (0, 0, 0.4, DOG), (0, 0, 0.3, (80.0, 0.0, 100.0, 20.0)), (0, 1, 0.2, (80.0, 80.0, 90.0, 90.0)),
    ]  # fmt: skip
    outcomes = Outcomes.of(index_of(tmp_path, (0, 0, CAT), (0, 1, DOG)), table_of(*rows))
    split = split_errors(outcomes)

    def seen(cat: float, dog: float) -> dict[str, int]:
        return {k: v for k, v in shown_errors(outcomes, split, np.array([cat, dog])).items() if v}

    assert seen(0, 0) == {kind: count for kind, count in split.counts.items() if count} == {"class": 1, "background": 2}
    assert seen(0.35, 0.35) == {"class": 1}  # the dog is called a cat, so it is not missed
    assert seen(0.5, 0) == {"background": 1, "missed": 1}  # without that error the dog is
    assert seen(0.95, 0.95) == {"missed": 2}
    empty = Outcomes.of(outcomes.index, table_of())
    assert shown_errors(empty, split_errors(empty), np.zeros(2))["missed"] == 2


def test_only_the_best_error_about_an_object_becomes_right(tmp_path: Path) -> None:
    # Two dogs taken for cats on the same dog: one becomes right, the other goes; a found cat leaves nothing to mend.
    rows = [(0, 0, 0.9, CAT), (0, 0, 0.8, DOG), (0, 0, 0.7, DOG), (0, 1, 0.6, CAT)]
    counts, costs = split_of(tmp_path, *rows)  # type: ignore[arg-type]
    assert counts == {"class": 3}
    assert costs == {"class": 0.5}  # from (1 + 0) / 2 to 1


def test_thresholds(tmp_path: Path) -> None:
    index = index_of(tmp_path, (0, 0, CAT), (0, 0, DOG))
    # F1 from each score on: 0.9 -> 2*1/(1+2) = 2/3, 0.8 -> 2*1/4, 0.3 -> 2*2/5 = 0.8, 0.1 -> 4/6
    far = (80.0, 0.0, 100.0, 20.0)
    cat, dog = threshold_curves(
        Outcomes.of(index, table_of((0, 0, 0.9, CAT), (0, 0, 0.8, far), (0, 0, 0.3, DOG), (0, 0, 0.1, far)))
    )
    assert (cat.best, cat.best_f1) == (pytest.approx(0.3), pytest.approx(0.8))
    assert (cat.precision[85], cat.recall[85]) == (1, 0.5)
    assert cat.precision[100] == 1
    assert cat.recall[100] == 0
    assert dog.best is None


def test_equal_scores_cannot_be_parted(tmp_path: Path) -> None:
    index = index_of(tmp_path, (0, 0, CAT))
    far = (80.0, 0.0, 100.0, 20.0)
    (cat, _) = threshold_curves(Outcomes.of(index, table_of((0, 0, 0.5, CAT), (0, 0, 0.5, far))))
    assert cat.best_f1 == pytest.approx(2 / 3)  # not 1, which the first alone would have


def test_confusion(tmp_path: Path) -> None:
    index = index_of(tmp_path, (0, 0, CAT), (0, 1, DOG))
    table = table_of((0, 1, 0.9, CAT), (0, 0, 0.8, (80.0, 0.0, 100.0, 20.0)), (0, 1, 0.2, DOG))
    matrix = confusion(Outcomes.of(index, table), np.array([0.5, 0.5]))
    assert matrix.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert confusion(Outcomes.of(index, table_of()), np.array([0.5, 0.5])).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_calibration(tmp_path: Path) -> None:
    index = index_of(tmp_path, (0, 0, CAT), (0, 1, DOG))
    far = (80.0, 0.0, 100.0, 20.0)
    found = calibration(
        Outcomes.of(index, table_of((0, 0, 0.75, CAT), (0, 0, 0.75, far), (0, 1, 0.25, DOG), (0, 1, 0.01, far)))
    )
    assert found.counts.tolist() == [0, 0, 1, 0, 0, 0, 0, 2, 0, 0]
    assert found.right[7] == 0.5
    assert found.error == pytest.approx((2 * 0.25 + 1 * 0.75) / 3)
    assert calibration(Outcomes.of(index, table_of())).error == 0


def drawn(folder: Path, num_images: int = 30, seed: int = 0) -> tuple[CocoIndex, DetectionTable]:
    """Boxes of every size, detections near them and elsewhere, some with equal scores."""
    random = np.random.default_rng(seed)
    boxes, rows = [], []
    for image in range(num_images):
        for _ in range(random.integers(0, 6)):
            x, y, w, h = random.uniform(0, 50), random.uniform(0, 50), *random.uniform(5, 50, 2)
            label = int(random.integers(2))
            boxes.append((image, label, (x, y, x + w, y + h)))
            for _ in range(random.integers(0, 3)):
                moved = np.array([x, y, x + w, y + h]) + random.normal(0, 3, 4)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 1)
                rows.append(
                    (image, label if random.random() < 0.8 else 1 - label, round(random.random(), 1), tuple(moved))
                )
    return index_of(folder, *boxes, num_images=num_images), table_of(*rows)  # type: ignore[arg-type]


def test_precision_is_that_of_pycocotools(tmp_path: Path) -> None:
    index, table = drawn(tmp_path)
    write_coco_results(tmp_path / "found.json", index, table)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    result = coco_ap(index, read_coco_results(tmp_path / "found.json", index))
    np.testing.assert_allclose(result.precision, evaluation.eval["precision"][..., 2], atol=1e-12)
    assert result.class_ap_of_size(0) == result.class_ap


def test_resampling_each_image_once_gives_cocos_ap(tmp_path: Path) -> None:
    index, table = drawn(tmp_path)
    result = coco_ap(index, table)
    outcomes = Outcomes.of(index, table)
    plain = resampled_ap(outcomes, np.ones((1, len(index)), np.int32))[0]
    np.testing.assert_allclose(plain, list(result.class_ap.values()), atol=1e-12)
    assert split_errors(outcomes).ap50 == pytest.approx(result.figures["AP50"])


def test_a_resample_is_the_set_with_images_left_out_or_doubled(tmp_path: Path) -> None:
    index, table = drawn(tmp_path)
    weights = np.random.default_rng(1).integers(0, 2, (1, len(index)))
    kept = np.flatnonzero(weights[0])
    part = index.select(kept)
    expected = coco_ap(part, table.select(np.isin(table.image_ids, part.image_ids)))
    found = resampled_ap(Outcomes.of(index, table), weights)[0]
    np.testing.assert_allclose(found, list(expected.class_ap.values()), atol=1e-12)
    # An image counted twice is two images with the same content.
    truth = json.loads((tmp_path / "truth.json").read_text())
    more = len(truth["images"])
    truth["images"] += [image | {"id": image["id"] + more} for image in truth["images"][:10]]
    again = [a for a in truth["annotations"] if a["image_id"] < 10]
    truth["annotations"] += [a | {"id": a["id"] + 1000, "image_id": a["image_id"] + more} for a in again]
    (tmp_path / "double.json").write_text(json.dumps(truth))
    second = table.select(table.image_ids < 10)
    second = DetectionTable(
        image_ids=second.image_ids + more, boxes=second.boxes, scores=second.scores, labels=second.labels
    )
    # Scores that differ: where they are equal, the order of the images decides.
    expected = coco_ap(
        CocoIndex.read(tmp_path / "double.json"), DetectionTable.concat([unequal(table), unequal(second)])
    )
    doubled = np.where(np.arange(len(index)) < 10, 2, 1)[None]
    found = resampled_ap(Outcomes.of(index, unequal(table)), doubled)[0]
    # Two equal detections count one after the other there, and at once here: a step of recall may differ.
    np.testing.assert_allclose(found, list(expected.class_ap.values()), atol=0.02)


def unequal(table: DetectionTable) -> DetectionTable:
    """Scores that follow from the box, so that no two of a set are equal."""
    return DetectionTable(
        image_ids=table.image_ids,
        boxes=table.boxes,
        scores=np.clip(table.scores + table.boxes[:, 0] * 1e-4, 0, 1),
        labels=table.labels,
    )


def test_a_table_against_itself_shows_no_difference(tmp_path: Path) -> None:
    index, table = drawn(tmp_path)
    outcomes = Outcomes.of(index, table)
    found = compare(outcomes, outcomes, resamples=50)
    assert {row.verdict for row in [*found.overall, *found.classes]} == {"no difference shown"}
    assert (found.images == 0).all()
    empty = compare(outcomes, Outcomes.of(index, table_of()), resamples=50)
    assert empty.overall[0].verdict == "worse"
    assert empty.overall[0].high < 0
    assert empty.overall[0].second == 0


def test_f1_of_images(tmp_path: Path) -> None:
    index = index_of(tmp_path, (0, 0, CAT), (0, 1, DOG), num_images=2)
    assert image_f1(Outcomes.of(index, table_of((0, 0, 0.9, CAT)))).tolist() == [pytest.approx(2 / 3), 1]
    assert image_f1(Outcomes.of(index, table_of((1, 0, 0.9, CAT), (1, 1, 0.1, DOG)))).tolist() == [0, 0]


def test_kinds_are_six() -> None:
    assert len(KINDS) == 6

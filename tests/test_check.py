import json
from pathlib import Path

from detection.data.coco import CocoIndex
from detection.data.summary import describe


def test_report(tmp_path: Path) -> None:
    boxes = [(1, 1, [0, 0, 4, 4]), (1, 1, [0, 0, 10, 20]), (1, 3, [0, 0, 100, 40]), (3, 1, [0, 0, 0, 3])]
    records = [{"id": n, "image_id": i, "category_id": c, "bbox": b} for n, (i, c, b) in enumerate(boxes)]
    records.append({"id": 9, "image_id": 2, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 100} for i in (1, 2, 3)],
        "annotations": records,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    report = describe(CocoIndex.read(path))
    assert "a.json: 3 images, 2 of them without objects, 3 boxes to learn from, 3 classes" in report
    assert "left out: 1 crowds; 1 of 5 boxes without area: annotation 3" in report
    assert "boxes per image: median 0, at most 3" in report
    assert "on disk: < 8: 33%, 8-16: 0%, 16-32: 33%, 32-64: 0%, 64-128: 33%, 128-256: 0%, >= 256: 0%" in report
    assert "boxes by class: cat 2, cow 1, dog 0" in report
    assert "classes without a box: dog" in report
    # At 50x50: 4x4 -> 1x2, 10x20 -> 2.5x10, 100x40 -> 25x20.
    assert "at input size 50x50: < 8: 33%, 8-16: 33%, 16-32: 33%" in describe(CocoIndex.read(path), (50, 50))

    path.write_text(json.dumps(content | {"images": [], "annotations": []}))
    assert "a.json: 0 images, 0 of them without objects, 0 boxes" in describe(CocoIndex.read(path))

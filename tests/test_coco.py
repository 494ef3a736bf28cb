import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.data import coco
from detection.data.coco import CocoIndex


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _every_record_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "_PIECE", 1)


def example() -> dict[str, Any]:
    """Three images, the middle one empty; category ids out of order; one crowd; annotations out of order."""
    return {
        "images": [
            {"id": 20, "file_name": "b.jpg", "width": 100, "height": 50},
            {"id": 10, "file_name": "sub/ä.jpg", "width": 30, "height": 40},
            {"id": 30, "file_name": "c.jpg", "width": 64, "height": 64},
        ],
        "annotations": [
            {"id": 5, "image_id": 30, "category_id": 3, "bbox": [1, 2, 10, 20], "iscrowd": 1, "area": 7.5},
            {"id": 6, "image_id": 20, "category_id": 7, "bbox": [10.5, 20, 30, 40.25], "segmentation": [[1, 2, 3]]},
            {"id": 4, "image_id": 30, "category_id": 7, "bbox": [0, 0, 64, 64], "iscrowd": 0, "area": 4096},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat", "supercategory": "animal"}],
    }


def write(folder: Path, content: Any) -> Path:
    path = folder / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def _change(content: dict[str, Any], table: str, record: int, **values: Any) -> dict[str, Any]:
    content[table][record] |= values
    return content


def test_file_without_annotations_is_read_but_not_trained_on(tmp_path: Path) -> None:
    content = example() | {"annotations": []}
    index = CocoIndex.read(write(tmp_path, content))
    assert len(index) == 3
    assert index.boxes.shape == (0, 4)
    assert index.objects(1).boxes.shape == (0, 4)
    with pytest.raises(ValueError, match=r"instances.json: nothing to learn: 3 images, 0 annotations"):
        index.require_objects()
    with pytest.raises(ValueError, match="`images` is empty"):
        CocoIndex.read(write(tmp_path, content | {"images": []})).require_objects()


def test_arrays_hold_the_file(tmp_path: Path) -> None:
    index = CocoIndex.read(write(tmp_path, example()))
    assert index.class_names == ("cat", "dog")
    assert index.category_ids.tolist() == [3, 7]
    assert index.image_ids.tolist() == [20, 10, 30]
    assert [index.file_name(position) for position in range(3)] == ["b.jpg", "sub/ä.jpg", "c.jpg"]
    assert [index.size(position) for position in range(3)] == [(50, 100), (40, 30), (64, 64)]
    assert index.offsets.tolist() == [0, 1, 1, 3]
    assert index.annotation_ids.tolist() == [6, 5, 4]
    first = index.objects(0)
    # The box sticks out of its image (20 + 40.25 > 50): it is kept as it stands, as COCO's evaluation does.
    assert first.boxes.tolist() == [[10.5, 20.0, 40.5, 60.25]]
    assert first.boxes.dtype == np.float32
    assert first.areas.tolist() == [30 * 40.25]
    last = index.objects(2)
    assert last.labels.tolist() == [0, 1]
    assert last.crowd.tolist() == [True, False]
    assert last.areas.tolist() == [7.5, 4096]
    assert index.objects(2, usable_only=True).labels.tolist() == [1]
    assert index.boxes.tolist() == [first.boxes[0].tolist(), *last.boxes.tolist()]


def _text(content: dict[str, Any], **options: Any) -> str:
    return json.dumps(content, **options)


def _nested(where: str) -> dict[str, Any]:
    """Lists of valid records that are called ``annotations`` and are not the file's."""
    content = example()
    other = [record | {"id": record["id"] + 100} for record in content["annotations"]]
    if where == "images":
        content["images"][1]["annotations"] = other
        return content
    return {"info": {"annotations": other}} | content


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (_text(example()), True),
        (_text(example(), separators=(",", ":")), True),
        (_text(example(), indent=1), True),
        (_text(dict(reversed(example().items()))), True),  # categories, annotations, images
        (_text({"annotations": example()["annotations"]} | example()), True),
        (_text(example() | {"annotations": example()["annotations"][:1]}), False),
        (_text(_change(example(), "annotations", 1, note='a "brace" }, { in }, {"id": 1}, { a note')), True),
        (_text(_change(example(), "annotations", 1, parts=[{"a": 1}, {"a": 2}, {"a": 3}])), True),
        (_text(_change(example(), "annotations", 0, parts=[{"a": 1}, {"a": 2}, {"a": 3}])), False),
        (_text(_change(example(), "images", 0, file_name='"annotations": [{"id": 1}, {"id": 2}].jpg')), True),
        (_text({"info": "annotations"} | example()), True),
        (_text(_nested("images")), False),
        (_text(_nested("info")), False),
        ('{"annotations": ' + _text(example()["annotations"][::-1]) + ", " + _text(example())[1:], False),
    ],
)
def test_pieces_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cut: bool) -> None:
    path = write(tmp_path, text)
    monkeypatch.setattr(coco, "_PIECE", len(text))
    whole = CocoIndex.read(path)
    results = []

    def decode_in_pieces(data: Any) -> Any:
        results.append(in_pieces(data))
        return results[-1]

    in_pieces = coco._decode_in_pieces
    monkeypatch.setattr(coco, "_decode_in_pieces", decode_in_pieces)
    for size in range(1, len(text)):
        monkeypatch.setattr(coco, "_PIECE", size)
        _same(CocoIndex.read(path), whole)
    assert sorted(whole.annotation_ids.tolist()) in ([4, 5, 6], [5])
    assert (results[0] is not None) == cut  # the smallest size


@pytest.mark.parametrize("stretch", [1, 10**12])
def test_ids_near_and_far_apart(tmp_path: Path, stretch: int) -> None:
    content = example()
    for image in content["images"]:
        image["id"] *= stretch
    for annotation in content["annotations"]:
        annotation["image_id"] *= stretch
    assert CocoIndex.read(write(tmp_path, content)).annotation_ids.tolist() == [6, 5, 4]
    for unknown in (21 * stretch, 5 * stretch, 31 * stretch):  # between, below, above
        content["annotations"][1]["image_id"] = unknown
        with pytest.raises(ValueError, match=rf"annotation 6 names image_id {unknown}, which"):
            CocoIndex.read(write(tmp_path, content))


def test_boxes_that_cannot_be_learnt_from_are_named_and_kept_for_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = example()
    flat = [[1, 1, 0, 5], [1, 1, 5, -2]]
    outside = [[100, 10, 5, 5], [-9, 10, 9, 5], [10, 50, 5, 5], [10, -9, 5, 9]]  # right, left, below, above of 100x50
    for number, box in enumerate([*flat, *outside, [99, 49, 5, 5]], 100):
        content["annotations"].append({"id": number, "image_id": 20, "category_id": 3, "bbox": box})
    path = write(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        index = CocoIndex.read(path)
    assert "2 of 10 boxes without area: annotation 100, 101" in caplog.text
    assert "4 of 10 boxes wholly outside the image: annotation 102, 103, 104, 105" in caplog.text
    assert len(index.objects(0).labels) == 8
    assert index.annotation_ids[index.usable].tolist() == [6, 106, 4]
    with pytest.raises(ValueError, match="boxes without area: annotation 100, 101; 4 of 10 boxes wholly outside"):
        CocoIndex.read(path, strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"instances.json is not a json file"),
        ('{"images": [', r"instances.json is not a json file: .*"),
        ('{"images": [], "annotations": [{"bbox": NaN}]', r"is not a json file: .*after .*bbox"),
        ([], r"is not a COCO json file: Expected `object`, got `array`"),
        ({"images": [], "annotations": []}, r"is not a COCO json file: .*missing required field `categories`"),
        ({"shapes": []}, r"is not a COCO json file: .*missing required field `images`"),
        (example() | {"categories": []}, r"`categories` is empty"),
        (_change(example(), "images", 1, width=None), r"image 10 \(sub/ä.jpg\) has width None and height 40"),
        (_change(example(), "images", 1, height=0), r"image 10 \(sub/ä.jpg\) has width 30 and height 0"),
        (_change(example(), "images", 1, id=30), r"image id 30 stands there more than once"),
        (_change(example(), "annotations", 1, id=5), r"annotation id 5 stands there more than once"),
        (_change(example(), "categories", 1, id=7), r"category id 7 stands there more than once"),
        (_change(example(), "categories", 1, name="dog"), r"category name dog stands there more than once"),
        (_change(example(), "annotations", 1, image_id=99), r"annotation 6 names image_id 99, which `images` has not"),
        (_change(example(), "annotations", 1, category_id=9), r"annotation 6 has the unknown category 9; .* has 3, 7"),
        (
            _change(example(), "annotations", 1, bbox=[1, 2, 3]),
            r"length 4.* - at `annotations\[1\].bbox`: \{'id': 6, 'image_id': 20, 'category_id': 7, 'bbox': \[1, 2, 3",
        ),
        (_change(example(), "annotations", 1, id=10**30), r"Expected `int` <= 9223372036854775807 .*'id': 1000"),
        (_change(example(), "images", 1, width=10**10), r"Expected `int` <= 2147483647 .*images\[1\].*'id': 10,"),
        (_change(example(), "annotations", 0, bbox=[1, 2, "x", 4]), r"Expected `float`, got `str` .*'id': 5"),
        (
            _change(example(), "annotations", 0, image_id="a"),
            r"Expected `int`, got `str` - at `annotations\[0\].image_id`",
        ),
    ],
)
def test_a_bad_file_is_refused_by_file_and_record(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        CocoIndex.read(write(tmp_path, content))
    assert "instances.json" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"annotation file .*none.json does not exist"):
        CocoIndex.read(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"is a folder, not a file"):
        CocoIndex.read(tmp_path)


def test_labels_of_another_file(tmp_path: Path) -> None:
    index = CocoIndex.read(write(tmp_path, example()))  # cat 3, dog 7
    other = index.with_categories(np.array([3, 4, 5]), ("dog", "bird", "cat"))
    assert other.labels.tolist() == [0, 2, 0]
    assert other.class_names == ("dog", "bird", "cat")
    assert other.category_ids.tolist() == [7, 4, 3]
    # The id of a class that this file lacks must not fall on one that it has.
    assert index.with_categories(np.array([1, 3, 5]), ("dog", "bird", "cat")).category_ids.tolist() == [7, 8, 3]
    with pytest.raises(ValueError, match=r"unknown category 'cat' \(id 3, 1 boxes\); the classes are 'dog', 'bird'"):
        index.with_categories(np.array([1, 2]), ("dog", "bird"))


def test_unknown_category_without_objects_does_no_harm(tmp_path: Path) -> None:
    content = example()
    content["categories"].append({"id": 1, "name": "void"})
    index = CocoIndex.read(write(tmp_path, content)).with_categories(np.array([1, 2]), ("cat", "dog"))
    assert index.labels.tolist() == [1, 0, 1]
    assert index.category_ids.tolist() == [3, 7]


def _same(a: CocoIndex, b: CocoIndex) -> None:
    for name in coco._ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
    assert (a.class_names, a.problems, a.path) == (b.class_names, b.problems, b.path)


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "CACHE_FROM_BYTES", 1)
    content = _change(example(), "annotations", 1, bbox=[1, 2, 0, 4])
    path = write(tmp_path, content)
    folder = tmp_path / "cache" / "litedet"

    uncached = CocoIndex.read(path, cache=False)
    assert not folder.exists()
    _same(CocoIndex.read(path), uncached)
    (cached,) = folder.iterdir()

    with monkeypatch.context() as patch:  # the second opening does not look into the json
        patch.setattr(coco, "decode_coco", None)
        second = CocoIndex.read(path)
        _same(second, uncached)
        assert second.problems == ("1 of 3 boxes without area: annotation 6",)
        with pytest.raises(ValueError, match="without area"):
            CocoIndex.read(path, strict=True)

    cached.write_bytes(cached.read_bytes()[:100])  # broken: ignored, and made again
    _same(CocoIndex.read(path), uncached)
    assert cached.stat().st_size > 100

    write(tmp_path, content | {"annotations": []})  # changed json
    assert len(CocoIndex.read(path).labels) == 0
    assert [entry.name for entry in folder.iterdir()] == [cached.name]  # no temporary file stays behind


def test_a_cache_folder_that_cannot_be_made_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "CACHE_FROM_BYTES", 1)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(CocoIndex.read(write(tmp_path, example()))) == 3


def test_small_files_are_not_cached(tmp_path: Path) -> None:
    CocoIndex.read(write(tmp_path, example()))
    assert not (tmp_path / "cache").exists()


def test_numbers_as_texts(tmp_path: Path) -> None:
    content = example()
    for image in content["images"]:
        image["id"] = str(image["id"])
    for record in content["annotations"]:
        record["image_id"], record["iscrowd"] = str(record["image_id"]), None
    content["annotations"][0]["iscrowd"] = "1"
    content["annotations"][1]["iscrowd"] = "0"
    index = CocoIndex.read(write(tmp_path, content))
    assert index.image_ids.tolist() == [20, 10, 30]
    assert index.annotation_ids.tolist() == [6, 5, 4]
    assert index.crowd.tolist() == [False, True, False]
    content["annotations"][2]["id"] = "no. 4"
    with pytest.raises(ValueError, match=r"Expected `int`, got `str` - at `annotations\[2\].id`: \{'id': 'no. 4'"):
        CocoIndex.read(write(tmp_path, content))


def test_no_crowd_said_as_null(tmp_path: Path) -> None:
    index = CocoIndex.read(write(tmp_path, _change(example(), "annotations", 2, iscrowd=None)))
    assert index.crowd.tolist() == [False, True, False]


def test_byte_order_mark(tmp_path: Path) -> None:
    plain = CocoIndex.read(write(tmp_path, example()))
    (tmp_path / "instances.json").write_text(json.dumps(example()), encoding="utf-8-sig")
    _same(CocoIndex.read(tmp_path / "instances.json"), plain)


@pytest.mark.parametrize("where", ["file", "record"])
def test_deep_nesting_is_refused(tmp_path: Path, where: str) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    content = _change(example(), "annotations", 1, segmentation=7) if where == "record" else example() | {"x": 7}
    name = "segmentation" if where == "record" else "x"
    text = json.dumps(content).replace(f'"{name}": 7', f'"{name}": {deep}')
    with pytest.raises(
        ValueError, match=r"instances.json is not a COCO json file: lists or objects are nested too deep"
    ):
        CocoIndex.read(write(tmp_path, text))


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.write_bytes(json.dumps(example(), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match=r"instances.json is not a json file: it is not UTF-8 text"):
        CocoIndex.read(path)


def test_select(tmp_path: Path) -> None:
    index = CocoIndex.read(write(tmp_path, example()))
    dogs = index.select(class_names=["dog"])
    assert (len(dogs), dogs.offsets.tolist(), dogs.annotation_ids.tolist()) == (3, [0, 1, 1, 2], [6, 4])
    assert dogs.class_names == index.class_names
    turned = index.select([2, 0])
    assert [turned.file_name(position) for position in range(2)] == ["c.jpg", "b.jpg"]
    assert turned.image_ids.tolist() == [30, 20]
    assert [turned.size(position) for position in range(2)] == [(64, 64), (50, 100)]
    assert (turned.offsets.tolist(), turned.annotation_ids.tolist()) == ([0, 2, 3], [5, 4, 6])
    both = index.select([2, 1], ["dog"])
    assert (both.offsets.tolist(), both.annotation_ids.tolist()) == ([0, 1, 1], [4])
    assert both.objects(0).boxes.tolist() == [[0, 0, 64, 64]]
    _same(index.select(range(3)), index)
    assert index.select() is index
    nothing = index.select([])
    assert (len(nothing), nothing.offsets.tolist(), nothing.xywh.shape) == (0, [0], (0, 4))
    with pytest.raises(ValueError, match=r"instances.json has no class 'cow'; it has 'cat', 'dog'"):
        index.select(class_names=["cow"])
    with pytest.raises(IndexError):
        index.select([3])

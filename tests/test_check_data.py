import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from browser import look_at, needs_chromium
from faulty_data import SIZE, draw, faulty_set
from shared_data import SHARED, needs_shared

from backbones.errors import UserError
from detection.checks.check import Checked, check_splits
from detection.checks.duplicates import bit_counts, difference_hashes, near_pairs
from detection.checks.files import look_at_files
from detection.checks.findings import KINDS
from detection.checks.labels import compare
from detection.checks.records import as_read
from detection.checks.sources import read_splits
from detection.cli.check import main
from detection.data.coco import CocoIndex
from detection.structures import Detections

# Every fault of ``faulty_set``: the kind, the split, and the image or annotation (or the beginning of the message).
FAULTS = [
    ("duplicate-annotation-id", "train", 1),
    ("unknown-image", "train", 23),
    ("unknown-category", "train", 22),
    ("name-outside", "train", "../outside.jpg"),
    ("image-listed-twice", "train", "good5.jpg"),
    ("no-size", "train", "no_size.jpg"),
    ("box-inverted", "train", 16),
    ("box-without-area", "train", 14),
    ("box-outside", "train", 15),
    ("box-twice", "train", 20),
    ("box-two-classes", "train", 21),
    ("box-below-pixel", "train", 18),
    ("box-sticks-out", "train", 17),
    ("box-covers-image", "train", 19),
    ("class-unused", "train", "'nobody' (category 3) has no object"),
    ("class-rare", "train", "'dust' has 1 object"),
    ("class-rare", "val", "'cell' has 3 objects"),
    ("class-rare", "val", "'ghost' has 1 object"),
    ("class-not-learnt", "val", "'ghost' has 1 object here and is no class of train"),
    ("no-objects", "train", "empty.jpg"),
    ("missing-image", "train", "absent.jpg"),
    ("not-an-image", "train", "text.jpg"),
    ("truncated-image", "train", "truncated.jpg"),
    ("size-differs", "train", "small.jpg"),
    ("exif-turned", "train", "turned.jpg"),
    ("exif-turned", "train", "mirrored.jpg"),
    ("sixteen-bit", "train", "deep.png"),
    ("cmyk", "train", "cmyk.jpg"),
    ("leak", "val", "leaked.jpg"),
    ("leak-near", "val", "leaked_near.jpg"),
    ("duplicate-image", "train", "copy.jpg"),
    ("duplicate-near", "train", "near.jpg"),
]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return faulty_set(tmp_path_factory.mktemp("faulty"))


@pytest.fixture(scope="module")
def checked(faulty: tuple[Path, Path, Path]) -> Checked:
    return check_splits(read_splits(faulty[:2], [faulty[2]]))


def plain(checked: Checked) -> list[tuple[str, str, Any]]:
    return [
        (one["kind"], one["split"], one.get("annotation_id", one.get("image", one["message"])))
        for one in checked.to_plain()["findings"]
    ]


def kinds(checked: Checked) -> list[str]:
    return [finding.kind for finding in checked.findings]


def write(path: Path, images: list[Any], annotations: list[Any], categories: Any = None, **more: Any) -> Path:
    categories = [{"id": 1, "name": "a"}] if categories is None else categories
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories} | more))
    return path


def image(number: int, name: str = "", size: tuple[int, int] = SIZE) -> dict[str, Any]:
    return {"id": number, "file_name": name or f"{number}.jpg", "height": size[0], "width": size[1]}


def box(number: int, image_id: int, bbox: list[Any], category: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": category, "bbox": bbox, "iscrowd": 0} | more


def test_an_empty_file_has_nothing_but_an_unused_category(tmp_path: Path) -> None:
    checked = check_splits(read_splits([write(tmp_path / "a.json", [], [])], [tmp_path]))
    assert kinds(checked) == ["class-unused"]
    assert checked.num_errors == 0
    assert "0 images, 0 boxes" in str(checked)


def test_every_fault_is_found_and_nothing_else(checked: Checked) -> None:
    assert sorted(map(str, plain(checked))) == sorted(map(str, FAULTS))
    assert {kind for kind, *_ in FAULTS} <= KINDS.keys()


def test_faults_come_with_where_and_what(checked: Checked) -> None:
    text = str(checked)
    sticks_out = "cell, 20 x 20 pixels at left 120, top 10, sticks out by 12 pixels; the image is 128 x 96"
    assert f"train, good0.jpg, annotation 17: {sticks_out}" in text
    assert "small.jpg is 64 x 48, recorded are 128 x 96" in text
    assert "leaked.jpg is good7.jpg of train" in text
    assert "    train: text.jpg: the image does not decode (15 bytes)" in text
    assert (
        "mirrored.jpg: orientation 2; boxes are taken to count the image as turned, which its size does not tell"
        in text
    )
    errors = sum(KINDS[kind].severity == "error" for kind, *_ in FAULTS)
    assert f"{errors} errors, {len(FAULTS) - errors} warnings" in text
    # no size, small, cut off, no image, absent, outside
    assert "training leaves out 6 images that cannot be read, or have another size" in text


def test_what_training_leaves_out_is_what_the_dataset_leaves_out(tmp_path: Path) -> None:
    boxes = [
        box(1, 1, [0, 0, 10, 10]),
        box(2, 1, [0, 0, 0, 4]),
        box(3, 1, [200, 0, 4, 4]),
        box(4, 1, [0, 0, 9, 9], iscrowd=1),
    ]
    path = write(tmp_path / "a.json", [image(1)], boxes)
    split = read_splits([path])[0]
    assert split.usable().tolist() == CocoIndex.read(path).usable.tolist() == [True, False, False, False]
    left_out = check_splits([split]).left_out(split)
    assert left_out == {"crowds": 1, "boxes without area, outside, or of no image or category": 2}


def test_command_writes_json_page_and_clean_copies(
    faulty: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val, images = map(str, faulty)
    out = [str(tmp_path / name) for name in ("out.json", "report", "train.json", "val.json")]
    with pytest.raises(SystemExit) as stop:
        main([train, val, "--images", images, "--json", out[0], "--report", out[1], "--fix", out[2], out[3]])
    assert stop.value.code == 1
    assert "1 x Box turned inside out (negative width or height): corners put in order" in capsys.readouterr().out

    findings = json.loads(Path(out[0]).read_text())
    assert findings["errors"] == findings["counts"]["leak"] + sum(
        count for kind, count in findings["counts"].items() if KINDS[kind].severity == "error" and kind != "leak"
    )
    assert len(findings["findings"]) == findings["errors"] + findings["warnings"] == len(FAULTS)

    assert [one["box"] for one in findings["findings"] if one["kind"] == "box-sticks-out"] == [[120, 10, 20, 20]]

    page = (tmp_path / "report" / "index.html").read_text()
    for kind, *_ in FAULTS:
        assert f'id="{kind}"' in page
    assert page.count("data:image/jpeg") >= 15
    assert "http://" not in page
    assert "https://" not in page

    # The copies are read strictly, and what is left in them is what nobody can mend alone.
    index = CocoIndex.read(out[2], strict=True)
    content = json.loads(Path(out[2]).read_text())
    assert content["licence"] == "own"
    by_id = {one["id"]: one for one in content["annotations"]}
    assert by_id[16]["bbox"] == [40, 50, 20, 10]
    assert by_id[17]["bbox"] == [120, 10, 8, 20]
    assert by_id[17]["area"] == 160
    assert by_id[13]["segmentation"] == [[50, 10, 80, 10, 80, 30]]
    assert not {14, 15, 20, 22, 23} & by_id.keys()
    names = [index.file_name(position) for position in range(len(index))]
    assert len(names) == len(set(names)) == 26 - 7  # cut off, no image, absent, outside, copy, leaked, listed twice
    assert len(index.objects(names.index("good5.jpg")).boxes) == 2
    assert index.size(names.index("no_size.jpg")) == SIZE
    again = check_splits(read_splits([Path(out[2]), Path(out[3])], [faulty[2]]))
    assert {kind for kind in kinds(again) if KINDS[kind].severity == "error"} == {"size-differs", "class-not-learnt"}


def test_lengths_are_rounded_for_people() -> None:
    lengths = {
        344.04: "344",
        12.345678: "12",
        9.04: "9",
        1.26: "1.3",
        -20: "-20",
        0: "0",
        0.333333: "0.33",
        0.00412: "0.0041",
    }
    assert {length: as_read(length) for length in lengths} == lengths
    assert (as_read(float("nan")), as_read(float("-inf")), as_read(2.5e9)) == ("nan", "-inf", "2.5e+09")


def test_exit_status_follows_fail_on(tmp_path: Path) -> None:
    for number in (1, 2):
        draw(tmp_path, f"{number}.jpg", number)
    boxes = [box(number, 1, [number, 5, 30, 20]) for number in range(1, 12)]
    path = str(write(tmp_path / "a.json", [image(1), image(2)], boxes))
    assert kinds(main([path, "--images", str(tmp_path)])) == ["no-objects"]
    with pytest.raises(SystemExit) as stop:
        main([path, "--images", str(tmp_path), "--fail-on", "warning"])
    assert stop.value.code == 1
    with pytest.raises(SystemExit) as stop:
        main([path, "--images", str(tmp_path), "--fix", path])
    assert stop.value.code == 2


def test_records_that_the_strict_reader_refuses_are_each_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    records = [box(1, 1, [0, 0, 10, 10]), {"id": 2, "bbox": [0, 0, 1, 1]}, box(3, 1, [0, 0, 10]), box(4, 1, None), 7]  # type: ignore[arg-type]
    records += [box(5, 1, [0, 0, float("nan"), 10]), box(6, 1, ["1", "2", "30", "40"]), box(7, 1, [0, 0, 10, None])]
    images = [image(1), {"id": 2}, {"id": 3, "file_name": "c.jpg", "width": "x", "height": 5}]
    write(path, images, records, [{"id": 1, "name": "a"}, {"id": 2}])
    with pytest.raises(UserError):
        CocoIndex.read(path)
    split = read_splits([path])[0]
    assert split.annotation_ids.tolist() == [1, 5, 6, 7]
    assert split.xywh[2].tolist() == [1, 2, 30, 40]
    assert split.places.tolist() == [0, 5, 6, 7]
    checked = check_splits([split])
    assert checked.counts()["broken-record"] == 4 + 1 + 1
    assert [split.annotation_ids[one.record] for one in checked.of_kind("box-not-finite")] == [5, 7]
    assert [split.file_names[one.image] for one in checked.of_kind("no-size")] == ["c.jpg"]


def test_both_ways_of_reading_agree(faulty: tuple[Path, Path, Path], tmp_path: Path) -> None:
    content = json.loads(faulty[0].read_text())
    content["annotations"].append({"id": "no number"})
    path = tmp_path / "loose.json"
    path.write_text(json.dumps(content))
    strict, loose = read_splits([faulty[0]])[0], read_splits([path])[0]
    for name in (
        "image_ids",
        "sizes",
        "exif",
        "annotation_ids",
        "images",
        "labels",
        "xywh",
        "crowd",
        "places",
        "category_ids",
    ):
        assert np.array_equal(getattr(strict, name), getattr(loose, name)), name
    assert (strict.file_names, strict.class_names) == (loose.file_names, loose.class_names)
    assert [one.kind for one in loose.findings] == ["broken-record", *(one.kind for one in strict.findings)]


def test_categories_given_twice(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "a"}, {"id": 2, "name": "c"}]
    path = write(tmp_path / "a.json", [image(1)], [box(1, 1, [0, 0, 9, 9], 3), box(2, 1, [9, 9, 9, 9], 2)], categories)
    checked = check_splits(read_splits([path]))
    assert checked.counts()["duplicate-category"] == 2
    assert checked.splits[0].labels.tolist() == [0, 1]
    assert checked.splits[0].class_names == ("a", "b")
    fixed = tmp_path / "fixed.json"
    with pytest.raises(SystemExit):
        main([str(path), "--fix", str(fixed)])
    assert CocoIndex.read(fixed).class_names == ("a", "b")
    assert CocoIndex.read(fixed).labels.tolist() == [0, 1]


def test_voc_folder_with_sizes_of_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xml = (
        "<annotation><size><width>{0}</width><height>{1}</height></size>"
        "<object><name>cat</name><bndbox><xmin>{2}</xmin><ymin>11</ymin><xmax>{3}</xmax><ymax>30</ymax></bndbox></object>"
        "</annotation>"
    )
    (tmp_path / "xml").mkdir()
    for stem, size in (("a", (128, 96)), ("b", (0, 0)), ("gone", (128, 96))):
        (tmp_path / "xml" / f"{stem}.xml").write_text(xml.format(*size, 11, 40))
    (tmp_path / "xml" / "flat.xml").write_text(xml.format(128, 96, 20, 20))
    (tmp_path / "xml" / "broken.xml").write_text("<annotation>")
    for seed, stem in enumerate(("a", "b", "flat")):
        draw(tmp_path / "images", f"{stem}.jpg", seed)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "xml"), "--images", str(tmp_path / "images"), "--fix", str(out)])
    assert stop.value.code == 1
    assert "1 x XML file without a size (0x0): the image's size written" in capsys.readouterr().out
    checked = check_splits(read_splits([tmp_path / "xml"], [tmp_path / "images"]))
    assert checked.counts() == {
        "broken-record": 1, "no-size-voc": 1, "annotation-without-image": 1, "box-without-area": 1, "class-rare": 1,
    }  # fmt: skip
    split = checked.splits[0]
    assert split.file_names == ["a.jpg", "b.jpg", "flat.jpg"]
    assert split.xywh[0].tolist() == [10, 10, 30, 20]
    assert split.sizes.tolist() == [[96, 128]] * 3
    index = CocoIndex.read(out, strict=True)
    assert index.sizes.tolist() == [[96, 128]] * 3
    assert index.xywh.tolist() == [[10, 10, 30, 20]] * 2
    # Without pixels the sizes that are missing come from the headers.
    assert check_splits(read_splits([tmp_path / "xml"], [tmp_path / "images"]), pixels=False).splits[0].sizes.all()


def test_yolo_folder(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    for seed, stem in enumerate(("a", "b", "c")):
        draw(tmp_path / "images", f"{stem}.jpg", seed)
    (tmp_path / "images" / "c.jpg").write_bytes(b"")
    rows = ["0 0.5 0.5 0.25 0.5", "5 0.5 0.5 0.1 0.1", "0 0.5 x", "0 1.5 0.5 0.1 0.1", "0 0.5 0.5 0 0.1"]
    (tmp_path / "labels" / "a.txt").write_text("\n".join(rows))
    (tmp_path / "labels" / "c.txt").write_text(rows[0])
    (tmp_path / "labels" / "gone.txt").write_text("")
    (tmp_path / "names.txt").write_text("cat\n")
    checked = check_splits(read_splits([tmp_path / "labels"], [tmp_path / "images"], names=tmp_path / "names.txt"))
    assert checked.splits[0].xywh[0].tolist() == [48, 24, 32, 48]
    assert checked.counts() == {
        "broken-record": 1, "unknown-category": 1, "annotation-without-image": 1, "box-without-area": 1, "box-outside": 1,
        "class-rare": 1, "no-objects": 2, "not-an-image": 1,
    }  # fmt: skip


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [], [])
    (tmp_path / "nothing").mkdir()
    for arguments, message in (
        ({"paths": [path, path], "image_dirs": [tmp_path] * 3}, "--images has 3 folders for 2 datasets"),
        ({"paths": [path], "lists": [path]}, "--list belongs to folders of Pascal VOC"),
        ({"paths": [tmp_path / "nothing"]}, "--images is missing"),
        ({"paths": [tmp_path / "nothing"], "image_dirs": [tmp_path]}, "neither XML files"),
    ):
        with pytest.raises(UserError, match=message):
            read_splits(**arguments)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        read_splits([tmp_path / "absent.json"])
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(UserError, match=r"b\.json is not a COCO json file"):
        read_splits([tmp_path / "b.json"])


def test_without_pixels_only_records_and_names_are_looked_at(faulty: tuple[Path, Path, Path], tmp_path: Path) -> None:
    both = write(tmp_path / "val.json", [image(1, "good2.jpg")], [box(1, 1, [0, 0, 9, 9])], [{"id": 1, "name": "cell"}])
    checked = check_splits(read_splits([faulty[0], both], [faulty[2]]), pixels=False)
    counts = checked.counts()
    assert counts["missing-image"] == 1
    assert counts["leak"] == 1  # the same path in two splits
    assert not {"truncated-image", "not-an-image", "duplicate-image", "cmyk"} & counts.keys()


def test_workers_find_what_one_process_finds(faulty: tuple[Path, Path, Path]) -> None:
    paths = [str(path) for path in sorted(faulty[2].iterdir())] * 3  # more than a chunk
    alone, shared = look_at_files(paths, workers=0), look_at_files(paths, workers=2)
    assert (alone.faults, alone.messages) == (shared.faults, shared.messages)
    for name in ("sizes", "orientations", "depths", "cmyk", "digests", "thumbs", "decoded"):
        assert np.array_equal(getattr(alone, name), getattr(shared, name)), name


# ----------------------------------------------------------------------------------------------------------- duplicates


def test_hash_and_bits_by_hand() -> None:
    ramp = np.tile(np.arange(9, dtype=np.uint8) * 20, (9, 1))
    hashes = difference_hashes(np.stack([ramp, ramp.T, 200 - ramp]))
    # Brighter to the right: all of the first kind of bit, none of the second.
    assert bit_counts(hashes).sum(axis=1).tolist() == [64, 64, 0]
    assert bit_counts(hashes[0] ^ hashes[1]).sum() == 128
    assert bit_counts(np.array([0, 1, 3, 2**64 - 1], np.uint64)).tolist() == [0, 1, 2, 64]


def test_near_pairs_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (150, 3, 3)).astype(np.uint8)
    thumbs = np.stack([cv2.resize(one, (9, 9), interpolation=cv2.INTER_CUBIC) for one in coarse])
    noisy = np.clip(thumbs[:100].astype(int) + rng.integers(-2, 3, (100, 9, 9)), 0, 255).astype(np.uint8)
    plain_ones = np.full((20, 9, 9), 90, np.uint8)  # all of one colour: alike, and no duplicates
    thumbs = np.concatenate([thumbs, noisy, plain_ones])
    hashes = difference_hashes(thumbs)
    centred = thumbs.reshape(len(thumbs), -1).astype(float)
    centred -= centred.mean(axis=1, keepdims=True).astype(int)
    bits = np.unpackbits(hashes.view(np.uint8), axis=1).astype(int)
    close = np.abs(bits[:, None] - bits).sum(axis=2) <= 7
    alike = np.abs(centred[:, None] - centred).mean(axis=2) <= 12
    shown = thumbs.reshape(len(thumbs), -1).std(axis=1) >= 4
    wanted = {(int(one), int(two)) for one, two in np.argwhere(np.triu(close & alike & shown & shown[:, None], 1))}
    found = {pair for one, two, _ in near_pairs(thumbs) for pair in zip(one.tolist(), two.tolist(), strict=True)}
    assert found == wanted
    assert len(wanted) > 60
    assert not list(near_pairs(thumbs[:0]))


# --------------------------------------------------------------------------------------------------------- label errors


def suspects(
    tmp_path: Path, records: list[Any], boxes: list[list[float]], scores: list[float], labels: list[int]
) -> list[Any]:
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    split = read_splits([write(tmp_path / "a.json", [image(1, size=(100, 100))], records, categories)])[0]
    found = Detections(
        boxes=torch.tensor(boxes).reshape(-1, 4), scores=torch.tensor(scores), labels=torch.tensor(labels, dtype=torch.int64),
        class_names=("a", "b"),
    )  # fmt: skip
    findings = compare(split, 0, np.arange(len(records)), split.labels, found)
    ids = [None if one.record is None else int(split.annotation_ids[one.record]) for one in findings]
    return [(one.kind, id_, round(one.score or 0, 3)) for one, id_ in zip(findings, ids, strict=True)]


def test_no_suspect_where_nothing_is_and_nothing_is_found(tmp_path: Path) -> None:
    assert suspects(tmp_path, [], [], [], []) == []


def test_agreement_is_no_suspect(tmp_path: Path) -> None:
    labels = [box(1, 1, [10, 10, 20, 20]), box(2, 1, [50, 50, 20, 20], 2)]
    assert suspects(tmp_path, labels, [[10, 10, 30, 30], [50, 50, 70, 70]], [0.9, 0.3], [0, 1]) == []


def test_the_four_suspects(tmp_path: Path) -> None:
    labels = [
        box(1, 1, [10, 10, 20, 20]),  # found as b
        box(2, 1, [50, 10, 20, 20]),  # found, but 10 to the right: IoU 200 / 600
        box(3, 1, [10, 60, 30, 30]),  # never found: 30 of 100 pixels
    ]
    boxes = [[10, 10, 30, 30], [60, 10, 80, 30], [70, 70, 90, 90], [10, 10, 30, 30], [70, 40, 90, 60]]
    found = suspects(tmp_path, labels, boxes, [0.9, 0.8, 0.7, 0.25, 0.4], [1, 0, 1, 0, 0])
    assert found == [
        ("label-class", 1, 0.65),  # 0.9 for b, 0.25 for what is written
        ("label-place", 2, round(0.8 * 2 / 3, 3)),
        ("label-missing", None, 0.7),
        ("label-not-found", 3, 0.3),
    ]


def test_crowds_explain_detections_and_are_not_sought(tmp_path: Path) -> None:
    crowd = [box(1, 1, [0, 0, 50, 50], iscrowd=1)]
    assert suspects(tmp_path, crowd, [[5, 5, 20, 20], [60, 60, 90, 90]], [0.9, 0.9], [1, 1]) == [
        ("label-missing", None, 0.9)
    ]


# ------------------------------------------------------------------------------------------------- real data, and a browser


@needs_shared("data/bccd/BCCD")
def test_bccd_has_two_boxes_without_area() -> None:
    folder = SHARED / "data" / "bccd" / "BCCD"
    lists = [folder / "ImageSets" / "Main" / f"{name}.txt" for name in ("trainval", "test")]
    splits = read_splits([folder / "Annotations"], [folder / "JPEGImages"], lists=lists)
    assert [(split.name, len(split), len(split.images)) for split in splits] == [
        ("trainval", 292, 3943),
        ("test", 72, 945),
    ]
    checked = check_splits(splits, workers=0)
    assert checked.counts() == {"box-without-area": 2, "duplicate-near": 1}
    assert {splits[0].file_names[one.image or 0] for one in checked.of_kind("box-without-area")} == {
        "BloodImage_00338.jpg", "BloodImage_00343.jpg",
    }  # fmt: skip


@needs_chromium
def test_page_fits_a_desk_and_a_telephone(faulty: tuple[Path, Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit):
        main([*map(str, faulty[:2]), "--images", str(faulty[2]), "--report", str(page), "--recipe", "finetune:ssdlite"])
    for look in look_at(page, tmp_path):
        assert not look.scrolls, look
        assert look.loaded == page.read_text().count("<img ") > 10
        assert look.letters > 9, look
    # Single images of a fault end where they end, so a section of them may be narrow; charts and tables are not.
    assert "What train holds" not in look_at(page, tmp_path, (1400,))[0].halves

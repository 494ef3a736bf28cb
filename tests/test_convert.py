import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from shared_data import SHARED, needs_shared

from detection.cli import convert as convert_dataset
from detection.data.coco import CocoIndex
from detection.data.formats.voc import convert_voc
from detection.data.formats.writer import read_class_names
from detection.data.formats.yolo import convert_yolo


def draw(path: Path, width: int, height: int, exif_orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if exif_orientation is not None:
        exif[0x0112] = exif_orientation
    Image.new("RGB", (width, height), (90, 120, 30)).save(path, exif=exif)


def voc_object(name: str, box: Sequence[object], difficult: int = 0, inner: str = "") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult>{inner}<bndbox>{corners}</bndbox></object>"


def write_voc(root: Path, stem: str, objects: str = "", size: tuple[int, int] | None = (40, 30)) -> None:
    (root / "xml").mkdir(parents=True, exist_ok=True)
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    (root / "xml" / f"{stem}.xml").write_text(f"<annotation>{sides}{objects}</annotation>")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_voc_corners_become_xywh(tmp_path: Path) -> None:
    draw(tmp_path / "images/a.jpg", 40, 30)
    draw(tmp_path / "images/b.png", 40, 30)
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    write_voc(
        tmp_path,
        "a",
        voc_object("dog", (1, 1, 40, 30), inner=part) + voc_object(" cat ", (11, 6, 20.5, 16), difficult=1),
    )
    write_voc(tmp_path, "b")
    report = convert_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "out/voc.json")
    content = read(tmp_path / "out/voc.json")
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert content["images"] == [
        {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
    ]
    dog, cat = content["annotations"]
    # Pixels 1 to 40 of a row of 40 are the whole row.
    assert dog == {"id": 1, "image_id": 1, "category_id": 2, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 0}
    assert (cat["bbox"], cat["area"], cat["difficult"]) == ([10, 5, 10.5, 11], 115.5, 1)
    assert "2 images (1 without objects), 2 boxes, 2 classes: cat, dog\ndropped: nothing" in str(report)
    assert os.stat(tmp_path / "out/voc.json").st_mode & 0o444 == 0o444
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["voc.json"]
    assert len(CocoIndex.read(tmp_path / "out/voc.json").require_objects()) == 2

    dropped = convert_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "out/voc.json", difficult="drop")
    assert (dropped.num_boxes, list(dropped.dropped)) == (1, ["difficult object"])


def test_what_voc_drops_is_counted_and_named(tmp_path: Path) -> None:
    draw(tmp_path / "images/a.jpg", 40, 30)
    draw(tmp_path / "images/wrong.jpg", 50, 30)
    draw(tmp_path / "images/nosize.jpg", 20, 10)
    (tmp_path / "images/rotten.jpg").write_bytes(b"\xff\xd8 no image")
    bad = [(5, 5, 5, 9), (50, 5, 60, 9), (1, 1, "x", 4), (-20, 1, 10, 9)]
    write_voc(tmp_path, "a", "".join(voc_object("dog", box) for box in bad))
    write_voc(tmp_path, "wrong", voc_object("dog", (1, 1, 45, 9)))
    write_voc(tmp_path, "nosize", voc_object("dog", (1, 1, 20, 10)), size=None)
    write_voc(tmp_path, "rotten", voc_object("dog", (1, 1, 4, 4)))
    write_voc(tmp_path, "lonely", voc_object("cat", (1, 1, 4, 4)))
    (tmp_path / "xml/broken.xml").write_text("<annotation>\n<object></annotation>")
    report = convert_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "voc.json")
    assert {reason: len(records) for reason, records in report.dropped.items()} == {
        "annotation file that cannot be read": 1,
        "box without area": 1,
        "box outside its image": 1,
        "box without four numbers": 1,
        "annotation without an image": 1,
        "image that does not decode": 1,
    }
    text = str(report)
    assert "broken.xml: mismatched tag: line 2" in text
    assert "a.xml: object 1: [5.0, 5.0, 5.0, 9.0]" in text
    assert "a.xml: object 3: [1.0, 1.0, None, 4.0]" in text
    assert "no image lonely in" in text
    assert "rotten.jpg" in text
    assert "changed: 1 x box cut off at the edge of its image by more than a pixel\n" in text
    assert "wrong.xml: states [40, 30], the image has [50, 30]" in text
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in read(tmp_path / "voc.json")["images"]}
    assert sizes == {"a.jpg": (40, 30), "nosize.jpg": (20, 10), "wrong.jpg": (50, 30)}
    assert [record["bbox"] for record in read(tmp_path / "voc.json")["annotations"]] == [
        [0, 0, 10, 9],
        [0, 0, 20, 10],
        [0, 0, 45, 9],
    ]


def test_both_halves_of_a_voc_split_have_the_same_classes(tmp_path: Path) -> None:
    for stem, name in (("a", "cat"), ("b", "dog")):
        draw(tmp_path / f"images/{stem}.jpg", 40, 30)
        write_voc(tmp_path, stem, voc_object(name, (1, 1, 9, 9)))
    (tmp_path / "train.txt").write_text("b  1\nmissing -1\n\n")
    report = convert_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "o.json", list_file=tmp_path / "train.txt")
    content = read(tmp_path / "o.json")
    assert [category["name"] for category in content["categories"]] == ["cat", "dog"]
    assert [record["category_id"] for record in content["annotations"]] == [2]
    assert list(report.dropped) == ["image of the list without an annotation file"]

    (tmp_path / "names.txt").write_text("dog\n")
    report = convert_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "o.json", names=tmp_path / "names.txt")
    assert read(tmp_path / "o.json")["categories"] == [{"id": 1, "name": "dog"}]
    assert "dropped: 1 x class that is not among the names\n" in str(report)
    assert (report.num_images, report.num_empty, report.num_boxes) == (2, 1, 1)

    (tmp_path / "train.txt").write_text("x\ny\n")
    with pytest.raises(ValueError, match=r"train.txt: none of its 2 names is an annotation file in"):
        convert_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "o.json", list_file=tmp_path / "train.txt")


def test_yolo_shares_become_pixels(tmp_path: Path) -> None:
    draw(tmp_path / "images/train/a.jpg", 40, 30)
    draw(tmp_path / "images/train/turned.jpg", 40, 30, exif_orientation=6)
    draw(tmp_path / "images/b.png", 40, 30)
    (tmp_path / "labels/train").mkdir(parents=True)
    # 0.5 +- 0.125 of 40 is 15..25, 0.5 +- 0.25 of 30 is 7.5..22.5; the triangle spans 4..20 and 3..12.
    (tmp_path / "labels/train/a.txt").write_text("1 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.5 0.2 0.3 0.4\n")
    (tmp_path / "labels/train/turned.txt").write_text("0 0.5 0.5 1 1\n")
    (tmp_path / "data.yaml").write_text("path: .\nnc: 2\nnames:\n  0: cat\n  1: dog\n")
    report = convert_yolo(tmp_path / "images", tmp_path / "labels", tmp_path / "data.yaml", tmp_path / "yolo.json")
    content = read(tmp_path / "yolo.json")
    assert [(i["file_name"], i["width"], i["height"]) for i in content["images"]] == [
        ("b.png", 40, 30),
        ("train/a.jpg", 40, 30),
        ("train/turned.jpg", 30, 40),
    ]
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in content["annotations"]] == [
        (2, 2, [15, 7.5, 10, 15]),
        (2, 1, [4, 3, 16, 9]),
        (3, 1, [0, 0, 30, 40]),
    ]
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert (report.num_empty, report.dropped) == (1, {})


def test_what_yolo_drops_is_counted_and_named(tmp_path: Path) -> None:
    draw(tmp_path / "images/a.jpg", 40, 30)
    (tmp_path / "images/rotten.jpg").write_bytes(b"")
    (tmp_path / "labels").mkdir()
    rows = [
        "2 .5 .5 .1 .1",
        "0 .5 .5 0 .1",
        "0 1.5 .5 .1 .1",
        "0 .5 .5 .1",
        "0 .5 .5 .1 .1 .9 .9 .9 .9 .9",
        "cat .5 .5 .1 .1",
        "0 .5 .5 .1 .1",
    ]
    (tmp_path / "labels/a.txt").write_text("\n".join(rows))
    (tmp_path / "labels/lonely.txt").write_text("")
    (tmp_path / "labels/rotten.txt").write_text("")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    report = convert_yolo(tmp_path / "images", tmp_path / "labels", tmp_path / "names.txt", tmp_path / "yolo.json")
    assert {reason: len(records) for reason, records in report.dropped.items()} == {
        "annotation without an image": 1,
        "image that does not decode": 1,
        "class that is not among the names": 1,
        "box without area": 1,
        "box outside its image": 1,
        "row that is neither a box nor a polygon": 3,
    }
    assert "a.txt:1: 2" in str(report)
    assert "a.txt:4: '0 .5 .5 .1'" in str(report)
    assert (report.num_images, report.num_boxes) == (1, 1)


def test_class_names(tmp_path: Path) -> None:
    def names(file: str, text: str) -> list[str]:
        (tmp_path / file).write_text(text)
        return read_class_names(tmp_path / file)

    assert names("n.txt", "a\n b c \n\n") == ["a", "b c"]
    assert names("n.yaml", "names: [a, b]") == ["a", "b"]
    assert names("n.yml", "names: {1: b, 0: 7}") == ["7", "b"]
    with pytest.raises(ValueError, match=r"n.yaml: the numbers of `names` are \[1, 2\]; 0 .. 1 is expected"):
        names("n.yaml", "names: {1: a, 2: b}")
    with pytest.raises(ValueError, match=r"n.yaml: `names` \(a list of class names.*missing required field `names`"):
        names("n.yaml", "nc: 3")
    with pytest.raises(ValueError, match=r"n.yaml: `names`"):
        names("n.yaml", "names: [")
    with pytest.raises(ValueError, match="class name a stands there more than once"):
        names("n.txt", "a\na\n")
    with pytest.raises(ValueError, match="no class name in it"):
        names("n.txt", "\n")
    with pytest.raises(FileNotFoundError, match=r"file of names .*none.txt does not exist"):
        read_class_names(tmp_path / "none.txt")


def test_nothing_to_convert(tmp_path: Path) -> None:
    out = tmp_path / "o.json"
    (tmp_path / "names.txt").write_text("cat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder of annotations .*none does not exist"):
        convert_voc(tmp_path / "none", tmp_path / "empty", out)
    with pytest.raises(ValueError, match=r"folder of annotations .*empty has no .xml file"):
        convert_voc(tmp_path / "empty", tmp_path / "empty", out)
    with pytest.raises(ValueError, match=r"folder of images .*empty has no image"):
        convert_yolo(tmp_path / "empty", tmp_path / "empty", tmp_path / "names.txt", out)
    draw(tmp_path / "images/a.jpg", 40, 30)
    with pytest.raises(ValueError, match=r"no text file in .*empty has the name of an image"):
        convert_yolo(tmp_path / "images", tmp_path / "empty", tmp_path / "names.txt", out)
    write_voc(tmp_path, "b", voc_object("dog", (1, 1, 9, 9)))
    with pytest.raises(
        ValueError, match=r"o.json is not written: not one image is left .*1 x annotation without an image"
    ):
        convert_voc(tmp_path / "xml", tmp_path / "images", out)
    assert not out.exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((30, 40, 3), np.uint8))
    write_voc(tmp_path, "a", voc_object("dog", (1, 1, 9, 9)))
    (tmp_path / "a.txt").write_text("0 .5 .5 .5 .5")
    (tmp_path / "names").write_text("dog")
    here, out = str(tmp_path), str(tmp_path / "o.json")
    convert_dataset.main(["voc", "--annotations", f"{here}/xml", "--images", here, "--out", out])
    assert "o.json: 1 images (0 without objects), 1 boxes, 1 classes: dog" in capsys.readouterr().out
    convert_dataset.main(["yolo", "--images", here, "--labels", here, "--names", f"{here}/names", "--out", out])
    assert read(tmp_path / "o.json")["annotations"][0]["bbox"] == [10, 7.5, 20, 15]
    with pytest.raises(SystemExit) as stop:
        convert_dataset.main(["voc", "--annotations", f"{here}/none", "--images", here, "--out", out])
    assert stop.value.code == 2
    assert "error: folder of annotations " in capsys.readouterr().err


@needs_shared("data/bccd")
def test_blood_cells(tmp_path: Path) -> None:
    root = SHARED / "data/bccd/BCCD"
    counts = {}
    for split in ("trainval", "test"):
        report = convert_voc(
            root / "Annotations",
            root / "JPEGImages",
            tmp_path / f"{split}.json",
            list_file=root / f"ImageSets/Main/{split}.txt",
        )
        counts[split] = (report.num_images, report.num_boxes, len(report.dropped.get("box without area", [])))
        assert report.class_names == ("Platelets", "RBC", "WBC")
    # 3943 objects in the XML files of trainval; the corners of two coincide.
    assert counts == {"trainval": (292, 3941, 2), "test": (72, 945, 0)}


def yolo(folder: Path, rows: str, names: str = "cat\n", names_file: str = "names.txt") -> Any:
    draw(folder / "images/a.jpg", 100, 100)
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels/a.txt").write_text(rows)
    (folder / names_file).write_text(names)
    return convert_yolo(folder / "images", folder / "labels", folder / names_file, folder / "o.json")


def test_key_points_are_no_polygon(tmp_path: Path) -> None:
    box, points = "0 .5 .5 .2 .4", [".1 .1", ".9 .9", ".1 .9"]
    told = "names: [cat]\nkpt_shape: [3, 2]\n"
    report = yolo(tmp_path, f"{box} {' '.join(points)}\n{box}\n{box} .1 .1", told, "data.yaml")
    assert [record["bbox"] for record in read(tmp_path / "o.json")["annotations"]] == [[40, 30, 20, 40]] * 2
    assert list(report.dropped) == ["row that is neither a box nor a polygon"]
    assert not report.notes
    # Not told: an odd number of values may be a polygon, an even one cannot.
    report = yolo(tmp_path, f"{box} {' '.join(points)}\n{box} .1 .1 2\n{box} .9\n{box} .9 .9 .9 .9 .9 .9 .9")
    assert [record["bbox"] for record in read(tmp_path / "o.json")["annotations"]] == [
        [10, 10, 80, 80],
        [40, 30, 20, 40],
        [40, 30, 20, 40],
    ]
    assert len(report.dropped["row that is neither a box nor a polygon"]) == 1
    assert {reason: len(rows) for reason, rows in report.notes.items()} == {
        "row of more than five values read as a polygon (key points need kpt_shape in the data.yaml)": 1,
        "row read as a box with key points, by its length": 1,
        "row read as a box with a score behind it": 1,
    }
    with pytest.raises(ValueError, match=r"data.yaml: `kpt_shape` is 17; the number of key points"):
        yolo(tmp_path, box, "names: [cat]\nkpt_shape: 17\n", "data.yaml")


def test_texts_with_a_mark_and_texts_that_are_not_utf8(tmp_path: Path) -> None:
    report = yolo(tmp_path, "\ufeff0 .5 .5 .2 .4", "\ufeffcat\ndog\n")
    assert (report.class_names, report.num_boxes, report.dropped) == (("cat", "dog"), 1, {})
    draw(tmp_path / "images/b.jpg", 100, 100)
    (tmp_path / "labels/b.txt").write_bytes(b"0 .5 .5 .2 .4 # \xe9t\xe9")
    report = convert_yolo(tmp_path / "images", tmp_path / "labels", tmp_path / "names.txt", tmp_path / "o.json")
    assert (report.num_images, list(report.dropped)) == (1, ["image whose text file is not UTF-8"])
    assert "b.txt: not a UTF-8 text" in str(report)
    (tmp_path / "names.txt").write_bytes("Käfer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names.txt: not a UTF-8 text: .* at byte 1; save it as UTF-8"):
        read_class_names(tmp_path / "names.txt")


def test_nothing_left_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match=r"o.json is not written: not one box is left to convert \(1 x class that is not"
    ):
        yolo(tmp_path, "7 .5 .5 .2 .4")
    here = str(tmp_path)
    arguments = ["yolo", "--images", f"{here}/images", "--labels", f"{here}/labels", "--names", f"{here}/names.txt"]
    with pytest.raises(SystemExit) as stop:
        convert_dataset.main([*arguments, "--out", f"{here}/o.json"])
    assert stop.value.code == 2
    assert "not one box is left" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"not one box is left to convert \(there was none\)"):
        yolo(tmp_path, "")
    assert not (tmp_path / "o.json").exists()


def test_images_of_the_same_name_are_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "sub/a.jpg"):
        draw(tmp_path / "images" / name, 40, 30)
    write_voc(tmp_path, "a", voc_object("dog", (1, 1, 9, 9)))
    report = convert_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "o.json")
    assert [image["file_name"] for image in read(tmp_path / "o.json")["images"]] == ["a.jpg"]
    (note,) = report.notes["one of several images of the same name taken"]
    assert note.endswith(f"a.jpg, not {tmp_path}/images/a.png, {tmp_path}/images/sub/a.jpg")
    write_voc(tmp_path, "a", "<filename>a.png</filename>" + voc_object("dog", (1, 1, 9, 9)))
    report = convert_voc(tmp_path / "xml", tmp_path / "images", tmp_path / "o.json")
    assert [image["file_name"] for image in read(tmp_path / "o.json")["images"]] == ["a.png"]
    assert not report.notes

    report = yolo(tmp_path, "0 .5 .5 .2 .4")
    assert report.num_boxes == 2
    (note,) = report.notes["text file that several images share, taken for each"]
    assert note == f"{tmp_path}/labels/a.txt: {tmp_path}/images/a.jpg, {tmp_path}/images/a.png"


def test_a_folder_as_out_leaves_nothing_behind(tmp_path: Path) -> None:
    yolo(tmp_path, "0 .5 .5 .2 .4")
    (tmp_path / "out/o.json").mkdir(parents=True)
    with pytest.raises(OSError, match=r"o.json"):
        convert_yolo(tmp_path / "images", tmp_path / "labels", tmp_path / "names.txt", tmp_path / "out/o.json")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["o.json"]

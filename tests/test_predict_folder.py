"""Detections of a folder: shards, formats, kills, the same as eval. Run: pytest tests/test_predict_folder.py"""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_predictor import small_detector

from backbones.errors import UserError
from detection.cli import convert, predict
from detection.cli import eval as eval_det
from detection.data.coco import CocoIndex
from detection.data.drawn import draw_detection_set
from detection.evaluation.table import read_coco_results
from detection.inference import cluster, folder_formats
from detection.inference import folder as folders
from detection.inference.folder import Images, Shards, list_images
from detection.inference.folder_formats import Formats, voc_xml, yolo_rows
from detection.inference.predictor import load_detector
from detection.weights.native import save_detector

pq = pytest.importorskip("pyarrow.parquet", reason="litedet predict needs pyarrow (pip install 'litedet[predict]')")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("predict")
    save_detector(root / "d.safetensors", *small_detector())
    (root / "images" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(23):
        image = rng.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "images" / ("sub" if number % 2 else "") / f"{number}.png"), image)
    (root / "images" / "rotten.jpg").write_bytes(b"rotten")
    return root


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--device", "cpu", "--workers", "0", "--score-threshold", "0.01", "--shard-size", "5", "--batch-size", "4"]
    return [str(folder / "d.safetensors"), "--source", str(folder / "images"), "--out", str(out), *fixed, *more]


def rows(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_every_image_once_with_what_the_predictor_finds(folder: Path, tmp_path: Path, capsys):
    predict.main(arguments(folder, tmp_path / "out"))
    found = rows(tmp_path / "out")
    assert [row["image"] for row in found] == list_images(str(folder / "images"))
    assert len(found) == 24
    detector = load_detector(folder / "d.safetensors", device="cpu", score_threshold=0.01)
    number = 0
    for row in found:
        if row["image"].endswith("rotten.jpg"):
            assert "rotten.jpg" in row["error"]
            assert row["boxes"] is None
            continue
        expected = detector(row["image"])
        assert row["labels"] == expected.labels.tolist()
        assert row["names"] == expected.names()
        np.testing.assert_allclose(row["scores"], expected.scores, atol=1e-5)
        np.testing.assert_allclose(np.array(row["boxes"]).reshape(-1, 4), expected.boxes, atol=1e-2)
        assert (row["height"], row["width"]) == cv2.imread(row["image"]).shape[:2]
        number += len(expected)
    assert number > 0
    assert "rotten.jpg" in (tmp_path / "out" / "unreadable.txt").read_text()
    assert "24 images, 5 of 5 shards" in capsys.readouterr().out


def test_a_worker_process_gives_the_same_rows(folder: Path, tmp_path: Path):
    for workers in ("0", "1"):
        predict.main(arguments(folder, tmp_path / workers, "--workers", workers))
    found, expected = rows(tmp_path / "1"), rows(tmp_path / "0")
    assert len(found) == 24
    assert found == expected


def test_processes_share_the_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in (("1", [1, 3]), ("0", [0, 1, 2, 3, 4])):
        monkeypatch.setenv("RANK", rank)
        predict.main(arguments(folder, tmp_path / "out", "--format", "yolo"))
        # The last of them writes what is about the whole.
        assert (tmp_path / "out" / "data.yaml").exists() == (rank == "0")
        assert sorted(int(path.stem[6:]) for path in (tmp_path / "out").glob("*.parquet")) == there
    assert [row["image"] for row in rows(tmp_path / "out")] == list_images(str(folder / "images"))


def test_another_threshold_or_list_in_the_same_folder_is_refused(folder: Path, tmp_path: Path, capsys):
    predict.main(arguments(folder, tmp_path / "out"))
    for more, told in (
        (["--score-threshold", "0.5"], "score_threshold 0.01 -> 0.5"),
        (["--source", str(folder / "images" / "sub" / "*.png")], "images 24 -> 11"),
    ):
        with pytest.raises(SystemExit):
            predict.main(arguments(folder, tmp_path / "out", *more))
        assert told in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["score_threshold"] == 0.01


def run(argv: list[str]) -> subprocess.Popen[bytes]:
    code = "import sys; from detection.cli.predict import main; main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def files(out: Path) -> list[Path]:
    return [Path(folder) / name for folder, _, names in os.walk(out) for name in names]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs the signals of Unix")
def test_killed_five_times_and_continued_has_everything_once(folder: Path, tmp_path: Path):
    paths = list_images(str(folder / "images"))
    many = tmp_path / "list.txt"
    links = tmp_path / "links"
    links.mkdir()
    for number in range(120):
        (links / f"{number:03}{Path(paths[number % 24]).suffix}").symlink_to(paths[number % 24])
    many.write_text("".join(f"{path}\n" for path in sorted(links.iterdir())))
    out = tmp_path / "out"
    # A batch lies in one shard, so that a restart has the same batches: results are then the same to the bit.
    more = ["--source", str(many), "--format", *get_args(predict.Format)]
    argv = arguments(folder, out, *more, "--batch-size", "5", "--score-threshold", "0.3")
    # 24 shards, then 115 texts, 115 XML files and some: killed where so many files are there, those half written included.
    killed_at = []
    for wanted in sorted(random.sample(range(1, 240), 5)):
        process = run(argv)
        while process.poll() is None and len(files(out)) < wanted:
            time.sleep(0.01)
        process.kill()
        process.wait()
        killed_at.append(len(files(out)))
    assert killed_at[0] < 259, killed_at
    ends = (".parquet", ".txt", ".xml")
    before = {path: path.stat().st_mtime_ns for path in files(out) if path.suffix in ends and path.stem != "unreadable"}
    predict.main(argv)
    assert [row["image"] for row in rows(out)] == sorted(map(str, links.iterdir())), killed_at
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())  # nothing was done twice
    predict.main([*argv, "--out", str(tmp_path / "whole")])
    one, other = (
        {str(path.relative_to(root)): path.read_bytes() for path in files(root)} for root in (out, tmp_path / "whole")
    )
    assert one == other, killed_at


def test_sources_that_hold_nothing_say_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_images(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no image in it"):
        list_images(str(tmp_path))


def test_every_format_is_what_our_own_readers_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, source = tmp_path / "out", folder / "images"
    predict.main(arguments(folder, out, "--score-threshold", "0.3"))
    predict.main(arguments(folder, out, "--score-threshold", "0.3", "--format", "coco", "yolo", "voc"))  # afterwards
    printed = capsys.readouterr().out
    names = ("detections.json", "instances.json", "data.yaml", "classes.txt")
    assert all(f"written: {out / name}" in printed for name in names)
    found = [row for row in rows(out) if row["error"] is None]
    number = sum(len(row["boxes"]) for row in found)
    assert number > 20
    index = CocoIndex.read(out / "instances.json")
    assert [str(source / index.file_name(place)) for place in range(len(index))] == [row["image"] for row in found]
    assert index.class_names == ("cat", "dog")
    table = read_coco_results(out / "detections.json", index)
    assert (table.boxes == [box for row in found for box in row["boxes"]]).all()
    assert (table.scores == [score for row in found for score in row["scores"]]).all()
    assert (table.labels == [label for row in found for label in row["labels"]]).all()
    assert len(list((out / "labels").rglob("*.txt"))) == len(list((out / "annotations").glob("*.xml"))) == 23

    both = ["--images", str(source), "--out"]
    yolo = [
        "yolo",
        *both,
        str(tmp_path / "yolo.json"),
        "--labels",
        str(out / "labels"),
        "--names",
        str(out / "data.yaml"),
    ]
    voc = ["voc", *both, str(tmp_path / "voc.json"), "--annotations", str(out / "annotations")]
    convert.main(yolo)
    convert.main([*voc, "--names", str(out / "classes.txt")])
    for name in ("yolo", "voc"):
        again = CocoIndex.read(tmp_path / f"{name}.json")
        assert again.class_names == ("cat", "dog")
        where = {again.file_name(place): place for place in range(len(again))}
        assert "rotten.jpg" not in where or name == "yolo"
        for place in range(len(index)):
            objects, read = index.objects(place), again.objects(where[index.file_name(place)])
            assert read.labels.tolist() == objects.labels.tolist()
            np.testing.assert_allclose(read.boxes, objects.boxes, atol=1e-3)


def test_scores_in_yolo_and_voc(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    predict.main(arguments(folder, out, "--score-threshold", "0.3", "--format", "yolo", "voc", "--save-conf"))
    row = next(row for row in rows(out) if row["scores"])
    name = Path(row["image"]).relative_to(folder / "images").with_suffix("")
    lines = (out / "labels" / f"{name}.txt").read_text().splitlines()
    assert [float(line.split()[5]) for line in lines] == pytest.approx(row["scores"], abs=1e-6)
    assert f"<score>{row['scores'][0]:.6f}</score>" in (out / "annotations" / f"{name.name}.xml").read_text()
    capsys.readouterr()
    labels = ["--labels", str(out / "labels"), "--names", str(out / "data.yaml"), "--out", str(tmp_path / "o.json")]
    convert.main(["yolo", "--images", str(folder / "images"), *labels])
    assert "row read as a box with a score behind it" in capsys.readouterr().out


def test_texts_by_hand():
    empty = {"width": 200, "height": 100, "boxes": [], "scores": [], "labels": [], "names": [], "error": None}
    assert yolo_rows(empty, True) == ""
    assert b"<object>" not in voc_xml("a.jpg", empty, True)
    row = empty | {"boxes": [[20.0, 10.0, 60.0, 90.0], [199.5, 0.0, 200.0, 100.0]], "scores": [0.75, 0.5]}
    row |= {"labels": [1, 0], "names": ["dog", "c<t"]}
    assert yolo_rows(row, False).splitlines() == [
        "1 0.20000000 0.50000000 0.20000000 0.80000000",
        "0 0.99875000 0.50000000 0.00250000 1.00000000",
    ]
    assert yolo_rows(row, True).splitlines()[0].endswith(" 0.750000")
    xml = voc_xml("a.jpg", row, False).decode()
    for text in ("<filename>a.jpg</filename>", "<width>200</width>", "<height>100</height>", "<name>c&lt;t</name>"):
        assert text in xml
    assert "score" not in xml
    corners = [
        f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        for x1, y1, x2, y2 in ((21, 11, 60, 90), (199.9999, 1, 200, 100))
    ]
    joined = "".join(line.strip() for line in xml.splitlines())
    assert all(text in joined for text in corners)


def test_images_that_would_share_a_file_are_named_before_anything_runs(folder: Path, tmp_path: Path, capsys):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png"):
        shutil.copy(folder / "images" / "0.png", images / name)
    argv = arguments(folder, tmp_path / "out", "--source", str(images))
    predict.main([*argv, "--format", "yolo"])  # in folders of their own
    with pytest.raises(SystemExit):
        predict.main([*argv, "--format", "voc"])
    assert f"{images}/a.png and {images}/sub/a.png would share the file annotations/a.xml" in capsys.readouterr().err
    shutil.copy(images / "a.png", images / "a.bmp")
    with pytest.raises(SystemExit):
        predict.main([*argv, "--out", str(tmp_path / "other"), "--format", "yolo"])
    assert "would share the file labels/a.txt" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def formats(out: Path, root: Path, paths: list[str], *wanted: folder_formats.Format) -> Formats:
    return Formats(
        wanted=wanted,
        shards=Shards(paths=paths, out=out, size=2),
        root=root,
        class_names=("cat",),
        category_ids=np.array([7]),
        image_ids=np.arange(1, len(paths) + 1),
    )


def test_formats_of_nothing_and_of_a_part(tmp_path: Path):
    found = {"image": "/r/a.png", "width": 9, "height": 8, "boxes": [], "scores": [], "labels": [], "names": []}
    made = formats(tmp_path, Path("/r"), ["/r/a.png", "/r/b.png", "/r/c.png"], "coco", "yolo", "voc")
    made.shards.write(0, [found, {"image": "/r/b.png", "error": "rotten"}])
    assert made.write() == []  # a shard is missing: no file about the whole
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["a.txt"]
    with pytest.raises(ValueError, match="shard 1 has 1 images, 2 rows are given"):
        made.shards.write(1, [found, found])
    made.shards.write(1, [found | {"image": "/r/c.png"}])
    assert len(made.write()) == 4
    assert json.loads((tmp_path / "detections.json").read_text()) == []
    instances = json.loads((tmp_path / "instances.json").read_text())
    assert [image["file_name"] for image in instances["images"]] == ["a.png", "c.png"]
    assert instances["annotations"] == []
    assert instances["categories"] == [{"id": 7, "name": "cat"}]
    with pytest.raises(UserError, match=r"/r/a.png does not lie in /s"):
        formats(tmp_path, Path("/s"), ["/r/a.png"], "yolo")


def test_the_same_detections_as_eval(folder: Path, tmp_path: Path):
    draw_detection_set(tmp_path / "set", num_train=1, num_val=11, size=(96, 128))
    images, annotations = tmp_path / "set" / "val", tmp_path / "set" / "val.json"
    names = CocoIndex.read(annotations).class_names
    model, info = small_detector(names)
    save_detector(tmp_path / "d.safetensors", model, info)
    first = [str(tmp_path / "d.safetensors")]
    common = ["--device", "cpu", "--batch-size", "4", "--score-threshold", "0.002", "--annotations", str(annotations)]
    result = eval_det.main([*first, *common, "--images", str(images), "--predictions", str(tmp_path / "eval.json")])
    for more, out in (([], "with"), (None, "without")):  # the ids of the file, or a sorted folder's
        argv = [*first, *(common if more is not None else common[:-2]), "--source", str(images)]
        predict.main([*argv, "--out", str(tmp_path / out), "--format", "coco", "--shard-size", "3", "--workers", "0"])
    index = CocoIndex.read(annotations)
    expected = read_coco_results(tmp_path / "eval.json", index)
    assert len(expected) > 100
    for out in ("with", "without"):
        found = read_coco_results(tmp_path / out / "detections.json", index)
        for name in ("image_ids", "boxes", "scores", "labels"):
            assert (getattr(found, name) == getattr(expected, name)).all(), (out, name)
        argv = ["--from-predictions", str(tmp_path / out / "detections.json"), "--annotations", str(annotations)]
        again = eval_det.main(argv)
        assert again.figures == result.figures
    assert result.figures["AR100"] > 0  # else the figures say nothing


def test_boxes_count_the_pixels_that_the_annotation_file_counts(folder: Path, tmp_path: Path):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "a.png", exif=exif)
    for number, (width, height) in enumerate(((90, 60), (60, 90), (50, 50))):
        image = {"id": 5, "file_name": "a.png", "width": width, "height": height}
        content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
        out = tmp_path / str(number)
        more = ["--source", str(tmp_path / "images"), "--annotations", str(tmp_path / f"{number}.json")]
        predict.main(arguments(folder, out, *more))
        (row,) = rows(out)
        if number == 2:
            assert "the image is 60x90 pixels, its annotation says 50x50" in row["error"]
        else:
            assert (row["width"], row["height"]) == (width, height)


def test_the_thresholds_of_the_file_count(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, info = small_detector()
    save_detector(tmp_path / "d.safetensors", model, replace(info, thresholds=(0.9, 0.02)))
    argv = [str(tmp_path / "d.safetensors"), "--source", str(folder / "images" / "0.png")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # "auto" is the CPU
    predict.main([*argv, "--out", str(tmp_path / "out"), "--workers", "0"])
    (row,) = rows(tmp_path / "out")
    expected = load_detector(tmp_path / "d.safetensors", device="cpu")(folder / "images" / "0.png")
    assert row["labels"] == expected.labels.tolist()
    assert set(row["labels"]) == {1}
    assert min(row["scores"]) >= np.float32(0.02)


def test_a_file_name_that_is_no_text_stops_nothing(folder: Path, tmp_path: Path):
    name = os.fsdecode(b"b\xff.png")
    (tmp_path / "images").mkdir()
    try:
        shutil.copy(folder / "images" / "0.png", tmp_path / "images" / name)
    except OSError:
        pytest.skip("this file system takes no such name")
    (tmp_path / "images" / os.fsdecode(b"c\xff.jpg")).write_bytes(b"rotten")
    predict.main(
        arguments(folder, tmp_path / "out", "--source", str(tmp_path / "images"), "--format", "coco", "yolo", "voc")
    )
    one, other = rows(tmp_path / "out")
    assert one["image"] == f"{tmp_path}/images/b\\xff.png"
    assert one["boxes"]
    assert "c\\xff.jpg" in other["error"]
    assert (tmp_path / "out" / "labels" / name).with_suffix(".txt").read_text()
    (tmp_path / "list.txt").write_bytes(os.fsencode(tmp_path / "images" / name) + b"\r\n")
    assert list_images(str(tmp_path / "list.txt")) == [str(tmp_path / "images" / name)]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--shard-size", "0"], "--shard-size must be at least 1"),
        (["--score-threshold", "1"], "must be in [0, 1)"),
        (["--format"], "--format"),
        (["--save-conf"], "--save-conf is for --format yolo and voc"),
        (["--annotations", "a.json", "--source", "*.jpg"], "--annotations needs the folder of its images as --source"),
        (["--detectors", "2"], "--detectors is for --engine ray"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(more: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        predict.main(["none.pt", "--source", "none", "--out", "none", *more])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_ray_and_torchrun_are_not_both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        predict.main(["none.pt", "--source", "none", "--out", "none", "--engine", "ray"])
    assert "start it once, without torchrun" in capsys.readouterr().err


def test_packages_that_are_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(cluster, "import_module", refuse)
    with pytest.raises(SystemExit):
        predict.main(arguments(folder, tmp_path / "out", "--engine", "ray"))
    assert "--engine ray needs the package ray; pip install 'litedet[ray]'" in capsys.readouterr().err
    monkeypatch.setattr(folders.importlib, "import_module", refuse)
    with pytest.raises(SystemExit):
        predict.main(arguments(folder, tmp_path / "other"))
    assert "Parquet needs the package pyarrow; pip install 'litedet[predict]'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_rows_of_a_cluster_come_in_any_order(tmp_path: Path):
    arrow, _ = folders.require_arrow()
    shards = Shards(paths=[f"{number}.jpg" for number in range(5)], out=tmp_path, size=2)
    tables = [
        arrow.table({"position": positions, "error": [str(one) for one in positions]})
        for positions in ([3, 0], [4], [2, 1])
    ]
    taken = cluster._collect(iter(tables), shards, [0, 1, 2])
    assert next(taken) == 2
    assert not list(tmp_path.iterdir())
    assert next(taken) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000002.parquet"]
    assert list(taken) == [2]
    assert [(row["image"], row["error"]) for row in rows(tmp_path)] == [(f"{n}.jpg", str(n)) for n in range(5)]
    with pytest.raises(RuntimeError, match="the cluster ended without 2 of 3 shards"):
        list(cluster._collect(iter(tables[:2]), Shards(paths=shards.paths, out=tmp_path / "b", size=2), [0, 1, 2]))


def test_an_actor_finds_the_same_whoever_decodes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = list_images(str(folder / "images"))[-3:]
    paths[1] = str(folder / "images" / "rotten.jpg")
    options = {"score_threshold": 0.01, "device": "cpu"}
    detector = load_detector(folder / "d.safetensors", device="cpu", score_threshold=0.01)
    monkeypatch.setattr(cluster, "_fetch", lambda reference: Images(paths, detector.info.model))
    actor = cluster._Detector(str(folder / "d.safetensors"), options, None)
    batch = {"position": np.array([2, 0, 1])}
    found = actor(batch).to_pylist()
    assert actor(cluster._decode(batch, None)).to_pylist() == found
    assert [row["position"] for row in found] == [2, 0, 1]
    assert "rotten.jpg" in found[2]["error"]
    expected = detector([paths[2], paths[0]])
    assert [row["labels"] for row in found[:2]] == [one.labels.tolist() for one in expected]
    assert len(found[0]["scores"]) > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray (pip install 'litedet[ray]')")
def test_a_ray_cluster_finds_the_same(folder: Path, tmp_path: Path):
    predict.main(arguments(folder, tmp_path / "local"))
    process = run(arguments(folder, tmp_path / "ray", "--engine", "ray", "--detectors", "1"))
    assert process.wait(timeout=300) == 0
    found, expected = rows(tmp_path / "ray"), rows(tmp_path / "local")
    assert len(found) == 24
    for one, other in zip(found, expected, strict=True):
        assert {**one, "boxes": 0, "scores": 0} == {**other, "boxes": 0, "scores": 0}
        np.testing.assert_allclose(one["scores"] or [], other["scores"] or [], atol=1e-5)
        np.testing.assert_allclose(one["boxes"] or [], other["boxes"] or [], atol=1e-2)


def test_the_formats_of_the_command_are_those_that_are_written():
    assert predict.Format == folder_formats.Format

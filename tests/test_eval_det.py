"""The evaluation tool from command line to json. Run: pytest tests/test_eval_det.py"""

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from detection.cli.eval import main
from detection.data.augment import EvalTransform
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset
from detection.data.loader import build_loader
from detection.engine.checkpoint import save_checkpoint
from detection.engine.plain import to_plain
from detection.evaluation.coco_ap import FIGURES, CocoEvaluator
from detection.evaluation.run import evaluate
from detection.inference.predictor import Predictor, load_detector
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.postprocess import PostprocessConfig, build_postprocess
from detection.structures import Detections, RawPredictions
from detection.weights.info import DetectorInfo
from detection.weights.native import read_detector, save_detector

NAMES = ("disc", "square", "star")
FILE_IDS = {"star": 2, "disc": 5, "square": 9, "moon": 11}  # neither the detector's ids nor its order


class Scene:
    """A detector with drawn weights, and an annotation file in which whatever it finds is the truth: its AP is 1."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "detector.safetensors"
        self.annotations = folder / "annotations.json"
        self.images = folder / "images"
        self.json = folder / "out" / "figures.json"
        self.images.mkdir()
        torch.manual_seed(0)
        config = SSDLiteConfig(
            backbone=MobileNetV2Config(width=0.35), input_size=(96, 128), resize="letterbox", init_std=0.3
        )
        self.info = DetectorInfo(
            model=config,
            postprocess=PostprocessConfig(max_detections=20),
            class_names=NAMES,
            category_ids=(1, 2, 3),
        )
        self.model = SSDLite(config, len(NAMES))
        save_detector(self.checkpoint, self.model, self.info)

        rng = np.random.default_rng(0)
        predictor = load_detector(self.checkpoint, device="cpu", score_threshold=0.001)
        self.content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": id_, "name": name} for name, id_ in FILE_IDS.items()],
        }
        for number in range(6):
            height, width = 60 + 10 * number, 90
            path = self.images / f"{number}.png"
            cv2.imwrite(str(path), cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (width, height)))
            self.content["images"].append({"id": 30 - number, "file_name": path.name, "width": width, "height": height})
            self.annotate(predictor, 30 - number, path)
        self.write()

    def annotate(self, predictor: Predictor, image_id: int, path: Path) -> None:
        detections = predictor(path)
        for box, name in zip(detections.boxes.double().tolist(), detections.names(), strict=True):
            x1, y1, x2, y2 = box
            self.content["annotations"].append(
                {
                    "id": len(self.content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": FILE_IDS[name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )

    def write(self) -> None:
        self.annotations.write_text(json.dumps(self.content))

    def arguments(self, *more: str) -> list[str]:
        fixed = [
            "--annotations",
            str(self.annotations),
            "--images",
            str(self.images),
            "--workers",
            "0",
            "--batch-size",
            "4",
        ]
        return [str(self.checkpoint), *fixed, *more]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_everything_found_is_the_truth(scene: Scene, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    predictions = tmp_path / "predictions.json"
    main(scene.arguments("--json", str(scene.json), "--predictions", str(predictions)))
    report = json.loads(scene.json.read_text())
    num_boxes = len(scene.content["annotations"])
    assert num_boxes > 20
    assert report["AP"] == pytest.approx(1, abs=1e-6)
    assert set(FIGURES) < set(report)
    counts = {name: sum(FILE_IDS[name] == a["category_id"] for a in scene.content["annotations"]) for name in NAMES}
    assert report["objects_per_class"] == counts
    assert list(report["AP_per_class"]) == list(NAMES)
    for name in NAMES:
        assert report["AP_per_class"][name] == (pytest.approx(1, abs=1e-6) if counts[name] else None)
    assert (report["num_images"], report["num_detections"], report["unreadable"]) == (6, num_boxes, [])
    assert set(report["milliseconds_per_image"]) == {"network", "postprocess", "wait"}

    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["class", "objects", "AP"]
    assert [line.split()[0] for line in out[1:4]] == list(NAMES)
    for name, line in zip(NAMES, out[1:4], strict=True):
        assert line.split()[1:] == [str(counts[name]), "1.000" if counts[name] else "-"]
    assert "AP         1.000" in out
    assert f"6 images, {num_boxes} detections" in out
    assert f"{num_boxes} detections written to {predictions}" in out

    # What was written stands up before the reference, with the file's own category ids.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(scene.annotations))
        reference = COCOeval(truth, truth.loadRes(str(predictions)), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert reference.stats.tolist() == pytest.approx([report[name] for name in FIGURES], abs=1e-9)


def test_backends_and_thresholds(scene: Scene) -> None:
    faster, reference = (main(scene.arguments("--backend", name)) for name in ("faster", "pycocotools"))
    assert faster == reference
    strict = main(scene.arguments("--score-threshold", "0.5"))
    assert strict.num_detections < faster.num_detections
    assert main(scene.arguments("--nms-threshold", "0.01")).figures["AP"] < 0.9
    assert main(scene.arguments("--input-size", "96", "96")).figures["AP"] < 0.9


def test_training_checkpoint(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(
        path, {"weights": scene.model.state_dict(), "extra": {"detector": to_plain(scene.info)}, "epoch": 3}
    )
    assert main([str(path), *scene.arguments()[1:]]).figures["AP"] == pytest.approx(1, abs=1e-6)


def test_a_file_with_fewer_classes(scene: Scene) -> None:
    name = max(NAMES, key=lambda n: sum(FILE_IDS[n] == a["category_id"] for a in scene.content["annotations"]))
    scene.content["categories"] = [{"id": FILE_IDS[name], "name": name}]
    scene.content["annotations"] = [a for a in scene.content["annotations"] if a["category_id"] == FILE_IDS[name]]
    scene.write()
    result = main(scene.arguments())
    assert result.figures["AP"] == pytest.approx(1, abs=1e-6)
    assert {n for n, ap in result.class_ap.items() if ap is not None} == {name}


def test_classes_alone(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    # A category that the detector does not know: wrong, unless only others are asked for.
    first = scene.content["annotations"][0]
    moon = {**first, "id": 10_000, "category_id": FILE_IDS["moon"]}
    scene.content["annotations"].append(moon)
    scene.write()
    message = error_of(capsys, scene.arguments())
    assert "unknown category 'moon' (id 11, 1 boxes)" in message
    assert "the classes are 'disc', 'square', 'star'" in message
    name = next(n for n in NAMES if FILE_IDS[n] == first["category_id"])
    result = main(scene.arguments("--classes", name))
    assert list(result.class_ap) == [name]
    assert result.figures["AP"] == pytest.approx(1, abs=1e-6)
    assert "has no class 'sun'; it has 'star', 'disc', 'square', 'moon'" in error_of(
        capsys, scene.arguments("--classes", "sun")
    )


def test_unreadable_images_are_named_and_counted(
    scene: Scene, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (scene.images / "1.png").write_bytes(b"rotten")
    (scene.images / "3.png").unlink()
    result = main(scene.arguments("--json", str(scene.json)))
    assert result.num_images == 6
    assert result.figures["AP"] < 0.9
    assert "1.png: the image does not decode (6 bytes)" in caplog.text
    assert "3.png: No such file" in caplog.text
    assert "2 images could not be read and count as images in which nothing was found" in capsys.readouterr().out
    assert [Path(line.split(":")[0]).name for line in json.loads(scene.json.read_text())["unreadable"]] == [
        "1.png",
        "3.png",
    ]

    for path in scene.images.iterdir():
        path.write_bytes(b"rotten")
    assert "none of 6 images can be read; the first:" in error_of(capsys, scene.arguments())


def test_mistakes(scene: Scene, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fixed = scene.arguments()[1:]
    assert "gone.pt does not exist" in error_of(capsys, [str(tmp_path / "gone.pt"), *fixed])
    other = tmp_path / "backbone.pt"
    torch.save(MobileNetV2(MobileNetV2Config(width=0.35)).state_dict(), other)
    assert "is not in a layout that is known here" in error_of(capsys, [str(other), *fixed])
    assert "--batch-size must be at least 1, got 0" in error_of(capsys, scene.arguments("--batch-size", "0"))
    assert "--workers must not be negative, got -1" in error_of(capsys, scene.arguments("--workers", "-1"))
    assert "score_threshold must be in [0, 1), got 2.0" in error_of(capsys, scene.arguments("--score-threshold", "2"))
    assert "image folder" in error_of(capsys, scene.arguments("--images", str(tmp_path / "nowhere")))
    assert "does not exist" in error_of(capsys, scene.arguments("--annotations", str(tmp_path / "gone.json")))
    scene.annotations.write_text("[1, 2]")
    assert "is not a COCO json file" in error_of(capsys, scene.arguments())
    scene.write()
    scene.content["annotations"].clear()
    scene.write()
    assert "no ground truth to evaluate on" in error_of(capsys, scene.arguments())
    assert "--anotations" in error_of(capsys, [str(scene.checkpoint), "--anotations", "x"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_cuda_where_there_is_none(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'cuda' was asked for" in error_of(capsys, scene.arguments("--device", "cuda"))


def test_command_line(scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_det.py", *scene.arguments()])
    assert main(None).figures["AP"] == pytest.approx(1, abs=1e-6)
    assert "AP50       1.000" in capsys.readouterr().out


def test_a_result_file_in_place_of_a_checkpoint(
    scene: Scene, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    predictions = tmp_path / "predictions.json"
    wanted = main(scene.arguments("--predictions", str(predictions), "--score-threshold", "0.3"))
    file = ["--from-predictions", str(predictions), "--annotations", str(scene.annotations)]
    for backend in ("faster", "pycocotools"):
        result = main([*file, "--backend", backend, "--json", str(scene.json)])
        assert result.figures == pytest.approx(wanted.figures, abs=1e-12)
        assert {name: result.class_ap[name] for name in NAMES} == pytest.approx(wanted.class_ap)
    report = json.loads(scene.json.read_text())
    assert (report["checkpoint"], report["from_predictions"]) == (None, str(predictions))
    assert "milliseconds_per_image" not in report
    one = NAMES[0] if wanted.class_counts[NAMES[0]] else NAMES[1]
    assert main([*file, "--classes", one]).class_ap == pytest.approx({one: wanted.class_ap[one]})
    capsys.readouterr()
    assert "not both" in error_of(capsys, scene.arguments("--from-predictions", str(predictions)))
    assert "give a checkpoint" in error_of(capsys, ["--annotations", str(scene.annotations)])
    assert "--images is missing" in error_of(capsys, [str(scene.checkpoint), "--annotations", str(scene.annotations)])
    assert "nothing new" in error_of(capsys, [*file, "--predictions", str(tmp_path / "again.json")])


def test_report_thresholds_and_comparison_in_one_go(
    scene: Scene, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Half of what is found of a class is the truth: its best threshold is the lowest score of that half."""
    plain = load_detector(scene.checkpoint, device="cpu", score_threshold=0.001)
    paths = sorted(scene.images.iterdir())
    found = [
        (int(label), float(score))
        for path in paths
        for label, score in zip(*_labels_and_scores(plain(path)), strict=True)
    ]
    label = max(range(3), key=lambda k: sum(one == k for one, _ in found))
    scores = sorted((score for one, score in found if one == label), reverse=True)
    lowest = scores[len(scores) // 2]
    scene.content["annotations"] = [
        a
        for a, (one, score) in zip(scene.content["annotations"], found, strict=True)
        if one != label or score >= lowest
    ]
    scene.write()
    tuned = tmp_path / "tuned.safetensors"
    more = ["--report", str(tmp_path / "page"), "--write-thresholds", str(tuned), "--against", str(scene.checkpoint)]
    main(scene.arguments(*more, "--json", str(scene.json)))
    text = (tmp_path / "page" / "report.html").read_text()
    assert "Against" in text
    assert text.count("data:image/jpeg") > 0
    differences = json.loads(scene.json.read_text())["differences"]
    assert {row["name"] for row in differences} >= {"AP", NAMES[label]}
    assert all(row["first"] == row["second"] and row["low"] == row["high"] == 0 for row in differences)

    _, info = read_detector(tuned)
    assert info.thresholds[label] == pytest.approx(lowest, abs=1e-6)
    out = capsys.readouterr().out
    for k, name in enumerate(NAMES):
        if all(one != k for one, _ in found):
            assert info.thresholds[k] == 0.25
            assert f"{name}: no object of it was evaluated, 0.25 stays" in out
    detector = load_detector(tuned, device="cpu", default_score=0.99)
    drawn = [pair for path in paths for pair in zip(*_labels_and_scores(detector(path)), strict=True)]
    wanted = [(one, score) for one, score in found if score >= info.thresholds[one]]
    assert [one for one, _ in drawn] == [one for one, _ in wanted]
    assert 0 < len(wanted) < len(found)
    assert len(load_detector(tuned, device="cpu", score_threshold=0.001)(paths[0]).scores) == len(
        plain(paths[0]).scores
    )
    # An evaluation does not use them, and classes that are not evaluated keep theirs.
    other = next(k for k in range(3) if k != label)
    again = tmp_path / "again.safetensors"
    assert main([str(tuned), *scene.arguments()[1:], "--classes", NAMES[label], "--write-thresholds", str(again)])
    assert read_detector(again)[1].thresholds[other] == info.thresholds[other]


def _labels_and_scores(detections: Detections) -> tuple[list[int], list[float]]:
    return detections.labels.tolist(), detections.scores.tolist()


def test_comparison_of_different_class_lists(scene: Scene, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The same detections in a file, whose classes have another order and one more, and from the checkpoint."""
    predictions = tmp_path / "predictions.json"
    main(scene.arguments("--predictions", str(predictions)))
    file = ["--from-predictions", str(predictions), *scene.arguments()[1:]]
    main([*file, "--against", str(scene.checkpoint), "--json", str(scene.json)])
    differences = json.loads(scene.json.read_text())["differences"]
    assert any(row["first"] > 0.9 for row in differences)
    assert all(row["second"] == pytest.approx(row["first"], abs=1e-6) for row in differences)

    # A detector that lacks a class can be compared on the others alone.
    present = [name for name in NAMES if any(FILE_IDS[name] == a["category_id"] for a in scene.content["annotations"])]
    info = replace(scene.info, class_names=(present[0], "moon"), category_ids=(1, 2))
    fewer = tmp_path / "fewer.safetensors"
    save_detector(fewer, SSDLite(info.model, 2), info)
    capsys.readouterr()
    if len(present) > 1:
        assert f"'{present[1]}'" in error_of(capsys, scene.arguments("--against", str(fewer)))
    main(scene.arguments("--against", str(fewer), "--classes", present[0], "--json", str(scene.json)))
    assert {row["name"] for row in json.loads(scene.json.read_text())["differences"]} >= {present[0]}


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["onnxruntime", "openvino"])
def test_exported_networks_have_an_ap(scene: Scene, runner: str) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip(runner)
    result = main(scene.arguments("--runner", runner, "--json", str(scene.json)))
    assert result.figures["AP"] == pytest.approx(1, abs=0.02)
    assert json.loads(scene.json.read_text())["runner"] == runner


@pytest.mark.slow
def test_the_ap_of_an_exported_file_is_that_of_all_its_scores(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from detection.export.module import RawHeads
    from detection.export.onnx import OnnxFile, joined, tail_onnx
    from detection.inference.exported import ExportRecord
    from detection.inference.runners import to_onnx

    model = scene.model.eval()
    content = joined(to_onnx(RawHeads(model).model), tail_onnx(model, scene.info.postprocess))
    scene.checkpoint = scene.checkpoint.with_name("detector.onnx")
    record = ExportRecord(format="onnx", outputs="detections", info=replace(scene.info, thresholds=(0.999,) * 3))
    OnnxFile(content).write(scene.checkpoint, record)
    whole = main(scene.arguments())
    assert whole.figures["AP"] == pytest.approx(1, abs=0.02)
    assert whole.num_detections == len(scene.content["annotations"])
    error = error_of(capsys, scene.arguments("--write-thresholds", str(scene.checkpoint.with_suffix(".safetensors"))))
    assert "detector.onnx is an exported file; give the checkpoint" in error


def test_a_function_has_an_ap(scene: Scene) -> None:
    """What an evaluation needs is a function of images and an info record."""
    model, info = scene.model.eval(), scene.info

    def run(images: torch.Tensor) -> RawPredictions:
        raw: RawPredictions = model(images)
        return raw

    index = CocoIndex.read(scene.annotations)
    index = index.with_categories(np.array(info.category_ids), info.class_names)
    transform = EvalTransform(info.model.input_size, resize_mode=info.model.resize, fill=info.model.fill)
    loader = build_loader(DetectionDataset(index, scene.images, transform), batch_size=4, num_workers=0)
    evaluator = CocoEvaluator(index)
    postprocess = build_postprocess(info.model, info.postprocess, info.class_names)
    assert evaluate(run, loader, postprocess, evaluator) is None
    assert evaluator.compute().figures["AP"] == pytest.approx(1, abs=1e-6)

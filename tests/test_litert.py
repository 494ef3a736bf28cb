"""LiteRT files: conversion, eight bits, and what those who read them expect.

The converter wants older packages than ours: these tests run in an environment of its own, .venv-litert, which
``bash tools/run_tests.sh`` makes and runs them in. Elsewhere they are skipped.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from apart import LITERT_MARKS, run_apart
from test_export_classifier import (
    check_classifier,
    scene,  # noqa: F401  a fixture
)
from test_export_classifier import job_of as classifier_job
from test_litedet import small_litedet
from test_predictor import small_detector

from detection import load_detector
from detection.export.bundle import write_bundle
from detection.export.run import ExportJob, ExportResult, export
from detection.inference.exported import open_exported
from detection.weights.native import save_detector

pytestmark = LITERT_MARKS


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(4):
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(coarse, (200, 150)))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SSDLite whose answers are as large as a trained one's."""
    path = tmp_path_factory.mktemp("checkpoint") / "d.safetensors"
    model, info = small_detector()
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if name.endswith("weight"):
                parameter *= 3
    save_detector(path, model, info)
    return path


def exported(checkpoint: Path, images: Path, out: Path, **options: Any) -> ExportResult:
    job = ExportJob(checkpoint=checkpoint, to="litert", out=out, images=images, **options)
    return export(job, say=lambda line: None)


@pytest.fixture(scope="module")
def made(checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return exported(checkpoint, images, tmp_path_factory.mktemp("made") / "d.tflite")


def test_a_file_says_what_torch_says(made: ExportResult, checkpoint: Path, images: Path) -> None:
    assert made.chosen.difference.sure > 0
    assert made.chosen.difference.found == made.chosen.difference.sure
    assert made.chosen.difference.box < 0.05
    assert open_exported(made.path).record == made.record
    several = sorted(images.iterdir())
    ours = load_detector(checkpoint, device="cpu", score_threshold=0.3)(several)
    for one, other in zip(load_detector(made.path, score_threshold=0.3)(several), ours, strict=True):
        assert len(one) == min(len(other), 100) > 0
        torch.testing.assert_close(one.boxes, other.boxes[:100], atol=0.1, rtol=0)
        assert torch.equal(one.labels, other.labels[:100])


def test_channels_last_images_are_not_misread(made: ExportResult) -> None:
    runner = load_detector(made.path).runner
    given = torch.randint(0, 256, (1, 96, 128, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    assert not given.is_contiguous()
    torch.testing.assert_close(runner(given).codes, runner(given.contiguous()).codes)


def test_raw_heads_of_a_detector_with_another_box_coder(tmp_path: Path, images: Path) -> None:
    """LiteDet: distances as distributions, no background column; also with its boxes decoded in the graph."""
    model, info = small_litedet()
    with torch.no_grad():
        for layer in model.head.classes:
            layer.weight *= 3  # sure of some
    save_detector(tmp_path / "l.safetensors", model, info)
    for raw in (True, False):
        result = exported(tmp_path / "l.safetensors", images, tmp_path / f"{raw}.tflite", raw=raw)
        assert (result.chosen.difference.codes is not None) == raw
        assert result.chosen.difference.sure > 0
        assert result.chosen.difference.box < 0.1


def test_eight_bits(made: ExportResult, checkpoint: Path, images: Path, tmp_path: Path) -> None:
    options = {"int8": True, "calibration": images, "keep_float": ("model.backbone.stem.conv",)}
    result = exported(checkpoint, images, tmp_path / "int8.tflite", **options)
    assert open_exported(result.path).record.precision == "int8"
    assert result.record.kept_float == ("model.backbone.stem.conv",)
    assert result.record.variant
    assert result.chosen.size < 0.45 * made.chosen.size
    assert result.chosen.difference.found >= 0.8 * result.chosen.difference.sure > 0
    model = interpreter(result.path)
    (given,) = model.get_input_details()
    assert given["dtype"] is np.uint8  # MediaPipe refuses signed inputs
    weights = [
        one for one in model.get_tensor_details() if len(one["shape"]) == 4 and one["shape"][1:3].tolist() == [3, 3]
    ]
    kinds = {bool(one["shape"][3] == 3): set[str]() for one in weights}
    for one in weights:
        kinds[bool(one["shape"][3] == 3)].add(one["dtype"].__name__)
    assert kinds == {True: {"float32"}, False: {"int8"}}  # the stem's, and those of the depthwise convolutions


def test_a_classifier(scene: Path) -> None:  # noqa: F811
    check_classifier(scene, export(classifier_job(scene, "litert", "c.tflite"), say=lambda line: None))


# --- what video recorders and the Task library expect


def interpreter(path: Path) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    opened = Interpreter(model_path=str(path))
    opened.allocate_tensors()
    return opened


def test_the_four_outputs_in_the_order_that_recorders_read(made: ExportResult, images: Path) -> None:
    """Boxes, classes, scores, count, by place, as a program reads them that knows no names: the first with y1, x1, y2, x2."""
    model = interpreter(made.path)
    (given,) = model.get_input_details()
    assert given["shape"].tolist() == [1, 96, 128, 3]
    assert given["dtype"] is np.uint8
    outputs = model.get_output_details()
    assert [one["dtype"] for one in outputs] == [np.float32] * 4

    image = sorted(images.iterdir())[0]
    pixels = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
    model.set_tensor(given["index"], cv2.resize(pixels, (128, 96))[None])
    model.invoke()
    boxes, classes, scores, count = (model.get_tensor(one["index"]) for one in outputs)
    assert (boxes.shape, classes.shape, scores.shape, count.shape) == ((1, 100, 4), (1, 100), (1, 100), (1,))

    with zipfile.ZipFile(made.path) as archive:
        names = archive.read("labels.txt").decode().splitlines()
    labels = dict(enumerate(names))  # a line a class, from 0 on, without numbers
    assert labels == {0: "cat", 1: "dog"}
    expected = load_detector(made.path, score_threshold=0.3)(image)
    read = []
    for place in range(int(count[0])):
        if scores[0, place] < 0.3:
            break  # best first
        y1, x1, y2, x2 = boxes[0, place]
        read.append((labels[int(classes[0, place])], scores[0, place], [x1 * 200, y1 * 150, x2 * 200, y2 * 150]))
    assert len(read) == len(expected) > 0
    assert {name for name, *_ in read} == {"cat", "dog"}
    for (name, score, box), wanted, one, other in zip(
        read, expected.names(), expected.scores.tolist(), expected.boxes.tolist(), strict=True
    ):
        assert name == wanted
        assert score == pytest.approx(one)
        assert np.clip(box, 0, [200, 150, 200, 150]) == pytest.approx(other, abs=0.1)


def test_labels_and_record_travel_in_the_file(made: ExportResult) -> None:
    content = made.path.read_bytes()
    assert content[4:8] == b"TFL3"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["labels.txt", "litedet.json"]
        assert archive.testzip() is None


# --- the bundle


def test_a_bundle_finds_the_same_without_torch(made: ExportResult, images: Path, tmp_path: Path) -> None:
    write_bundle(made.path, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "requirements.txt").read_text().split() == [
        "numpy",
        "opencv-python-headless",
        "ai-edge-litert",
    ]
    run_apart("bundle-litert", tmp_path / "bundle", made.path, sorted(images.iterdir())[0])

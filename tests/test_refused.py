"""What is refused with a message, and what seldom happens, part by part. Run: pytest tests/test_refused.py"""

import importlib.util
import io
import json
import math
import pickle
import sys
import tarfile
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backbones.weights import tflite
from detection.checks.folders import read_voc, read_yolo
from detection.cli import video
from detection.data import coco
from detection.engine.config import TrainConfig
from detection.engine.lr_range import find_lr
from detection.engine.runtime import Runtime
from detection.engine.sync_norm import SyncBatchNorm, synchronise_norms
from detection.export.calibration import image_files, network_inputs
from detection.export.folder import model_files
from detection.images import decode
from detection.images.decode import UnreadableImageError
from detection.inference import encoders
from detection.inference.exported import LiteRTRunner
from detection.models import box_coders
from detection.models.build import build_detector
from detection.models.litedet import LiteDetConfig
from detection.models.ssdlite import SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.structures import Detections
from detection.training.distillation import DistillationConfig, _same_bins
from detection.training.run_report import _indented, try_run_report
from detection.weights import recognition
from detection.weights.info import DetectorInfo
from detection.weights.tensorflow import Graph

# ---- files


def test_pixels_of_another_type() -> None:
    with pytest.raises(UnreadableImageError, match=r"a\.tiff: the pixels are float32; 8 or 16 bits a channel are read"):
        decode._to_uint8(np.zeros((4, 4, 3), np.float32), "a.tiff")
    deep = np.array([[[4095, 16, 0]]], np.uint16)  # 12 bits, unless one of them is above that
    assert decode._to_uint8(deep, "a.png").tolist() == [[[255, 1, 0]]]
    assert decode._to_uint8(deep * 16, "a.png").tolist() == [[[255, 1, 0]]]


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        image_files(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    assert image_files(tmp_path) == [tmp_path / "a.jpg"]
    with pytest.raises(ValueError, match=r"none of 1 images can be read; the first is .*a\.jpg"):
        network_inputs([tmp_path / "a.jpg"], SSDLiteConfig())


def test_a_field_that_a_record_lacks_is_no_number() -> None:
    records = [SimpleNamespace(area=2.5), SimpleNamespace(area=None)]
    found = coco._floats(records, "area")
    assert found.dtype == np.float64
    assert found[0] == 2.5
    assert math.isnan(found[1])


def test_a_record_that_json_reads_no_more_is_named_as_it_is() -> None:
    error = "Expected `int`, got `str` - at `$.images[0].id`"
    assert coco._explain(error, b"[" * 100_000) == error
    wrong = b'{"images": [{"id": "a", "segmentation": [1]}]}'
    assert coco._explain(error, wrong) == "Expected `int`, got `str` - at `images[0].id`: {'id': 'a'}"


def test_voc_and_yolo_folders_with_nothing_to_check(tmp_path: Path) -> None:
    annotations, images, names = tmp_path / "xml", tmp_path / "images", tmp_path / "names.txt"
    annotations.mkdir()
    images.mkdir()
    names.write_text("cat\n")
    with pytest.raises(ValueError, match=r"has no \.xml file"):
        read_voc(annotations, images, 0, "train")
    with pytest.raises(ValueError, match="has no image"):
        read_yolo(annotations, images, names, 0, "train")
    (annotations / "a.xml").write_text("<annotation>")
    (annotations / "b.xml").write_text("<annotation/>")
    listed = tmp_path / "list.txt"
    listed.write_text("b\nc\n")
    cv2.imwrite(str(images / "b.png"), np.zeros((4, 4, 3), np.uint8))
    split = read_voc(annotations, images, 0, "train", list_file=listed, names=names)
    kinds = {finding.kind for finding in split.findings}
    assert {"broken-record", "annotation-without-image"} <= kinds
    assert any("c: listed, without an annotation file" in finding.message for finding in split.findings)
    (images / "b.txt").write_bytes(b"0 0.5 0.5 \xff\xfe 1\n")
    assert [f.kind for f in read_yolo(images, images, names, 0, "train").findings] == ["broken-record"]
    (images / "b.txt").write_text("\n0 0.5 0.5 0.5 0.5\n0 0.5\n")
    split = read_yolo(images, images, names, 0, "train")
    (broken,) = split.findings
    assert "b.txt:3: '0 0.5' is neither a box nor a polygon" in broken.message
    assert split.xywh.tolist() == [[0.25, 0.25, 0.5, 0.5]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, r"expected one .* found 0 \(nothing\)"),
        ({"a.tflite": b"", "b.tflite": b""}, r"found 2 \(a.tflite, b.tflite\)"),
        ({"x/a.tflite": b"\x1f\x8b again"}, "a.tflite in it is an archive again; unpack it first"),
    ],
)
def test_archives_that_hold_no_network(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(ValueError, match=message):
        recognition.convert(path)


def test_an_archive_with_too_large_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognition, "_ARCHIVE_LIMIT", 2)
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo("a.tflite")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match=r"a\.tflite has 3 bytes, too many for a small network"):
        recognition.convert(path)


def test_constants_of_a_graph_that_are_not_what_is_expected() -> None:
    class Known(Graph):
        def constant(self, name: str, at_most: int = 0) -> np.ndarray | None:
            return {"square": np.zeros((2, 2)), "nan": np.array([math.nan]), "list": np.arange(2.0)}.get(name)

    graph = Known(Path("a.pb"), {})
    assert graph.numbers("none") is None
    assert graph.number("none") is None
    assert graph.numbers("list").tolist() == [0, 1]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"a\.pb: the constant square has the shape \[2, 2\], a list was expected"):
        graph.numbers("square")
    for name in ("list", "nan"):
        with pytest.raises(ValueError, match=f"the constant {name} is no single number"):
            graph.number(name)


def test_normalisation_of_an_eight_bit_input() -> None:
    def tensor(kind: int, scale: float, zero: int) -> Any:
        quantization = SimpleNamespace(ScaleLength=lambda: 1, Scale=lambda _: scale, ZeroPoint=lambda _: zero)
        return SimpleNamespace(Type=lambda: kind, Quantization=lambda: quantization)

    assert tflite._normalisation(tensor(3, 1 / 128, 128), 3) == (0.5, 0.5)  # [-1, 1], a step off
    assert tflite._normalisation(tensor(3, 0.02, 51), 3) == pytest.approx((0.2, 1 / 5.1))
    assert tflite._normalisation(tensor(0, 0.02, 51), 3) == (0.5, 0.5)  # floats are taken as they are
    for scale in (0.0, -0.02, math.inf, math.nan):
        with pytest.raises(ValueError, match="its input has the scale"):
            tflite._normalisation(tensor(3, scale, 51), 3)


def test_an_export_of_another_kind_makes_no_folder() -> None:
    with pytest.raises(ValueError, match=r"a\.pt2: this is made of a file that ends in \.onnx"):
        model_files(Path("a.pt2"), ("onnx",))


def test_names_and_ids_of_another_number_than_the_classes() -> None:
    info = DetectorInfo(
        model=SSDLiteConfig(), postprocess=PostprocessConfig(), class_names=("cat", "dog"), category_ids=(1, 2)
    )
    assert DetectorInfo.from_plain(info.to_plain()) == info
    with pytest.raises(ValueError, match=r"a\.pt: 2 class names and 1 category ids"):
        DetectorInfo.from_plain(info.to_plain() | {"category_ids": [1]}, "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: 2 class names and 1 thresholds"):
        DetectorInfo.from_plain(info.to_plain() | {"thresholds": [0.5]}, "a.pt")


def test_a_report_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    try_run_report(tmp_path / "none")
    assert "no report of this run" in caplog.text
    (tmp_path / "config.json").write_text("{half")
    assert _indented(tmp_path / "config.json") == "{half"
    (tmp_path / "config.json").write_text('{"a":1}')
    assert _indented(tmp_path / "config.json") == '{\n  "a": 1\n}'


# ---- settings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistillationConfig(class_weight=-1.0), "class_weight and distillation.box_weight must not be negative"),
        (DistillationConfig(box_weight=-1.0), "class_weight and distillation.box_weight must not be negative"),
        (DistillationConfig(temperature=0.0), "temperature must be above 0, got 0.0"),
    ],
)
def test_a_distillation_that_makes_no_sense(config: DistillationConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_box_codes_that_a_teacher_and_a_student_share() -> None:
    assert _same_bins(LiteDetConfig(), LiteDetConfig())
    assert not _same_bins(LiteDetConfig(first_bin=0.0), LiteDetConfig(first_bin=-0.5))
    assert not _same_bins(LiteDetConfig(), SSDLiteConfig())
    assert _same_bins(SSDLiteConfig(), SSDLiteConfig())


def test_no_detector_of_another_config() -> None:
    with pytest.raises(TypeError, match="no detector is built from a SimpleNamespace"):
        build_detector(SimpleNamespace(), 2)  # type: ignore[arg-type]


# ---- the range of learning rates


@dataclass
class Given:
    """A batch whose loss is given."""

    loss: Tensor

    def to(self, *_: object, **__: object) -> "Given":
        return self

    def inputs(self) -> tuple[Tensor]:
        return (self.loss,)


class Losses(nn.Module):
    """A training step whose loss is what the batch says, and a task of such batches."""

    lr_scales: dict[str, float] = {}  # noqa: RUF012
    num_train = 1

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.losses = losses
        self.step = self.model = self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("step", "model"):  # itself: not a part of itself
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, loss: Tensor) -> dict[str, Tensor]:
        return {"loss": loss + 0 * self.weight}

    def train_loader(self) -> list[Given]:
        return [Given(torch.tensor(loss)) for loss in self.losses]


def lr_range_of(losses: list[float], steps: int = 30, **more: Any) -> Any:
    runtime = Runtime(device=torch.device("cpu"), **more)
    return find_lr(Losses(losses), TrainConfig(amp="off"), runtime, steps=steps, low=1e-3, high=1.0)  # type: ignore[arg-type]


def test_a_range_test_goes_round_and_ends_where_the_loss_blows_up() -> None:
    quiet = lr_range_of([1.0, 1.0], steps=13)  # two batches, over and over
    assert quiet.losses == [1.0] * 13
    assert not quiet.diverged
    assert (quiet.rates[0], quiet.rates[-1]) == pytest.approx((1e-3, 1.0))
    blown = lr_range_of([1.0] * 15 + [200.0] * 15)
    assert blown.diverged
    assert blown.losses == [1.0] * 15 + [200.0]  # the average is over 20 at once, more than 4 times the lowest
    broken = lr_range_of([1.0] * 15 + [math.nan] * 15)
    assert broken.diverged
    assert broken.losses == [1.0] * 15


def test_what_a_range_test_cannot_do() -> None:
    with pytest.raises(ValueError, match="runs in one process"):
        lr_range_of([1.0], world_size=2)
    with pytest.raises(ValueError, match="1 training images give no batch of 24"):
        lr_range_of([])
    with pytest.raises(ValueError, match="no longer finite after 3 steps"):
        lr_range_of([1.0] * 3 + [math.inf] * 20)


# ---- networks


@pytest.mark.filterwarnings("ignore:.*SyncBatchNorm")
def test_norms_of_a_gpu_are_torchs_unless_compiled() -> None:
    cuda = torch.device("cuda")  # only its name is looked at
    assert isinstance(synchronise_norms(nn.BatchNorm2d(3), cuda), nn.SyncBatchNorm)
    assert isinstance(synchronise_norms(nn.BatchNorm2d(3), cuda, compiled=True), SyncBatchNorm)
    with pytest.raises(ValueError, match=r"\[B, C, \.\.\.\] is needed, not \[3\]"):
        SyncBatchNorm(3)._check_input_dim(torch.zeros(3))


def test_a_compiler_gets_the_plain_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 4, 8)
    eager = box_coders.softmax(logits), box_coders.log_softmax(logits)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close((box_coders.softmax(logits), box_coders.log_softmax(logits)), eager)


class Interpreter:
    """LiteRT's, as far as it is used: gives what it was made with, and keeps what it was given."""

    made: list["Interpreter"] = []  # noqa: RUF012

    def __init__(self, model_content: bytes, num_threads: int) -> None:
        self.outputs = pickle.loads(model_content)
        self.num_threads = num_threads
        self.given: Any = None
        Interpreter.made.append(self)

    def allocate_tensors(self) -> None:
        self.ready = True

    def get_input_details(self) -> list[dict[str, int]]:
        return [{"index": 7}]

    def get_output_details(self) -> list[dict[str, int]]:
        return [{"index": index} for index in range(len(self.outputs))]

    def set_tensor(self, index: int, pixels: np.ndarray) -> None:
        assert index == 7
        self.given = pixels

    def invoke(self) -> None:
        assert self.ready

    def get_tensor(self, index: int) -> np.ndarray:
        return self.outputs[index]


def test_litert_gives_rows_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = types.ModuleType("ai_edge_litert"), types.ModuleType("ai_edge_litert.interpreter")
    module.Interpreter = Interpreter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ai_edge_litert", package)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", module)
    monkeypatch.setattr(Interpreter, "made", [])
    # y1 x1 y2 x2 in shares, classes, scores, and how many of the two are used.
    boxes = np.array([[[0.1, 0.2, 0.5, 0.6], [9, 9, 9, 9]]], np.float32)
    found = [boxes, np.array([[2.0, 9]], np.float32), np.array([[0.75, 9]], np.float32), np.array([1.0], np.float32)]
    runner = LiteRTRunner(pickle.dumps(found), torch.zeros(0, 4), (100, 200), num_threads=3)
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(1, 3, 2, 4)
    (rows,) = runner.outputs(images)
    np.testing.assert_allclose(rows, [[[40, 10, 120, 50, 0.75, 2], [0] * 6]], rtol=1e-6)
    (made,) = Interpreter.made
    assert made.num_threads == 3
    np.testing.assert_array_equal(made.given, images.permute(0, 2, 3, 1))
    # Where the only interpreter is at work another one is made, and both are kept.
    runner._free.get_nowait()
    runner.outputs(images)
    assert len(Interpreter.made) == 2
    runner.outputs(images)
    assert len(Interpreter.made) == 2
    # The raw heads come as they are; a process that it is sent to opens it anew.
    raw = LiteRTRunner(pickle.dumps(found[:2]), torch.zeros(0, 4), (100, 200))
    assert [one.shape for one in pickle.loads(pickle.dumps(raw)).outputs(images)] == [(1, 2, 4), (1, 2)]


# ---- videos


def test_without_pyav_there_is_no_h264(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert importlib.util.find_spec("av")
    monkeypatch.setitem(sys.modules, "av", None)
    assert encoders.h264_encoder() is None


def test_two_detectors_of_the_same_name_are_told_apart_by_their_folders() -> None:
    assert video._names_apart(Path("a/x.pt"), Path("b/y.pt")) == ("x.pt", "y.pt")
    assert video._names_apart(Path("runs/a/best.pt"), Path("runs/b/best.pt")) == ("a/best.pt", "b/best.pt")


def test_a_line_of_json_says_box_score_class_and_track() -> None:
    found = Detections(
        boxes=torch.tensor([[1.0, 2, 3.456, 4]]),
        scores=torch.tensor([0.123456]),
        labels=torch.tensor([1]),
        class_names=("cat", "dog"),
    )
    record = {"box": [1.0, 2.0, 3.46, 4.0], "score": 0.1235, "label": 1, "class": "dog"}
    assert video._detections(found, None) == [record]
    assert video._detections(found, [7]) == [record | {"track": 7}]
    frame = SimpleNamespace(index=3, time=0.125, name="a.jpg")
    line = video._record(frame, found, [None])  # type: ignore[arg-type]
    assert json.loads(json.dumps(line)) == {
        "frame": 3, "time": 0.125, "file": "a.jpg",
        "detections": [record | {"track": None}],
    }  # fmt: skip


def test_a_folder_of_frames_that_would_overwrite_something(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is the folder of --source; its images would be overwritten"):
        video._refuse_folder(SimpleNamespace(out=tmp_path, source=str(tmp_path / "a.jpg")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is a file; a video is called OUT\.mp4"):
        video._refuse_folder(SimpleNamespace(out=tmp_path / "file", source=str(tmp_path)))  # type: ignore[arg-type]

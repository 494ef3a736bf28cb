"""Exported files say what torch says, carry their record, and are refused where they do not match."""

import functools
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from apart import run_apart
from test_predictor import small_detector

from backbones.errors import UserError
from detection import load_detector
from detection.cli.export import main
from detection.export import onnx as onnx_export
from detection.export import run as run_module
from detection.export import torch_program
from detection.export.bundle import write_bundle
from detection.export.calibration import spread
from detection.export.litert_metadata import associated_files, metadata
from detection.export.module import Network, Tail
from detection.export.options import ExportOptions, Record, Variant
from detection.export.run import ExportJob, ExportResult, export, signed
from detection.export.verification import BOUNDS, Difference, compare
from detection.inference import predictor as predictor_module
from detection.inference.exported import (
    SUFFIXES,
    Exported,
    ExportRecord,
    FilePostprocess,
    Format,
    is_exported,
    open_exported,
    sha256_of_detector,
)
from detection.inference.predictor import Predictor
from detection.inference.runners import TorchRunner, as_predictions, to_onnx
from detection.models.box_coders import SSDBoxCoder
from detection.models.folding import fold_norms
from detection.postprocess import PostprocessConfig
from detection.structures import RawPredictions, Runner, run_in_parts
from detection.weights.native import save_detector

PACKAGES: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torch": (),
    "executorch": ("executorch", "torchao"),
    "ncnn": ("ncnn", "pnnx"),
    "coreml": ("coremltools",),
}
SUFFIX = {kind: suffix for suffix, kind in SUFFIXES.items()}


def needs(*formats: Format) -> None:
    for name in {package for kind in formats for package in PACKAGES[kind]}:
        if importlib.util.find_spec(name) is None:  # not imported: one of them takes many seconds
            pytest.skip(f"needs the package {name}, which is not installed")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector whose answers are as large as a trained one's, and images."""
    folder = tmp_path_factory.mktemp("export")
    model, info = small_detector()
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if name.endswith("weight"):
                parameter *= 3
    save_detector(folder / "d.safetensors", model, info)
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(4):
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), cv2.resize(coarse, (200, 150)))
    return folder


@functools.cache
def made(folder: Path, to: Format, raw: bool) -> ExportResult:
    out = folder / f"{to}{'_raw' if raw else ''}{SUFFIX[to]}"
    return export(
        ExportJob(checkpoint=folder / "d.safetensors", to=to, out=out, images=folder / "images", raw=raw),
        say=lambda line: None,
    )


def images_of(folder: Path) -> list[Path]:
    return sorted((folder / "images").iterdir())


# --- without any package


def test_endings_say_what_is_an_exported_file() -> None:
    assert is_exported("a/b.onnx")
    assert is_exported(Path("b.XML"))
    assert not is_exported("best.pt")
    assert not is_exported("ssdlite_mobilenet_v2_coco")


def test_a_record_comes_back_as_it_was() -> None:
    info = small_detector()[1]
    record = ExportRecord(format="onnx", outputs="raw", info=info, versions={"torch": "2"}, variant="é")
    record.measured.ap = 0.5
    text = record.to_json()
    assert ExportRecord.from_json(text, "f.onnx") == record
    plain = json.loads(text)
    assert (plain["input"]["height"], plain["input"]["width"]) == (96, 128)
    assert plain["names"] == ["cat", "dog"]
    with pytest.raises(UserError, match=r"f\.onnx: its record cannot be read"):
        ExportRecord.from_json("{}", "f.onnx")


def test_finished_rows_become_detections() -> None:
    rows = np.zeros((1, 4, 6), np.float32)
    rows[0, 0] = [10, 10, 20, 30, 0.5, 1]
    rows[0, 1] = [-5, 0, 200, 96, 0.9, 0]  # sticks out
    rows[0, 2] = [50, 50, 50, 60, 0.8, 0]  # no width
    raw = as_predictions([rows], torch.zeros(1, 4))
    placements = torch.tensor([[2.0, 1.0, 0.0, 0.0]])  # the image is half as wide as the input
    (found,) = FilePostprocess(0.2, ("cat", "dog"))(raw, placements, torch.tensor([[96, 64]]))
    assert found.scores.tolist() == pytest.approx([0.9, 0.5])
    assert found.boxes.tolist() == [[0, 0, 64, 96], [5, 10, 10, 30]]
    assert found.names() == ["cat", "dog"]
    (none,) = FilePostprocess(0.95, ())(raw, placements, torch.tensor([[96, 64]]))
    assert len(none) == 0


def test_the_tail_finds_what_our_post_processing_finds() -> None:
    model, info = small_detector()
    config = PostprocessConfig(score_threshold=0.3, nms_threshold=0.5, max_detections=20)
    generator = torch.Generator().manual_seed(0)
    A = len(model.anchors)
    codes = torch.randn(3, A, 4, generator=generator)
    logits = torch.randn(3, A, 3, generator=generator)
    logits[2, :, 0] = 20  # nothing but background
    rows = Tail(model, config)(codes, logits)
    assert rows.shape == (3, 20, 6)
    assert not rows[2].any()
    reference = Predictor(
        lambda images: RawPredictions(codes, logits, model.anchors), replace(info, postprocess=config)
    )
    placements, sizes = torch.tensor([[1.0, 1, 0, 0]] * 3), torch.tensor([[96, 128]] * 3)
    expected = reference.postprocess(RawPredictions(codes, logits, model.anchors), placements, sizes)
    found = FilePostprocess(0.3, info.class_names)(as_predictions([rows.numpy()], model.anchors), placements, sizes)
    assert len(expected[0]) > 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(one.scores, other.scores)
        assert torch.equal(one.labels, other.labels)


def test_the_litert_tail_writes_boxes_as_the_operator_reads_them() -> None:
    litert = pytest.importorskip("detection.export.litert")
    from test_litedet import small_litedet  # another box coder

    for model in (small_detector()[0], small_litedet()[0]):
        tail = litert.OperatorTail(model)
        with torch.no_grad():
            raw = model(torch.zeros(1, 3, *model.config.input_size, dtype=torch.uint8))
            codes, scores = tail(raw.codes, raw.class_logits)
        y, x, h, w = (codes[0].double() / torch.tensor(tail.scales)).unbind(-1)
        py, px, ph, pw = torch.from_numpy(tail.priors).double().unbind(-1)
        y, x, h, w = (
            y * ph + py,
            x * pw + px,
            h.exp() * ph,
            w.exp() * pw,
        )  # detection_postprocess.cc, DecodeCenterSizeBoxes
        height, width = model.config.input_size
        boxes = torch.stack(((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height), -1)
        expected = model.config.box_coder().decode(raw.codes[0], raw.anchors)
        torch.testing.assert_close(boxes.float(), expected, atol=1e-2, rtol=0)
        assert scores.shape[-1] == model.num_classes
    assert SSDBoxCoder().centre_weight == 10  # what TensorFlow's files have


def test_metadata_names_the_labels_and_the_order_of_a_box() -> None:
    pytest.importorskip("flatbuffers")
    record = ExportRecord(format="litert", outputs="detections", info=small_detector()[1])
    packed = metadata(record)
    assert packed[4:8] == b"M001"
    for text in (b"labels.txt", b"location", b"category", b"score", b"number of detections", b"detection_result"):
        assert text in packed
    assert (
        np.array([4, 1, 0, 3, 2], np.uint32).tobytes() in packed
    )  # a vector of four: x1, y1, x2, y2 from y1, x1, y2, x2
    archive = associated_files(record)
    assert b"cat\ndog\n" in archive
    assert archive == associated_files(record)


def test_what_does_not_match_is_told() -> None:
    same = Difference(num_images=2, codes=0.0, class_logits=0.0, box=0.0, score=0.0, sure=10, found=10)
    assert same.broken(BOUNDS["float32"]) is None
    assert "raw heads differ by 2" in str(replace(same, codes=2.0).broken(BOUNDS["float32"]))
    assert "raw heads differ by nan" in str(replace(same, codes=float("nan")).broken(BOUNDS["float32"]))
    assert "finds 7 of the 10" in str(replace(same, found=7).broken(BOUNDS["int8"]))
    assert replace(same, found=7).error > replace(same, box=20.0, score=0.2).error > same.error


def test_images_are_taken_at_even_distances() -> None:
    files = [Path(str(number)) for number in range(10)]
    assert spread(files, 3) == [Path("0"), Path("4"), Path("9")]
    assert spread(files, 20) == files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": Path("a.tflite")}, "a file of the format onnx ends in .onnx"),
        ({"int8": True}, "--int8 needs --calibration"),
        ({"calibration": Path("x")}, "--calibration is for --int8"),
        ({"fp16": True}, "--fp16 is for --to openvino"),
        ({"compiled": True}, "--compiled is for --to torch"),
        ({"keep_float": ("3",)}, "--keep-float is for --int8"),
        ({"max_detections": 0}, "must be at least 1"),
        ({"max_drop": -0.1}, "--enough and --max-drop must not be negative, got 0.002 and -0.1"),
        ({"int8": True, "calibration": Path("i"), "annotations": Path("a")}, "and --images are the same folder"),
        ({"int8": True, "calibration": Path("k"), "labelled": Path("k")}, "and --labelled are the same folder"),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    given = {"checkpoint": "d", "to": "onnx", "out": Path("a.onnx"), "images": Path("i"), **changes}
    with pytest.raises(UserError, match=message):
        ExportJob(**given).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize("outputs", ["raw", "detections"])
def test_thresholds_of_an_exported_file(outputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = small_detector()[1]
    info.postprocess.score_threshold = 0.02

    def opened(path: Path, backend: str | None) -> Exported:
        runner = TorchRunner(torch.nn.Identity(), torch.device("cpu"))
        return Exported(runner=runner, record=ExportRecord(format="onnx", outputs=outputs, info=info))  # type: ignore[arg-type]

    monkeypatch.setattr(predictor_module, "open_exported", opened)

    def thresholds(**given: float | None) -> tuple[float, tuple[float, ...]]:
        detector = load_detector("d.onnx", **given)  # type: ignore[arg-type]
        if outputs == "detections":
            assert isinstance(detector.postprocess, FilePostprocess)
            assert detector.postprocess.score_threshold == detector.info.postprocess.score_threshold
        return detector.info.postprocess.score_threshold, detector.info.thresholds

    assert thresholds() == (0.25, ())
    assert thresholds(default_score=None) == (0.02, ())
    assert thresholds(score_threshold=0.1) == (0.1, ())
    info.thresholds = (0.4, 0.6)
    assert thresholds() == (pytest.approx(0.4), (0.4, 0.6))
    assert thresholds(default_score=None) == (0.02, ())
    assert thresholds(score_threshold=0.1) == (0.1, ())


@pytest.mark.slow
def test_a_file_that_does_not_match_gets_no_name(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        """The network of another checkpoint."""

        def write(self, path: Path, record: ExportRecord) -> None:
            from detection.export.module import RawHeads
            from detection.export.torch_program import ProgramFile

            other = small_detector(seed=1)[0]
            images = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
            shapes = ({0: torch.export.Dim("batch")},)
            ProgramFile(torch.export.export(RawHeads(other), (images,), dynamic_shapes=shapes)).write(path, record)

    monkeypatch.setattr(torch_program, "variants", lambda *_: iter([Variant(name="", make=Wrong)]))
    out = scene / "wrong.pt2"
    before = sorted(path.name for path in scene.iterdir())
    job = ExportJob(checkpoint=scene / "d.safetensors", to="torch", out=out, images=scene / "images", raw=True)
    with pytest.raises(UserError, match=r"no variant matches the checkpoint; .*wrong\.pt2 is not written"):
        export(job, say=lambda line: None)
    assert not out.exists()
    assert sorted(path.name for path in scene.iterdir()) == before


# --- the search for a variant, and what is said of it


class Scripted:
    """A subject (see ``Subject``) whose files have known figures: variant -> (AP, milliseconds, found of ten)."""

    figure_name = "AP"
    figure_torch: float | None = 0.5
    network: Any = None
    postprocess = PostprocessConfig()

    def __init__(self, files: dict[str, tuple[float | None, float, int]]) -> None:
        self.files = files
        self.record = ExportRecord(format="onnx", outputs="detections", precision="int8", info=small_detector()[1])
        self.record.measured.num_images = 7

    def inputs(self, files: Sequence[Path]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.zeros((len(files), 3, 96, 128), np.uint8)

    def run(self, path: Path) -> tuple[Difference, float | None, float]:
        figure, milliseconds, found = self.files[path.read_text()]
        same = Difference(num_images=2, codes=None, class_logits=None, box=1.0, score=0.1, sure=10, found=found)
        return same, figure, milliseconds

    def check(self, path: Path) -> None:
        assert path.read_text() in self.files

    def measured(self, figure: float | None, milliseconds: float | None) -> ExportRecord:
        return replace(self.record, measured=replace(self.record.measured, ap=figure, milliseconds=milliseconds))


class Named:
    """A file that holds the name of its variant."""

    def write(self, path: Path, record: Record) -> None:
        path.write_text(record.variant)


def search(
    folder: Path, monkeypatch: pytest.MonkeyPatch, subject: Scripted, **options: Any
) -> tuple[list[str], str, str]:
    """Exports it; the variants that were run, the one that was kept, and what was said."""
    variants = [Variant(name=name, make=Named) for name in subject.files]
    monkeypatch.setattr(onnx_export, "variants", lambda *_: iter(variants))
    monkeypatch.setattr(run_module, "open_subject", lambda *_: subject)
    for name in ("images", "calibration"):
        (folder / name).mkdir(exist_ok=True)
        cv2.imwrite(str(folder / name / "a.png"), np.zeros((8, 8, 3), np.uint8))
    given: dict[str, Any] = {"int8": True, "calibration": folder / "calibration", **options}
    said: list[str] = []
    job = ExportJob(checkpoint="d", to="onnx", out=folder / "d.onnx", images=folder / "images", **given)
    result = export(job, said.append)
    assert job.out.read_text() == result.chosen.name == result.record.variant
    assert result.record.measured.ap == result.chosen.figure
    return [one.name for one in result.tried], result.chosen.name, "\n".join(said)


def test_the_first_variant_that_loses_little_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Scripted({"a": (0.492, 7.0, 10), "b": (0.4985, 7.1, 10), "c": (0.5, 20.0, 10), "d": (0.45, 7.0, 10)})
    assert search(tmp_path, monkeypatch, subject)[:2] == (["a", "b"], "b")  # 0.0015 < 0.002
    assert search(tmp_path, monkeypatch, subject, enough=0.01)[:2] == (["a"], "a")
    assert search(tmp_path, monkeypatch, subject, enough=0.001)[:2] == (["a", "b", "c"], "c")
    assert search(tmp_path, monkeypatch, subject, enough=0)[:2] == (["a", "b", "c", "d"], "c")
    assert search(tmp_path, monkeypatch, subject, all_variants=True)[:2] == (["a", "b", "c", "d"], "c")
    # Of figures within 0.001 the quicker file is better, whichever comes first.
    near = Scripted({"a": (0.4960, 20.0, 10), "b": (0.4955, 7.0, 10), "c": (0.4959, 8.0, 10)})
    assert search(tmp_path, monkeypatch, near)[:2] == (["a", "b", "c"], "b")
    # Without AP: the first that finds all that torch is sure of.
    unmeasured = Scripted({"a": (None, 7.0, 9), "b": (None, 20.0, 10), "c": (None, 7.0, 10)})
    unmeasured.figure_torch = None
    assert search(tmp_path, monkeypatch, unmeasured)[:2] == (["a", "b"], "b")


def test_a_much_quicker_variant_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a": (0.493, 7.0, 10), "b": (0.495, 7.5, 10), "broken": (0.499, 1.0, 7), "c": (0.5, 20.0, 10)}
    tried, chosen, said = search(tmp_path, monkeypatch, Scripted(files))
    assert (tried, chosen) == (["a", "b", "broken", "c"], "c")
    assert "it finds 7 of the 10 objects" in said
    (hint,) = [line for line in said.splitlines() if line.startswith("quicker")]
    assert hint.startswith("quicker, for a larger drop: b; AP 0.4950 (drop +0.0050); 0.00 MB; 7.5 ms; ")
    assert hint.endswith("--enough takes the first variant that loses less than it says (now 0.002)")
    # What it advises gives that file.
    assert search(tmp_path, monkeypatch, Scripted(files), enough=0.006)[1] == "b"
    # Two thirds of the time are not much quicker, and without AP nothing is known of a drop.
    slower = {"a": (0.493, 14.0, 10), "c": (0.5, 20.0, 10)}
    assert "quicker, for" not in search(tmp_path, monkeypatch, Scripted(slower))[2]
    unmeasured = Scripted({"a": (None, 7.0, 9), "b": (None, 20.0, 10)})
    unmeasured.figure_torch = None
    assert "quicker, for" not in search(tmp_path, monkeypatch, unmeasured)[2]


def test_onnx_tries_the_quickest_variant_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark takes the first, the search the order."""
    monkeypatch.setattr(onnx_export, "network_onnx", lambda network: b"")
    monkeypatch.setattr(onnx_export, "_prepared", lambda raw: raw)
    options = ExportOptions(
        raw=True, int8=True, postprocess=PostprocessConfig(), calibration=np.zeros((1, 3, 4, 4), np.uint8)
    )
    network = Network(module=torch.nn.Identity(), input_size=(4, 4), outputs=("codes", "class_logits"))
    assert [variant.name for variant in onnx_export.variants(network, options)] == [
        "min-max, per channel",
        "min-max, per channel, output layers float",
        "percentile 99.999, per channel",
        "min-max, per tensor, reduced range",
    ]


def test_a_drop_has_a_sign_where_it_is_one() -> None:
    drops = {0.0123: "+0.0123", -0.0015: "-0.0015", 0.0: "0.0000", -0.00004: "0.0000", 0.00004: "0.0000"}
    assert {drop: signed(drop) for drop in drops} == drops
    assert (signed(0.00005), signed(-0.00006)) == ("+0.0001", "-0.0001")


def test_enough_reaches_the_export(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(scene / "d.safetensors"), "--to", "onnx", "--images", str(scene / "images")]
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(scene / "e.onnx"), "--enough", "-0.5"])
    assert "--enough and --max-drop must not be negative, got -0.5 and 0.05" in capsys.readouterr().err


# --- with the packages; those of LiteRT are in an environment of their own: test_litert.py


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "raw"),
    [
        ("torch", True),
        ("onnx", True),
        ("onnx", False),
        ("openvino", False),
        ("executorch", True),
        ("ncnn", True),
    ],
)
def test_a_file_says_what_torch_says(scene: Path, to: Format, raw: bool) -> None:
    needs(to)
    result = made(scene, to, raw)
    assert result.chosen.difference.sure > 0
    assert result.chosen.difference.box < 0.01
    record = open_exported(result.path).record
    assert record == result.record
    assert record.outputs == ("raw" if raw else "detections")
    torch_detector = load_detector(scene / "d.safetensors", device="cpu", score_threshold=0.3)
    detector = load_detector(result.path, score_threshold=0.3)
    images = images_of(scene)
    most = None if raw else 100
    for one, other in zip(detector(images), torch_detector(images), strict=True):  # several images at once
        torch.testing.assert_close(one.boxes, other.boxes[:most], atol=0.05, rtol=0)
        assert torch.equal(one.labels, other.labels[:most])
    if not raw:
        with pytest.raises(UserError, match="suppresses boxes itself"):
            load_detector(result.path, nms_threshold=0.9)
    with pytest.raises(UserError, match="has one input size"):
        load_detector(result.path, input_size=96)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch", "onnx", "openvino", "executorch", "ncnn"])
def test_channels_last_images_are_not_misread(scene: Path, to: Format) -> None:
    needs(to)
    runner = load_detector(made(scene, to, to != "openvino").path).runner
    check_layouts(runner)


def check_layouts(runner: Runner) -> None:
    """Images say the same however they lie in memory, and something else than their bytes in another order would."""
    images = torch.zeros(2, 96, 128, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    images[0, 0] = images[1, 2, :48] = 255  # a red image and a half blue one: grey stripes to who misreads them
    assert not images.is_contiguous()
    misread = torch.frombuffer(images.permute(0, 2, 3, 1).numpy(), dtype=torch.uint8).view(2, 3, 96, 128)
    given, same, other = (run_in_parts(runner, one) for one in (images, images.contiguous(), misread))
    torch.testing.assert_close(given.codes, same.codes, rtol=0, atol=1e-6)
    torch.testing.assert_close(given.class_logits, same.class_logits, rtol=0, atol=1e-6)
    assert (given.codes - other.codes).abs().max() > 2e-5  # an untrained network says nearly the same of all images


@pytest.mark.slow
def test_eight_bits_end_before_the_tail(scene: Path) -> None:
    needs("onnx")
    onnx = pytest.importorskip("onnx")
    model, info = small_detector()
    prepared = onnx_export._prepared(to_onnx(fold_norms(model)))
    layers = onnx_export.output_layers(prepared)
    assert len(layers) == 2 * 6  # boxes and classes of six maps
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 128), dtype=np.uint8)
    tail = onnx_export.tail_onnx(model, info.postprocess)
    stem = next(node for node in onnx.load_from_string(prepared).graph.node if node.op_type == "Conv")
    file = onnx_export._quantised(prepared, tail, pixels, excluded=[stem.name], portable=True)
    graph = onnx.load_from_string(file.content).graph
    rounded = [node.name for node in graph.node if node.op_type == "QuantizeLinear"]
    assert rounded
    assert not [name for name in rounded if name.startswith(onnx_export.TAIL)]
    assert [one.name for one in graph.output] == ["detections"]
    # Sums of two tensors of eight bits, the ten residual ones: none that a runtime computes its own way.
    widened = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    sums = [node.op_type for node in graph.node if len(node.input) == 2 and widened.issuperset(node.input)]
    assert sums.count("Sum") == 10
    assert "Add" not in sums
    # Weights: those of the layer that stays float as they were, of the others no two that overflow 16 bits.
    before, after = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in one.initializer}
        for one in (onnx.load_from_string(prepared).graph, graph)
    )
    assert np.array_equal(after[stem.input[1]], before[stem.input[1]])
    pointwise = [one for one in after.values() if one.dtype == np.int8 and one.ndim == 4 and one.shape[2:] == (1, 1)]
    assert len(pointwise) > 30
    assert max(np.abs(one[:, ::2].astype(int) + one[:, 1::2]).max() for one in pointwise) == 128
    assert max(np.abs(one.astype(int)).max() for one in pointwise) > 100


@pytest.mark.slow
def test_a_bundle_finds_the_same_without_torch(scene: Path) -> None:
    needs("onnx")
    folder = scene / "bundle"
    names = write_bundle(made(scene, "onnx", False).path, folder)
    assert names == ["detect.py", "labels.txt", "model.json", "model.onnx", "requirements.txt"]
    image = images_of(scene)[0]
    block = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = sys.argv[1:]; "
    run = block + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run, str(folder / "detect.py"), str(image), "--threshold", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=scene)
    found = json.loads(done.stdout)["detections"]
    expected = load_detector(scene / "d.safetensors", device="cpu", score_threshold=0.3)(image)
    assert len(found) == min(len(expected), 100) > 0
    for one, box, name in zip(found, expected.boxes.tolist(), expected.names(), strict=False):
        assert one["box"] == pytest.approx(box, abs=1)
        assert one["class"] == name
    with pytest.raises(UserError, match="exists"):
        write_bundle(made(scene, "onnx", False).path, folder)


@pytest.mark.slow
def test_a_bundle_in_an_environment_without_torch(scene: Path, tmp_path: Path) -> None:
    needs("onnx")
    exported = made(scene, "onnx", False).path
    write_bundle(exported, tmp_path / "bundle")
    run_apart("bundle-onnx", tmp_path / "bundle", exported, images_of(scene)[0])


@pytest.mark.slow
def test_a_bundle_shows_each_class_from_its_own_threshold_on(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("onnx")
    write_bundle(made(scene, "onnx", False).path, tmp_path / "bundle")
    record = json.loads((tmp_path / "bundle" / "model.json").read_text())
    record["record"]["info"]["thresholds"] = [0.3, 0.5]
    (tmp_path / "bundle" / "model.json").write_text(json.dumps(record))
    monkeypatch.syspath_prepend(tmp_path / "bundle")
    detector = importlib.import_module("detect").Detector()
    image = cv2.imread(str(images_of(scene)[0]))
    all_found = detector(image, 0.0)
    assert [one.label for one in all_found if one.score < 0.5].count(1) > 0
    expected = [one for one in all_found if one.score >= (0.3, 0.5)[one.label]]
    assert detector(image) == expected
    assert {one.label for one in expected} == {0, 1}


@pytest.mark.slow
def test_mistakes_with_a_bundle_are_told(scene: Path, tmp_path: Path) -> None:
    needs("onnx")
    write_bundle(made(scene, "onnx", False).path, tmp_path / "bundle")
    image = images_of(scene)[0]
    for arguments, message in (
        (["no.jpg"], "no.jpg does not exist"),
        ([tmp_path / "bundle" / "labels.txt"], "labels.txt cannot be opened; give an image, a video"),
        ([image, "--out", tmp_path / "boxes.txt"], "boxes.txt cannot be written; an image ends in .jpg or .png"),
    ):
        command = [sys.executable, str(tmp_path / "bundle" / "detect.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert message in done.stderr
    block = "import sys; sys.modules['onnxruntime'] = None; import runpy; sys.argv = sys.argv[1:]; "
    block += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", block, str(tmp_path / "bundle" / "detect.py"), str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "the package onnxruntime is not installed; pip install -r" in done.stderr


@pytest.mark.slow
def test_files_that_are_not_ours_are_refused(scene: Path) -> None:
    needs("onnx")
    (scene / "damaged.onnx").write_bytes(b"\x08\x01 not a model")
    with pytest.raises(UserError, match=r"damaged\.onnx cannot be opened"):
        open_exported(scene / "damaged.onnx")
    (scene / "plain.onnx").write_bytes(to_onnx(fold_norms(small_detector()[0])))
    with pytest.raises(UserError, match="no record of LiteDet"):
        open_exported(scene / "plain.onnx")
    with pytest.raises(FileNotFoundError):
        load_detector(scene / "nothing.onnx")
    (scene / "plain.tflite").write_bytes(b"not a model")
    with pytest.raises(UserError, match="no record of LiteDet"):
        open_exported(scene / "plain.tflite")


def test_compare_is_zero_for_the_same(scene: Path) -> None:
    detector = load_detector(scene / "d.safetensors", device="cpu", score_threshold=0.01)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 128), dtype=np.uint8)
    difference = compare(detector, detector, pixels)
    assert (difference.codes, difference.box, difference.found) == (0.0, 0.0, difference.sure)


def test_a_file_of_openvino_is_known_by_its_weights_too(tmp_path: Path) -> None:
    (tmp_path / "d.xml").write_bytes(b"<net/>")
    known = []
    for weights in (b"1", b"2", b"1"):
        (tmp_path / "d.bin").write_bytes(weights)
        known.append(sha256_of_detector(tmp_path / "d.xml"))
    assert known[0] == known[2] != known[1]
    (tmp_path / "d.onnx").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_detector(tmp_path / "d.onnx") == wanted

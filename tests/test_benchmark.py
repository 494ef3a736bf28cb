"""The benchmark: its peer is the same network, its counts are right, its parts run. Run: pytest tests/test_benchmark.py"""

import importlib
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import apart_sides
import cv2
import msgspec
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from backbones.classifier import Classifier, ClassifierConfig
from backbones.mobilenetv2 import MobileNetV2Config
from detection.benchmark import config as benchmark_config
from detection.benchmark import count, drawn, scale, timing
from detection.benchmark.apart import Side, run_apart
from detection.benchmark.chart import LONGEST, draw_chart
from detection.benchmark.peer import build_peer
from detection.benchmark.stages import STAGES
from detection.cli import benchmark
from detection.data.augment import EvalTransform
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset
from detection.data.drawn import draw_detection_set
from detection.data.loader import build_loader
from detection.evaluation.coco_ap import CocoEvaluator
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.structures import Batch
from detection.weights.info import DetectorInfo
from detection.weights.native import save_detector


def test_the_peer_is_the_same_network() -> None:
    torch.manual_seed(0)
    model = SSDLite(SSDLiteConfig(), 80)
    images = torch.randint(0, 256, (4, 3, 320, 320), dtype=torch.uint8)
    drawn.draw_weights(model, images)
    # The last maps have 1 to 4 cells: batch norms that saw four images of noise there blow
    # rounding up a thousandfold. Hence double precision and the same rounded mean for both.
    model.eval().double()
    peer = build_peer(model, PostprocessConfig()).double()
    with torch.inference_mode():
        expected = model(images[:1])
        inputs, _ = peer.transform([images[0].double() / 255])
        normalised = (images[:1].double() - model.normalise.mean) / model.normalise.std
        maps = list(peer.backbone(normalised).values())
        outputs = peer.head(maps)
        anchors = peer.anchor_generator(inputs, maps)[0]
    torch.testing.assert_close(inputs.tensors, normalised, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs["bbox_regression"], expected.codes, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs["cls_logits"], expected.class_logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(anchors, expected.anchors, rtol=0, atol=1e-3, check_dtype=False)
    share = (expected.class_logits.softmax(-1)[..., 1:] > 0.001).float().mean().item()
    assert 0.01 < share < 0.2  # as after a training; an untrained head has 1


@pytest.mark.parametrize(
    "config",
    [
        SSDLiteConfig(resize="letterbox"),
        SSDLiteConfig(backbone=MobileNetV2Config(width=0.35)),
        SSDLiteConfig(input_size=(192, 320)),
    ],
)
def test_a_detector_that_torchvision_cannot_make_is_refused(config: SSDLiteConfig) -> None:
    with pytest.raises(ValueError, match=r"torchvision's parts make a MobileNetV2 of width 1\.0"):
        build_peer(SSDLite(config, 3), PostprocessConfig())


def test_counts_by_hand() -> None:
    # Stem at 224: 3 x 3 x 3 weights for each of 32 channels of 112 x 112, and scale and shift of the norm.
    # stage1: a depthwise 3 x 3 of 32 channels, then 32 -> 16, both at 112 x 112.
    # The last convolution: 320 -> 1280 at 7 x 7. The linear layer: 1280 x 1000 and 1000 biases.
    counts = count.count(Classifier(ClassifierConfig(), 1000), (224, 224))
    cells = 112 * 112
    assert counts["stem"] == (32 * 27 + 64, 32 * 27 * cells, 32 * cells)
    assert counts["stage1"] == (32 * 9 + 64 + 32 * 16 + 32, (32 * 9 + 32 * 16) * cells, (32 + 16) * cells)
    assert counts["last"] == (320 * 1280 + 2560, 320 * 1280 * 49, 1280 * 49)
    assert counts["linear"] == (1280 * 1000 + 1000, 1280 * 1000, 1000)
    assert counts["total"].parameters == 3_504_872
    assert counts["total"].multiply_adds == 300_774_272
    _assert_parts_sum_up(counts)


def test_one_convolution_by_hand() -> None:
    # 3 -> 8 channels in two groups is not possible, 4 -> 8 is: each of the 8 sees 2 channels of 3 x 3, and has a bias.
    # 9 x 7 with stride 2 and padding 1 gives 5 x 4 cells. The 1 x 1 over 3 colours before it: 9 x 7 cells of 4.
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2))
    counts = count.count(model.train(), (9, 7))
    assert counts["0"] == (12, 12 * 63, 4 * 63)
    assert counts["1"] == (8 * 18 + 8, 8 * 18 * 20, 8 * 20)
    assert model.training
    _assert_parts_sum_up(counts)


def _assert_parts_sum_up(counts: dict[str, count.Count]) -> None:
    parts = [part for name, part in counts.items() if name != "total"]
    assert tuple(map(sum, zip(*parts, strict=True))) == counts["total"]


def test_counts_of_the_detector_by_hand() -> None:
    counts = count.count(SSDLite(SSDLiteConfig(), 80), (320, 320))
    # First extra map: 1280 -> 256 at 10 x 10, depthwise to 5 x 5, 256 -> 512; the others in the same way.
    pairs = [(1280, 512, 10, 5), (512, 256, 5, 3), (256, 256, 3, 2), (256, 128, 2, 1)]
    extras = sum(a * b // 2 * s * s + b // 2 * 9 * t * t + b // 2 * b * t * t for a, b, s, t in pairs)
    # Twice (boxes, classes) a depthwise 3 x 3 and a 1 x 1 to n * (4 or 81) columns on each of the six maps.
    maps = [(576, 20, 3), (1280, 10, 6), (512, 5, 6), (256, 3, 6), (256, 2, 6), (128, 1, 6)]
    head = sum((2 * 9 * c + c * n * (4 + 81)) * s * s for c, s, n in maps)
    assert counts["extras"].multiply_adds == extras
    assert counts["head"].multiply_adds == head
    assert counts["head"].activations == sum((2 * c + n * (4 + 81)) * s * s for c, s, n in maps)
    assert counts["total"].multiply_adds / 1e9 == pytest.approx(0.789, abs=5e-4)
    assert counts["total"].parameters / 1e6 == pytest.approx(4.337, abs=5e-4)
    _assert_parts_sum_up(counts)
    assert list(counts) == ["stem", *(f"stage{n}" for n in range(1, 8)), "last", "extras", "head", "total"]


def test_drawn_annotations_are_a_coco_file(tmp_path: Path) -> None:
    path = drawn.draw_annotations(tmp_path / "a.json", 50, 400, ("x.jpg", "y.jpg"))
    content = json.loads(path.read_text())
    record = content["annotations"][399]
    x, y, width, height = record["bbox"]
    corners = np.array(record["segmentation"][0]).reshape(-1, 2)
    assert (len(content["images"]), len(content["annotations"])) == (50, 400)
    assert len(corners) == 12
    assert (corners >= (x - 0.01, y - 0.01)).all()
    assert (corners <= (x + width + 0.01, y + height + 0.01)).all()
    assert {image["file_name"] for image in content["images"]} == {"x.jpg", "y.jpg"}
    index = CocoIndex.read(path)
    assert index.num_classes == 80
    assert index.usable.sum() == 400 - index.crowd.sum()


def test_detections_have_some_ap(tmp_path: Path) -> None:
    index = CocoIndex.read(drawn.draw_annotations(tmp_path / "a.json", 100, 700))
    evaluator = CocoEvaluator(index)
    scale.feed(evaluator, index, drawn.draw_detections(index, 30))
    assert 0.1 < evaluator.compute().figures["AP"] < 0.9


def test_what_a_data_set_costs_does_not_grow_with_it(tmp_path: Path) -> None:
    images = draw_detection_set(tmp_path / "p", num_train=6, num_val=1, size=(480, 640))
    names = tuple(path.name for path in sorted(images.train_images.glob("*.jpg")))
    per_image, per_detection, calls = [], [], []
    for size in (250, 1000, 4000):
        index = CocoIndex.read(drawn.draw_annotations(tmp_path / f"{size}.json", size, size * 7, names))
        evaluator = CocoEvaluator(index)
        detections = drawn.draw_detections(index, 10)
        scale.feed(evaluator, index, detections)
        per_image.append((scale.array_bytes(index) - 80 * 8) / size)  # 80 category ids, however many images
        per_detection.append(scale.array_bytes(evaluator.table) / len(detections[0]))
        dataset = DetectionDataset(index, images.train_images, EvalTransform((320, 320)))
        calls.append(_calls(partial(dataset.__getitem__, (0, 7))))
    assert per_image == pytest.approx([per_image[0]] * 3, rel=0.02)
    assert per_detection == [36.0] * 3  # 8 id, 16 box, 4 score, 8 label
    assert calls[0] == calls[1] == calls[2]


def _calls(run: Callable[[], object]) -> int:
    """Python and C functions called: the same work makes the same number."""
    total = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal total
        total += event in ("call", "c_call")

    run()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="reads a worker's memory from /proc (Linux)")
def test_a_worker_does_not_grow_over_an_epoch(tmp_path: Path) -> None:
    images = draw_detection_set(tmp_path / "p", num_train=6, num_val=1, size=(480, 640))
    names = tuple(path.name for path in sorted(images.train_images.glob("*.jpg")))
    index = CocoIndex.read(drawn.draw_annotations(tmp_path / "a.json", 4000, 28_000, names))
    dataset = DetectionDataset(index, images.train_images, EvalTransform((320, 320)))
    # A batch of 16 images is 4.7 MiB; forty of them must not leave even two behind.
    assert scale.worker_growth(dataset, samples=42 * 16) < 9 * 1024


def test_batches_are_pinned_and_copied_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = draw_detection_set(tmp_path, num_train=4, num_val=1, size=(96, 96))
    dataset = DetectionDataset(CocoIndex.read(images.train_annotations), images.train_images, EvalTransform((96, 96)))
    loader = build_loader(dataset, batch_size=2, pin_memory=True)
    assert loader.pin_memory
    assert build_loader(dataset, batch_size=2).pin_memory is False
    batch = next(iter(build_loader(dataset, batch_size=2)))
    tensors = ("images", "boxes", "labels", "valid")  # the rest stays on the host

    pinned: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    assert isinstance(batch.pin_memory(), Batch)
    assert pinned == [getattr(batch, name).data_ptr() for name in tensors]

    copies: list[bool] = []

    def copy(tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        copies.append(non_blocking)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", copy)
    batch.to(torch.device("cuda"), non_blocking=True)
    assert copies == [True] * len(tensors)


def test_sides_take_turns() -> None:
    order: list[str] = []
    times = timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert [len(runs) for runs in times.values()] == [3, 3]


def test_a_comparison_by_hand() -> None:
    compared = timing.compare("x", "y", [1.0, 3.0, 2.0, 2.0, 4.0], [4.0, 4.0, 5.0, 4.0, 4.0], bar=0.5)
    assert (compared.ours, compared.theirs, compared.ratio) == (2.0, 4.0, 0.5)
    assert compared.spread == (0.4, 0.75)  # of 0.25, 0.4, 0.5, 0.75 and 1
    assert compared.runs == 5
    assert "bar 0.50 reached" in timing.row(compared)
    assert "missed" in timing.row(timing.compare("x", "y", [3.0], [4.0], bar=0.5))
    assert "bar" not in timing.row(timing.compare("x", "y", [3.0], [4.0], bar=None))


def test_every_stage_has_a_function() -> None:
    assert tuple(STAGES) == benchmark_config.BenchmarkConfig().stages


def test_the_chart_holds_any_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Warnings are errors: one about a layout that collapsed would end the test.
    drawn_bars: list[list[float]] = []
    barh = Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda *args, **kwargs: drawn_bars.append(args[2]) or barh(*args, **kwargs))
    ratios = [1e-6, 0.1, 0.69, 0.71, 1.0, LONGEST, 3.57, 1e6]
    rows = [timing.compare("a stage of this name", "a peer", [ratio * 3], [3.0], bar=0.5) for ratio in ratios]
    rows.append(timing.compare("far from the aim", "a peer", [99.0], [3.0], bar=9.0))
    draw_chart(rows, tmp_path / "all.png")
    draw_chart(rows[:1], tmp_path / "one.png")
    peers, ours = drawn_bars[:2]
    assert set(peers) == {1.0}
    assert ours == pytest.approx([min(ratio, LONGEST) for ratio in [33, *ratios[::-1]]])
    high, wide, _ = cv2.imread(str(tmp_path / "all.png")).shape
    assert wide == 9 * 120
    assert high > 400


def test_sides_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APART_SEEN", "as it was")
    sides = {
        "a": Side(apart_sides.add, ([1, 2], "APART_SEEN"), {"APART_OUT": str(tmp_path / "a")}),
        "b": Side(apart_sides.add, ([5], "APART_SEEN"), {"APART_OUT": str(tmp_path / "b"), "APART_SEEN": None}),
    }
    with run_apart(sides) as calls:
        calls["a"]()
        calls["b"]()
        calls["a"]()
    assert (tmp_path / "a").read_text() == "3 as it was\n" * 2
    assert (tmp_path / "b").read_text() == "5 None\n"
    assert os.environ["APART_SEEN"] == "as it was"
    assert "APART_OUT" not in os.environ
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="side 'c' has ended"), run_apart({"c": Side(apart_sides.fail, ())}) as calls:
        calls["c"]()  # and does not wait for ever


@pytest.mark.parametrize("side", ["own", "peer"])
def test_a_step_of_each_side_trains_the_whole_network(
    side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_detection_set(tmp_path, num_train=2, num_val=1, size=(96, 96))
    index = CocoIndex.read(images.train_annotations, cache=False)
    dataset = DetectionDataset(index, images.train_images, EvalTransform((96, 96)))
    batch = next(iter(build_loader(dataset, batch_size=2)))
    batch.labels %= 2
    model = SSDLite(SSDLiteConfig(input_size=(96, 96)), 2)
    info = DetectorInfo(
        model=model.config, postprocess=PostprocessConfig(), class_names=("a", "b"), category_ids=(1, 2)
    )
    arguments = (info, model.state_dict(), batch, torch.get_num_threads())
    train = importlib.import_module("detection.benchmark.stages.train")  # the package has a function of that name
    built: list[nn.Module] = []

    def keeping(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        return lambda *given: built.append(build(*given)) or built[-1]

    monkeypatch.setattr(train, "build_detector", keeping(train.build_detector))
    monkeypatch.setattr(train, "build_peer", keeping(train.build_peer))
    steps = train.own_step(*arguments) if side == "own" else train.peer_step(*arguments, torch.contiguous_format)
    with steps as run:
        before = {name: tensor.clone() for name, tensor in built[0].named_parameters() if tensor.requires_grad}
        run()
        after = dict(built[0].named_parameters())
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert len(moved) > len(before) / 2  # maps whose anchors have no object learn no boxes
        assert {name.split(".")[0] for name in moved} >= {"backbone", "head"}


def test_costs_by_size(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(images / "a.jpg"), np.zeros((480, 640, 3), np.uint8))
    (cost,) = scale.measure_scale(tmp_path, images, [64], samples=32)
    assert cost.images == 64
    assert json.loads((tmp_path / "scale_64.json").read_text())["images"][0]["file_name"] == "a.jpg"
    assert 0 < cost.annotation_bytes < 2000
    assert min(cost.open_us, cost.sample_ms, cost.evaluator_bytes, cost.evaluation_us) > 0
    (one, two, row) = scale.table([cost]).splitlines()
    assert row.split()[0] == "64"
    assert len(one) == len(two) == len(row)


@pytest.mark.slow
def test_the_tool_writes_json_and_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["--stages", "predict", "postprocess", "loader", "open", "evaluate", "--rounds", "1"]
    arguments += ["--threads", str(threads), "--batch-size", "2", "--open-images", "300", "--open-boxes", "2000"]
    arguments += ["--evaluate-images", "100", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    result = benchmark.main(arguments)
    written = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert written == json.loads(msgspec.json.encode(result))
    assert len(written["comparisons"]) == 7
    assert all(math.isfinite(row["ours"]) and row["ours"] > 0 < row["theirs"] for row in written["comparisons"])
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) for row in written["comparisons"])
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert f"torch.set_num_threads({threads})" in printed
    assert "the twelve figures agree" in printed


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes are forked from one that has loaded torch; else each of a dozen takes some seconds to start."""
    context, strategy = multiprocessing.get_context, torch.multiprocessing.get_sharing_strategy()
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(["detection.benchmark.stages"])
        monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context("forkserver"))
        torch.multiprocessing.set_sharing_strategy("file_system")  # so many open files cannot be handed over
    yield
    torch.multiprocessing.set_sharing_strategy(strategy)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_processes")
def test_other_backends_and_own_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    config = SSDLiteConfig(input_size=(96, 96))
    info = DetectorInfo(model=config, postprocess=PostprocessConfig(), class_names=("a", "b"), category_ids=(1, 2))
    save_detector(tmp_path / "d.safetensors", SSDLite(config, 2), info)
    images = draw_detection_set(tmp_path / "p", num_train=4, num_val=1, size=(96, 128))
    arguments = ["--images", str(images.train_images), "--annotations", str(images.train_annotations)]
    arguments += ["--weights", str(tmp_path / "d.safetensors"), "--threads", str(torch.get_num_threads())]
    arguments += ["--stages", "predict", "backends", "folder", "train", "detectors", "busy", "--folder-images", "7"]
    arguments += ["--backends", "onnxruntime"]
    arguments += ["--rounds", "1", "--batch-size", "2", "--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    result = benchmark.main(arguments)
    names = [
        "predict, torch",
        "predict, onnxruntime",
        "folder of JPEG files, torch",
        "folder of JPEG files, onnxruntime",
        *["training step, batch 2"] * 2,
    ]
    names += [f"LiteDet: {part}" for part in ("network, torch", "predict, torch")]
    names += [f"LiteDet: {part}" for part in ("network, onnxruntime", "predict, onnxruntime", "training step, 2")]
    names += ["predict, busy machine", "training step, busy machine"]
    assert [row.name for row in result.comparisons] == names
    bars = [row.bar for row in result.comparisons]
    assert {bars.pop(2), bars.pop(2)} == {None, 1 / 3}  # whichever was faster
    assert bars == [0.55, 0.35, 0.42, 0.97, 1.0, 1.0, 1.0, 1.0, 1.15, None, None]
    assert all(0 < row.ratio < math.inf for row in result.comparisons)
    assert "weights: d.safetensors, 2 classes" in result.notes
    with pytest.raises(SystemExit):
        benchmark.main([*arguments, "--batch-size", "5"])


def test_a_missing_package_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_config, "find_spec", lambda name: None if name == "openvino" else object())
    with pytest.raises(SystemExit):
        benchmark.main([])
    captured = capsys.readouterr()
    assert "--backends openvino needs the package openvino" in captured.err
    assert "pip install 'litedet[export]'" in captured.err
    assert captured.out == ""
    benchmark_config.BenchmarkConfig(backends=("compile",)).validate()
    benchmark_config.BenchmarkConfig(stages=("predict",)).validate()


def test_the_tool_counts(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--count", "--threads", str(torch.get_num_threads())])
    printed = capsys.readouterr().out
    assert "300.77 M" in printed
    assert "788.83 M" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--images", "somewhere"], "--images and --annotations go together"),
        (["--stages", "predict", "--images", "none", "--annotations", "none.json"], "none.json"),
        (["--batch-size", "97"], "--batch-size 97 is more than the 96 images"),
        (["--scale", "--scale-sizes", "10"], "--scale-sizes must be at least 64 each"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err

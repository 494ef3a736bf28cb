"""LiteDet as a whole: counts, a step fit for CUDA, weights, prediction. Run: pytest tests/test_litedet.py"""

import copy
import platform
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from fake_cuda import needs_indexing
from test_model import training_batch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from backbones.weights.info import WeightsInfo
from backbones.weights.native import save_weights
from configs import coco
from detection import load_detector
from detection.benchmark.count import count
from detection.cli.train import main as train_det
from detection.data.drawn import draw_detection_set
from detection.images.place import place
from detection.inference.packed import PackedRunner, _PackedSeparable, can_pack
from detection.inference.runners import (
    Backend,
    OnnxRuntimeRunner,
    build_runner,
    to_onnx,
)
from detection.models.build import build_detector
from detection.models.folding import SubtractedReLU6, clip_sums_in_blocks, fold_norms, merge_outputs
from detection.models.litedet import LiteDet, LiteDetConfig
from detection.models.necks import DepthwiseSeparable
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.structures import RawPredictions, Target
from detection.training.config import DetectionConfig, loss_type
from detection.training.litedet_loss import LiteDetLossConfig
from detection.training.losses import TrainingStep
from detection.training.ssd_loss import SSDLossConfig
from detection.training.task_aligned import TaskAlignedConfig
from detection.weights.info import DetectorInfo
from detection.weights.native import read_detector, save_detector
from detection.weights.start import adopt_network, start_from

SMALL = LiteDetConfig(backbone=small.BACKBONE, input_size=(96, 128), neck_width=32)
NAMES = ("cat", "dog")


def small_litedet(names: tuple[str, ...] = NAMES, seed: int = 0) -> tuple[LiteDet, DetectorInfo]:
    """With statistics and output layers as after a training, so that folding and comparing have something to do."""
    torch.manual_seed(seed)
    model = LiteDet(SMALL, len(names)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    with torch.no_grad():
        for layer in (*model.head.box, *model.head.classes):
            layer.weight *= 20
    ids = tuple(range(1, len(names) + 1))
    return model, DetectorInfo(model=model.config, postprocess=PostprocessConfig(), class_names=names, category_ids=ids)


# Of the recipes, and what the second and third may cost at most.
@pytest.mark.parametrize(
    ("config", "giga", "millions"),
    [
        (coco.litedet_096_320(), 0.719, 2.138),
        (coco.litedet_064_320(), 0.250, 0.643),
        (coco.litedet_128_320(), 1.349, 4.050),
    ],
)
def test_counts(config: DetectionConfig, giga: float, millions: float) -> None:
    total = count(build_detector(config.model, 80), (320, 320))["total"]
    assert total.multiply_adds / 1e9 == pytest.approx(giga, abs=5e-4)
    assert total.parameters / 1e6 == pytest.approx(millions, abs=5e-4)


def test_it_costs_less_than_ssdlite() -> None:
    ours, theirs = (
        count(model, (320, 320))["total"] for model in (LiteDet(LiteDetConfig(), 80), SSDLite(SSDLiteConfig(), 80))
    )
    assert ours.multiply_adds < 0.92 * theirs.multiply_adds
    assert ours.parameters < 0.5 * theirs.parameters


@pytest.mark.parametrize("size", [(96, 96), (96, 330), (161, 225)])
@pytest.mark.parametrize("padding", ["symmetric", "tf_same"])
def test_any_input_size_and_class_count(size: tuple[int, int], padding: str) -> None:
    backbone = MobileNetV2Config(width=0.35, padding=padding)  # type: ignore[arg-type]
    model = LiteDet(SMALL.replaced(backbone=backbone, input_size=size), 1).eval()
    with torch.inference_mode():
        raw = model(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8))
    assert raw.codes.shape == (2, len(model.anchors), 32)
    assert raw.class_logits.shape == (2, len(model.anchors), 1)
    assert raw.class_logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)  # the prior


def test_width_and_depth_are_config_values() -> None:
    deeper = LiteDet(SMALL.replaced(neck_depth=2, head_depth=0, kernel_size=3, bins=4), 2)
    assert len(deeper.neck.top_down[0].more) == 1  # type: ignore[arg-type, union-attr]
    assert deeper.config.box_coder().code_size == deeper.head.code_size == 16
    raw = deeper.eval()(torch.zeros(1, 3, 96, 128))
    assert raw.codes.shape[-1] == 16
    two_maps = LiteDet(SMALL.replaced(features=("stage5", "stage7")), 2)
    assert two_maps.anchors[0].tolist() == [0, 0, 16, 16]


def test_predictions_are_in_the_order_of_the_anchors() -> None:
    # One cell of one map is disturbed before the head; only the anchors around that cell may notice.
    model = LiteDet(LiteDetConfig(backbone=MobileNetV2Config(width=0.35), neck_width=8), 3).eval()
    for module in model.head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # shortcuts begin as the only way
    maps = [torch.zeros(1, 8, n, n) for n in (40, 20, 10, 5)]
    with torch.inference_mode():
        quiet = model.head(maps)[1]
        maps[1][0, :, 7, 2] = 100.0  # row 7, column 2 of the second map; two 5x5 kernels see it from 4 cells away
        loud = model.head(maps)[1]
    changed = (loud - quiet).abs().sum(-1)[0].nonzero().flatten()
    centres = (model.anchors[changed, :2] + model.anchors[changed, 2:]) / 2 / 16 - 0.5
    assert set(centres[:, 0].tolist()) == {0, 1, 2, 3, 4, 5, 6}
    assert set(centres[:, 1].tolist()) == {3, 4, 5, 6, 7, 8, 9, 10, 11}
    assert ((model.anchors[changed, 2] - model.anchors[changed, 0]) == 16).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LiteDetConfig(input_size=(64, 320)), r"each 96 to 4096 pixels; got \(64, 320\)"),
        (LiteDetConfig(features=("stage3", "stage7")), r"strides double, got strides \[8, 32\]"),
        (LiteDetConfig(features=()), r"names 1 to 16 maps of the backbone, got 0"),
        (LiteDetConfig(features=("stage9",)), "'stage9'; there are: stem"),
        (LiteDetConfig(neck_width=0), r"model\.neck_width must be in 1\.\.4096, got 0"),
        (LiteDetConfig(kernel_size=4), "kernel_size is 4; an odd number"),
        (LiteDetConfig(bins=10**9), r"model\.bins must be in 2\.\.256, got 1000000000"),
        (LiteDetConfig(first_bin=0.5), r"model\.first_bin must be in -1\.\.0, got 0\.5"),
        (LiteDetConfig(background_column=True), "no background column"),
        (LiteDetConfig(prior=0.0), r"model\.prior is between 0 and 1"),
        (LiteDetConfig(std=(1.0, 0.0, 1.0)), "model.std must be positive"),
    ],
)
def test_configs_that_make_no_sense(config: LiteDetConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiteDet(config, 2)


def two_heads() -> LiteDet:
    torch.manual_seed(0)
    return LiteDet(SMALL.replaced(input_size=(128, 128), one_to_one=True), 3)


def test_a_one_to_one_head_learns_from_maps_that_it_does_not_change() -> None:
    model = two_heads()
    A = len(model.anchors)
    raw = model(torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8))
    assert raw.codes.shape == (2, 2 * A, 32)
    assert raw.class_logits.shape == (2, 2 * A, 3)
    assert torch.equal(raw.anchors[:A], raw.anchors[A:])
    raw.class_logits[:, A:].sum().backward()
    moved = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved
    assert all(name.startswith("one_to_one_head.") for name in moved)


def test_one_head_predicts_and_the_config_says_which() -> None:
    model = two_heads().eval()
    images = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        model.one_to_one_head.classes[0].bias += 1.0  # type: ignore[index, operator, union-attr]
        many = model(images)
        model.config = model.config.replaced(predict_with="one_to_one")
        one = model(images)
    assert many.codes.shape == one.codes.shape == (1, len(model.anchors), 32)
    assert (
        one.class_logits[:, :256] - many.class_logits[:, :256]
    ).mean() > 0.5  # the map at stride 8 has 16 x 16 cells
    assert len(model.class_tensors()) == 2 * 2 * 4
    runner = build_runner(model, "torch", torch.device("cpu"))  # packs the convolutions of one head alone
    torch.testing.assert_close(runner(images).class_logits, one.class_logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"model\.one_to_one is False: there is no such head"):
        LiteDet(SMALL.replaced(predict_with="one_to_one"), 3)


def test_the_loss_of_two_heads_is_that_of_one_with_many_and_one_with_single_anchors() -> None:
    model = two_heads()
    images, *target = training_batch(4, 5)
    raw = model(images)
    A = len(model.anchors)
    losses = LiteDetLossConfig(one_to_one_weight=0.5).build(model)(raw, Target(*target))
    alone = LiteDet(SMALL.replaced(input_size=(128, 128)), 3)

    def loss_of(part: slice, anchors_per_object: int) -> float:
        config = LiteDetLossConfig(assigner=TaskAlignedConfig(anchors_per_object=anchors_per_object))
        half = RawPredictions(raw.codes[:, part], raw.class_logits[:, part], raw.anchors[part])
        return config.build(alone)(half, Target(*target))["loss"].item()

    many, one = loss_of(slice(None, A), 13), loss_of(slice(A, None), 1)
    assert losses["loss_one_to_one"].item() == pytest.approx(0.5 * one, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(many + 0.5 * one, rel=1e-5)


def test_loss_and_network_must_fit() -> None:
    config = DetectionConfig(model=LiteDetConfig(), loss=SSDLossConfig(classification="focal"))
    with pytest.raises(ValueError, match=r"loss\.kind ssd trains SSD's box codes, which a model of kind litedet"):
        config.validate()
    config = DetectionConfig(loss=LiteDetLossConfig())
    with pytest.raises(
        ValueError, match=r"loss\.kind litedet trains sigmoid scores and distributions, which a model of kind ssd"
    ):
        config.validate()
    assert loss_type({}) is SSDLossConfig  # a record from before there were kinds
    with pytest.raises(ValueError, match="loss of kind 'detr'; this version knows ssd, litedet"):
        loss_type({"kind": "detr"})


def small_step(num_classes: int = 3, one_to_one: bool = False) -> TrainingStep:
    model = LiteDet(SMALL.replaced(input_size=(128, 128), one_to_one=one_to_one), num_classes)
    return TrainingStep(model, LiteDetLossConfig().build(model))


@needs_indexing
@pytest.mark.parametrize(("num_objects", "one_to_one"), [(0, False), (5, False), (5, True)])
def test_a_step_on_fake_cuda_makes_no_round_trip(num_objects: int, one_to_one: bool) -> None:
    # Under FakeTensorMode nonzero(), .item() and a tensor left on the host raise; no GPU is needed.
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"):
        losses = small_step(3, one_to_one)(*training_batch(4, num_objects, "cuda"))
        assert losses["loss"].device.type == "cuda"
    with FakeTensorMode(allow_non_fake_inputs=False):  # the way back runs without a GPU on another device alone
        small_step(3, one_to_one)(*training_batch(4, num_objects))["loss"].backward()


@pytest.mark.slow
def test_a_step_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    step, batch = small_step(), training_batch(4, 5)
    eager = step(*batch)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*batch)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)
    compiled["loss"].backward()


def test_the_loss_launches_the_same_operators_at_any_batch_size() -> None:
    loss = LiteDetLossConfig().build(LiteDet(SMALL.replaced(input_size=(128, 128)), 3))
    model = small_step().model.eval()

    def launched(batch_size: int) -> int:
        images, *target = training_batch(batch_size, 8)
        with torch.no_grad():
            raw = model(images)
        raw = raw._replace(codes=raw.codes.requires_grad_(), class_logits=raw.class_logits.requires_grad_())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss(raw, Target(*target))["loss"].backward()
        return sum(event.name.startswith("aten::") for event in profile.events() if event.cpu_parent is None)

    launched(2)
    assert launched(2) == launched(16) > 50


def test_a_backbone_of_a_file_goes_in_without_its_last_part(tmp_path: Path) -> None:
    whole = MobileNetV2(SMALL.backbone)
    save_weights(tmp_path / "b.safetensors", whole, WeightsInfo())
    model = LiteDet(SMALL, 2)
    start_from(model, tmp_path / "b.safetensors", NAMES)
    assert "last.conv.weight" not in model.backbone.state_dict()
    assert torch.equal(model.backbone.stage7[0].project.conv.weight, whole.stage7[0].project.conv.weight)
    # The same out of an SSDLite; the other way about nobody can make up what is missing.
    ssdlite = SSDLite(SSDLiteConfig(backbone=SMALL.backbone), 2)
    info = DetectorInfo(model=ssdlite.config, postprocess=PostprocessConfig(), class_names=NAMES, category_ids=(1, 2))
    save_detector(tmp_path / "s.safetensors", ssdlite, info)
    start_from(model, tmp_path / "s.safetensors", NAMES, "backbone")
    assert torch.equal(model.backbone.stem.conv.weight, ssdlite.backbone.stem.conv.weight)
    save_detector(tmp_path / "d.safetensors", *small_litedet())
    with pytest.raises(ValueError, match=r"missing: last\.conv\.weight"):
        start_from(ssdlite, tmp_path / "d.safetensors", NAMES, "backbone")
    with pytest.raises(ValueError, match="holds a detector of kind ssdlite, the config asks for litedet"):
        adopt_network(SMALL, tmp_path / "s.safetensors")


def test_there_and_back_through_a_file(tmp_path: Path) -> None:
    model, info = small_litedet()
    save_detector(tmp_path / "d.safetensors", model, info)
    loaded, theirs = read_detector(tmp_path / "d.safetensors")
    assert isinstance(loaded, LiteDet)
    assert theirs == info
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), model(images))


def test_other_classes_keep_everything_but_the_class_layers(tmp_path: Path) -> None:
    model, info = small_litedet()
    save_detector(tmp_path / "d.safetensors", model, info)
    config, _ = adopt_network(LiteDetConfig(input_size=(128, 128)), tmp_path / "d.safetensors")
    assert (config.neck_width, config.backbone.width, config.input_size) == (32, 0.35, (128, 128))
    other = build_detector(config, 3)
    new = {name: tensor.clone() for name, tensor in other.state_dict().items() if name in other.class_tensors()}
    assert len(new) == 2 * 4
    start_from(other, tmp_path / "d.safetensors", ("horse", "cow", "pig"))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, new[name] if name in new else model.state_dict()[name]), name


def test_a_predictor_finds_objects(tmp_path: Path) -> None:
    save_detector(tmp_path / "d.safetensors", *small_litedet())
    detector = load_detector(tmp_path / "d.safetensors", device="cpu", score_threshold=0.01)
    image = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    found = detector(image)
    assert len(found) > 0
    assert found.boxes.min() >= 0
    assert (found.boxes[:, 2:] <= torch.tensor([200, 150])).all()
    # The network, the coder and the threshold by hand: the best detection is the best pair of anchor and class.
    model, _ = small_litedet()
    info = detector.info
    raw = model(torch.from_numpy(np.ascontiguousarray(detector_input(image))).permute(2, 0, 1)[None])
    score, pair = raw.class_logits[0].sigmoid().flatten().max(0)
    box = info.model.box_coder().decode(raw.codes[0], raw.anchors)[pair // 2]
    box = box / torch.tensor([128 / 200, 96 / 150]).repeat(2)
    torch.testing.assert_close(found.scores[0], score, rtol=1e-3, atol=1e-4)
    limits = torch.tensor([200.0, 150]).repeat(2)
    torch.testing.assert_close(found.boxes[0], box.clamp(min=0).minimum(limits), rtol=1e-3, atol=0.05)
    assert found.labels[0] == pair % 2


def detector_input(image: np.ndarray) -> np.ndarray:
    return place(image, (96, 128), "stretch", SMALL.fill)[0]


@pytest.mark.parametrize("folded", [True, False])
def test_packed_convolutions_say_the_same(folded: bool) -> None:
    if not can_pack():
        pytest.skip("this processor or this torch has no packed convolutions")
    model = small_litedet()[0].to(memory_format=torch.channels_last)
    model = fold_norms(model) if folded else model
    images = torch.randint(0, 256, (3, 3, 96, 128), dtype=torch.uint8)
    runner = PackedRunner(model)
    blocks = [isinstance(layer, _PackedSeparable) for layer in runner._packed.modules()]
    assert sum(blocks) == (12 if folded else 0)  # a sum in each of 4 mixes and of 2 blocks of 4 heads
    with torch.inference_mode():
        expected, found = model(images), runner(images)
    assert expected.class_logits.std() > 0.01
    torch.testing.assert_close(found.codes, expected.codes, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=2e-4)


def test_outputs_merged_for_prediction_say_the_same() -> None:
    model = small_litedet()[0]
    images = torch.randint(0, 256, (3, 3, 96, 128), dtype=torch.uint8)
    merged = merge_outputs(copy.deepcopy(model))
    outputs = sum(isinstance(layer, nn.Conv2d) for layer in model.modules())
    assert sum(isinstance(layer, nn.Conv2d) for layer in merged.modules()) == outputs - 4  # one a map in place of two
    with torch.inference_mode():
        expected, found = model(images), merged(images)
    torch.testing.assert_close(found.codes, expected.codes)
    torch.testing.assert_close(found.class_logits, expected.class_logits)


def test_relu6_by_subtraction() -> None:
    act = SubtractedReLU6(2)
    x = torch.tensor([-1e4, -1.0, 0.0, 2.5, 6.0, 6.5, 1e4]).reshape(1, 1, 1, 7).expand(1, 2, 1, 7)
    expected = torch.tensor([0.0, 0.0, 0.0, 2.5, 6.0, 6.0, 6.0]).expand(1, 2, 1, 7)
    torch.testing.assert_close(act(x), expected, rtol=0, atol=1e-6)


def test_sums_clipped_in_blocks_say_the_same() -> None:
    model = small_litedet()[0]
    with torch.no_grad():  # so that sums are above 6
        for module in model.modules():
            if isinstance(module, DepthwiseSeparable):
                module.pointwise.norm.bias.add_(4.0)  # type: ignore[operator]
    images = torch.randint(0, 256, (3, 3, 96, 128), dtype=torch.uint8)
    other = clip_sums_in_blocks(copy.deepcopy(model))
    num_blocks = sum(isinstance(layer, SubtractedReLU6) for layer in other.modules())
    assert num_blocks == sum(
        isinstance(layer, DepthwiseSeparable) and layer.act is not None for layer in model.modules()
    )
    assert num_blocks > 8
    with torch.inference_mode():
        expected, found = model(images), other(images)
    torch.testing.assert_close(found.codes, expected.codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_other_backends_say_the_same(backend: Backend) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip(backend)
    model = fold_norms(small_litedet()[0])
    runner = build_runner(model, backend)
    if isinstance(runner, OnnxRuntimeRunner) and platform.machine() in ("x86_64", "AMD64"):
        nodes = pytest.importorskip("onnx").load_from_string(runner.onnx).graph.node
        made_by = {name: node.op_type for node in nodes for name in node.output}
        assert {made_by[node.input[0]] for node in nodes if node.op_type == "Clip"} == {
            "Conv"
        }  # no sum is clipped alone
    for batch_size in (1, 3):
        images = torch.randint(0, 256, (batch_size, 3, 96, 128), dtype=torch.uint8)
        with torch.inference_mode():
            expected, found = model(images), runner(images)
        torch.testing.assert_close(found.codes, expected.codes, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_exported_graph_has_plain_operators_alone() -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    graph = onnx.load_from_string(to_onnx(fold_norms(small_litedet()[0]))).graph
    operators = {node.op_type for node in graph.node}
    network = {"Conv", "Add", "Clip", "Resize", "Concat"}
    assert network <= operators
    assert operators <= network | {"Cast", "Sub", "Div", "Transpose", "Reshape", "Shape", "Slice", "Gather", "Squeeze"}
    for node in graph.node:
        if node.op_type == "Resize":
            assert {a.name: a.s for a in node.attribute}["mode"] == b"nearest"


@pytest.mark.slow
def test_a_short_training_learns_the_drawn_shapes(tmp_path: Path) -> None:
    drawn = draw_detection_set(tmp_path / "drawn", 8, 8, (128, 128), 0)
    files = ["--data.train.annotations", drawn.train_annotations, "--data.train.images", drawn.train_images]
    files += ["--data.val.annotations", drawn.train_annotations, "--data.val.images", drawn.train_images]
    options = (
        "--model.backbone.width 0.35 --model.backbone.frozen-stages 0 --model.input-size 128 128 --train.batch-size 2"
    )
    options += " --train.epochs 45 --train.eval-every 45 --data.workers 0 --train.device cpu --train.optim.lr 3e-3"
    options += (
        " --augment.crop-probability 0 --augment.expand-probability 0 --backbone-lr-scale 1"  # nothing is pretrained
    )
    recipe = f"{Path(__file__).resolve().parents[1]}/configs/finetune.py:litedet"
    result = train_det([recipe, *map(str, files), "--run-dir", str(tmp_path / "run"), *options.split()])
    assert result.best_metric > 0.3
    model, info = read_detector(result.best_path)
    assert isinstance(model, LiteDet)
    assert info.model.kind == "litedet"

"""The detector as a whole: counts of the published network, inputs, and a step fit for CUDA. Run: pytest tests/test_model.py"""

import math

import pytest
import torch
from fake_cuda import needs_indexing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from backbones.mobilenetv2 import MobileNetV2Config
from detection.models.anchors import AnchorConfig
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.training.assignment import MatcherConfig
from detection.training.losses import TrainingStep
from detection.training.ssd_loss import SSDLossConfig


def count_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_multiply_adds(model: torch.nn.Module, size: tuple[int, int]) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.zeros(1, 3, *size))
    return counter.get_total_flops() // 2


# Figures of architecture.md and of the paper (4.3 M, 0.8 B multiply-adds at 320, table 6).
@pytest.mark.parametrize(
    ("size", "columns", "reduce", "features", "millions", "giga", "anchors"),
    [
        (320, 81, True, ("stride16_expansion", "last"), 4.337, 0.789, 2034),
        (300, 91, True, ("stride16_expansion", "last"), 4.501, 0.750, 1917),
        (320, 81, False, ("stride16_expansion", "last"), 4.484, 0.848, 3234),
        (320, 81, False, ("stage5", "last"), 4.229, 0.746, 3234),
    ],
)
def test_published_counts(
    size: int, columns: int, reduce: bool, features: tuple[str, ...], millions: float, giga: float, anchors: int
) -> None:
    config = SSDLiteConfig(input_size=(size, size), features=features, anchors=AnchorConfig(reduce_first_map=reduce))
    model = SSDLite(config, columns - 1)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=5e-4)
    assert count_multiply_adds(model, (size, size)) / 1e9 == pytest.approx(giga, abs=5e-4)
    assert model.anchors.shape == (anchors, 4)


@pytest.mark.parametrize("size", [(96, 96), (96, 330), (161, 225)])
@pytest.mark.parametrize("padding", ["symmetric", "tf_same"])
def test_any_input_size_and_class_count(size: tuple[int, int], padding: str) -> None:
    backbone = MobileNetV2Config(width=0.35, padding=padding)  # type: ignore[arg-type]
    model = SSDLite(SSDLiteConfig(backbone=backbone, input_size=size), 1).eval()
    with torch.inference_mode():
        raw = model(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8))
    assert raw.codes.shape == (2, len(model.anchors), 4)
    assert raw.class_logits.shape == (2, len(model.anchors), 2)


def test_predictions_are_in_the_order_of_the_anchors() -> None:
    # One cell of one map is disturbed; only the anchors of that cell may notice.
    model = SSDLite(SSDLiteConfig(backbone=MobileNetV2Config(width=0.35)), 3).eval()
    maps = [torch.zeros(1, s.channels, 20, 20) for s in [model.backbone.feature_specs["stride16_expansion"]]]
    specs = [model.backbone.feature_specs["last"], *model.extras.feature_specs]
    maps += [torch.zeros(1, s.channels, n, n) for s, n in zip(specs, (10, 5, 3, 2, 1), strict=True)]
    with torch.inference_mode():
        quiet = model.head(maps)[1]
        maps[1][0, :, 7, 2] = (
            100.0  # row 7, column 2 of the second map; a 3x3 kernel sees it from rows 6-8, columns 1-3
        )
        loud = model.head(maps)[1]
    changed = (loud - quiet).abs().sum(-1)[0].nonzero().flatten()
    centres = (model.anchors[changed, :2] + model.anchors[changed, 2:]) / 2 / 32 - 0.5
    assert len(changed) == 9 * 6
    assert set(centres[:, 0].round().tolist()) == {1, 2, 3}
    assert set(centres[:, 1].round().tolist()) == {6, 7, 8}


def test_uint8_and_float_images_are_the_same() -> None:
    torch.manual_seed(0)
    model = SSDLite(SSDLiteConfig(backbone=MobileNetV2Config(width=0.35), input_size=(96, 96)), 2).eval()
    images = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), model(images.float()))


@pytest.mark.parametrize(
    ("config", "num_classes", "message"),
    [
        (SSDLiteConfig(input_size=(64, 320)), 2, r"each 96 to 4096 pixels; got \(64, 320\)"),
        (SSDLiteConfig(), 0, "1 to 20000 classes, got num_classes=0"),
        (SSDLiteConfig(features=("stage9",)), 2, "'stage9'; there are: stem"),
        (SSDLiteConfig(background_column=False), 2, "softmax needs model.background_column"),
        (SSDLiteConfig(std=(1.0, 0.0, 1.0)), 2, "model.std must be positive"),
        (SSDLiteConfig(input_size=(100_000, 320)), 2, r"each 96 to 4096 pixels; got \(100000, 320\)"),
        (SSDLiteConfig(), 10**9, "1 to 20000 classes, got num_classes=1000000000"),
        (SSDLiteConfig(extra_channels=(10**9,)), 2, "model.extra_channels are at most 16 numbers from 1 to 4096"),
        (
            SSDLiteConfig(backbone=MobileNetV2Config(last_channels=10**9)),
            2,
            "last_channels is 1000000000; it can be 1 to",
        ),
        (
            SSDLiteConfig(anchors=AnchorConfig(ratios=(1.0,) * 10**6)),
            2,
            "anchor ratios must be positive and 1 to 32 of them",
        ),
        (SSDLiteConfig(features=()), 2, "names 1 to 16 maps of the backbone, got 0"),
    ],
)
def test_configs_that_make_no_sense(config: SSDLiteConfig, num_classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSDLite(config, num_classes)


def test_a_image_of_another_size_is_refused() -> None:
    model = SSDLite(SSDLiteConfig(backbone=MobileNetV2Config(width=0.35), input_size=(96, 128)), 2)
    with pytest.raises(ValueError, match=r"built for inputs of \(96, 128\).*got \(128, 96\)"):
        model(torch.zeros(1, 3, 128, 96))


def test_loss_and_score_must_fit() -> None:
    small = MobileNetV2Config(width=0.35)
    softmax, sigmoid = (SSDLite(SSDLiteConfig(backbone=small, score=score), 2) for score in ("softmax", "sigmoid"))
    with pytest.raises(ValueError, match=r"focal trains sigmoid scores, model\.score is softmax"):
        SSDLossConfig(classification="focal").build(softmax)
    with pytest.raises(ValueError, match=r"cross_entropy trains softmax scores, model\.score is sigmoid"):
        SSDLossConfig().build(sigmoid)


def training_batch(batch_size: int, num_objects: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images = torch.randint(0, 256, (batch_size, 3, 128, 128), dtype=torch.uint8, device=device)
    corners = torch.rand(batch_size, num_objects, 2, device=device) * 64
    boxes = torch.cat((corners, corners + 8 + torch.rand(batch_size, num_objects, 2, device=device) * 48), -1)
    labels = torch.zeros(batch_size, num_objects, dtype=torch.long, device=device)
    valid = torch.rand(batch_size, num_objects, device=device) < 0.7
    return images, boxes, labels, valid


def small_step(classification: str = "cross_entropy", freeze: bool = False) -> TrainingStep:
    score = "softmax" if classification == "cross_entropy" else "sigmoid"
    backbone = MobileNetV2Config(width=0.35, frozen_stages=2 * freeze, freeze_norm=freeze)
    model = SSDLite(SSDLiteConfig(backbone=backbone, input_size=(128, 128), score=score), 3)  # type: ignore[arg-type]
    return TrainingStep(model, SSDLossConfig(classification=classification, matcher=MatcherConfig()).build(model))  # type: ignore[arg-type]


@needs_indexing
@pytest.mark.parametrize("classification", ["cross_entropy", "focal"])
@pytest.mark.parametrize("num_objects", [0, 5])
def test_a_step_on_fake_cuda_makes_no_round_trip(classification: str, num_objects: int) -> None:
    # Under FakeTensorMode nonzero(), .item() and a tensor left on the host raise; no GPU is needed.
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"):
        step = small_step(classification)
        losses = step(*training_batch(4, num_objects, "cuda"))
        assert losses["loss"].device.type == "cuda"
        assert losses["loss"].requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("classification", ["cross_entropy", "focal"])
def test_a_step_compiles_into_one_graph(classification: str) -> None:
    torch.manual_seed(0)
    step, batch = small_step(classification), training_batch(4, 5)
    eager = step(*batch)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*batch)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)
    compiled["loss"].backward()


@pytest.mark.slow
def test_a_step_launches_the_same_operators_at_any_batch_size() -> None:
    step = small_step()

    def launched(batch_size: int) -> int:
        batch = training_batch(batch_size, 8)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(*batch)["loss"].backward()
        return sum(is_outermost(event) for event in profile.events())

    def is_outermost(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
        # What an operator calls in turn is the library's choice: a convolution takes another kernel for a small batch.
        if not event.name.startswith("aten::"):
            return False
        while (event := event.cpu_parent) is not None:
            if event.name.startswith("aten::"):
                return False
        return True

    launched(8)  # fills the gradients, which are then added to
    assert launched(8) == launched(64) > 500


@pytest.mark.parametrize("background", [False, True])
def test_a_new_sigmoid_head_starts_at_the_prior(background: bool) -> None:
    backbone = MobileNetV2Config(width=0.35)
    config = SSDLiteConfig(
        backbone=backbone,
        input_size=(128, 128),
        score="sigmoid",
        background_column=background,
        init_std=1e-6,
        prior=0.02,
    )
    model = SSDLite(config, 3).eval()
    with torch.inference_mode():
        probabilities = model(torch.zeros(1, 3, 128, 128)).class_logits.sigmoid()
    expected = torch.tensor([0.98] * background + [0.02] * 3).expand_as(probabilities)
    torch.testing.assert_close(probabilities, expected, atol=1e-4, rtol=0)


def test_the_first_focal_loss_is_small_with_a_background_column() -> None:
    # A positive pays for a background that starts at 0.99, and nobody for one that starts at 0.01 where it should be 1.
    losses = []
    for background in (False, True):
        torch.manual_seed(0)
        config = SSDLiteConfig(
            backbone=MobileNetV2Config(width=0.35), input_size=(128, 128), score="sigmoid", background_column=background
        )
        model = SSDLite(config, 3)
        step = TrainingStep(model, SSDLossConfig(classification="focal").build(model))
        losses.append(step(*training_batch(4, 2))["loss_class"].item())
    without, with_background = losses
    assert with_background == pytest.approx(without + 0.75 * 0.99**2 * -math.log(0.01), rel=0.1)


def test_frozen_stages_take_no_gradient() -> None:
    step = small_step(freeze=True)
    step.train()
    before = step.model.backbone.stem.norm.running_mean.clone()
    step(*training_batch(2, 3))["loss"].backward()
    assert step.model.backbone.stem.conv.weight.grad is None
    assert torch.equal(step.model.backbone.stem.norm.running_mean, before)
    assert step.model.backbone.stage7[0].project.conv.weight.grad is not None
    assert step.model.backbone.stage7[0].project.norm.weight.grad is None
